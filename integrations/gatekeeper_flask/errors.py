"""Refusals as Werkzeug's exceptions, so that `errorhandler(429)` and its like see them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from werkzeug import exceptions
from werkzeug.wrappers import Response

from gatekeeper.commands import Verdict
from gatekeeper.errors import Limited
from gatekeeper.ticket import Refusal, Ticket, tightness

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Refused(exceptions.HTTPException):
    """A request is refused. Without an error handler the answer is the one that the settings give.

    - `ticket`: the request, with the verdicts of all limits that were asked
    - `refusal`: the answer that is given unless the application makes one of its own: status, fields and body
    - `verdict`: of the limit with the longest wait; None where no limit refused (an address that is denied)
    - `retry_after`: seconds until it is worth to come again; None where waiting does not help
    """

    retry_after: datetime | int | None = None
    verdict: Verdict | None

    def __init__(self, ticket: Ticket, refusal: Refusal, verdict: Verdict | None) -> None:
        wait = next((int(value) for name, value in refusal.fields if name == b"retry-after"), None)
        Exception.__init__(self)  # what lies between has other arguments, for what is set below
        self.response = None
        if refusal.status == 429:
            self.description = "The request would exceed a quota."
            if wait is not None:
                self.description += f" Try again in {wait} {'second' if wait == 1 else 'seconds'}."
        self.code = refusal.status
        self.ticket = ticket
        self.refusal = refusal
        self.verdict = verdict
        self.retry_after = wait

    def get_headers(
        self, environ: WSGIEnvironment | None = None, scope: dict[str, Any] | None = None
    ) -> list[tuple[str, str]]:
        """All fields of the refusal: `Retry-After`, `Cache-Control`, `RateLimit`, those of its body."""
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.refusal.fields]

    def get_body(self, environ: WSGIEnvironment | None = None, scope: dict[str, Any] | None = None) -> str:
        return self.refusal.body.decode("utf-8", "replace")

    def get_response(self, environ: Any = None, scope: Any = None) -> Any:
        if self.response is not None:
            return self.response
        # Flask has this error for the result of its function, whose frame the traceback holds: together they would
        # wait for the collector, with the request, and there may be many.
        self.__traceback__ = None
        return Response(self.refusal.body, self.refusal.status, self.get_headers(environ, scope))


class TooManyRequests(Refused, exceptions.TooManyRequests, Limited):
    """429: a limit refuses. It is Werkzeug's TooManyRequests and gatekeeper's Limited."""

    verdict: Verdict


class _BadRequest(Refused, exceptions.BadRequest):
    """400: a field of the body that a rule counts by is there twice."""


class _Forbidden(Refused, exceptions.Forbidden):
    """403: the client's address is denied."""


class _ContentTooLarge(Refused, exceptions.RequestEntityTooLarge):
    """413: the body is longer than what is read to find whom to count it for."""


class _ServiceUnavailable(Refused, exceptions.ServiceUnavailable):
    """503: a store did not answer, and the rule denies."""


# Flask looks for handlers by the class's code.
_BY_STATUS: Final[dict[int, Callable[[Ticket, Refusal, Verdict | None], Refused]]] = {
    400: _BadRequest,
    403: _Forbidden,
    413: _ContentTooLarge,
    429: TooManyRequests,
    503: _ServiceUnavailable,
}


def error_of(ticket: Ticket, refusal: Refusal, verdict: Verdict | None = None) -> Refused:
    """The error for a refusal; `verdict` where it is not one of the ticket's own."""
    verdicts = [
        charge.verdict for charge in ticket.charges if not charge.verdict.allowed and not charge.limit.shadow
    ]
    verdict = verdict or min(verdicts, key=tightness, default=None)
    return _BY_STATUS.get(refusal.status, Refused)(ticket, refusal, verdict)
