"""The parts of a request by which quotas are counted and upstreams are chosen."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import unquote_plus

from gatekeeper.errors import GatekeeperError
from gatekeeper.http.message import Request
from gatekeeper.http.routes import host_of, normalise


class Subject(Request, Protocol):
    """What a key is made of: a request whose client is known. (A gate's Ticket is one.)"""

    @property
    def address(self) -> str: ...

    @property
    def user(self) -> str | None: ...

    @property
    def api_key(self) -> str | None: ...

    @property
    def claims(self) -> Mapping[str, Any]: ...


Part: TypeAlias = Callable[[Subject], str | None]
"""What reads a part of a request; None if the request lacks it."""

PARTS: Final[dict[str, Part]] = {
    "ip": lambda subject: subject.address,
    "user": lambda subject: subject.user,
    "api_key": lambda subject: subject.api_key,
    "method": lambda subject: subject.method,
    "host": lambda subject: host_of(subject.field("host")),
    "path": lambda subject: normalise(subject.path),
}
"""The parts by name; besides them there are those of `EXPECTED`."""

EXPECTED: Final = f"{', '.join(PARTS)}, ip/BITS, header:NAME, cookie:NAME, query:NAME or claim:NAME"

LONGEST_QUERY: Final = 16 * 1024
"""A query of more characters has no parameters: it is not looked through."""

LONGEST_COOKIES: Final = 32 * 1024
"""So many characters of the Cookie fields are looked through. What stands behind them is not there."""

_LONGEST_DECIMAL: Final = 2048
"""The bits of the greatest number that is written in decimal digits: of more than 640 Python may make an error."""

_FIELD: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_PREFIX: Final = re.compile(r"ip/([0-9]{1,2})(?:/([0-9]{1,3}))?")
_NAME: Final = re.compile(r"[!-~]{1,64}")
_COOKIE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")  # a token: RFC 6265, 4.1.1


class PartError(GatekeeperError, ValueError):
    """The text names no part of a request. The message says what is expected and does not repeat the text."""


def part(text: str) -> Part:
    """What reads a part of a request, by the part's name. Raises PartError for an unknown one.

    "ip/24" is the network of the client's address, of so many bits if it is an IPv4 one; "ip/24/48" says how many
    of an IPv6 one, which else is as `identity.ipv6_prefix` has it.
    """
    if text in PARTS:
        return PARTS[text]
    prefix = _PREFIX.fullmatch(text)
    if prefix is not None:
        bits = int(prefix[1]), None if prefix[2] is None else int(prefix[2])
        if 1 <= bits[0] <= 32 and (bits[1] is None or 1 <= bits[1] <= 128):
            return lambda subject: network_of(subject.address, *bits)
    kind, _, name = text.partition(":")
    if kind == "header" and _FIELD.fullmatch(name):
        field = name.lower()
        return lambda subject: only(subject, field)
    if kind == "cookie" and _COOKIE.fullmatch(name):
        return lambda subject: _one(cookies(subject.fields("cookie"), name)) or None
    if kind == "query" and _NAME.fullmatch(name):
        return lambda subject: parameter(subject.query(), name) or None
    if kind == "claim" and _NAME.fullmatch(name):
        return lambda subject: as_text(subject.claims.get(name))
    raise PartError(f"expected {EXPECTED}")


def only(request: Request, name: str) -> str | None:
    """The value of a field that stands once; None of one that does not: which the application believes is unknown.

    (Of a WSGI server's environ it cannot be told: a repeated field has come as one.)
    """
    values = request.fields(name)
    return values[0] or None if len(values) == 1 else None


def bearer_token(request: Request) -> str | None:
    """The token of `Authorization: Bearer` (RFC 6750, 2.1)."""
    scheme, _, token = (only(request, "authorization") or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def as_text(value: object) -> str | None:
    """A text, a number or a truth as text; None for what is none of them, and for no text at all."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > _LONGEST_DECIMAL:
        return hex(value)
    return str(value) or None if isinstance(value, str | int | float) else None


def network_of(address: str, bits: int, bits6: int | None = None) -> str:
    """The network of a client's address: so many bits of an IPv4 address, `bits6` of an IPv6 one (None: as it is).

    What is no address, as a test client's name, is itself.
    """
    try:
        network = ipaddress.ip_network(address)
    except ValueError:
        return address
    most = bits if network.version == 4 else bits6
    return address if most is None or most >= network.prefixlen else str(network.supernet(new_prefix=most))


def parameter(query: str, name: str) -> str | None:
    """The value of a parameter of a query; None if there is none.

    Nor is there one that is given twice: which of them the application believes cannot be known, and a client that
    sends a value of its own beside the real one would have a quota of its own each time.
    """
    found = None
    if len(query) > LONGEST_QUERY:
        return None
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if key == name or (("%" in key or "+" in key) and unquote_plus(key) == name):
            if found is not None:
                return None
            found = unquote_plus(value)
    return found


def _one(values: Iterable[str]) -> str | None:
    """The value, if it is one: of two, which the application believes is unknown."""
    found = list(values)
    return found[0] if len(found) == 1 else None


def cookie(fields: Iterable[str], name: str) -> str | None:
    """The value of the first cookie of that name, None if there is none."""
    return next(cookies(fields, name), None)


def cookies(fields: Iterable[str], name: str) -> Iterator[str]:
    """The values of the cookies of that name (RFC 6265, 4.2.1 and 5.4).

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
                    yield value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        room -= len(text)
        if room <= 0:
            break
