"""HTTP/1.1 on the wire (RFC 9112): heads parsed strictly, bodies by their framing, both written anew.

Nothing here does I/O. Framing is never relayed: what goes on is written from what was understood.

Of each field line only the name is looked up; the line itself goes on as it came, once the head as a whole is known
to hold no control character. (A generated parser calls Python back for each field: for the 22 of an exchange that
alone costs more than all that is done here.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from gatekeeper.errors import GatekeeperError

CHUNKED: Final = -1
"""The length of a body in chunks."""

UNTIL_CLOSE: Final = -2
"""The length of a response that ends with its connection (RFC 9112, 6.3, the last case)."""

LONGEST_LINE: Final = 8192
"""The longest start line, in bytes (RFC 9112, 3 recommends that 8000 be taken)."""

LONGEST_EXTENSION: Final = 256
"""The longest extension of a chunk, in bytes. They are dropped."""

LONGEST_TRAILERS: Final = 8192
"""The most bytes of trailers. They are dropped too (RFC 9110, 6.5.1 allows it)."""

MOST_RESPONSE_FIELDS: Final = 256
LONGEST_RESPONSE_HEAD: Final = 64 * 1024


class WireError(GatekeeperError):
    """A message breaks the protocol, or a bound. `status` is what a client is answered."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)


class Field(NamedTuple):
    """A field by its name in lower case, its value, and the line as it came."""

    name: bytes
    value: bytes
    line: bytes


_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS: Final = bytes(code for code in (*range(32), 127) if code != 9)
_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_HOST: Final = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){1,255}(?::[0-9]{0,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{0,5})?"
)
_ABSOLUTE: Final = re.compile(rb"[hH][tT][tT][pP][sS]?://([^/?]*)(/?.*)", re.DOTALL)
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
_VERSION: Final = re.compile(rb"HTTP/[0-9]\.[0-9]")
_MOST_DIGITS: Final = 18
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*(;[\t -~\x80-\xff]*))?")
_DOTS: Final = re.compile(rb"/(?:\.|%2[eE]){1,2}(?:/|\Z)")
_RARE: Final = re.compile(rb"%(?:2[fF]|5[cC]|25)|;")
_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")

HOP_BY_HOP: Final = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"proxy-authenticate", b"proxy-authorization",
    )
)  # fmt: skip
"""Fields for this connection alone (RFC 9110, 7.6.1). `Trailer` is among them, for trailers are dropped."""

CLAIMS: Final = (b"x-forwarded-", b"forwarded", b"x-real-ip")
"""How the fields begin in which a proxy speaks of the client. Believed, and passed on, from trusted peers alone."""

_SENSITIVE: Final = frozenset((b"authorization", b"cookie", b"set-cookie", b"proxy-authorization"))
IDENTITY: Final = b"gatekeeper-identity"
"""In this field a gateway vouches for the client: so no client may send it on."""

_REQUEST_SPECIAL: Final = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"via", b"max-forwards", b"proxy", IDENTITY,
}  # fmt: skip
_FRAMING: Final = frozenset((b"connection", b"content-length", b"transfer-encoding"))
_RESPONSE_SPECIAL: Final = HOP_BY_HOP | {b"content-length"}

# `Connection` may name further fields for this connection alone, but not take away what others rely on.
_NOT_NAMED: Final = _SENSITIVE | {
    b"host", b"content-length", b"content-type", b"via", b"expect", b"date", b"cache-control", b"max-forwards",
    b"origin", b"close", b"keep-alive", b"upgrade", b"te", b"transfer-encoding",
}  # fmt: skip

_REMEMBERED: Final = 2048
_LONGEST_REMEMBERED: Final = 64


class _Names(dict[bytes, "bytes | None"]):
    """Names of fields as they are written, once checked: in lower case those that need a look, None for others.

    Bounded, and no value is ever in it.
    """

    def __init__(self, special: frozenset[bytes], prefixes: tuple[bytes, ...], *, drops_underscores: bool) -> None:
        self._special = special
        self._prefixes = prefixes
        self._drops_underscores = drops_underscores

    def __missing__(self, written: bytes) -> bytes | None:
        if not _NAME.fullmatch(written):
            raise WireError(400, "malformed field")
        name: bytes | None = written.lower()
        assert name is not None
        if b"_" in name and self._drops_underscores:  # to WSGI and CGI `X_User` is `X-User`
            name = DROPPED
        elif name not in self._special and not name.startswith(self._prefixes):
            name = None
        if len(written) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[written] = name
        return name


