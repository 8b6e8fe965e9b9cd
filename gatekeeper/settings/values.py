"""The words in which settings are written, beyond those of TOML: durations, sizes, names, addresses, objects.

What reads them raises ValueError with what was expected, and never repeats the text: it may be a secret.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from inspect import iscoroutinefunction, signature
from typing import Any, Final, NamedTuple, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from gatekeeper.errors import SettingsError
from gatekeeper.http.fields import NAME

_UNITS_NS: Final = {
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86_400 * 10**9,
}
_UNITS: Final = {
    "": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}

LONGEST_NS: Final = 365 * _UNITS_NS["d"]
"""The longest duration."""

GREATEST: Final = 1 << 50
"""The greatest size, in bytes."""

LONGEST_SOCKET: Final = 107
"""The bytes that the path of a Unix socket may have (Linux's sun_path, less its NUL)."""


class Duration:
    """A duration as text, an integer of nanoseconds once read. `zero` tells whether it may be nothing."""

    pattern: Final = r"^[0-9]{1,11}(ms|s|m|h|d)$"

    def __init__(self, *, zero: bool = False) -> None:
        self._least = 0 if zero else 1

    def read(self, value: object) -> int:
        """Raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,11})(ms|s|m|h|d)", value) if isinstance(value, str) else None
        if match is not None and self._least <= (found := int(match[1]) * _UNITS_NS[match[2]]) <= LONGEST_NS:
            return found
        least = "" if self._least == 0 else "above 0s, "
        raise ValueError(f'expected a duration such as "50ms", "10s", "5m", "1h" or "1d", {least}at most 365d')

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": self.pattern}


class Size:
    """A number of bytes, as an integer or as text, within bounds."""

    pattern: Final = r"^[0-9]{1,16}(KiB|MiB|GiB|KB|MB|GB)?$"

    def __init__(self, least: int = 1, most: int = GREATEST) -> None:
        self._least = least
        self._most = most

    def read(self, value: object) -> int:
        """Raises ValueError."""
        found = value if type(value) is int else None  # true is no number
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]{1,16})(|[KMG]iB|[KMG]B)", value)
            found = int(match[1]) * _UNITS[match[2]] if match is not None else None
        if found is not None and self._least <= found <= self._most:
            return found
        raise ValueError(
            'expected a number of bytes, or a size such as "32KiB", "1MiB", "1GiB" or "10MB": '
            f"{self._least} to {self._most} bytes"
        )

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self._least, "maximum": self._most}
        return {"anyOf": [number, {"type": "string", "pattern": self.pattern}]}


class TcpAddress(NamedTuple):
    """A host (a name in lower case, or an address without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """The absolute path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address: TypeAlias = TcpAddress | UnixAddress

_ADDRESS_EXPECTED: Final = (
    'expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080" (port 0 to 65535), or "unix:/path"'
)
_URL_EXPECTED: Final = (
    'expected "http://host:port" (port 1 to 65535, by default 80; no path, query or user), or "http+unix:///path"'
)


def parse_address(text: object) -> Address:
    """Where to listen: "host:port", "[v6]:port" or "unix:/path". Port 0 is any that is free. Raises ValueError."""
    if isinstance(text, str) and len(text) <= 512:
        if text.startswith("unix:"):
            return UnixAddress(_socket(text.removeprefix("unix:")))
        host, port = _host_and_port(text)
        if host is not None and port is not None:
            return TcpAddress(host, port)
    raise ValueError(_ADDRESS_EXPECTED)


def parse_upstream(text: object) -> Address:
    """Where an upstream is: "http://host[:port]" or "http+unix:///absolute/path". Raises ValueError."""
    if isinstance(text, str) and len(text) <= 512:
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        if scheme == "https":
            raise ValueError('expected "http://host:port"; TLS to upstreams is not there yet')
        if scheme == "http+unix":
            return UnixAddress(_socket(rest))
        if scheme == "http":
            host, port = _host_and_port(rest)
            if host is not None and (port or port is None) and not rest.endswith(":"):
                return TcpAddress(host, port or 80)
    raise ValueError(_URL_EXPECTED)


def upstream_url(address: Address) -> str:
    """The one spelling of an upstream's URL: lower case, without the port if it is 80."""
    if isinstance(address, UnixAddress):
        return f"http+unix://{address.path}"
    return f"http://{address}".removesuffix(":80")


def _socket(path: str) -> str:
    # Characters that URLs give a meaning are refused: whether they are quoted would be anybody's guess.
    if not (path.startswith("/") and path.isprintable() and not re.search("[?#%]", path)):
        raise ValueError("expected an absolute path of a Unix socket, of printable characters but ?, # and %")
    if len(path.encode()) > LONGEST_SOCKET or path.endswith("/"):
        raise ValueError(f"expected the path of a Unix socket, which has at most {LONGEST_SOCKET} bytes")
    return path


def _host_and_port(text: str) -> tuple[str | None, int | None]:
    """The host, None if it is none, and the port, None if there is none."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    if match is None:
        return None, None
    port = None if match[2] is None else int(match[2])
    return (None if port is not None and port > 65_535 else _host(match[1].lower())), port


def _host(text: str) -> str | None:
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            return None
    labels = text.split(".")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        # What ends in a number is an address, never a name; resolvers read "127.1" and "0x7f.1" as one too.
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            return None
    sound = len(text) <= 253 and all(re.fullmatch(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", one) for one in labels)
    return text if sound else None


def proper_name(text: str) -> str:
    """The text, if it is a name as rules and pools have. Raises ValueError."""
    if not NAME.fullmatch(text):
        raise ValueError("expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return text


def resolved(text: str) -> str:
    """A text, or what the environment holds under the name behind `env:`. Raises ValueError if that is nothing."""
    if not text.startswith("env:"):
        return text
    found = os.environ.get(text.removeprefix("env:"))
    if not found:
        raise ValueError(f"expected the environment variable {_shown(text)} to be set")
    return found


def _shown(text: str) -> str:
    """The name of a variable, if it is one: else it may be a secret."""
    name = text.removeprefix("env:")
    return name if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name) else "named behind env:"


def store_url(text: str) -> str:
    """The URL of a store, what stands in the environment looked up. Raises ValueError."""
    text = resolved(text)
    if not re.fullmatch(STORE_PATTERN, text) or text.startswith("env:"):
        raise ValueError(STORE_EXPECTED)
    return text


REDIS: Final = tuple(
    f"{server}{how}"
    for server in ("redis", "valkey")
    for how in ("", "s", "+cluster", "s+cluster", "+sentinel", "s+sentinel")
)
"""The schemes of one Redis or Valkey, and of several together."""


def store_scheme(url: str) -> str:
    """Which kind of store a URL names: "memory", "shared", "redis" or, for any other scheme, "limits"."""
    scheme = url.partition("://")[0]
    if scheme in ("memory", "shared"):
        return scheme
    return "redis" if scheme == "unix" or scheme in REDIS else "limits"


STORE_PATTERN: Final = r"^(env:.+|[a-z][a-z0-9+.-]{0,63}://.{0,2000})$"
STORE_EXPECTED: Final = (
    "expected the URL of a store: memory://, shared:///PATH, redis://HOST:PORT/DB (rediss, redis+cluster, "
    "redis+sentinel, unix; or valkey), or a storage URI of limits"
)

OBJECT: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""The form of "package.module:Name"."""


class NoModuleError(ValueError):
    """There is no module of the name that stands before the colon."""


def load_object(text: str) -> Any:
    """The object that "package.module:Name" names. Raises ValueError that says which step failed."""
    module, _, name = text.partition(":")
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:
        # Of what reads these settings while it is imported, and is imported by that module in its turn.
        around = isinstance(error, ImportError | SettingsError) and not isinstance(error, ModuleNotFoundError)
        told = (
            f"expected a module that can be imported; importing it raised {type(error).__name__}"
            f"{_APART if around else ''}"
        )
        if _repeats(error, module):
            raise NoModuleError(told) from None
        raise ValueError(told) from error
    for attribute in name.split("."):
        try:
            found = getattr(found, attribute)
        except Exception:  # a module may have a __getattr__ of its own
            so_far = f"; it is still being imported{_APART}" if _is_beginning(module) else ""
            raise ValueError(f"expected a name that the module has{so_far}") from None
    return found


def _repeats(error: BaseException, module: str) -> bool:
    """Whether an error says of the text itself that it is no module; it may be a secret in the wrong place."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


_APART: Final = ": put what the settings name in a module of its own, which does not read them"


def _is_beginning(module: str) -> bool:
    """Whether a module is being imported, perhaps by itself: then it has not yet all that it will have."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def is_asynchronous(function: object) -> bool:
    """Whether calls of it must be awaited."""
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def takes_one(function: Any) -> bool:
    """Whether it can be called with one argument; so can, for all we know, what does not tell its parameters."""
    try:
        told = signature(function, follow_wrapped=False)  # it is the wrapper that is called
    except (TypeError, ValueError):
        return True
    try:
        told.bind(object())
    except TypeError:
        return False
    return True


def parameters(function: Any) -> list[str]:
    """The names of a function's parameters; none of what does not tell them."""
    try:
        return list(signature(function).parameters)
    except (TypeError, ValueError):
        return []


def near(text: str, names: Iterable[str], rest: str = "") -> str:
    """The end of a line: which of the names was perhaps meant by a misspelt one, if any. `rest` stood behind it."""
    found = difflib.get_close_matches(text[:64], list(names), n=1)
    return f"; did you mean {json.dumps(found[0] + rest)}?" if found else ""


def nth(place: int) -> str:
    """Which of a list, counted as people do."""
    number = place + 1
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
