"""The gate as WSGI middleware (PEP 3333): `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from gatekeeper.commands import run
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, SettingsError
from gatekeeper.gate import Refusal, Ticket
from gatekeeper.http.message import EnvironRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Settings, is_asynchronous

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]

T = TypeVar("T")

_STATUS: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class GatekeeperMiddleware:
    """Limits requests before the application sees them.

    - `settings`: a mapping, the path of a TOML file, Settings, or a Gatekeeper that others share.

    The request's Ticket is in `environ["gatekeeper.ticket"]`. Raises SettingsError when the settings are wrong.
    """

    def __init__(self, app: App, settings: Gatekeeper | Settings | Mapping[str, Any] | str | Path) -> None:
        self.app = app
        self.keeper = settings if isinstance(settings, Gatekeeper) else Gatekeeper(settings)
        if is_asynchronous(self.keeper.settings.identity.user):
            raise SettingsError(["identity.user: expected a function that is not asynchronous, under WSGI"])

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        keeper = self.keeper
        gate = keeper.gate
        ticket = _Ticket(environ)
        ticket.start_response = start_response
        if "gatekeeper.ticket" in environ:
            ticket.outer = environ["gatekeeper.ticket"]
            if ticket.outer.under(gate) is not None:
                return self.app(environ, start_response)  # the same policy stands around us already
        ticket.refused = gate.admit_at_once(ticket, keeper.ask)
        if ticket.refused:
            return _refuse(environ, start_response, gate.refusal(ticket))
        environ["gatekeeper.ticket"] = ticket
        if not IN_USE and not ticket.is_open:
            ticket.native = None  # environ and ticket held each other: the cycle would wait for the collector
            return self.app(environ, ticket.start)  # nothing to do when it ends: the body goes by untouched
        body = _Body(keeper, ticket)
        body.begin(self.app, environ)
        return body


class _Ticket(EnvironRequest, Ticket):
    """A ticket that what the application answers goes through, on its way out."""

    refusal: Sequence[bytes] = ()
    """The body in place of the application's, once `replaced`."""

    start_response: StartResponse
    """The server's."""

    def start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        """The `start_response` that the application is given."""
        if self.replaced:
            return _discard
        self.sent = int(status[:3])
        if self.sent >= 500 and self.limited is not None and (limited := self.limited()) is not None:
            # The application took a decorator's refusal for a fault of its own; we know better.
            self.replace(self.gate.refusal(self, limited.verdict), *exc_info)
            return _discard
        fields = [(name.decode(), value.decode()) for name, value in self.gate.respond(self)]
        return self.start_response(status, headers + fields, *exc_info)

    def replace(self, refusal: Refusal, *exc_info: Any) -> None:
        self.sent = refusal.status
        self.replaced = True
        self.refusal = _refuse(self.native, self.start_response, refusal, *exc_info)


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
            run(self._keeper.gate.finish(ticket), self._keeper.ask)

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