DROPPED: Final = b"proxy"
"""This field becomes HTTP_PROXY to CGI programs, so it is dropped; and others in its name."""

_REQUEST_NAMES: Final = _Names(_REQUEST_SPECIAL, CLAIMS, drops_underscores=True)
_RESPONSE_NAMES: Final = _Names(_RESPONSE_SPECIAL, (), drops_underscores=False)
_KNOWN_HOSTS: Final[dict[bytes, None]] = {}


def _is_host(text: bytes) -> bool:
    if text in _KNOWN_HOSTS:
        return True
    if not _HOST.fullmatch(text):
        return False
    if len(_KNOWN_HOSTS) >= _REMEMBERED:
        _KNOWN_HOSTS.clear()
    _KNOWN_HOSTS[text] = None
    return True


def _split(head: bytes, status: int) -> list[bytes]:
    """The lines of a head, in which no control character is left: no NUL, no bare CR or LF (RFC 9112, 2.2)."""
    lines = head.split(b"\r\n")
    if len(head) - len(head.translate(None, _CONTROLS)) != 2 * len(lines) - 2:
        raise WireError(status, "control characters in the head")
    return lines


_METHODS: Final = {
    text.encode(): text for text in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE")
}


class WireRequest:
    """A request as its head on the wire says; a Request to the core.

    - `method` in upper case, `verb` as it was written
    - `target`: as it goes on, in origin-form and without dot segments
    - `host`: the authority that was asked for; None only in HTTP/1.0
    - `lines`: the field lines that go on; `forwarding`: those of `CLAIMS`, which stand apart; `via`: what proxies
      on the way wrote
    - `length` of the body: 0, a number of bytes, or CHUNKED
    - `keeps_alive`: whether the client goes on with its connection; `is_old`: whether this is HTTP/1.0
    - `expects`: whether it waits for `100 Continue`
    - `readings`: other paths that a lenient server might read in this target
    """

    method: str
    verb: bytes
    path: str
    peer: str | None
    native: Any
    target: bytes
    host: bytes | None
    lines: list[bytes]
    forwarding: list[Field]
    via: list[bytes]
    length: int
    keeps_alive: bool
    is_old: bool
    expects: bool
    max_forwards: int | None = None
    readings: tuple[str, ...] = ()

    def read(self, head: bytes, most_fields: int = 100) -> None:
        """Take over a head: all before the empty line. Raises WireError."""
        lines = _split(head, 400)
        start = lines.pop(0)
        words = start.split(b" ")
        if len(words) != 3:
            raise WireError(400, "malformed request line")
        if len(start) > LONGEST_LINE:
            raise WireError(414, "request line too long")
        self.verb, target, version = words
        self.is_old = version != b"HTTP/1.1"
        if self.is_old and version != b"HTTP/1.0":
            raise WireError(505 if _VERSION.fullmatch(version) else 400, "version not supported")
        method = _METHODS.get(self.verb)
        if method is None:
            if not _METHOD.fullmatch(self.verb):
                raise WireError(400, "malformed method")
            method = self.verb.decode("ascii").upper()
        self.method = method
        # Of what is no visible ASCII, other controls and spaces have been looked for. (Sought as numbers: a bytes
        # object takes six times as long to be sought in another.)
        if not target or not target.isascii() or 0x23 in target or 0x5C in target or 0x09 in target:
            raise WireError(400, "malformed target")
        if len(lines) > most_fields:
            raise WireError(431, "too many fields")
        self.native = lines
        self.forwarding, self.via = [], []
        self.length, self.keeps_alive, self.expects, self.host = 0, not self.is_old, False, None
        self._fields(lines)
        if self.host is None and not self.is_old:
            raise WireError(400, "no Host")
        if target[0] != 0x2F:
            target = self._other_form(target)
        path = target.partition(b"?")[0]
        has_escapes = 0x25 in path
        if has_escapes or 0x3B in path or (0x2E in path and b"/." in path):
            path, target = self._clean(path, target)
        self.target = target
        self.path = unquote(path.decode("ascii")) if has_escapes else path.decode("ascii")

    def fields(self, name: str) -> list[str]:
        wanted = name.encode("latin-1") + b":"
        size = len(wanted)
        if b"_" in wanted:  # such fields are dropped, so they are not there
            return []
        return [
            line[size:].strip(b" \t").decode("latin-1") for line in self.native if line[:size].lower() == wanted
        ]

    def field(self, name: str) -> str | None:
        values = self.fields(name)
        return ",".join(values) if values else None

    def query(self) -> str:
        return self.target.partition(b"?")[2].decode("latin-1")

    def _fields(self, lines: list[bytes]) -> None:
        self.lines = kept = []
        framing: list[tuple[bytes, bytes]] = []
        for line in lines:
            written, colon, value = line.partition(b":")
            name = _REQUEST_NAMES[written]
            if name is None:
                kept.append(line)
            elif name == b"host":
                value = value.strip(b" \t")
                if self.host is not None or (value not in _KNOWN_HOSTS and not _is_host(value)):
                    raise WireError(400, "not one valid Host")
                self.host = value
            elif name in _FRAMING:
                framing.append((name, value.strip(b" \t")))
            else:
                self._look(name, value.strip(b" \t"), line)
            if not colon:
                raise WireError(400, "malformed field")
        if framing:
            self._frame(framing)

    def _look(self, name: bytes, value: bytes, line: bytes) -> None:
        """A field that is neither framing nor simply passed on."""
        if name.startswith(CLAIMS):
            self.forwarding.append(Field(name, value, line))
        elif name == b"via":
            self.via.append(value)
            self.lines.append(line)
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise WireError(417, "unknown expectation")
            self.expects = not self.is_old
        elif name == b"max-forwards" and self.method == "OPTIONS":  # one less for the next (RFC 9110, 7.6.2)
            if self.max_forwards is not None or not value.isdigit() or len(value) > _MOST_DIGITS:
                raise WireError(400, "Max-Forwards is not one number")
            self.max_forwards = int(value)
            self.lines.append(b"Max-Forwards: %d" % max(0, self.max_forwards - 1))
        elif name == b"max-forwards":  # it means nothing there
            self.lines.append(line)

    def _frame(self, framing: list[tuple[bytes, bytes]]) -> None:
        lengths = [value for name, value in framing if name == b"content-length"]
        codings = [value for name, value in framing if name == b"transfer-encoding"]
        if len(lengths) + len(codings) != len(framing):
            self._options([value for name, value in framing if name == b"connection"])
        if codings:
            self._codings(codings, lengths)
        elif lengths:
            self.length = content_length(lengths, 400)

    def _options(self, values: list[bytes]) -> None:
        named = connection_options(values)
        if b"close" in named:
            self.keeps_alive = False
        elif self.is_old and b"keep-alive" in named:
            self.keeps_alive = True
        self.lines = without(self.lines, named)

    def _codings(self, codings: list[bytes], lengths: list[bytes]) -> None:
        if lengths:
            raise WireError(400, "both Content-Length and Transfer-Encoding")
        if self.is_old:
            raise WireError(400, "Transfer-Encoding in HTTP/1.0")
        named = [part.strip(b" \t").lower() for part in b",".join(codings).split(b",")]
        if named != [b"chunked"]:
            is_chunked = named[-1] == b"chunked" and named.count(b"chunked") == 1
            unknown = is_chunked and all(re.fullmatch(_METHOD, part) for part in named)
            raise WireError(501 if unknown else 400, "Transfer-Encoding other than chunked")
        self.length = CHUNKED

    def _other_form(self, target: bytes) -> bytes:
        """A target that does not begin with a slash (RFC 9112, 3.2), in origin-form."""
        if target == b"*" and self.method == "OPTIONS":
            return target
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or self.method == "CONNECT":
            if self.method == "CONNECT":
                raise WireError(405, "CONNECT is not served")
            raise WireError(400, "malformed target")
        authority, rest = absolute.groups()
        if not _is_host(authority):
            raise WireError(400, "malformed authority")
        self.host = authority  # it overrides the field (RFC 9112, 3.2.2), for the core as well
        self.native = [b"Host: " + authority, *(line for line in self.native if line[:5].lower() != b"host:")]
        return rest if rest[:1] == b"/" else b"/" + rest

    def _clean(self, path: bytes, target: bytes) -> tuple[bytes, bytes]:
        """The path and target without dot segments (RFC 3986, 5.2.4), whether they are encoded or not."""
        if _ESCAPE.search(path) or b"%00" in path:
            raise WireError(400, "malformed escape in the target")
        if _DOTS.search(path):
            query = target[len(path) :]
            path = _without_dots(path)
            target = path + query
        if _RARE.search(path):
            self.readings = _readings(path.decode("ascii"))
        return path, target


