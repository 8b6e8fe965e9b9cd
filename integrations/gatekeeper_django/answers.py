"""Responses: what is answered in a view's place, and what every response tells."""

from __future__ import annotations

import logging
import sys
import weakref
from asyncio import AbstractEventLoop, ensure_future
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from http.client import responses
from typing import Any, Final

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.core.signals import got_request_exception
from django.http import HttpResponse
from django.urls import get_callable, get_resolver
from django.utils.log import log_response

from gatekeeper.commands import Batch, Hits, Replies, Verdict
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.algorithms import NS
from gatekeeper.ticket import Charge, Refusal
from gatekeeper_django.requests import DjangoTicket
from gatekeeper_django.signals import banned, limited

_LOG: Final = logging.getLogger("gatekeeper")
_SECURITY: Final = logging.getLogger("django.security.gatekeeper")
_QUOTAS: Final = (429, 503)

# What is refused


def refuse(ticket: DjangoTicket, verdict: Verdict | None = None) -> Any:
    """The response to a request whose ticket is refused, or that `verdict` of another limit refused."""
    refusal = ticket.gate.refusal(ticket, verdict)
    error = _error(ticket, verdict)
    handler = _handler(ticket, refusal)
    if handler is None:
        response = _plain(ticket, refusal)
    else:
        respond = async_to_sync(handler) if iscoroutinefunction(handler) else handler
        response = _told(refusal, respond(ticket.native, error))
    note(ticket, refusal.status, response)
    for signal, arguments in _news(ticket, refusal.status, error):
        signal.send_robust(sender=Gatekeeper, **arguments)
    return response


async def arefuse(ticket: DjangoTicket, verdict: Verdict | None = None) -> Any:
    """As `refuse`, awaiting the handler and the receivers of signals."""
    refusal = ticket.gate.refusal(ticket, verdict)
    error = _error(ticket, verdict)
    handler = _handler(ticket, refusal)
    if handler is None:
        response = _plain(ticket, refusal)
    else:
        respond = handler if iscoroutinefunction(handler) else sync_to_async(handler, thread_sensitive=True)
        response = _told(refusal, await respond(ticket.native, error))
    note(ticket, refusal.status, response)
    for signal, arguments in _news(ticket, refusal.status, error):
        await signal.asend_robust(sender=Gatekeeper, **arguments)
    return response


def is_of_session(request: Any, error: object) -> bool:
    """Whether an error is that the store of the request's session does not answer."""
    return isinstance(error, StoreError) and getattr(getattr(request, "session", None), "failure", None) is error


def refuse_error(ticket: DjangoTicket, error: Limited | StoreError) -> Any:
    """The response to a request that could not be answered for a limit, or for the store of sessions."""
    if isinstance(error, Limited):
        return refuse(ticket, error.verdict)
    if ticket.session is not None:
        ticket.session.failure = error
    ticket.refused = 503
    response = _plain(ticket, ticket.gate.refusal(ticket))
    note(ticket, 503, response)
    return response


async def arefuse_error(ticket: DjangoTicket, error: Limited | StoreError) -> Any:
    """As `refuse_error`, awaiting the handler and the receivers of signals."""
    if isinstance(error, Limited):
        return await arefuse(ticket, error.verdict)
    return refuse_error(ticket, error)


def announce(ticket: DjangoTicket, verdict: Verdict) -> None:
    """Log and signal a refusal that somebody else answers."""
    note(ticket, 429, None)
    for signal, arguments in _news(ticket, 429, Limited(verdict)):
        signal.send_robust(sender=Gatekeeper, **arguments)


def _handler(ticket: DjangoTicket, refusal: Refusal) -> Callable[..., Any] | None:
    """The root URLconf's `handler429`, as its `handler404` is for pages that are not there."""
    if refusal.status != 429:
        return None
    resolver = get_resolver(getattr(ticket.native, "urlconf", None))
    handler = getattr(resolver.urlconf_module, "handler429", None)
    return None if handler is None else get_callable(handler)


