"""Which requests may be sent once more."""

from __future__ import annotations

from typing import Final

IDEMPOTENT: Final = frozenset(["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"])
"""Methods of which several have the effect of one (RFC 9110, 9.2.2)."""


MOST_REPEATS: Final = 2
"""How often: once for a kept connection that had gone stale, and once more for an upstream that just then died."""


def may_repeat(method: str) -> bool:
    """Whether a request may be sent again when its connection broke and no byte of an answer had come.

    Whether the upstream has acted on it cannot be known then, so only an idempotent one may. `method` is as it was
    written, for methods are case-sensitive.
    """
    return method in IDEMPOTENT
