"""What carries a session: a cookie, or several where one cannot hold it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from gatekeeper.errors import SessionError
from gatekeeper.http.cookies import set_cookie, wrong_prefix
from gatekeeper.http.fields import Fields
from gatekeeper.http.parts import cookies

LONGEST: Final = 4096
"""The bytes of a cookie with its name and attributes that each browser keeps (RFC 6265, 6.1)."""

MOST_PARTS: Final = 8
"""The cookies that one session may need. Servers refuse more than 32 KiB of fields, many of them 8 or 16."""

_ATTRIBUTES: Final = 256  # the room for them, a long domain included
_PARTS: Final = re.compile(r"([2-8])~(.*)", re.DOTALL)


class Cookie(NamedTuple):
    """How the cookie of a session is written. The names are those of RFC 6265bis."""

    name: str = "__Host-session"
    path: str = "/"
    domain: str | None = None
    secure: bool = True
    httponly: bool = True
    samesite: Literal["lax", "strict", "none"] | None = "lax"
    partitioned: bool = False
    persistent: bool = True
    """Whether it outlives the browser: with `Max-Age`."""

    @property
    def misfit(self) -> str | None:
        """Why browsers drop it unheard (RFC 6265bis); None if they do not."""
        for attribute, needs in (('samesite "none"', self.samesite == "none"), ("partitioned", self.partitioned)):
            if needs and not self.secure:
                return f"expected secure beside {attribute}"
        return wrong_prefix(self.name, secure=self.secure, path=self.path, domain=self.domain)


def joined(cookie: Cookie, came: Sequence[str]) -> Iterator[str]:
    """What came in cookies of that name, those of several parts put together.

    `came`: the values of the Cookie fields. A part that is missing, or there twice, makes them nothing. Each is
    looked for once, however many cookies of that name there are.
    """
    behind: dict[int, list[str]] = {}
    for value in cookies(came, cookie.name):
        match = _PARTS.fullmatch(value)
        if match is None:
            yield value
            continue
        parts = [match[2]]
        for place in range(1, int(match[1])):
            if place not in behind:
                behind[place] = list(cookies(came, f"{cookie.name}.{place}"))
            if len(behind[place]) != 1:
                break
            parts += behind[place]
        else:
            yield "".join(parts)


def written(cookie: Cookie, value: str, max_age: int, came: Sequence[str] = ()) -> Fields:
    """The fields that set a session's cookie, and expire the parts that came and are not needed any more.

    Raises SessionError for a value that is longer than all parts together.
    """
    size = LONGEST - _ATTRIBUTES - len(cookie.name) - 4
    parts = [value[at : at + size] for at in range(0, len(value), size)]
    if len(parts) > MOST_PARTS:
        raise SessionError(
            f"session: expected at most {size * MOST_PARTS} bytes as a token, and it has {len(value)}; "
            'keep less in it, or let a store hold it (session.kind = "store")'
        )
    if len(parts) > 1:
        parts[0] = f"{len(parts)}~{parts[0]}"
    age = max_age if cookie.persistent else None
    fields = [_field(cookie, place, part, age) for place, part in enumerate(parts)]
    return fields + [_field(cookie, place, "", 0) for place in _parts(cookie, came) if place >= len(parts)]


def dropped(cookie: Cookie, came: Sequence[str] = ()) -> Fields:
    """The fields that expire a session's cookie, and its parts."""
    return [_field(cookie, 0, "", 0)] + [_field(cookie, place, "", 0) for place in _parts(cookie, came)]


def _parts(cookie: Cookie, came: Iterable[str]) -> list[int]:
    """The numbers of the parts that came behind the first."""
    text = ";".join(came)
    return [place for place in range(1, MOST_PARTS) if f"{cookie.name}.{place}=" in text]


def _field(cookie: Cookie, place: int, value: str, max_age: int | None) -> tuple[bytes, bytes]:
    return b"set-cookie", set_cookie(
        cookie.name if not place else f"{cookie.name}.{place}",
        value,
        max_age=max_age,
        path=cookie.path,
        domain=cookie.domain,
        secure=cookie.secure,
        httponly=cookie.httponly,
        samesite=cookie.samesite,
        partitioned=cookie.partitioned,
    )
