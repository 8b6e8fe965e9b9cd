"""`Gatekeeper()`: the extension, and its decorators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any, Final, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from flask import Blueprint, Flask, current_app, request

from gatekeeper import Gatekeeper as Keeper
from gatekeeper.commands import Store, run
from gatekeeper.decorators import Guard, limited, of_route
from gatekeeper.errors import SettingsError
from gatekeeper.http.routes import methods_of
from gatekeeper.settings import load_settings
from gatekeeper.ticket import Ticket
from gatekeeper_flask.commands import group
from gatekeeper_flask.config import Given, called, own, settings_of
from gatekeeper_flask.errors import error_of
from gatekeeper_flask.home import FlaskTicket, Home
from gatekeeper_flask.sessions import adapted, fit

NAME: Final = "gatekeeper"
"""Where the extension is in `app.extensions`, and the name of its commands."""

T = TypeVar("T", bound=Callable[..., Any] | Blueprint)


class Place:
    """Where a limit stands: at a function, or at all routes of a blueprint.

    - `label` names it: no two places have the same, so each has counters of its own
    - `everywhere`: it is no function's, and stands at each route that it is asked for
    - `alone`: the limit of calls outside of any request, where there is no client
    """

    __slots__ = ("__weakref__", "alone", "everywhere", "guard", "label", "methods")

    def __init__(
        self,
        guard: Guard,
        alone: Guard | None,
        label: str,
        methods: frozenset[str] | None,
        *,
        everywhere: bool = False,
    ) -> None:
        self.guard = guard
        self.alone = alone
        self.label = label
        self.methods = methods
        self.everywhere = everywhere

    def check(self, keeper: Keeper) -> None:
        """Raises SettingsError if the limit cannot be decided under WSGI."""
        if self.guard.awaited(keeper):
            raise SettingsError([f"{self.label}: expected functions that are not asynchronous, under WSGI"])

    def __repr__(self) -> str:
        return f"<Place {self.label}>"


class Gatekeeper:
    """Limits for Flask applications.

        gk = Gatekeeper()

        def create_app():
            app = Flask(__name__)
            app.config["GATEKEEPER_LIMITS"] = [{"name": "default", "rate": "300/minute"}]
            gk.init_app(app)
            return app

    - `app`: what `init_app` is called with at once.
    - `settings`: a mapping, the path of a TOML file (relative to the application), Settings, or a
      `gatekeeper.Gatekeeper` that others share. The application's config stands above it, see `init_app`.
    - `store`: a Store in place of the one that the settings name.
    - `workers`: the number of processes that serve the application, among which a limit is divided while its store
      does not answer (default 1, or `GATEKEEPER_WORKERS`).
    - `exempt_static`: whether static files are under those rules only that have a `match` (default True, or
      `GATEKEEPER_EXEMPT_STATIC`).

    One extension serves any number of applications; each has a policy and, in memory, counters of its own.
    """

    def __init__(
        self,
        app: Flask | None = None,
        settings: Given = None,
        *,
        store: Store | None = None,
        workers: int | None = None,
        exempt_static: bool = True,
    ) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._exempt_static = exempt_static
        self._homes: WeakSet[Home] = WeakSet()
        self._limited: WeakKeyDictionary[Any, Place] = WeakKeyDictionary()
        self._blueprints: WeakKeyDictionary[Blueprint, list[Place]] = WeakKeyDictionary()
        self._exempted: WeakSet[Any] = WeakSet()
        self._defaults: list[Place] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Limit an application, by its config: `GATEKEEPER` (a mapping, or the path of a TOML file), and
        `GATEKEEPER_*`, such as `GATEKEEPER_LIMITS` and `GATEKEEPER_STORE_URL`, which stand above it.

        Raises SettingsError with all that is wrong, and RuntimeError if the application has a Gatekeeper already.
        """
        if NAME in app.extensions:
            raise RuntimeError(f"the application {app.name!r} has a Gatekeeper already: init_app was called twice")
        settings = settings_of(app.config, self._settings)
        if isinstance(settings, Keeper):
            keeper = settings
        else:
            workers = self._workers if self._workers is not None else own(app.config, "WORKERS", 1)
            keeper = Keeper(adapted(app, load_settings(settings)), store=self._store, workers=workers)
            if keeper.sessions is not None:
                app.session_interface = fit(keeper, app)
        exempt_static = own(app.config, "EXEMPT_STATIC", self._exempt_static)
        home = Home(self, app, keeper, exempt_static=exempt_static)
        for places in (self._limited.values(), self._defaults, *self._blueprints.values()):
            for place in places:
                place.check(keeper)
        app.extensions[NAME] = home
        app.wsgi_app = home  # type: ignore[method-assign]
        app.preprocess_request = home.hook  # type: ignore[method-assign]
        if self._defaults:
            app.before_request(self._charge_defaults)
        app.cli.add_command(group(home))
        self._homes.add(home)

    @property
    def keeper(self) -> Keeper:
        """The `gatekeeper.Gatekeeper` of the current application; outside of any, of the only one.

        Raises RuntimeError if it cannot be told which.
        """
        if current_app:
            return self._home().keeper
        homes = list(self._homes)
        if len(homes) != 1:
            raise RuntimeError(
                f"expected an application context, for this Gatekeeper has {len(homes)} applications"
            )
        return homes[0].keeper

    @property
    def ticket(self) -> Ticket:
        """The ticket of the current request: its client, its charges. Raises RuntimeError outside of a request."""
        ticket: Ticket | None = request.environ.get("gatekeeper.ticket")
        ours = None if ticket is None else ticket.under(self._home().keeper.gate)
        if ours is None:
            raise RuntimeError("the request did not come through the application's wsgi_app")
        return ours

    def limit(
        self,
        rate: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        methods: str | Iterable[str] | None = None,
        **settings: Any,
    ) -> Callable[[T], T]:
        """Limit a view, or each view of a blueprint and of those nested in it: `@gk.limit("5/minute")`.

        Put it below `@app.route`, into the `decorators` of a class-based view, on a method of such a view, on any
        function that views call, or call its result with a Blueprint. A view has a quota for each route that leads
        to it, which is known by its template: `/item/1` and `/item/2` share one. Other functions have one quota,
        whatever view they are called from, and outside of requests one that all callers share.

        - `rate`: "5/minute", or several
        - `name`: told to clients, and keeps counters apart: with a name all places have one quota
        - `methods`: requests of other methods than these, such as "POST", are not limited; GET covers HEAD
        - `settings`: those of a rule in a file (`key`, `cost`, `scope`, `exempt`, `give_back`, …), but those that
          say for which requests it is. Functions take the request's Ticket, or nothing.

        A call too many raises TooManyRequests, which is Werkzeug's, and gatekeeper's Limited. Raises SettingsError
        for settings that cannot be, and TypeError for what cannot be limited.
        """
        guard, alone = self._guards(rate, name, settings)
        only = methods_of(methods)

        def decorate(target: T) -> T:
            if isinstance(target, Blueprint):
                self._limit_blueprint(target, guard, only)
                return target
            return cast(T, self._limit_function(target, guard, alone, only))

        return decorate

    def limit_blueprint(
        self, blueprint: Blueprint, rate: str | Sequence[str] | None = None, **settings: Any
    ) -> None:
        """Limit each view of a blueprint, and of those nested in it, as `limit` does."""
        if not isinstance(blueprint, Blueprint):
            raise TypeError(f"expected a Blueprint, and not {type(blueprint).__name__}")
        self.limit(rate, **settings)(blueprint)

    def shared_limit(
        self, rate: str | Sequence[str] | None = None, *, scope: str, **settings: Any
    ) -> Callable[[T], T]:
        """As `limit`, with one quota for all that it, or another limit of that `scope`, stands at.

        A request that comes by several of them is charged once.
        """
        return self.limit(rate, scope=scope, **settings)

    def default_limit(self, rate: str | Sequence[str] | None = None, **settings: Any) -> None:
        """Limit each route that has no limit of its own, by decorator or blueprint: each has a quota by itself.

        Static files and what is exempt are not limited, nor are requests without a route. (A rule of the settings
        without a `match` is one quota for the whole application.)
        """
        methods = settings.pop("methods", None)
        guard, _ = self._guards(rate, settings.pop("name", None), settings)
        only = methods_of(methods)
        label = f"<default>.default{f'-{len(self._defaults) + 1}' if self._defaults else ''}"
        place = Place(guard, None, label, only, everywhere=True)
        for home in self._homes:
            place.check(home.keeper)
            if not self._defaults:
                home.flask.before_request(self._charge_defaults)
        self._defaults.append(place)

    def exempt(self, target: T) -> T:
        """Take a view, or all views of a blueprint and of those nested in it, out of the rules of the settings,
        of default limits, and of the limits of blueprints. A limit on the view itself holds.

        Networks that the settings deny are refused all the same. The result is the target.
        """
        if isinstance(target, type):
            raise TypeError("exempt: expected a view, not a class; put it into the class's `decorators`")
        if not isinstance(target, Blueprint | FunctionType):
            raise TypeError(f"exempt: expected a view function or a Blueprint, and not {type(target).__name__}")
        self._exempted.add(target)
        return target

    def exempts(self, app: Flask, endpoint: str) -> bool:
        """Whether an endpoint was declared exempt."""
        if any(blueprint in self._exempted for blueprint in _blueprints(app, endpoint)):
            return True
        return any(function in self._exempted for function in _chain(app.view_functions.get(endpoint)))

    def idle(self, app: Flask) -> Iterator[Place]:
        """The limits that stand above the route of their view: Flask calls what is below them."""
        called = {id(function) for view in app.view_functions.values() for function in _chain(view)}
        views = {id(view) for view in app.view_functions.values()}
        for function, place in self._limited.items():
            if id(function) not in called and any(id(one) in views for one in _chain(function)):
                yield place

    def places(self, app: Flask, endpoint: str) -> Iterator[Place]:
        """The limits of an endpoint: of its blueprints, of its function, of the methods of its class."""
        if not self.exempts(app, endpoint):
            for blueprint in _blueprints(app, endpoint):
                yield from self._blueprints.get(blueprint, ())
        view = app.view_functions.get(endpoint)
        functions = list(_chain(view))
        view_class = getattr(view, "view_class", None)
        for name in ("dispatch_request", "get", "post", "put", "patch", "delete", "head", "options", "trace"):
            functions += _chain(getattr(view_class, name, None))
        for function in functions:
            place = self._limited.get(function)
            if place is not None:
                yield place

    def defaults(self, app: Flask, endpoint: str) -> tuple[Place, ...]:
        """The default limits that an endpoint is under."""
        home: Home = app.extensions[NAME]
        if not self._defaults or home.places(endpoint) or home.exempts(endpoint) or home.is_static(endpoint):
            return ()
        return tuple(self._defaults)

    def _guards(
        self, rate: str | Sequence[str] | None, name: str | None, settings: dict[str, Any]
    ) -> tuple[Guard, Guard]:
        written = of_route(called(settings), lambda ticket: request.view_args)
        guard = Guard(rate, name, written)
        if any(isinstance(part, str) and part.startswith(("form:", "json:")) for part in guard.settings.key):
            raise SettingsError(
                ["key: fields of the body go with rules of the settings alone; a function can read request.form"]
            )
        # Outside of a request there is no client: the function itself is whom the quota belongs to.
        return guard, Guard(rate, name, {**written, "key": "ip"})

    def _limit_blueprint(self, blueprint: Blueprint, guard: Guard, methods: frozenset[str] | None) -> None:
        places = self._blueprints.setdefault(blueprint, [])
        label = f"{blueprint.import_name}.<blueprint>.{blueprint.name}{f'-{len(places) + 1}' if places else ''}"
        place = Place(guard, None, label, methods, everywhere=True)
        self._check(place)
        # Before it is kept: a blueprint that was registered already refuses this.
        blueprint.before_request(functools.partial(self._charge_blueprint, place))
        places.append(place)

    def _limit_function(
        self, function: Callable[..., Any], guard: Guard, alone: Guard, methods: frozenset[str] | None
    ) -> Callable[..., Any]:
        plain = _plain(function)
        # A class-based view calls each of its functions "view".
        name = plain.__name__ if plain.__qualname__.endswith("as_view.<locals>.view") else plain.__qualname__
        before = sum(one in self._limited for one in _chain(function))
        label = f"{plain.__module__}.{name}{f'-{before + 1}' if before else ''}"
        place = Place(guard, alone, label, methods)
        self._check(place)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def limited_async(*args: Any, **kwargs: Any) -> Any:
                # It blocks its own event loop alone: Flask has one for each call.
                ticket = self._charge(place)
                if ticket is None:
                    return await function(*args, **kwargs)
                try:
                    result = await function(*args, **kwargs)
                    ticket.sent, ticket.ended = 200, True
                    return result
                except Exception:
                    ticket.sent = 500
                    raise
                finally:
                    cast(Any, ticket.gate).keeper.finish(ticket)

            self._limited[limited_async] = place
            return limited_async

        @functools.wraps(function)
        def limited_sync(*args: Any, **kwargs: Any) -> Any:
            ticket = self._charge(place)
            if ticket is None:
                return function(*args, **kwargs)
            try:
                result = function(*args, **kwargs)
                ticket.sent, ticket.ended = 200, True
                return result
            except Exception:
                ticket.sent = 500
                raise
            finally:
                cast(Any, ticket.gate).keeper.finish(ticket)

        self._limited[limited_sync] = place
        return limited_sync

    def _check(self, place: Place) -> None:
        for home in self._homes:
            place.check(home.keeper)

    def _home(self) -> Home:
        """That of the current application. Raises RuntimeError if it is none of ours."""
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        home = app.extensions.get(NAME)
        if home is None or home.extension is not self:
            raise RuntimeError(f"the application {app.name!r} was not given to this Gatekeeper: call its init_app")
        return cast(Home, home)

    def _charge_blueprint(self, place: Place) -> None:
        asked = request._get_current_object()  # type: ignore[attr-defined]
        if asked.url_rule is not None and not self._home().exempts(asked.url_rule.endpoint):
            self._charge(place)

    def _charge_defaults(self) -> None:
        asked = request._get_current_object()  # type: ignore[attr-defined]
        if asked.url_rule is not None:
            for place in self.defaults(current_app._get_current_object(), asked.url_rule.endpoint):  # type: ignore[attr-defined]
                self._charge(place)

    def _charge(self, place: Place) -> Ticket | None:
        """Charge the current request, or call, for a limit. Raises TooManyRequests, outside of requests Limited.

        The result is a ticket that ends with the call, if there is one: nobody else will end it.
        """
        try:
            asked = request._get_current_object()  # type: ignore[attr-defined]
        except RuntimeError:
            return self._charge_call(place)
        if place.methods is not None and asked.method not in place.methods:
            return None
        environ = asked.environ
        current: Ticket | None = environ.get("gatekeeper.ticket")
        is_ours = isinstance(current, FlaskTicket) and current.home.extension is self
        home: Home = current.home if is_ours else self._home()  # type: ignore[union-attr]
        keeper = home.keeper
        gate = keeper.gate
        ticket = None
        if current is not None and current.native is not None:
            ticket = current if current.gate is gate else current.under(gate)
        is_own = ticket is None
        if ticket is None:  # the request has ended but for its body, or did not come through our gate
            ticket = FlaskTicket(environ)
            gate.identify(ticket)
        rule = home.rule(place, asked.url_rule, environ.get("SCRIPT_NAME", ""))
        # An OPTIONS may be a preflight, and free; of a function called again only the last call is kept.
        if (
            (rule.hit is not None or keeper.store.local)
            and asked.method != "OPTIONS"
            and rule not in ticket.rules
            and gate.extend_at_once(ticket, rule, keeper.ask)
        ):
            return None
        before = ticket.refused
        if run(place.guard.charge(ticket, rule), keeper.ask):
            refusal = gate.refusal(ticket)
            error = limited(ticket, rule)
            ticket.refused = before  # the application may catch it and answer otherwise
            if isinstance(ticket, FlaskTicket):
                ticket.told = refusal
            try:
                raise error_of(ticket, refusal, error.verdict)
            finally:
                del ticket, current, error  # this frame is held by the error's traceback
        return ticket if is_own and ticket.is_open else None

    def _charge_call(self, place: Place) -> Ticket | None:
        """A call outside of any request, in the context of an application."""
        keeper = self.keeper
        ticket = FlaskTicket({"REQUEST_METHOD": ""})
        keeper.gate.identify(ticket)
        ticket.address = f"*{place.label}"
        assert place.alone is not None
        rule = place.alone.rule(keeper, place.label)
        if run(place.alone.charge(ticket, rule), keeper.ask):
            raise limited(ticket, rule)
        return ticket if ticket.is_open else None


