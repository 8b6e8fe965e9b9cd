"""Limits on single views: `@limit("5/minute")`."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

from asgiref.sync import iscoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.urls import URLPattern, URLResolver

from gatekeeper.commands import Hits, Replies, Steps, Verdict, arun, run
from gatekeeper.decorators import Guard, of_route
from gatekeeper.gate import is_preflight
from gatekeeper.http.routes import methods_of
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.algorithms import NS
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.ticket import tightness
from gatekeeper_django.answers import arefuse, awatching, leave, refuse, watching
from gatekeeper_django.conf import policy
from gatekeeper_django.requests import DjangoTicket, request_of
from gatekeeper_django.routes import class_of, template

V = TypeVar("V")

MARK: Final = "gatekeeper_limits"
"""The attribute of a limited view that has its `Placed` limits. Decorators that keep attributes pass it on."""

_UNLIMITED: Final = Verdict(True, 0, 0, 0, 0, None)
_REFUSED: Final = Verdict(False, 0, 0, NS, NS, None)  # a body that could not be read, say


class Placed(NamedTuple):
    """A limit, and what names the view that it stands at."""

    limit: Limit
    label: str


class Limit:
    """A limit of its own for what it decorates; see `limit`."""

    def __init__(
        self,
        rate: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        methods: str | Iterable[str] | None = None,
        **settings: Any,
    ) -> None:
        self.guard = Guard(rate, name, of_route(settings, _parameters))
        self.methods = methods_of(methods)
        self._rules: tuple[Gatekeeper | None, dict[tuple[str, str | None], Rule]] = (None, {})

    def __call__(self, view: V) -> V:
        """Decorate a view, a class-based view, or the URLs of an `include()`."""
        if isinstance(view, type):
            return cast(V, self._class(view))
        if isinstance(view, tuple | list):
            return cast(V, self._urls(view))
        if not callable(view):
            raise TypeError(f"limit: expected a view, and not {type(view).__name__}")
        return cast(V, self._view(view, _label(view)))

    def hit(self, request: Any) -> Verdict:
        """Charge a request here and now, and refuse nothing: the verdict says whether it is within the limit.

        Needs a `name`, for it stands at no view. Raises TypeError without one.
        """
        ticket, keeper, rule = self._begin_hit(request)
        if ticket.gate.off:
            return _UNLIMITED
        ticket.awaiting = False
        return self._hit(ticket, rule, run(charged(self.guard, ticket, rule), keeper.ask, ticket.read))

    async def ahit(self, request: Any) -> Verdict:
        """As `hit`, awaiting the store."""
        ticket, keeper, rule = self._begin_hit(request)
        if ticket.gate.off:
            return _UNLIMITED
        ticket.awaiting = True
        return self._hit(ticket, rule, await arun(charged(self.guard, ticket, rule), keeper.aask, ticket.aread))

    def _begin_hit(self, request: Any) -> tuple[DjangoTicket, Gatekeeper, Rule]:
        if self.guard.name is None:
            raise TypeError("limit: expected a name, for a limit that stands at no view")
        request = request_of((request,), {})
        ticket, keeper, is_own = found(request)
        rule = self.rule(keeper, self.guard.name, request, awaiting=True)
        if is_own and rule.is_open:
            raise TypeError("limit: without the middleware, what is settled by the outcome goes with views alone")
        return ticket, keeper, rule

    def _hit(self, ticket: DjangoTicket, rule: Rule, status: int) -> Verdict:
        verdicts = [charge.verdict for charge in ticket.charges if charge.limit.rule is rule]
        return min(verdicts, key=tightness, default=_REFUSED if status else _UNLIMITED)

    def __repr__(self) -> str:
        settings = self.guard.settings
        what = ", ".join(settings.rate) if settings.concurrency is None else f"{settings.concurrency} at a time"
        return f"<Limit {self.guard.name or 'of each view'}: {what}>"

    def rule(self, keeper: Gatekeeper, label: str, request: Any, *, awaiting: bool) -> Rule:
        """The rule of a view on the route of a request."""
        match = getattr(request, "resolver_match", None)
        route = None if match is None else match.route
        known = self._rules
        if known[0] is not keeper:
            known = self._rules = (keeper, {})
        rule = known[1].get((label, route))
        if rule is None:
            if not awaiting and self.guard.awaited(keeper):
                raise ImproperlyConfigured(
                    f"limit: {label} is not asynchronous, and a function of its limit's settings is"
                )
            where = None if match is None else template(match, getattr(request, "urlconf", None))
            rule = known[1][label, route] = self.guard.rule(keeper, label, where)
        return rule

    def _numbered(self, view: object, label: str) -> str:
        """The label of this limit at a view: others without a name, below it, have counters of their own."""
        if self.guard.name is not None:
            return label
        placed = [one.limit for one in getattr(view, MARK, ()) if one.limit.guard.name is None]
        below = placed[len(placed) - placed[::-1].index(self) :] if self in placed else placed
        return f"{label}-{len(set(below)) + 1}" if below else label

    def _view(self, view: Callable[..., Any], label: str) -> Callable[..., Any]:
        label = self._numbered(view, label)
        guard, methods = self.guard, self.methods
        awaited: dict[type, bool] = {}

        def is_awaited(owner: Any) -> bool:
            """Whether what is no coroutine function returns an awaitable, as dispatch may."""
            kind = type(owner)
            found = awaited.get(kind)
            if found is None:
                found = awaited[kind] = bool(getattr(kind, "view_is_async", False))
            return found

        async def charge_async(
            ticket: DjangoTicket, rule: Rule, keeper: Gatekeeper, is_own: bool, args: Any, kwargs: Any
        ) -> Any:
            ticket.awaiting = True
            try:
                if keeper.awaits or rule.asks:
                    ask = keeper.aask if rule.penalty is None else awatching(ticket, keeper.aask)
                    status = await arun(charge(guard, ticket, rule), ask, ticket.aread)
                else:
                    status = charge_at_once(guard, ticket, rule, keeper)
                response = await arefuse(ticket) if status else await view(*args, **kwargs)
            except BaseException as error:
                if is_own:
                    _end(ticket, error)
                    await keeper.afinish(ticket)
                raise
            return leave(ticket, response, asyncio.get_running_loop()) if is_own else response

        if iscoroutinefunction(view):

            @functools.wraps(view)
            async def limited_async(*args: Any, **kwargs: Any) -> Any:
                request = request_of(args, kwargs)
                if methods is not None and request.method not in methods:
                    return await view(*args, **kwargs)
                ticket, keeper, is_own = found(request)
                if ticket.gate.off:
                    return await view(*args, **kwargs)
                rule = self.rule(keeper, label, request, awaiting=True)
                if rule in ticket.rules or _is_free(rule, ticket):
                    return await view(*args, **kwargs)  # charged already: it was decorated twice
                return await charge_async(ticket, rule, keeper, is_own, args, kwargs)

            return self._marked(limited_async, view, label)

        # What method_decorator hands us is a method that knows its object.
        bound = getattr(view.func, "__self__", None) if isinstance(view, functools.partial) else None

        @functools.wraps(view)
        def limited_sync(*args: Any, **kwargs: Any) -> Any:
            request = args[0] if args and isinstance(args[0], HttpRequest) else request_of(args, kwargs)
            if methods is not None and request.method not in methods:
                return view(*args, **kwargs)
            ticket, keeper, is_own = found(request)
            if ticket.gate.off:
                return view(*args, **kwargs)
            owner = bound
            if owner is None and args and args[0] is not request:
                owner = args[0]
            is_async = owner is not None and is_awaited(owner)
            rule = self.rule(keeper, label, request, awaiting=is_async)
            if rule in ticket.rules or _is_free(rule, ticket):
                return view(*args, **kwargs)
            if is_async:
                return charge_async(ticket, rule, keeper, is_own, args, kwargs)
            if not is_own:
                if charge_at_once(guard, ticket, rule, keeper):
                    return refuse(ticket)
                return view(*args, **kwargs)
            try:
                status = charge_at_once(guard, ticket, rule, keeper)
                return leave(ticket, refuse(ticket) if status else view(*args, **kwargs), None)
            except BaseException as error:
                _end(ticket, error)
                keeper.finish(ticket)
                raise

        return self._marked(limited_sync, view, label)

    def _marked(self, limited_view: Callable[..., Any], view: object, label: str) -> Callable[..., Any]:
        setattr(limited_view, MARK, (Placed(self, label), *getattr(view, MARK, ())))
        return limited_view

    def _class(self, view: Any) -> Any:
        """A class-based view, limited whatever the method."""
        if not hasattr(view, "dispatch"):
            raise TypeError("limit: expected a class-based view: the class has no dispatch")
        view.dispatch = self._view(view.dispatch, _name(view))
        return view

    def _urls(self, urls: Any) -> Any:
        """What `include()` returns, or a list of `path()`: each view in it limited, wherever it is included."""
        if isinstance(urls, list):
            return self._patterns(urls)
        if not 2 <= len(urls) <= 3 or isinstance(urls[0], str):
            raise TypeError("limit: expected what include() returns, or a list of path()")
        return (self._patterns(urls[0]), *urls[1:])

    def _patterns(self, urlconf: Any) -> list[Any]:
        limited_patterns: list[Any] = []
        for one in getattr(urlconf, "urlpatterns", urlconf):
            if isinstance(one, URLResolver):
                below = self._patterns(one.url_patterns)
                limited_patterns.append(
                    URLResolver(one.pattern, below, one.default_kwargs, one.app_name, one.namespace)
                )
            elif isinstance(one, URLPattern):
                limited_patterns.append(URLPattern(one.pattern, self(one.callback), one.default_args, one.name))
            else:
                raise TypeError(f"limit: expected a list of path(), and not of {type(one).__name__}")
        return limited_patterns


def limit(
    rate: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    methods: str | Iterable[str] | None = None,
    **settings: Any,
) -> Limit:
    """Limit a view, with the middleware or without it: `@limit("5/minute")`.

    It goes on functions, asynchronous functions, class-based views and their methods, into `method_decorator`,
    around `include(…)`, lists of `path()` and `admin.site.urls`.

    - `rate`: "5/minute", or several
    - `name`: told to clients. Views limited under one name share a quota; without a name each view has one of its
      own on each of its routes, whatever the parameters in the path.
    - `methods`: for requests of these alone, such as "POST"; GET covers HEAD
    - `settings`: as those of a rule in `GATEKEEPER` (`key`, `cost`, `tiers`, `shadow`, …), but those that say for
      which requests it is

    Raises SettingsError for settings that cannot be.
    """
    return Limit(rate, name=name, methods=methods, **settings)


def limits_of(view: Any) -> list[Placed]:
    """The limits of a view, the outermost first, as far as decorators around them keep a view's attributes.

    Of a class-based view also those of its methods, and its throttles of ours.
    """
    cls = class_of(view)
    placed = [(one, _label(view)) for one in getattr(view, MARK, ())]
    if cls is not None:
        placed += [(one, _name(cls)) for one in getattr(getattr(cls, "dispatch", None), MARK, ())]
        for method in getattr(cls, "http_method_names", ()):
            handler = getattr(cls, method, None)
            placed += [(one, f"{_name(cls)}.{method}") for one in getattr(handler, MARK, ())]
            placed += [(one, one.label) for one in getattr(_below_api_view(handler), MARK, ())]
        throttles = [getattr(one, "limit", None) for one in getattr(cls, "throttle_classes", ())]
        placed += [(Placed(one, _name(cls)), "") for one in throttles if isinstance(one, Limit)]
    limits: dict[Limit, Placed] = {}
    for one, label in placed:
        # method_decorator tries its decorators on a function of its own, and keeps the attributes of that.
        known = Placed(one.limit, label) if _TRIAL in one.label else one
        limits.setdefault(one.limit, known)
    return list(limits.values())


def _below_api_view(handler: Any) -> Any:
    """The function that the REST framework's `api_view` calls: its class has nothing of it but its name."""
    if getattr(handler, "__module__", None) != "rest_framework.decorators":
        return None
    return inspect.getclosurevars(handler).nonlocals.get("func")


