"""The parts of a request by which quotas are counted and upstreams are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeAlias

from gatekeeper.errors import GatekeeperError
from gatekeeper.http.message import Request
from gatekeeper.http.routes import host_of, normalise


class Subject(Request, Protocol):
    """What a key is made of: a request whose client is known. (A gate's Ticket is one.)"""

    @property
    def address(self) -> str: ...

    @property
    def user(self) -> str | None: ...


Part: TypeAlias = Callable[[Subject], str | None]
"""What reads a part of a request; None if the request lacks it."""

PARTS: Final[dict[str, Part]] = {
    "ip": lambda subject: subject.address,
    "user": lambda subject: subject.user,
    "method": lambda subject: subject.method,
    "host": lambda subject: host_of(subject.field("host")),
    "path": lambda subject: normalise(subject.path),
}
"""The parts by name; besides them there are "header:NAME" and "cookie:NAME"."""

LONGEST_COOKIES: Final = 32 * 1024
"""So many characters of the Cookie fields are looked through. What stands behind them is not there."""

_FIELD: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_COOKIE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")  # a token: RFC 6265, 4.1.1


class PartError(GatekeeperError, ValueError):
    """The text names no part of a request. The message says what is expected and does not repeat the text."""


def part(text: str) -> Part:
    """What reads a part of a request, by the part's name. Raises PartError for an unknown one."""
    if text in PARTS:
        return PARTS[text]
    kind, _, name = text.partition(":")
    if kind == "header" and _FIELD.fullmatch(name):
        field = name.lower()
        return lambda subject: subject.field(field) or None
    if kind == "cookie" and _COOKIE.fullmatch(name):
        return lambda subject: cookie(subject.fields("cookie"), name) or None
    raise PartError(f"expected {', '.join(PARTS)}, header:NAME or cookie:NAME")


def cookie(fields: Iterable[str], name: str) -> str | None:
    """The value of the first cookie of that name, None if there is none (RFC 6265, 4.2.1 and 5.4).

    `fields`: the values of the Cookie fields, of which HTTP/2 may bring several. Names are told apart by case.
    A value in double quotes loses them. Nothing that a client sends raises an error.
    """
    room = LONGEST_COOKIES
    for text in fields:
        if name in text:  # most requests end here
            # What is cut off is cut at the end of a pair: half a value would be another one.
            whole = text if len(text) <= room else text[:room].rpartition(";")[0]
            for pair in whole.split(";"):
                found, equals, value = pair.strip(" \t").partition("=")
                if equals and found == name:
                    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        room -= len(text)
        if room <= 0:
            break
    return None
