"""Limits on functions: `@gk.limit("5/minute")`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary, ref

from gatekeeper.commands import Steps, Verdict, arun, run
from gatekeeper.errors import Limited, SettingsError
from gatekeeper.gate import Gate, is_preflight
from gatekeeper.ratelimit.algorithms import NS
from gatekeeper.ratelimit.rules import Native, Rule
from gatekeeper.settings import LimitSettings, is_asynchronous, load_limit
from gatekeeper.ticket import BareTicket, Ticket, tightness

if TYPE_CHECKING:
    from gatekeeper.keeper import Gatekeeper

CURRENT: ContextVar[Ticket | None] = ContextVar("gatekeeper", default=None)
"""The ticket of the request that is being served. Set by the middleware once functions are decorated."""

IN_USE: list[None] = []
"""Not empty once any function was decorated. Until then no ticket need be put where functions find it."""

_OF_BODY: Final = ("form:", "json:")

_OF_SETTINGS: Final = ("match", "per", "overrides")
"""Keys of rules of the settings alone: a guard is for where it stands."""

_PARAMETER: Final = re.compile(r"param:[A-Za-z_]\w*")

_LIMITS: Final = "__gatekeeper_limits__"
"""An attribute of a limited function: how many limits stand upon one another there."""

P = ParamSpec("P")
T = TypeVar("T")


class Guard:
    """The limit of a function, a route or a dependency: a rule for each place it stands at.

    - `rate` and `settings` as those of a rule in a file (`key`, `cost`, `tiers`, `shadow`, …), but those that say
      for which requests it is
    - `name`: told to clients, and keeps counters apart; without one each place has counters of its own
    - `by_call`: whether it stands where a call has to find its request in `CURRENT`

    Raises SettingsError.
    """

    def __init__(
        self,
        rate: str | Sequence[str] | None,
        name: str | None,
        settings: Mapping[str, Any],
        *,
        by_call: bool = True,
    ) -> None:
        for key in _OF_SETTINGS:
            if key in settings:
                raise SettingsError(
                    [f"{key}: goes with rules of the settings alone: this one is for where it stands"]
                )
        written = {"name": name or "function", **settings}
        if rate is not None:
            written["rate"] = rate
        self.settings = load_limit(written, unnamed=_OF_SETTINGS)
        self.name = name
        self._rules: WeakKeyDictionary[Gatekeeper, dict[tuple[str, str | None], Rule]] = WeakKeyDictionary()
        if by_call:
            IN_USE.append(None)

    @property
    def asks(self) -> bool:
        """Whether more has to be found out of a request than its head says: the user, a field of its body."""
        settings = self.settings
        texts = [part for part in (*settings.key, settings.tier) if isinstance(part, str)]
        return bool(settings.functions) or _names_user(settings) or any(text.startswith(_OF_BODY) for text in texts)

    def awaited(self, keeper: Gatekeeper) -> bool:
        """Whether it needs a function of the settings that must be awaited."""
        functions = self.settings.functions
        user = keeper.settings.identity.user
        if callable(user) and _names_user(self.settings):
            functions = [*functions, user]
        return any(is_asynchronous(one) for one in functions)

    def rule(self, keeper: Gatekeeper, label: str, route: str | None = None) -> Rule:
        """The rule of a place: `label` names the function, `route` is the template of the framework's route."""
        rules = self._rules.get(keeper)
        if rules is None:
            rules = self._rules[keeper] = {}
        rule = rules.get((label, route))
        if rule is None:
            told = self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", label.rpartition(".")[2]).strip("_-.")[:64]
            space = self.name or f"*{label}{'' if route is None else ' ' + route}"
            settings = self.settings.model_copy(update={"name": told or "function"})
            rule = rules[label, route] = keeper.rule(settings, space, route)
        return rule

    def charge(self, ticket: Ticket, rule: Rule) -> Steps[int]:
        """Charge a request. 0, or the status to refuse it with, which the ticket's `refused` is then, too.

        CORS preflights are free, unless the rule says that they are not.
        """
        if ticket.method == "OPTIONS" and not rule.preflights and is_preflight(ticket):
            return 0
        gate = cast(Gate, ticket.gate)
        status = yield from gate.extend(ticket, (rule,))
        if status:
            ticket.refused = status
        return status


