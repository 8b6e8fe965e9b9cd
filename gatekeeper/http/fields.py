"""Values of fields, written by the RFCs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeAlias

from gatekeeper.http.message import split_list

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Fields of a response, names in lower case, as they go on the wire (and into ASGI)."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names we accept for rules: they go into fields and keys without quoting."""


def quoted(text: str) -> str:
    """A String of structured fields (RFC 9651, 3.3.3); `text` is printable ASCII."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_SHARED: Final = frozenset(("private", "public", "s-maxage"))


def private(values: Iterable[str]) -> str:
    """The value of `Cache-Control` for a response that is for one client alone (RFC 9111, 5.2.2.7).

    `values`: those it had. They stay, but for what speaks to shared caches and would say the contrary: `public`,
    `s-maxage`, and a `private` that is for some fields only.
    """
    kept = [one for one in split_list(values) if one and one.partition("=")[0].strip(" \t").lower() not in _SHARED]
    return ", ".join(["private", *kept])


def wants_problem(accept: str | None) -> bool:
    """Whether a client is better served by `application/problem+json` than by plain text.

    So it is unless the client asks for text and not for JSON, as browsers do. No preference (no `Accept`, or
    `*/*` as from curl) is that of a program.
    """
    accept = (accept or "").lower()
    return "json" in accept or "text/" not in accept
