"""Cookies as they are written, and left out (RFC 6265, and its revision for prefixes and SameSite)."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final, Literal

_PREFIXED: Final = re.compile(r"__(host|secure)-", re.IGNORECASE)

# What a browser may keep as a value without quotes: RFC 6265, 4.1.1, cookie-octet.
_VALUE: Final = re.compile(r"[!#-+\--:<-\[\]-~]*")


def set_cookie(
    name: str,
    value: str,
    *,
    max_age: int | None,
    path: str = "/",
    domain: str | None = None,
    secure: bool = True,
    httponly: bool = True,
    samesite: Literal["lax", "strict", "none"] | None = "lax",
    partitioned: bool = False,
) -> bytes:
    """The value of a `Set-Cookie` field.

    `max_age`: seconds; 0 expires the cookie, None lets it end with the browser. Name and attributes are for the
    caller to check. Raises ValueError for a value with characters that no cookie can have.
    """
    if not _VALUE.fullmatch(value):
        raise ValueError(
            "expected a value of printable ASCII without spaces, quotes, commas, semicolons, backslashes"
        )
    text = f"{name}={value}; Path={path}"
    if domain is not None:
        text += f"; Domain={domain}"
    if max_age is not None:
        text += f"; Max-Age={max_age}"
    if secure:
        text += "; Secure"
    if httponly:
        text += "; HttpOnly"
    if samesite is not None:
        text += f"; SameSite={samesite.capitalize()}"
    if partitioned:
        text += "; Partitioned"
    return text.encode("ascii")


def wrong_prefix(name: str, *, secure: bool, path: str, domain: str | None) -> str | None:
    """What is wrong with a cookie whose name has a prefix (RFC 6265bis, 4.1.3): browsers drop it unheard."""
    match = _PREFIXED.match(name)
    if match is None:
        return None
    if not secure:
        return f"expected secure = true beside the prefix {match[0]}"
    if match[1].lower() == "host" and (path != "/" or domain is not None):
        return f'expected path = "/" and no domain beside the prefix {match[0]}'
    return None


def without(fields: Iterable[str], names: Container[str]) -> list[str]:
    """Cookie fields without the cookies of these names; the others are byte for byte as they came.

    A field of which nothing is left is left out.
    """
    kept = []
    for text in fields:
        pairs = [pair for pair in text.split(";") if pair.partition("=")[0].strip(" \t") not in names]
        left = ";".join(pairs).lstrip(" \t")
        if left.strip(" \t;"):
            kept.append(left)
    return kept