def of_route(
    settings: Mapping[str, Any], parameters: Callable[[Any], Mapping[str, Any] | None]
) -> Mapping[str, Any]:
    """The settings of a guard on a framework's route, whose key or tier may be `param:NAME`, a part of the path.

    A guard has no pattern of its own: `parameters` tells what the framework has found in the path of a request, of
    which it is given the ticket.
    """

    def part(value: Any) -> Any:
        if not isinstance(value, str) or not _PARAMETER.fullmatch(value):
            return value
        name = value.partition(":")[2]

        def read(ticket: Any) -> str | None:
            found = (parameters(ticket) or {}).get(name)
            return None if found is None else str(found)

        return Native(read)

    found = dict(settings)
    for key in ("key", "tier"):
        value = settings.get(key)
        if isinstance(value, list | tuple):
            found[key] = [part(one) for one in value]
        elif value is not None:
            found[key] = part(value)
    return found


def limited(ticket: Ticket, rule: Rule) -> Limited:
    """The error for a request that a guard has refused: known to every policy around, to be told from a fault."""
    verdicts = [
        charge.verdict for charge in ticket.charges if charge.limit.rule is rule and not charge.verdict.allowed
    ]
    error = Limited(min(verdicts, key=tightness, default=_UNKNOWN))
    around: Ticket | None = CURRENT.get()
    while around is not None:
        around.limited = ref(error)
        around = around.outer
    return error


_UNKNOWN: Final = Verdict(False, 0, 0, 0, NS, None)  # a body that could not be read, say


def limit(
    keeper: Gatekeeper, rate: str | Sequence[str] | None, name: str | None, settings: Mapping[str, Any]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """What `Gatekeeper.limit` says."""
    guard = Guard(rate, name, settings)
    if any(isinstance(part, str) and part.startswith(_OF_BODY) for part in guard.settings.key):
        raise SettingsError(["key: fields of the body go with rules of the settings alone: a function has no body"])
    # Outside of a request there is no client: the function itself is whom the quota belongs to.
    alone = Guard(rate, name, {**settings, "key": "ip"})

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        is_async = _is_async(function)
        if not is_async and guard.awaited(keeper):
            raise TypeError("limit: expected an async function, for a function of the settings must be awaited")
        label = f"{function.__module__}.{function.__qualname__}"
        above = 1 + getattr(function, _LIMITS, 0)  # one limit above another has counters of its own
        if above > 1:
            label += f"-{above}"
        inside, outside = guard.rule(keeper, label), alone.rule(keeper, label)

        def begin() -> tuple[Ticket, Rule, bool]:
            """The ticket to charge, and whether it ends with the call: no middleware of ours will end it."""
            current = CURRENT.get()
            # A task may outlive its request: then it is none's.
            if current is not None and current.native is not None:
                ours = current.under(keeper.gate)
                # Of other Gatekeepers around us the counters are not ours: only the request is shared.
                return ours or current.of(keeper.gate), inside, ours is None
            ticket = BareTicket()
            keeper.gate.identify(ticket)
            ticket.address = f"*{label}"
            return ticket, outside, True

        def refuse(ticket: Ticket, rule: Rule) -> None:
            try:
                raise limited(ticket, rule)
            finally:
                del ticket, rule  # this frame is held by the error's traceback

        if is_async:

            @functools.wraps(function)
            async def limited_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                ticket, rule, is_own = begin()
                refused = ticket.refused
                steps = guard.charge(ticket, rule)
                status = await arun(steps, keeper.aask) if keeper.awaits else run(steps, keeper.ask)
                if status:
                    ticket.refused = refused
                    refuse(ticket, rule)
                if not is_own or not ticket.is_open:
                    return await function(*args, **kwargs)  # type: ignore[misc]
                try:
                    result = await function(*args, **kwargs)  # type: ignore[misc]
                    ticket.sent, ticket.ended = 200, True
                    return result
                except Exception:
                    ticket.sent = 500
                    raise
                finally:
                    await keeper.afinish(ticket)

            setattr(limited_async, _LIMITS, above)
            return cast(Callable[P, T], limited_async)

        @functools.wraps(function)
        def limited_sync(*args: P.args, **kwargs: P.kwargs) -> T:
            ticket, rule, is_own = begin()
            refused = ticket.refused
            if run(guard.charge(ticket, rule), keeper.ask):
                ticket.refused = refused
                refuse(ticket, rule)
            if not is_own or not ticket.is_open:
                return function(*args, **kwargs)
            try:
                result = function(*args, **kwargs)
                ticket.sent, ticket.ended = 200, True
                return result
            except Exception:
                ticket.sent = 500
                raise
            finally:
                keeper.finish(ticket)

        setattr(limited_sync, _LIMITS, above)
        return limited_sync

    return decorate


def _names_user(settings: LimitSettings) -> bool:
    parts = (*settings.key, settings.tier, *settings.exempt)
    return any(isinstance(part, str) and (part == "user" or part.startswith(("claim:", "user:"))) for part in parts)


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