_TRIAL: Final = "_update_method_wrapper.<locals>"


def _parameters(ticket: DjangoTicket) -> Mapping[str, Any] | None:
    return getattr(getattr(ticket.native, "resolver_match", None), "kwargs", None)


def charge(guard: Guard, ticket: DjangoTicket, rule: Rule) -> Steps[int]:
    """Charge a request. 0, or the status to refuse it with, which the ticket's `refused` is then, too."""
    if rule.needs_user and ticket.asked_user and ticket.seen is not getattr(ticket.native, "user", None):
        ticket.asked_user = False  # somebody has logged in since
    return guard.charge(ticket, rule)


def charged(guard: Guard, ticket: DjangoTicket, rule: Rule) -> Steps[int]:
    """As `charge`, for whoever answers a refusal himself: the ticket's `refused` stays as it is."""
    refused = ticket.refused
    status = yield from charge(guard, ticket, rule)
    ticket.refused = refused
    return status


def found(request: Any) -> tuple[DjangoTicket, Gatekeeper, bool]:
    """The ticket of a request, whose Gatekeeper it is, and whether it is ours to end: no middleware will."""
    ticket: DjangoTicket | None = request.__dict__.get("gatekeeper")
    if ticket is not None and ticket.native is request:
        return ticket, ticket.gate.keeper or policy().keeper, False
    keeper = policy().keeper
    ticket = DjangoTicket(request)
    keeper.gate.identify(ticket)
    request.gatekeeper = ticket
    return ticket, keeper, True


