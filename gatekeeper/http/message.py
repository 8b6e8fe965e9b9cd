"""A request as the core sees it, whatever it came as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Request(Protocol):
    """One request, neutral between ASGI, WSGI and the wire.

    The same bytes give the same values in each home, except for what a WSGI server has already lost: repeated
    fields are joined with commas there, and a field spelt with `_` cannot be told from the one with `-`.
    """

    method: str
    """In upper case: frameworks route `post` as `POST`, so a rule must not tell them apart."""

    path: str
    """The whole path with the mount prefix, percent-decoded once, as UTF-8; not yet normalised."""

    peer: str | None
    """The address of the connection's other end; None or empty when it is a Unix socket or unknown."""

    native: Any
    """What the request came as: the ASGI scope or the WSGI environ. None once the request was decided and is the
    application's; fields cannot be read any more then."""

    def fields(self, name: str) -> list[str]:
        """The values of a field, in order. `name` is in lower case."""

    def field(self, name: str) -> str | None:
        """A field's value, None if it is absent. `name` is in lower case.

        Where the field is repeated its values are joined by commas (RFC 9110, 5.3), as WSGI servers do.
        """

    def query(self) -> str:
        """The query as it came, percent-encoded, without its question mark."""


class ScopeRequest:
    """A Request over an ASGI scope ("http" or "websocket")."""

    def __init__(self, scope: Any) -> None:
        self.native = scope
        self.method = scope.get("method", "GET").upper()  # a WebSocket begins as a GET
        self.path = scope["path"]
        client = scope.get("client")
        self.peer = client[0] if client else None

    def fields(self, name: str) -> list[str]:
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for key, value in self.native["headers"] if key.lower() == wanted]

    def field(self, name: str) -> str | None:
        values = self.fields(name)
        return ",".join(values) if values else None

    def query(self) -> str:
        query: bytes = self.native.get("query_string", b"")
        return query.decode("latin-1")


class EnvironRequest:
    """A Request over a WSGI environ (PEP 3333)."""

    blocking = True  # its home may wait for a store

    def __init__(self, environ: dict[str, Any]) -> None:
        self.native: Any = environ
        self.method = environ["REQUEST_METHOD"].upper()
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        # PEP 3333 hands over bytes in the guise of latin-1; ASGI has them decoded as UTF-8.
        self.path = path if path.isascii() else path.encode("latin-1", "replace").decode("utf-8", "replace")
        self.peer = environ.get("REMOTE_ADDR")

    def fields(self, name: str) -> list[str]:
        value = self.field(name)
        return [] if value is None else [value]

    def field(self, name: str) -> str | None:
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        value = self.native.get(key)
        return value if isinstance(value, str) else None

    def query(self) -> str:
        query: str = self.native.get("QUERY_STRING", "")
        return query


def split_list(values: Iterable[str]) -> list[str]:
    """The members of a list field, over all its lines (RFC 9110, 5.6.1). Commas in quoted strings are none.

    A quote that is never closed is none either: else a client that leaves one open would swallow the members
    that proxies add behind it.
    """
    text = ",".join(values)
    if '"' in text:
        members, start, quoted, escaped = [], 0, False, False
        for at, char in enumerate(text):
            if escaped:
                escaped = False
            elif quoted and char == "\\":
                escaped = True
            elif char == '"':
                quoted = not quoted
            elif char == "," and not quoted:
                members.append(text[start:at].strip(" \t"))
                start = at + 1
        if not quoted:
            return [*members, text[start:].strip(" \t")]
    return [member.strip(" \t") for member in text.split(",")] if text else []
