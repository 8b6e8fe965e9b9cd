"""Who is asking: the client's address behind trusted proxies, and the user."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from gatekeeper.http.message import Request, split_list

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

UNKNOWN: Final = "unknown"
"""The address of a client that has none (a Unix socket that is not trusted). All such share one."""

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_REMEMBERED: Final = 8192
_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR: Final = re.compile(rf'\s*({_WORD})\s*=\s*({_WORD}|"(?:[^"\\]|\\.)*")\s*(?:;|\Z)')


def parse_address(text: str) -> Address | None:
    """An address as it stands in a forwarding field: perhaps in brackets, with a port, with a zone.

    IPv4 mapped into IPv6, or translated (NAT64, RFC 6052), is unmapped: else all such clients would be one /64.
    None if it is none.
    """
    if len(text) > 64:
        return None
    text = text.strip()
    if text.startswith("["):
        text, closed, port = text[1:].partition("]")
        if not closed or not (port == "" or _is_port(port)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_port(text: str) -> bool:
    return len(text) <= 6 and text[:1] == ":" and text[1:].isascii() and text[1:].isdigit()


class Identity:
    """Reads the client's address and user off a request.

    - `trusted`: the networks of proxies whose forwarding field is believed; `unix` for peers on a Unix socket.
    - `header`: the one field they write, in lower case: "x-forwarded-for", "forwarded" (RFC 7239), or one
      that holds a single address.
    - `ipv6_prefix`: clients of one IPv6 network of this length are one client.
    - `user`: None; the name of a field that trusted peers write; or a function of the Request.
    """

    __slots__ = (
        "_header", "_known", "_prefix", "_trusted", "_trusts_any", "_unix", "_user_field", "direct", "user",
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
    ) -> None:
        self._trusted = tuple(trusted)
        self._unix = unix
        self._trusts_any = bool(self._trusted) or unix
        self._header = header
        self._prefix = ipv6_prefix
        self._user_field = user_field
        self.user = user
        # text -> (its name as a key or None if it is no address, whether it is a trusted proxy)
        self._known: dict[str, tuple[str | None, bool]] = {}
        # The peers among them that are clients themselves: the usual case, in one look-up.
        self.direct: dict[str | None, str] = {}

    def address(self, request: Request) -> str:
        """The name under which this client's address is counted."""
        peer = request.peer
        if not peer:
            return self._behind(request, UNKNOWN) if self._unix else UNKNOWN
        name, trusted = self._known.get(peer) or self._learn(peer)
        if name is not None and not trusted:
            if len(self.direct) >= _REMEMBERED:
                self.direct.clear()
            self.direct[peer] = name
        if name is None:
            return peer[:64]  # what the server calls its peer, such as the name of a test client
        return self._behind(request, name) if trusted else name

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

    def _behind(self, request: Request, nearest: str) -> str:
        """Walk the hops from the nearest; the first that is not a trusted proxy is the client.

        What a hop that is no address hides cannot be known, nor can what stands left of it: the walk stops.
        """
        forwarded = self._header == "forwarded"
        lines = request.fields(self._header)
        # X-Forwarded-For knows no quoted strings.
        hops = split_list(lines) if forwarded else ",".join(lines).split(",")
        for hop in reversed(hops):
            text = _for(hop) if forwarded else hop
            name, trusted = (None, False) if text is None else (self._known.get(text) or self._learn(text))
            if name is None:
                break
            nearest = name
            if not trusted:
                break
        return nearest

    def _learn(self, text: str) -> tuple[str | None, bool]:
        address = parse_address(text)
        if address is None:
            found: tuple[str | None, bool] = (None, False)
        else:
            trusted = self._trusts_any and any(
                address in network for network in self._trusted if network.version == address.version
            )
            found = (self._name(address), trusted)
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
