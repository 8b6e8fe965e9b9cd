"""Values of fields, written by the RFCs."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Fields of a response, names in lower case, as they go on the wire (and into ASGI)."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names we accept for rules: they go into fields and keys without quoting."""


def quoted(text: str) -> str:
    """A String of structured fields (RFC 9651, 3.3.3); `text` is printable ASCII."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def wants_problem(accept: str | None) -> bool:
    """Whether a client is better served by `application/problem+json` than by plain text.

    So it is unless the client asks for text and not for JSON, as browsers do. No preference (no `Accept`, or
    `*/*` as from curl) is that of a program.
    """
    accept = (accept or "").lower()
    return "json" in accept or "text/" not in accept