def _without_dots(path: bytes) -> bytes:
    segments: list[bytes] = []
    parts = path.split(b"/")[1:]
    for place, part in enumerate(parts):
        dots = part.replace(b"%2e", b".").replace(b"%2E", b".")
        if dots in (b".", b".."):
            if dots == b"..":
                del segments[-1:]
            if place == len(parts) - 1:
                segments.append(b"")
        else:
            segments.append(part)
    return b"/" + b"/".join(segments)


def _readings(path: str) -> tuple[str, ...]:
    """What servers might make of a path whose escapes are read in more than one way."""
    once = unquote(path)
    bare = re.sub(r";[^/]*", "", path)
    found = {
        unquote(re.sub("%2[fF]", "%252F", path)),  # an encoded slash that is no separator
        once.replace("\\", "/"),
        unquote(bare),
        unquote(once),
        unquote(unquote(bare)).replace("\\", "/"),
    }
    return tuple(sorted(found - {once}))


def connection_options(values: Iterable[bytes]) -> set[bytes]:
    """The names in `Connection` fields, in lower case."""
    return {part.strip(b" \t").lower() for part in b",".join(values).split(b",")}


def without(lines: list[bytes], named: set[bytes]) -> list[bytes]:
    """The lines without those fields that `Connection` named, as far as it may."""
    dropped = named - _NOT_NAMED
    if not dropped:
        return lines
    return [line for line in lines if line.partition(b":")[0].lower() not in dropped]


