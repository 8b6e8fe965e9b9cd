"""Where the servers are and how one logs in, read from a URL."""

from __future__ import annotations

import ssl
from typing import Final, Literal, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

EXPECTED: Final = (
    "expected redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss:// (TLS), unix://[[USER]:PASSWORD@]/PATH[?db=DB], "
    "redis+cluster://HOST[:PORT],HOST[:PORT] or redis+sentinel://HOST[:PORT],HOST[:PORT]/SERVICE[/DB], or the same "
    "with valkey in place of redis; user and password percent-encoded"
)

OPTIONS: Final = frozenset(
    {
        "db", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile",
        "sentinel_password", "sentinel_username",
    }
)  # fmt: skip
"""What may stand in the query of the URL, with the names and meanings that redis-py gave them."""

Topology: TypeAlias = Literal["single", "cluster", "sentinel"]

_TOPOLOGIES: Final[dict[str, Topology]] = {"": "single", "cluster": "cluster", "sentinel": "sentinel"}
_TLS: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_CERT_REQS: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_NO: Final = ("0", "f", "false", "n", "no")


class Address(NamedTuple):
    """A server: host and port, or the path of its socket. `sentinel`: one of those that know the real ones."""

    host: str
    port: int
    path: str | None = None
    sentinel: bool = False


class Target:
    """All that a URL says.

    - `addresses`: the server; or those of a cluster, or the sentinels, that are asked for the others.
    - `login`: the words after AUTH, none for no login; `sentinel_login` the same for the sentinels.
    - `service`: how the sentinels call the server that is meant.
    - `tls`: None for connections in the clear.

    Its `repr` shows nothing of a login.
    """

    __slots__ = ("addresses", "db", "login", "sentinel_login", "service", "tls", "topology")

    def __init__(self, url: str) -> None:
        """Raises ValueError for a wrong URL; the message does not repeat it."""
        try:
            self._read(url)
        except (ValueError, LookupError, TypeError, AttributeError):
            # From None: errors of the standard library quote what they were given.
            raise ValueError(EXPECTED) from None

    def _read(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        if parts.fragment or not options.keys() <= OPTIONS:
            raise ValueError
        userinfo, _, hosts = parts.netloc.rpartition("@")
        self.login = _login(*userinfo.partition(":")[::2])
        self.sentinel_login = _login(options.get("sentinel_username", ""), options.get("sentinel_password", ""))
        self.service = b""
        self.tls: ssl.SSLContext | None = None
        path = unquote(parts.path)
        if parts.scheme == "unix":
            if hosts or not path.strip("/"):
                raise ValueError
            self.topology: Topology = "single"
            self.addresses: tuple[Address, ...] = (Address("", 0, path),)
            db = ""
        else:
            scheme, _, topology = parts.scheme.partition("+")
            self.topology = _TOPOLOGIES[topology]
            if _TLS[scheme]:
                self.tls = _context(options)
            sentinel = self.topology == "sentinel"
            self.addresses = tuple(_address(host, sentinel) for host in hosts.split(","))
            if self.topology == "single" and len(self.addresses) > 1:
                raise ValueError
            words = path.strip("/").split("/") if path.strip("/") else []
            if sentinel:
                self.service = words.pop(0).encode()
            if len(words) > 1:
                raise ValueError
            db = words[0] if words else ""
        db = db or options.get("db", "")
        self.db = int(db) if db else 0
        if self.db < 0 or (self.db and self.topology == "cluster"):  # a cluster has but one
            raise ValueError

    def __repr__(self) -> str:
        return f"<Target {self.topology}{' with TLS' if self.tls else ''}>"


def _login(user: str, password: str) -> tuple[bytes, ...]:
    if user:
        return unquote(user).encode(), unquote(password).encode()
    return (unquote(password).encode(),) if password else ()


def _address(text: str, sentinel: bool) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host or "]" in host:
        raise ValueError
    number = int(port) if port else 26379 if sentinel else 6379
    if not 0 < number < 65536:
        raise ValueError
    return Address(unquote(host) or "localhost", number, None, sentinel)


def _context(options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if "ssl_certfile" in options:
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    except (OSError, ssl.SSLError):
        raise ValueError from None
    needed = _CERT_REQS[options["ssl_cert_reqs"]] if "ssl_cert_reqs" in options else ssl.CERT_REQUIRED
    context.check_hostname = (
        needed != ssl.CERT_NONE and options.get("ssl_check_hostname", "true").lower() not in _NO
    )
    context.verify_mode = needed
    return context