def charge_at_once(guard: Guard, ticket: DjangoTicket, rule: Rule, keeper: Gatekeeper) -> int:
    """`charge`, blocking. A request that one batch decides, as most are, costs no generator.

    Of another machine nothing is asked twice.
    """
    if keeper.store.local and ticket.gate.extend_at_once(ticket, rule, keeper.ask):
        return 0
    ticket.awaiting = False
    return run(charge(guard, ticket, rule), _asking(ticket, rule, keeper), ticket.read)


def _is_free(rule: Rule, ticket: DjangoTicket) -> bool:
    return ticket.method == "OPTIONS" and not rule.preflights and is_preflight(ticket)


def _asking(ticket: DjangoTicket, rule: Rule, keeper: Gatekeeper) -> Callable[[Hits], Replies]:
    return keeper.ask if rule.penalty is None else watching(ticket, keeper.ask)


def _end(ticket: DjangoTicket, error: BaseException) -> None:
    """No response came: only an error does, or the client has left."""
    if isinstance(error, Exception):
        ticket.sent = 500
    ticket.let_go()


def _name(view: Any) -> str:
    return f"{getattr(view, '__module__', '')}.{getattr(view, '__qualname__', type(view).__qualname__)}"


def _label(view: Any) -> str:
    """Names a view, whichever object it is made anew as."""
    if isinstance(view, functools.partial):
        owner = getattr(view.func, "__self__", None)
        if owner is None:
            return _label(view.func)
        method = view.func.__name__
        return _name(type(owner)) if method == "dispatch" else f"{_name(type(owner))}.{method}"
    # Of as_view(), in Django and in its REST framework.
    return _name(class_of(view) or view)