def content_length(values: list[bytes], status: int) -> int:
    """The one length that all values give (RFC 9110, 8.6: a repetition of the same is let pass)."""
    if len(values) == 1 and (text := values[0]).isdigit() and len(text) <= _MOST_DIGITS:
        return int(text)
    texts = {part.strip(b" \t") for value in values for part in value.split(b",")}
    # Digits of ASCII alone, as bytes.isdigit has it: int() takes "_", "+" and more.
    if len(texts) != 1 or not (text := texts.pop()).isdigit() or len(text) > _MOST_DIGITS:
        raise WireError(status, "Content-Length is not one number")
    return int(text)


_STATUS_LINES: Final[dict[bytes, tuple[int, bytes, bool]]] = {}


def _status(line: bytes) -> tuple[int, bytes, bool]:
    """(status, status and reason, whether it is HTTP/1.0) of a status line; the usual ones are remembered."""
    match = _STATUS.fullmatch(line)
    if match is None:
        raise WireError(502, "malformed status line")
    minor, status, reason = match.groups()
    found = int(status), status + b" " + (reason or b""), minor == b"0"
    if len(_STATUS_LINES) < 256 and len(line) <= _LONGEST_REMEMBERED:
        _STATUS_LINES[line] = found
    return found


class ResponseHead:
    """The head of a response from an upstream.

    `lines` are those that go on; `length` is as of a request, or UNTIL_CLOSE.
    For an answer to HEAD `told` keeps the Content-Length that a GET would have had.
    """

    __slots__ = ("keeps_alive", "length", "lines", "reason", "status", "told")

    def __init__(self, head: bytes, *, to_head: bool) -> None:
        """`head`: all before the empty line; `to_head`: whether HEAD was asked. Raises WireError (502)."""
        lines = _split(head, 502)
        start = lines.pop(0)
        self.status, self.reason, is_old = _STATUS_LINES.get(start) or _status(start)
        self.keeps_alive = not is_old
        if len(lines) > MOST_RESPONSE_FIELDS:
            raise WireError(502, "too many fields")
        self.lines = kept = []
        self.told: int | None = None
        framing: list[tuple[bytes, bytes]] = []
        try:
            for line in lines:
                written, colon, value = line.partition(b":")
                name = _RESPONSE_NAMES[written]
                if name is None:
                    kept.append(line)
                elif name in _FRAMING:
                    framing.append((name, value.strip(b" \t")))
                if not colon:
                    raise WireError(502, "malformed field")
        except WireError as error:
            raise WireError(502, error.reason) from None
        codings: list[bytes] = []
        if len(framing) == 1 and framing[0][0] == b"content-length":
            self.told = content_length([framing[0][1]], 502)
        elif framing:
            codings = [value for name, value in framing if name == b"transfer-encoding"]
            lengths = [value for name, value in framing if name == b"content-length"]
            options = [value for name, value in framing if name == b"connection"]
            if lengths:
                self.told = content_length(lengths, 502)
            if codings and (lengths or is_old or b",".join(codings).strip(b" \t").lower() != b"chunked"):
                raise WireError(502, "malformed framing")
            if options:
                named = connection_options(options)
                self.keeps_alive = b"close" not in named and (self.keeps_alive or b"keep-alive" in named)
                self.lines = without(kept, named)
        # RFC 9112, 6.3: what has no body whatever its fields say
        if to_head or self.status < 200 or self.status in (204, 304):
            self.length = 0
            if self.status < 200 or self.status == 204:
                self.told = None
        elif codings:
            self.length = CHUNKED
        else:
            self.length = UNTIL_CLOSE if self.told is None else self.told


