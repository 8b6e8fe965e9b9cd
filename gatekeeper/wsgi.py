"""The gate as WSGI middleware (PEP 3333): `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from gatekeeper.commands import nobody, run
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, SettingsError, StoreError
from gatekeeper.http.message import EnvironRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Settings, is_asynchronous, parameters
from gatekeeper.ticket import Refusal, Ticket

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]

T = TypeVar("T")

_OTHER: Final = "for ASGI: from gatekeeper.asgi import GatekeeperMiddleware"
_DIGITS: Final = 19  # so many or more are the length of no body, and of some thousand Python would make an error
_STATUS: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class GatekeeperMiddleware:
    """Limits requests before the application sees them.

    - `settings`: a mapping, the path of a TOML file, Settings, or a Gatekeeper that others share.

    The request's Ticket is in `environ["gatekeeper.ticket"]`. Raises SettingsError when the settings are wrong,
    TypeError for an ASGI application, or when an ASGI server calls it.
    """

    def __init__(self, app: App, settings: Gatekeeper | Settings | Mapping[str, Any] | str | Path) -> None:
        if is_asynchronous(app) or "receive" in parameters(app):
            raise TypeError(f"app: expected a WSGI application; {_OTHER}")
        self.app = app
        self.keeper = settings if isinstance(settings, Gatekeeper) else Gatekeeper(settings)
        self.keeper.require(awaiting=False)
        problems = [
            f"{path}: expected a function that is not asynchronous, under WSGI"
            for path, function in self.keeper.functions()
            if is_asynchronous(function)
        ]
        if problems:
            raise SettingsError(problems)

    def __call__(
        self, environ: Environ, start_response: StartResponse | None = None, *more: object
    ) -> Iterable[bytes]:
        if start_response is None or more:  # (scope), or (scope, receive, send)
            raise TypeError(f"expected to be called by a WSGI server; {_OTHER}")
        keeper = self.keeper
        gate = keeper.gate
        ticket = _Ticket(environ)
        ticket.start_response = start_response
        if "gatekeeper.ticket" in environ:
            ticket.outer = environ["gatekeeper.ticket"]
            if ticket.outer.under(gate) is not None:
                return self.app(environ, start_response)  # the same policy stands around us already
        ticket.refused = gate.admit_at_once(ticket, keeper.ask, ticket.read)
        if ticket.refused:
            return _refuse(environ, start_response, gate.refusal(ticket))
        environ["gatekeeper.ticket"] = ticket
        if ticket.session is not None:
            environ["gatekeeper.session"] = ticket.session
        if not IN_USE and not ticket.is_open and ticket.session is None:
            ticket.native = None  # environ and ticket held each other: the cycle would wait for the collector
            return self.app(environ, ticket.start)  # nothing to do when it ends: the body goes by untouched
        body = _Body(keeper, ticket)
        body.begin(self.app, environ)
        return body


class EnvironTicket(EnvironRequest, Ticket):
    """A ticket of a WSGI request: what it reads of the body, the application is given all the same."""

    start_response: StartResponse
    """The server's."""

    def read(self, most: int) -> bytes | None:
        """The body, None if it is longer; the application is given it all the same."""
        environ = self.native
        length = environ.get("CONTENT_LENGTH") or ""
        left = 0
        if length.isascii() and length.isdigit():
            left = int(length) if len(length) < _DIGITS else most + 1
        if environ.get("wsgi.input_terminated"):  # a server that has unchunked the body says so
            left = left or most + 1
        source = environ["wsgi.input"]
        head = b""
        while len(head) < min(left, most + 1):
            piece = source.read(min(left, most + 1) - len(head))
            if not piece:
                break
            head += piece
        environ["wsgi.input"] = io.BufferedReader(_Replayed(head, source, left - len(head)))
        return head if len(head) <= most else None

    def heed(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """A response's fields without those that tell us what it has cost."""
        for name, value in headers:
            if name.lower() in self.gate.reports:
                self.gate.report(self, name.lower(), value)
        return [(name, value) for name, value in headers if name.lower() not in self.gate.reports]


class _Ticket(EnvironTicket):
    """A ticket that what the application answers goes through, on its way out."""

    refusal: Sequence[bytes] = ()
    """The body in place of the application's, once `replaced`."""

    def start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        """The `start_response` that the application is given."""
        if self.replaced:
            return _discard
        self.sent = int(status[:3])
        if self.sent >= 500 and self.limited is not None and (limited := self.limited()) is not None:
            # The application took a decorator's refusal for a fault of its own; we know better.
            self.replace(self.gate.refusal(self, limited.verdict), *exc_info)
            return _discard
        if self.gate.reports:
            headers = self.heed(headers)
        fields = self.gate.respond_in_text(self)
        if self.session is not None:
            saved = self.save()
            if saved is None:
                self.replace(self.gate.refusal(self), *exc_info)
                return _discard
            fields += saved
        write = self.start_response(status, headers + fields, *exc_info)
        return self._counted(write) if self.is_open else write

    def save(self) -> list[tuple[str, str]] | None:
        """Write the session: the fields to add. None if its store does not answer, and that is to be told."""
        assert self.session is not None
        if self.sent >= 500 and self.session.failure is not None:
            self.refused = 503  # the application took the store's fault for its own
            return None
        try:
            return [(name.decode(), value.decode()) for name, value in run(self.gate.save(self), nobody)]
        except StoreError:
            return None

    def _counted(self, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def counted(data: bytes) -> object:
            self.moved += len(data)
            return write(data)

        return counted

    def replace(self, refusal: Refusal, *exc_info: Any) -> None:
        self.sent = refusal.status
        self.replaced = True
        self.refusal = _refuse(self.native, self.start_response, refusal, *exc_info)


class _Replayed(io.RawIOBase):
    """A body whose beginning was read already. It ends where the request does: servers may wait for more."""

    def __init__(self, head: bytes, source: Any, left: int) -> None:
        self._head = head
        self._source = source
        self._left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
        else:
            piece = self._source.read(min(size, self._left)) if self._left > 0 else b""
            self._left -= len(piece)
        buffer[: len(piece)] = piece
        return len(piece)


class _Body:
    """The application's body where its end matters, or where it may run while it is iterated."""

    __slots__ = ("_body", "_iterator", "_keeper", "_rest", "_ticket")

    def __init__(self, keeper: Gatekeeper, ticket: _Ticket) -> None:
        self._keeper = keeper
        self._ticket = ticket
        self._body: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] = iter(())
        self._rest: Iterator[bytes] | None = None

    def begin(self, app: App, environ: Environ) -> None:
        nothing: Iterable[bytes] = ()
        try:
            self._body = self._watch(lambda: app(environ, self._ticket.start), nothing)
            self._iterator = self._watch(lambda: iter(self._body), self._iterator)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        ticket = self._ticket
        if not ticket.replaced:
            chunk = self._watch(lambda: next(self._iterator, None), None)
            if not ticket.replaced:
                if chunk is not None:
                    ticket.moved += len(chunk)
                    return chunk
                ticket.ended = True
                raise StopIteration
        if self._rest is None:
            self._rest = iter(ticket.refusal)
            ticket.ended = True
        return next(self._rest)

    def close(self) -> None:
        ticket = self._ticket
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            ticket.native = None
            self._keeper.finish(ticket)

    def __del__(self) -> None:
        # A server that forgets to close it must not hold what the request holds for ever.
        if self._ticket.is_open:
            self._keeper.finish(self._ticket)

    def _watch(self, step: Callable[[], T], instead: T) -> T:
        """Let the application run. A decorator's refusal that reaches us is the answer, if none was begun."""
        ticket = self._ticket
        token = CURRENT.set(ticket)
        try:
            return step()
        except Limited as limited:
            if ticket.sent:
                raise
            ticket.replace(ticket.gate.refusal(ticket, limited.verdict))
            return instead
        except StoreError:
            if ticket.sent or ticket.session is None or ticket.session.failure is None:
                ticket.sent = 500
                raise
            ticket.refused = 503
            ticket.replace(ticket.gate.refusal(ticket))
            return instead
        except Exception:
            ticket.sent = 500
            raise
        finally:
            CURRENT.reset(token)


def _refuse(environ: Environ, start_response: StartResponse, refusal: Refusal, *exc_info: Any) -> list[bytes]:
    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in refusal.fields]
    status = _STATUS.get(refusal.status, str(refusal.status))
    start_response(status, fields, *exc_info)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [refusal.body]


def _discard(data: bytes) -> None:
    """The `write` of a response that was replaced."""
