"""Patterns of requests: `[METHOD|METHOD] [host]/path` with {name}, {name:path} and a final `*`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from gatekeeper.errors import GatekeeperError, SettingsError
from gatekeeper.http.message import Request

EXPECTED: Final = (
    'a pattern "[METHOD|METHOD] [host]/path", as in "/api/*", "POST /login" or "GET example.com/users/{id}" '
    "({name} is one segment, {name:path} the rest, * only at the end after a slash)"
)

_UNTIDY: Final = re.compile(r"//|/\.|[^/]/\Z|\n\Z|\A(?!/)")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_METHODS: Final = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"}
_HOST: Final = re.compile(r"(\*\.)?[0-9a-z_-]+(\.[0-9a-z_-]+)*|\[[0-9a-f:.]+\]")
_PART: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:path)?\}")


class PatternError(GatekeeperError, ValueError):
    """The text is not a pattern. The message says what is expected and does not repeat the text."""


def normalise(path: str) -> str:
    """The one spelling of a decoded path: no empty, `.` or `..` segment (RFC 3986, 5.2.4), no slash at the end.

    Nor a newline at the end: to a router that ends its expressions with `$`, `/login%0A` is `/login`. A first slash
    that is missing is there: a WSGI server may hand over `login`, which Werkzeug routes as `/login`.
    """
    if not _UNTIDY.search(path):
        return path
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    while segments and segments[-1].endswith("\n"):
        last = segments.pop().rstrip("\n")
        if last == "..":
            del segments[-1:]
        elif last not in ("", "."):
            segments.append(last)
    return "/" + "/".join(segments)


def host_of(field: str | None) -> str:
    """The host of a `Host` field: lower case, without port and final dot."""
    host = (field or "").strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].rstrip(".")


class Pattern:
    """A pattern, parsed. `methods` is None for all; `GET` covers `HEAD`.

    `path` is the normalised text; `exact` tells that it holds no variable part, so that a look-up decides. The
    path of `/api/*` covers `/api` as well.

    `rank` orders patterns by how specific they are, the greatest first: an exact path before a variable one, the
    longer literal beginning, a host before a wildcard before none, methods before none. `/api/{name}` is before
    `/api/*`, whose beginning is `/api`. `meaning` is equal for patterns of the same requests.
    """

    __slots__ = ("_path", "_prefix", "exact", "first", "host", "meaning", "methods", "path", "rank", "text")

    def __init__(self, text: str) -> None:
        words = text.split() if isinstance(text, str) and len(text) <= 1024 else []
        if len(words) not in (1, 2) or "/" not in words[-1]:
            raise PatternError(f"expected {EXPECTED}")
        self.text = text
        self.methods = _methods(words[0]) if len(words) == 2 else None
        host, slash, path = words[-1].partition("/")
        if host.upper() in _METHODS:
            raise PatternError(f"expected {EXPECTED}; a space between method and path")
        self.host = host.lower() or None
        if self.host and not _HOST.fullmatch(self.host):
            raise PatternError(f"expected {EXPECTED}")
        self.path = normalise(slash + path)
        self.exact = not re.search(r"[{}*]", self.path)
        self._path = None if self.exact else _compile(self.path)
        # `/api/*`, the most frequent of variable patterns, need not be matched: a comparison decides.
        literal = self.path.removesuffix("*")
        self._prefix = None if self.exact or re.search(r"[{}*]", literal) else literal
        first = self.path.split("/")[1]
        # The first segment, where it is literal, sorts a table's patterns into drawers.
        self.first = None if re.search(r"[{}*]", first) else first
        self.meaning = (self.methods, self.host, _PART.sub(r"{\2}", self.path))
        literal = re.split(r"\{|/\*", self.path, maxsplit=1)[0]
        wildcard = self.host is not None and self.host.startswith("*.")
        self.rank = (
            self.exact,
            len(literal),
            0 if self.host is None else 1 if wildcard else 2,
            len(self.host or ""),  # of two wildcards that cover a host the longer is the narrower
            self.methods is not None,
        )

    def covers(self, method: str, host: str, path: str) -> bool:
        """Whether a request is meant; `host` from `host_of`, `path` as it came or normalised."""
        if self.methods is not None and method not in self.methods:
            return False
        if self.host is not None and not self._covers_host(host):
            return False
        if self._prefix is not None:
            return path.startswith(self._prefix) or path == self._prefix[:-1]
        return path == self.path if self._path is None else self._path.fullmatch(path) is not None

    def parameter(self, name: str, path: str) -> str | None:
        """What `{name}` stands for in a path that this covers, normalised; None in one that it does not."""
        found = None if self._path is None else self._path.fullmatch(normalise(path))
        return None if found is None else found.groupdict().get(name)

    @property
    def names(self) -> frozenset[str]:
        """The names of its variable parts."""
        return frozenset() if self._path is None else frozenset(self._path.groupindex)

    def _covers_host(self, host: str) -> bool:
        if self.host is not None and self.host.startswith("*."):
            return host.endswith(self.host[1:])
        return host == self.host

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


def methods_of(methods: str | Iterable[str] | None) -> frozenset[str] | None:
    """What a decorator is told of methods: one or several, in any case; GET covers HEAD. None is for all.

    Raises SettingsError for what is no method, or looks like one that is misspelt.
    """
    if methods is None:
        return None
    named = [methods] if isinstance(methods, str) else list(methods)
    if not named or not all(isinstance(one, str) and _TOKEN.fullmatch(one) for one in named):
        raise SettingsError(['methods: expected a method such as "POST", or several'])
    try:
        return _methods("|".join(named))
    except PatternError as error:
        raise SettingsError([f"methods: {error}"]) from None


def _methods(text: str) -> frozenset[str]:
    methods = text.upper().split("|")
    if not all(_TOKEN.fullmatch(method) for method in methods):
        raise PatternError(f"expected {EXPECTED}")
    for method in set(methods) - _METHODS:
        near = difflib.get_close_matches(method, _METHODS, n=1, cutoff=0.7)
        if near:  # a rule for a method that is never sent would limit nothing, and nobody would know
            raise PatternError(f"expected a method; did you mean {near[0]}?")
    return frozenset([*methods, "HEAD"] if "GET" in methods else methods)


def _compile(path: str) -> re.Pattern[str]:
    names: set[str] = set()
    expression, position, rest = "", 0, False
    open_end = path.endswith("/*")
    body = path[:-2] if open_end else path
    for part in _PART.finditer(body):
        if position and "/" not in body[position : part.start()]:
            # Several variables in a segment would make matching polynomial in the length of a hostile path.
            raise PatternError(f"expected {EXPECTED}; one variable a segment")
        expression += re.escape(_literal(body[position : part.start()]))
        position = part.end()
        name, is_rest = part.groups()
        if name in names or rest:
            raise PatternError(f"expected {EXPECTED}; each name once, and nothing variable after {{name:path}}")
        names.add(name)
        rest = bool(is_rest)
        expression += f"(?P<{name}>.+)" if rest else f"(?P<{name}>[^/]+)"
    if rest and open_end:
        raise PatternError(f"expected {EXPECTED}; nothing variable after {{name:path}}")
    expression += re.escape(_literal(body[position:]))
    return re.compile(expression + ("(?:/.*)?" if open_end else ""), re.DOTALL)


def _literal(text: str) -> str:
    if re.search(r"[{}*]", text):
        raise PatternError(f"expected {EXPECTED}")
    return text


T = TypeVar("T")


class Table(Generic[T]):
    """Things by pattern (None: every request), and all of them that a request matches, in their order.

    Exact paths are one look-up; the others are tried only if their first segment is the request's.
    """

    __slots__ = ("_exact", "_hosts", "_open", "always")

    def __init__(self, entries: Iterable[tuple[Pattern | None, T]]) -> None:
        always: list[T] | None = []
        self._exact: dict[str, list[tuple[int, Pattern | None, T]]] = {}
        self._open: dict[str | None, list[tuple[int, Pattern | None, T]]] = {}
        self._hosts = False
        for place, (pattern, thing) in enumerate(entries):
            entry = (place, pattern, thing)
            if pattern is None:
                self._open.setdefault(None, []).append(entry)
                if always is not None:
                    always.append(thing)
                continue
            always = None
            self._hosts |= pattern.host is not None
            if pattern.exact:
                self._exact.setdefault(pattern.path, []).append(entry)
            else:
                self._open.setdefault(pattern.first, []).append(entry)
        # With no pattern anywhere the answer is the same for each request; else None.
        self.always = None if always is None else tuple(always)

    def match(self, request: Request) -> tuple[T, ...]:
        if self.always is not None:
            return self.always
        # Where the field is repeated, a server or a framework may believe any of its values.
        hosts = [host_of(host) for host in (request.field("host") or "").split(",")] if self._hosts else [""]
        path = request.path
        paths = [normalise(path)]
        if _UNTIDY.search(path):
            # An application may route on the path as it came, so `/open/../x` is both `/x` and under `/open/*`;
            # it may also do without the tail alone.
            paths += [path, path.rstrip("/\n")]
        found: dict[int, T] = {}
        for host in hosts[:16]:
            for spelling in paths:
                self._collect(found, request.method, host, spelling)
        if len(found) > 1:
            return tuple(found[place] for place in sorted(found))
        return tuple(found.values())

    def _collect(self, found: dict[int, T], method: str, host: str, path: str) -> None:
        for place, pattern, thing in self._exact.get(path, ()):
            if pattern is None or pattern.covers(method, host, path):
                found[place] = thing
        first = path[1:].partition("/")[0]
        for drawer in (first, None):
            for place, pattern, thing in self._open.get(drawer, ()):
                if pattern is None or pattern.covers(method, host, path):
                    found[place] = thing


class Router(Generic[T]):
    """Things by pattern, and of those that a request matches the one whose pattern is most specific.

    Where two are as specific (see `Pattern.rank`) the first in the order given is taken. It goes by the normalised
    path alone, for that is what a gateway forwards. Exact paths are one look-up; the others are tried only if
    their first segment is the request's.
    """

    __slots__ = ("_exact", "_hosts", "_only", "_open", "_rest")

    def __init__(self, entries: Iterable[tuple[Pattern, T]]) -> None:
        # Sorting keeps the order of those that are as specific, with reverse=True too.
        ranked = sorted(entries, key=lambda entry: entry[0].rank, reverse=True)
        self._hosts = any(pattern.host is not None for pattern, _ in ranked)
        self._exact: dict[str, list[tuple[Pattern, T]]] = {}
        for entry in ranked:
            if entry[0].exact:
                self._exact.setdefault(entry[0].path, []).append(entry)
        variable = [entry for entry in ranked if not entry[0].exact]
        self._rest = [entry for entry in variable if entry[0].first is None]
        self._open = {
            first: [entry for entry in variable if entry[0].first in (first, None)]
            for first in {pattern.first for pattern, _ in variable} - {None}
        }
        # Where `/*` is all there is, every request goes there.
        is_only = len(ranked) == 1 and ranked[0][0].meaning == (None, None, "/*")
        self._only: T | None = ranked[0][1] if is_only else None

    def find(self, request: Request) -> T | None:
        """The thing, None if no pattern covers the request."""
        if self._only is not None:
            return self._only
        path = normalise(request.path)
        host = host_of(request.field("host")) if self._hosts else ""
        method = request.method
        for pattern, thing in self._exact.get(path, ()):
            if pattern.covers(method, host, path):
                return thing
        for pattern, thing in self._open.get(path[1:].partition("/")[0], self._rest):
            if pattern.covers(method, host, path):
                return thing
        return None
