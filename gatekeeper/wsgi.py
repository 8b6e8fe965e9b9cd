"""The gate as WSGI middleware (PEP 3333): `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Final, TypeAlias

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
        environ["gatekeeper.ticket"] = ticket
        if ticket.status:
            return _refuse(environ, start_response, gate.refusal(ticket))
        exchange = _Exchange(keeper, ticket, environ, start_response)
        if not keeper.decorates and not ticket.is_open:
            request.native = None  # environ and ticket held each other: the cycle would wait for the collector
            return self.app(environ, exchange.start)  # nothing to do when it ends: the body goes by untouched
        token = CURRENT.set(ticket)
        try:
            body = self.app(environ, exchange.start)
        except Limited as limited:
            body = exchange.limited(limited)
        except BaseException:
            exchange.close(500)
            raise
        finally:
            CURRENT.reset(token)
        return _Body(exchange, body)


class _Exchange:
    """What the application answers, on its way out; and what became of it."""

    __slots__ = ("_environ", "_keeper", "_start_response", "replaced", "status", "ticket")

    def __init__(self, keeper: Gatekeeper, ticket: Ticket, environ: Environ, start_response: StartResponse) -> None:
        self._keeper = keeper
        self.ticket = ticket
        self._environ = environ
        self._start_response = start_response
        self.status = 0
        self.replaced: list[bytes] | None = None

    def start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        """The `start_response` that the application is given."""
        keeper, ticket = self._keeper, self.ticket
        self.status = int(status[:3])
        if ticket.status and self.status >= 500:
            # The application took a decorator's refusal for a fault of its own; we know better.
            self._replace(keeper.gate.refusal(ticket), *exc_info)
            return _discard
        headers = headers + [(name.decode(), value.decode()) for name, value in keeper.gate.respond(ticket)]
        return self._start_response(status, headers, *exc_info)

    def limited(self, limited: Limited) -> list[bytes]:
        """A decorator's refusal reached us: it is the answer, if none was begun."""
        if self.status:
            self.close(500)
            raise limited
        return self._replace(self._keeper.gate.refusal(self.ticket, limited.verdict))

    def close(self, status: int | None) -> None:
        """The request is over; called once."""
        self.ticket.request.native = None
        if self.ticket.is_open:
            run(self._keeper.gate.finish(self.ticket, status), self._keeper.ask)

    def _replace(self, refusal: Refusal, *exc_info: Any) -> list[bytes]:
        self.status = refusal.status
        self.replaced = _refuse(self._environ, self._start_response, refusal, *exc_info)
        return self.replaced


class _Body:
    """The application's body, watched for its end."""

    __slots__ = ("_body", "_ended", "_exchange", "_iterator")

    def __init__(self, exchange: _Exchange, body: Iterable[bytes]) -> None:
        self._exchange = exchange
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        token = CURRENT.set(exchange.ticket)  # an application may run when it is iterated
        try:
            if self._iterator is None:
                # Where the answer was replaced while the application ran, its body is closed unread.
                self._iterator = iter(self._body if exchange.replaced is None else exchange.replaced)
            chunk = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        except Limited as limited:
            self._iterator = iter(exchange.limited(limited))
            return next(self)
        except Exception:
            exchange.status = 500
            self._ended = True
            raise
        finally:
            CURRENT.reset(token)
        if exchange.replaced is not None and chunk not in exchange.replaced:
            self._iterator = iter(exchange.replaced)
            return next(self)
        return chunk

    def close(self) -> None:
        exchange = self._exchange
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            exchange.close(exchange.status if self._ended else None)


def _refuse(environ: Environ, start_response: StartResponse, refusal: Refusal, *exc_info: Any) -> list[bytes]:
    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in refusal.fields]
    status = _STATUS.get(refusal.status, str(refusal.status))
    start_response(status, fields, *exc_info)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [refusal.body]


def _discard(data: bytes) -> None:
    """The `write` of a response that was replaced."""
