"""What receivers may hear of.

- `limited`: a request was refused for a quota (429), or because a store did not answer and the rule denies (503).
  Arguments: `request`, `ticket`, `rules` (the names of those that refused) and `verdict`.
- `banned`: a penalty has banned a key. Arguments: `request`, `ticket`, `rule` (its name) and `key`.

The sender is the class `Gatekeeper`. An error of a receiver is logged by Django and changes no answer.
"""

from __future__ import annotations

from typing import Final

from django.dispatch import Signal

limited: Final = Signal()
banned: Final = Signal()