def _blueprints(app: Flask, endpoint: str) -> Iterator[Blueprint]:
    """The blueprints that an endpoint is of, the outermost first."""
    names = endpoint.split(".")[:-1]
    for depth in range(1, len(names) + 1):
        blueprint = app.blueprints.get(".".join(names[:depth]))
        if isinstance(blueprint, Blueprint):
            yield blueprint


def _chain(function: Any) -> Iterator[Any]:
    """A function, and those that it wraps."""
    while function is not None:
        if isinstance(function, FunctionType):
            yield function
        function = getattr(function, "__wrapped__", None)


def _plain(function: Any) -> FunctionType:
    """The function below its decorators. Raises TypeError for what a limit on calls would silently not limit."""
    if isinstance(function, Flask):
        raise TypeError("limit: expected a view or a Blueprint; for a whole application there is default_limit")
    if isinstance(function, type):
        raise TypeError("limit: expected a view, not a class; put it into the class's `decorators`")
    if isinstance(function, staticmethod | classmethod):
        raise TypeError(f"limit: expected a function; put @limit below @{type(function).__name__}")
    plain = inspect.unwrap(function) if callable(function) else function
    if not isinstance(plain, FunctionType):
        raise TypeError(f"limit: expected a function, and not {type(function).__name__}")
    if inspect.isasyncgenfunction(plain):
        raise TypeError("limit: expected no asynchronous generator: Flask cannot answer with it")
    return plain