def _plain(ticket: DjangoTicket, refusal: Refusal) -> Any:
    # The length that a HEAD is told is a GET's.
    response = HttpResponse(b"" if ticket.method == "HEAD" else refusal.body, status=refusal.status)
    for name, value in refusal.fields:
        response.headers[name.decode()] = value.decode("latin-1")
    return response


def _told(refusal: Refusal, response: Any) -> Any:
    """A page of the application's own with the fields of a refusal, but those of another body."""
    for name, value in refusal.fields:
        if name not in (b"content-type", b"content-length"):
            response.headers[name.decode()] = value.decode("latin-1")
    return response


def _refusals(ticket: DjangoTicket) -> list[Charge]:
    return [charge for charge in ticket.charges if not charge.verdict.allowed and not charge.limit.shadow]


def _error(ticket: DjangoTicket, verdict: Verdict | None) -> Limited:
    verdicts = [charge.verdict for charge in _refusals(ticket)]
    longest = max(verdicts, key=lambda one: one.retry_ns, default=verdict)
    return Limited(Verdict(False, 0, 0, NS, NS, None) if longest is None else longest)


def _refusing(ticket: DjangoTicket) -> list[str]:
    """The names of the rules that refused."""
    return list(dict.fromkeys(charge.limit.rule.name for charge in _refusals(ticket)))


def note(ticket: DjangoTicket, status: int, response: Any) -> None:
    """A line in the log, as Django has them; a response that has one gets no second from `django.request`."""
    log_response(
        "%s (%s, %s): %s",
        responses.get(status, "Refused"),
        ", ".join(_refusing(ticket)) or "-",
        ticket.address,
        ticket.path,
        response=_Bare(status) if response is None else response,
        request=ticket.native,
        logger=_SECURITY,
        level="warning",  # a 503 of ours is no error of the application's
    )


class _Bare:
    """What the log needs of a response that somebody else makes."""

    def __init__(self, status: int) -> None:
        self.status_code = status


