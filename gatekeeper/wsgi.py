"""The gate as WSGI middleware (PEP 3333): `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from gatekeeper.commands import run
from gatekeeper.decorators import CURRENT
from gatekeeper.errors import Limited, SettingsError
from gatekeeper.gate import Refusal, Ticket
from gatekeeper.http.message import EnvironRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Settings

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
        if iscoroutinefunction(self.keeper.settings.identity.user):
            raise SettingsError(["identity.user: expected a function that is not asynchronous, under WSGI"])

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        keeper = self.keeper
        gate = keeper.gate
        before = environ.get("gatekeeper.ticket")
        if before is not None and before.gate is gate:  # the same middleware stands around us already
            return self.app(environ, start_response)
        request = EnvironRequest(environ)
        ticket = run(gate.admit(request), keeper.ask)
        if ticket.refused:
            return _refuse(environ, start_response, gate.refusal(ticket))
        environ["gatekeeper.ticket"] = ticket
        exchange = _Exchange(ticket, start_response)
        if not keeper.decorates and not ticket.is_open:
            request.native = None  # environ and ticket held each other: the cycle would wait for the collector
            return self.app(environ, exchange.start)  # nothing to do when it ends: the body goes by untouched
        body = _Body(keeper, exchange)
        body.begin(self.app, environ)
        return body


class _Exchange:
    """What the application answers, on its way out."""

    __slots__ = ("_start_response", "refusal", "ticket")

    def __init__(self, ticket: Ticket, start_response: StartResponse) -> None:
        self.ticket = ticket
        self._start_response = start_response
        self.refusal: list[bytes] = []
        """The body in place of the application's, once `ticket.replaced`."""

    def start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        """The `start_response` that the application is given."""
        ticket = self.ticket
        ticket.sent = int(status[:3])
        if ticket.refused and ticket.sent >= 500:
            # The application took a decorator's refusal for a fault of its own; we know better.
            self.replace(ticket.gate.refusal(ticket), *exc_info)
            return _discard
        fields = [(name.decode(), value.decode()) for name, value in ticket.gate.respond(ticket)]
        return self._start_response(status, headers + fields, *exc_info)

    def replace(self, refusal: Refusal, *exc_info: Any) -> None:
        self.ticket.sent = refusal.status
        self.ticket.replaced = True
        self.refusal = _refuse(self.ticket.request.native, self._start_response, refusal, *exc_info)


class _Body:
    """The application's body where its end matters, or where it may run while it is iterated."""

    __slots__ = ("_body", "_exchange", "_iterator", "_keeper")

    def __init__(self, keeper: Gatekeeper, exchange: _Exchange) -> None:
        self._keeper = keeper
        self._exchange = exchange
        self._body: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] = iter(())

    def begin(self, app: App, environ: Environ) -> None:
        nothing: Iterable[bytes] = ()
        try:
            self._body = self._watch(lambda: app(environ, self._exchange.start), nothing)
            self._iterator = self._watch(lambda: iter(self._body), self._iterator)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        ticket = self._exchange.ticket
        if not ticket.replaced:
            chunk = self._watch(lambda: next(self._iterator, None), None)
            if chunk is not None and not ticket.replaced:
                return chunk
        if self._exchange.refusal:
            return self._exchange.refusal.pop()
        ticket.ended = True
        raise StopIteration

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            ticket = self._exchange.ticket
            ticket.request.native = None
            run(self._keeper.gate.finish(ticket), self._keeper.ask)

    def _watch(self, step: Callable[[], T], instead: T) -> T:
        """Let the application run. A decorator's refusal that reaches us is the answer, if none was begun."""
        ticket = self._exchange.ticket
        token = CURRENT.set(ticket)
        try:
            return step()
        except Limited as limited:
            if ticket.sent:
                raise
            self._exchange.replace(ticket.gate.refusal(ticket, limited.verdict))
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
