"""Limits on functions: `@gk.limit("5/minute")`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from weakref import ref

from gatekeeper.commands import Steps, arun, run
from gatekeeper.errors import Limited, SettingsError
from gatekeeper.settings import LimitSettings, is_asynchronous, load_settings
from gatekeeper.ticket import Ticket, tightness

if TYPE_CHECKING:
    from gatekeeper.keeper import Gatekeeper

CURRENT: ContextVar[Ticket | None] = ContextVar("gatekeeper", default=None)
"""The ticket of the request that is being served. Set by the middleware once functions are decorated."""

IN_USE: list[None] = []
"""Not empty once any function was decorated. Until then no ticket need be put where functions find it."""

P = ParamSpec("P")
T = TypeVar("T")


def limit(
    keeper: Gatekeeper, rate: str | Sequence[str], name: str | None, settings: Mapping[str, Any]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """What `Gatekeeper.limit` says."""
    for key in ("match", "per", "overrides"):
        if key in settings:
            raise SettingsError([f"{key}: goes with rules of the settings alone: a decorator is for its function"])
    checked = _checked({"name": name or "function", "rate": rate, **settings})

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        is_async = _is_async(function)
        awaited = checked.functions
        if "user" in checked.key and callable(keeper.settings.identity.user):
            awaited = [*awaited, keeper.settings.identity.user]
        if not is_async and any(is_asynchronous(one) for one in awaited):
            raise TypeError("limit: expected an async function, for a function of the settings must be awaited")
        IN_USE.append(None)
        label = f"{function.__module__}.{function.__qualname__}"
        told = name or re.sub(r"[^A-Za-z0-9._-]+", "-", function.__name__).strip("_-.")[:64] or "function"
        space = name or f"*{label}"
        inside = keeper.rule(checked.model_copy(update={"name": told}), space)
        # Outside of a request there is no client: the function itself is whom the quota belongs to.
        outside = keeper.rule(checked.model_copy(update={"name": told, "key": ["ip"]}), space)

        def charge() -> Steps[None]:
            ticket, rule = _ticket(keeper), inside
            if ticket is None:
                ticket, rule = _Call(), outside
                ticket.gate, ticket.address = keeper.gate, f"*{label}"
            if (yield from keeper.gate.extend(ticket, (rule,))):
                limited = Limited(min(ticket.verdicts[-len(rule.limits) :], key=tightness))
                # Known to every policy around us: whichever sees the answer can tell it from a fault.
                around: Ticket | None = CURRENT.get()
                while around is not None:
                    around.limited = ref(limited)
                    around = around.outer
                try:
                    raise limited
                finally:
                    del limited  # this frame, held by its own traceback, would keep it alive

        if is_async:

            @functools.wraps(function)
            async def limited_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                if keeper.awaits:
                    await arun(charge(), keeper.aask)
                else:
                    run(charge(), keeper.ask)
                return await function(*args, **kwargs)  # type: ignore[misc]

            return cast(Callable[P, T], limited_async)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> T:
            run(charge(), keeper.ask)
            return function(*args, **kwargs)

        return limited

    return decorate


def _checked(written: Mapping[str, Any]) -> LimitSettings:
    """The settings of a decorator, checked as those from a file would be."""
    try:
        (limit,) = load_settings({"limits": [written]}).limits
    except SettingsError as error:
        raise SettingsError([problem.removeprefix("limits[0].") for problem in error.problems]) from None
    return limit


class _Call(Ticket):
    """The ticket of a call outside of any request."""

    method = path = ""
    peer = native = None

    def fields(self, name: str) -> list[str]:
        return []

    def field(self, name: str) -> str | None:
        return None

    def query(self) -> str:
        return ""


def _ticket(keeper: Gatekeeper) -> Ticket | None:
    current = CURRENT.get()
    if current is None or current.native is None:  # none, or a task that has outlived its request
        return None
    # Where the policies around us are other Gatekeepers', their counters are not ours: only the request is shared.
    return current.under(keeper.gate) or current.of(keeper.gate)


def _is_async(function: object) -> bool:
    """Whether calls are awaited. Raises TypeError for what a limit on calls would silently not limit."""
    if isinstance(function, type):
        raise TypeError("limit: expected a function, not a class; decorate its methods")
    if isinstance(function, staticmethod | classmethod):
        raise TypeError(f"limit: expected a function; put @limit below @{type(function).__name__}")
    if not callable(function):
        raise TypeError(f"limit: expected a function, not {type(function).__name__}")
    plain = inspect.unwrap(function)
    if not inspect.isroutine(plain):
        raise TypeError("limit: expected a function, not an object that can be called; decorate its __call__")
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError("limit: expected no generator function: its body runs when it is iterated, not when called")
    return inspect.iscoroutinefunction(plain)
