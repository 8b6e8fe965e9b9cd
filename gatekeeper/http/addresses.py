"""Addresses of the internet as they stand in fields and settings, and sets of networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final, TypeAlias

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


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


class NetworkError(ValueError):
    """The text is no network."""

    def __init__(self) -> None:
        super().__init__(
            'expected networks such as "10.0.0.0/8" (IPv4 as IPv4, no bit set behind the prefix), or addresses'
        )


def parse_network(text: str) -> Network:
    """A network, or an address as the network that holds it alone. Raises NetworkError.

    IPv4 mapped into IPv6 is refused: addresses are unmapped before they are compared.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise NetworkError from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        raise NetworkError
    return network


class Networks:
    """A set of networks: whether an address is in any of them is one look-up a length of prefix."""

    __slots__ = ("_tables",)

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self.replace(networks)

    def replace(self, networks: Iterable[Network]) -> None:
        """Hold these from now on, and no others. Who asks meanwhile sees either."""
        tables: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in networks:
            shift = network.max_prefixlen - network.prefixlen
            tables[network.version].setdefault(shift, set()).add(int(network.network_address) >> shift)
        self._tables = {version: tuple(table.items()) for version, table in tables.items()}

    def __contains__(self, address: Address | None) -> bool:
        if address is None:
            return False
        number = int(address)
        return any(number >> shift in held for shift, held in self._tables[address.version])

    def __bool__(self) -> bool:
        return any(self._tables.values())
