"""Who is asking: the client's address behind trusted proxies, and the user."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from gatekeeper.http.addresses import Address, Network, Networks, parse_address
from gatekeeper.http.message import Request, split_list
from gatekeeper.http.parts import only

UNKNOWN: Final = "unknown"
"""The address of a client that has none (a Unix socket that is not trusted). All such share one."""

_REMEMBERED: Final = 8192
_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR: Final = re.compile(rf'\s*({_WORD})\s*=\s*({_WORD}|"(?:[^"\\]|\\.)*")\s*(?:;|\Z)')


_Known: TypeAlias = tuple[str | None, bool, Address | None]
"""The name by which an address is counted, whether it is a trusted proxy's, and the address itself."""

_NOBODY: Final[_Known] = (None, False, None)


class Identity:
    """Reads the client's address and user off a request.

    - `trusted`: the networks of proxies whose forwarding field is believed; `unix` for peers on a Unix socket.
    - `header`: the one field they write, in lower case: "x-forwarded-for", "forwarded" (RFC 7239), or one
      that holds a single address.
    - `ipv6_prefix`: clients of one IPv6 network of this length are one client.
    - `user`: None; the name of a field that trusted peers write; or a function of the Request.
    - `by_session`: whether the user is the owner of the session.
    - `api_key`: reads the API key of a Request; by default that of the field X-API-Key.
    """

    __slots__ = (
        "_header", "_known", "_prefix", "_trusted", "_unix", "_user_field", "api_key", "by_session", "direct",
        "user",
    )  # fmt: skip

    def __init__(
        self,
        *,
        trusted: Iterable[Network] = (),
        unix: bool = False,
        header: str = "x-forwarded-for",
        ipv6_prefix: int = 64,
        user_field: str | None = None,
        user: Callable[[Request], Any] | None = None,
        by_session: bool = False,
        api_key: Callable[[Request], str | None] = lambda request: only(request, "x-api-key"),
    ) -> None:
        self._trusted = Networks(trusted)
        self._unix = unix
        self._header = header
        self._prefix = ipv6_prefix
        self._user_field = user_field
        self.user = user
        self.by_session = by_session
        self.api_key = api_key
        # what was seen, by its text
        self._known: dict[str, _Known] = {}
        # The peers among them that are clients themselves: the usual case, in one look-up.
        self.direct: dict[str | None, str] = {}

    def address(self, request: Request) -> str:
        """The name under which this client's address is counted."""
        peer = request.peer
        name, trusted, _ = self._client(request)
        if name is None:
            return (peer or UNKNOWN)[:64]  # what the server calls its peer, such as the name of a test client
        if not trusted and peer and not self._known.get(peer, (None, True, None))[1]:
            if len(self.direct) >= _REMEMBERED:
                self.direct.clear()
            self.direct[peer] = name
        return name

    def ip(self, request: Request) -> Address | None:
        """The client's address itself; None if it has none."""
        return self._client(request)[2]

    def named_user(self, request: Request) -> str | None:
        """The user that a trusted peer names in its field."""
        if self._user_field is None or not self.trusts(request.peer):
            return None
        return request.field(self._user_field) or None

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer is a proxy whose forwarding field is believed."""
        if not peer:
            return self._unix
        return (self._known.get(peer) or self._learn(peer))[1]

    def _client(self, request: Request) -> _Known:
        """Who is at the other end, or behind it: walked from the nearest hop, the first that is no trusted proxy.

        What a hop that is no address hides cannot be known, nor can what stands left of it: the walk stops.
        """
        peer = request.peer
        nearest = (self._known.get(peer) or self._learn(peer)) if peer else (None, self._unix, None)
        if not nearest[1]:
            return nearest
        forwarded = self._header == "forwarded"
        lines = request.fields(self._header)
        # X-Forwarded-For knows no quoted strings.
        hops = split_list(lines) if forwarded else ",".join(lines).split(",")
        for hop in reversed(hops):
            text = _for(hop) if forwarded else hop
            known = _NOBODY if text is None else (self._known.get(text) or self._learn(text))
            if known[0] is None:
                break
            nearest = known
            if not known[1]:
                break
        return nearest

    def _learn(self, text: str) -> _Known:
        address = parse_address(text)
        found = _NOBODY if address is None else (self._name(address), address in self._trusted, address)
        if len(text) <= 64:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()  # bounded, whatever a client makes up
            self._known[text] = found
        return found

    def _name(self, address: Address) -> str:
        if address.version == 4 or self._prefix == 128:
            return str(address)
        return str(ipaddress.ip_network((int(address), self._prefix), strict=False))


def _for(element: str) -> str | None:
    """The `for` parameter of one forwarded-element (RFC 7239, 4); None unless it is one, with one `for`."""
    found, at = None, 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return None
        at = pair.end()
        name, value = pair.groups()
        if name.lower() == "for":
            if found is not None:
                return None
            found = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
    return found