def may_begin_response(data: bytes) -> bool:
    """Whether these first bytes of a head may become one: what speaks another protocol is not waited for."""
    line, whole, _ = data.partition(b"\r\n")
    if whole:
        return _STATUS.fullmatch(line) is not None
    return line[:7] == b"HTTP/1."[: len(line)] and len(line) <= LONGEST_LINE


class Body:
    """A body taken out of its framing, piece by piece.

    `take` returns what a piece of bytes holds of it. Once `is_done`, `rest` is what came behind it. `left` is how
    much is known to be still to come.
    """

    __slots__ = ("is_done", "left", "rest")

    def __init__(self, left: int = 0) -> None:
        self.is_done = False
        self.left = left
        self.rest = b""

    def take(self, data: bytes) -> bytes:
        raise NotImplementedError


class LengthBody(Body):
    """A body of known length."""

    __slots__ = ()

    def __init__(self, length: int) -> None:
        self.left = length
        self.is_done = not length
        self.rest = b""

    def take(self, data: bytes) -> bytes:
        left = self.left - len(data)
        if left > 0:
            self.left = left
            return data
        self.is_done = True
        if left:
            data, self.rest = data[: self.left], data[self.left :]
        self.left = 0
        return data


WHOLE: Final = LengthBody(0)
"""A body that came whole with its head. Shared: nothing is behind it, nor taken from it."""


class CloseBody(Body):
    """A body that ends with its connection."""

    __slots__ = ()

    def take(self, data: bytes) -> bytes:
        return data


class ChunkedBody(Body):
    """A body in chunks (RFC 9112, 7.1). Extensions and trailers are read strictly, bounded and dropped.

    `take` raises WireError with `status` when the framing is broken.
    """

    __slots__ = ("_kept", "_state", "_status", "_trailers")

    def __init__(self, status: int) -> None:
        super().__init__()
        self._status = status
        self._state = _SIZE
        self._kept = b""
        self._trailers = 0

    def take(self, data: bytes) -> bytes:
        if self._kept:
            data, self._kept = self._kept + data, b""
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._state == _DATA:
                piece = data[at : at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                if not self.left:
                    self._state = _DATA_END
            elif self._state == _DATA_END:
                if size - at < 2 and data[at] == 0x0D:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise WireError(self._status, "malformed chunk")
                at += 2
                self._state = _SIZE
            else:
                end = data.find(b"\r\n", at)
                bound = LONGEST_EXTENSION + 18 if self._state == _SIZE else LONGEST_TRAILERS - self._trailers
                # Of a line that is not whole a CR at the end may be half of its line end.
                if (end if end >= 0 else size - (data[-1] == 0x0D)) - at > bound:
                    raise WireError(self._status, "chunk extension or trailers too long")
                if end < 0:
                    if b"\n" in data[at:] or b"\r" in data[at : size - 1]:
                        raise WireError(self._status, "malformed line end")
                    break
                self._line(data[at:end])
                at = end + 2
                if self.is_done:
                    self.rest = data[at:]
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._kept = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line(self, line: bytes) -> None:
        if self._state == _SIZE:
            match = _CHUNK.fullmatch(line)
            if match is None or (match[2] and len(match[2]) > LONGEST_EXTENSION):
                raise WireError(self._status, "malformed chunk size")
            self.left = int(match[1], 16)
            self._state = _DATA if self.left else _TRAILERS
        elif line:
            if not _LINE.fullmatch(line):
                raise WireError(self._status, "malformed trailer")
            self._trailers += len(line) + 2
        else:
            self.is_done = True


_SIZE, _DATA, _DATA_END, _TRAILERS = range(4)

LAST_CHUNK: Final = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A chunk of a body; nothing for no data, for an empty chunk would end it."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def request_body(length: int) -> Body:
    return ChunkedBody(400) if length == CHUNKED else LengthBody(length)


def response_body(length: int) -> Body:
    if length == CHUNKED:
        return ChunkedBody(502)
    return CloseBody() if length == UNTIL_CLOSE else LengthBody(length)