def _news(ticket: DjangoTicket, status: int, error: Limited) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The signals to send for a refusal, with their arguments."""
    request = ticket.native
    if status in _QUOTAS and limited.receivers:
        rules = _refusing(ticket)
        yield limited, {"request": request, "ticket": ticket, "rules": rules, "verdict": error.verdict}
    bans, ticket.bans = ticket.bans, ()
    for rule, key in bans:
        yield banned, {"request": request, "ticket": ticket, "rule": rule, "key": key}


def watching(ticket: DjangoTicket, ask: Callable[[Hits], Replies]) -> Callable[[Hits], Replies]:
    """What asks, and notes on the ticket the bans that come of it."""

    def watch(batch: Hits) -> Replies:
        replies = ask(batch)
        note_bans(ticket, batch, replies)
        return replies

    return watch


def awatching(ticket: DjangoTicket, ask: Callable[[Hits], Any]) -> Callable[[Hits], Any]:
    """As `watching`, awaiting."""

    async def watch(batch: Hits) -> Replies:
        replies: Replies = await ask(batch)
        note_bans(ticket, batch, replies)
        return replies

    return watch


def note_bans(ticket: DjangoTicket, batch: Hits, replies: Replies) -> None:
    """A strike after which no strike is counted any more was the one that banned the key."""
    if batch.__class__ is Batch:
        for (limit, key, cost), reply in zip(batch, replies, strict=True):
            if cost and limit.kind == "penalty" and isinstance(reply, Verdict) and reply.remaining == reply.limit:
                ticket.bans = (*ticket.bans, (limit.rule.name, key))  # type: ignore[attr-defined]


def _note_error(*, request: Any = None, **_: Any) -> None:
    """Django takes a refusal that comes out of a middleware for a fault; ours, around it, knows better.

    So it does of a session that cannot be loaded or saved.
    """
    error = sys.exc_info()[1]
    ticket = getattr(request, "gatekeeper", None)
    if isinstance(ticket, DjangoTicket) and (isinstance(error, Limited) or is_of_session(request, error)):
        ticket.raised = error  # type: ignore[assignment]  # a StoreError, if it is of the session


got_request_exception.connect(_note_error, dispatch_uid="gatekeeper_django.answers")

# What is answered


def leave(ticket: DjangoTicket, response: Any, loop: AbstractEventLoop | None) -> Any:
    """A response on its way out: it gets its fields, and the ticket ends with it.

    `loop`: of who awaits; the store is asked there at the end, where it has to be awaited.
    """
    gate, is_open = ticket.gate, ticket.is_open
    if gate.reports and is_open:
        _heed(ticket, response)
    if ticket.hits:
        headers = response.headers
        for field, value in gate.respond(ticket):
            headers[field] = value
    ticket.sent = response.status_code
    if response.streaming and (is_open or (IN_USE and getattr(response, "file_to_stream", None) is None)):
        watch_stream(ticket, response)
    else:
        ticket.let_go()
    if is_open:
        if not response.streaming:
            ticket.ended = True
            if getattr(response, "is_rendered", True):
                ticket.moved = len(response.content)
            else:
                response.add_post_render_callback(lambda done: setattr(ticket, "moved", len(done.content)))
        # Once: when the server closes the response, or when one is dropped that another middleware has replaced.
        end = weakref.finalize(response, finish, ticket, loop)
        end.atexit = False
        response._resource_closers.append(end)
    return response


def _heed(ticket: DjangoTicket, response: Any) -> None:
    """The fields of a response that tell what it has cost are for us alone."""
    for name in ticket.gate.reports:
        if name in response.headers:
            ticket.gate.report(ticket, name, response.headers[name])
            del response.headers[name]


def finish(ticket: DjangoTicket, loop: AbstractEventLoop | None) -> None:
    """End a request, from whatever thread."""
    keeper: Gatekeeper = ticket.gate.keeper
    ticket.let_go()
    try:
        if loop is not None and keeper.awaits and not loop.is_closed():
            loop.call_soon_threadsafe(_finish_soon, keeper, ticket)
        else:
            keeper.finish(ticket)
    except Exception:  # Django would swallow it without a word
        _LOG.exception("a request could not be ended")


_FINISHING: Final[set[Any]] = set()


def _finish_soon(keeper: Gatekeeper, ticket: DjangoTicket) -> None:
    task = ensure_future(keeper.afinish(ticket))
    _FINISHING.add(task)  # a loop holds its tasks weakly
    task.add_done_callback(_FINISHING.discard)


def watch_stream(ticket: DjangoTicket, response: Any) -> None:
    """Count a body that is streamed, see its end, and let limited functions that it calls find the request."""
    content = response.streaming_content
    response.streaming_content = _astream(ticket, content) if response.is_async else _stream(ticket, content)


def _stream(ticket: DjangoTicket, content: Iterable[bytes]) -> Iterator[bytes]:
    iterator = iter(content)
    try:
        while True:
            token = CURRENT.set(ticket)
            try:
                part = next(iterator)
            except StopIteration:
                ticket.ended = True
                return
            finally:
                CURRENT.reset(token)
            ticket.moved += len(part)
            yield part
    finally:
        _over(ticket)


async def _astream(ticket: DjangoTicket, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        while True:
            token = CURRENT.set(ticket)
            try:
                part = await anext(content)
            except StopAsyncIteration:
                ticket.ended = True
                return
            finally:
                CURRENT.reset(token)
            ticket.moved += len(part)
            yield part
    finally:
        close = getattr(content, "aclose", None)
        if close is not None:
            await close()
        _over(ticket)


def _over(ticket: DjangoTicket) -> None:
    """The body has come to its end. What is still to be settled is when the server closes the response."""
    if not ticket.is_open:
        ticket.let_go()
