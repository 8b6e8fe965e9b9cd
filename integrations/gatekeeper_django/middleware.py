"""The gate as Django middleware, synchronous and asynchronous alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from asgiref.sync import iscoroutinefunction, markcoroutinefunction

from gatekeeper.commands import Call, Question, Steps, arun, run
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper_django.answers import (
    arefuse,
    arefuse_error,
    awatching,
    is_of_session,
    leave,
    refuse,
    refuse_error,
    watching,
)
from gatekeeper_django.conf import Policy, policy
from gatekeeper_django.requests import DjangoTicket, user_of


class GatekeeperMiddleware:
    """Limits requests by the rules of `GATEKEEPER` in Django's settings.

    The request's ticket is `request.gatekeeper`. Raises ImproperlyConfigured when the settings are wrong.

    It stands before what costs: sessions, authentication, the view. Rules that count by the user wait until the
    middleware behind it has made the user known: they and the others are spent together when the view is about to
    run. Whoever is over the limit of an address is refused before that, at once.
    """

    sync_capable: ClassVar[bool] = True
    async_capable: ClassVar[bool] = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self._awaits = bool(iscoroutinefunction(get_response))
        policy().require(awaiting=self._awaits)
        if self._awaits:
            markcoroutinefunction(self)
        # Whichever Django can call without a thread of its own.
        self.process_view = self._view_async if self._awaits else self._view

    @property
    def keeper(self) -> Gatekeeper:
        """The Gatekeeper in force."""
        return policy().keeper

    def __call__(self, request: Any) -> Any:
        if self._awaits:
            return self._call_async(request)
        if "gatekeeper" in request.__dict__:
            return self.get_response(request)  # it stands there twice
        now = policy()
        keeper = now.keeper
        ticket = DjangoTicket(request)
        request.gatekeeper = ticket
        if _is_within(ticket, keeper):
            pass  # the same policy stands around Django already
        elif now.needs_user and not hasattr(request, "user"):
            ticket.refused = self._begin(now, ticket)
        else:
            ask = watching(ticket, keeper.ask) if now.bans else keeper.ask
            ticket.refused = keeper.gate.admit_at_once(ticket, ask, ticket.read)
        if ticket.refused:
            response = refuse(ticket)
            ticket.let_go()
            return response
        token = CURRENT.set(ticket) if IN_USE else None
        try:
            response = self.get_response(request)
            if ticket.steps is not None and self._resume(now, ticket):
                response = _instead(response, refuse(ticket))  # no view has run: an unknown page, a redirect
            elif ticket.raised is not None and response.status_code >= 500:
                response = _instead(response, refuse_error(ticket, ticket.raised))
            return leave(ticket, response, None)
        except BaseException as error:
            _abandon(ticket, error)
            if ticket.is_open:
                keeper.finish(ticket)
            raise
        finally:
            if token is not None:
                CURRENT.reset(token)

    async def _call_async(self, request: Any) -> Any:
        if "gatekeeper" in request.__dict__:
            return await self.get_response(request)
        now = policy()
        keeper = now.keeper
        gate = keeper.gate
        ticket = DjangoTicket(request)
        ticket.awaiting = True
        request.gatekeeper = ticket
        if _is_within(ticket, keeper):
            pass
        elif now.needs_user and not hasattr(request, "user"):
            ticket.refused = await self._begin_async(now, ticket)
        elif keeper.awaits or gate.reads_body or now.needs_user:
            ask = awatching(ticket, keeper.aask) if now.bans else keeper.aask
            ticket.refused = await arun(gate.admit(ticket), ask, ticket.aread)
        else:
            ticket.refused = gate.admit_at_once(ticket, watching(ticket, keeper.ask) if now.bans else keeper.ask)
        if ticket.refused:
            response = await arefuse(ticket)
            ticket.let_go()
            return response
        token = CURRENT.set(ticket) if IN_USE else None
        try:
            response = await self.get_response(request)
            ticket.awaiting = True  # a view in a thread may have said otherwise
            if ticket.steps is not None and await self._resume_async(now, ticket):
                response = _instead(response, await arefuse(ticket))
            elif ticket.raised is not None and response.status_code >= 500:
                response = _instead(response, await arefuse_error(ticket, ticket.raised))
            return leave(ticket, response, asyncio.get_running_loop() if ticket.is_open else None)
        except BaseException as error:
            _abandon(ticket, error)
            if ticket.is_open:
                await keeper.afinish(ticket)
            raise
        finally:
            if token is not None:
                CURRENT.reset(token)

    def _view(self, request: Any, view: Any, arguments: Any, keywords: Any) -> Any:
        """What Django calls when the view is about to run."""
        ticket = getattr(request, "gatekeeper", None)
        if ticket is None or ticket.steps is None:
            return None
        return refuse(ticket) if self._resume(policy(), ticket) else None

    async def _view_async(self, request: Any, view: Any, arguments: Any, keywords: Any) -> Any:
        ticket = getattr(request, "gatekeeper", None)
        if ticket is None or ticket.steps is None:
            return None
        return await arefuse(ticket) if await self._resume_async(policy(), ticket) else None

    def process_exception(self, request: Any, error: Exception) -> Any:
        """A limited function that the view has called was called too often: that is no fault of the view's.

        Nor is it that the store of sessions does not answer.
        """
        ticket = getattr(request, "gatekeeper", None)
        if ticket is None or not (isinstance(error, Limited) or is_of_session(request, error)):
            return None
        return refuse_error(ticket, error)  # type: ignore[arg-type]  # a StoreError, if it is of the session

    # Rules that count by the user, where Django makes the user known only behind us.

    def _begin(self, now: Policy, ticket: DjangoTicket) -> int:
        steps = now.keeper.gate.admit(ticket)
        question, status = _first(steps)
        if question is None:
            return status
        if isinstance(question, Call) and question.function is user_of:
            look = now.keeper.gate.look(ticket)
            if look is None or _all_allowed(now.keeper.ask(look)):
                ticket.steps, ticket.question = steps, question
                return 0
        ask = watching(ticket, now.keeper.ask) if now.bans else now.keeper.ask
        return run(_resumed(steps, question), ask, ticket.read)

    async def _begin_async(self, now: Policy, ticket: DjangoTicket) -> int:
        steps = now.keeper.gate.admit(ticket)
        question, status = _first(steps)
        if question is None:
            return status
        if isinstance(question, Call) and question.function is user_of:
            look = now.keeper.gate.look(ticket)
            if look is None or _all_allowed(await now.keeper.aask(look)):
                ticket.steps, ticket.question = steps, question
                return 0
        ask = awatching(ticket, now.keeper.aask) if now.bans else now.keeper.aask
        return await arun(_resumed(steps, question), ask, ticket.aread)

    def _resume(self, now: Policy, ticket: DjangoTicket) -> int:
        steps, question = _taken(ticket)
        ticket.awaiting = False
        ask = watching(ticket, now.keeper.ask) if now.bans else now.keeper.ask
        ticket.refused = run(_resumed(steps, question), ask, ticket.read)
        return ticket.refused

    async def _resume_async(self, now: Policy, ticket: DjangoTicket) -> int:
        steps, question = _taken(ticket)
        ask = awatching(ticket, now.keeper.aask) if now.bans else now.keeper.aask
        ticket.refused = await arun(_resumed(steps, question), ask, ticket.aread)
        return ticket.refused


def _is_within(ticket: DjangoTicket, keeper: Gatekeeper) -> bool:
    """Whether the same policy stands around Django, as WSGI or ASGI middleware: it has charged its rules then."""
    request = ticket.native
    outer = request.META.get("gatekeeper.ticket")
    if outer is None:
        scope = request.__dict__.get("scope")
        if scope is None or "gatekeeper" not in scope:
            return False
        outer = scope["gatekeeper"]
    ticket.outer = outer
    if outer.under(keeper.gate) is None:
        return False
    keeper.gate.identify(ticket)
    return True


def _first(steps: Steps[int]) -> tuple[Question | None, int]:
    """The first question of steps; or None, and their result."""
    try:
        return next(steps), 0
    except StopIteration as stop:
        return None, stop.value


def _resumed(steps: Steps[int], question: Question | None) -> Steps[int]:
    """Steps that have asked already, for a driver that begins at the beginning."""
    try:
        while True:
            answer = yield question  # type: ignore[misc]  # there is one
            question = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _taken(ticket: DjangoTicket) -> tuple[Steps[int], Question | None]:
    steps, question = ticket.steps, ticket.question
    ticket.steps = ticket.question = None
    assert steps is not None
    return steps, question


def _all_allowed(replies: Any) -> bool:
    """Whether nothing was refused. A store that does not answer refuses nothing yet."""
    return all(reply.allowed or isinstance(reply, StoreError) for reply in replies)


def _instead(response: Any, answer: Any) -> Any:
    """An answer in a response's place; what that holds is closed with it."""
    answer._resource_closers.extend(response._resource_closers)
    return answer


def _abandon(ticket: DjangoTicket, error: BaseException) -> None:
    """No response came: only an error does, or the client has left."""
    if ticket.steps is not None:
        ticket.steps.close()
        ticket.steps = None
    if isinstance(error, Exception):
        ticket.sent = 500
    ticket.let_go()
