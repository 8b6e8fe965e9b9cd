"""The gate of one Flask application: around its `wsgi_app`, and just before its views.

What can be decided without Flask is decided before Flask sees the request. What cannot waits, and is decided within
the request's context: where the route decides whether the request is exempt, as soon as that is known; where a
function must be asked who the user is, once all `before_request` functions have run. In each case all rules of the
settings are one batch: all of them or none is spent.

A refusal is raised within Flask, before any `before_request` function: so the application's error handlers make the
answer if it has any, and its `after_request` functions see it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from flask import Blueprint, Flask, request
from werkzeug.routing import Rule as Route
from werkzeug.security import safe_join

from gatekeeper import Gatekeeper as Keeper
from gatekeeper.commands import Call, Question, Steps, run
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, SettingsError
from gatekeeper.gate import Gate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import LimitSettings, is_asynchronous
from gatekeeper.ticket import Refusal
from gatekeeper.wsgi import App, Environ, EnvironTicket, StartResponse
from gatekeeper_flask.errors import error_of

if TYPE_CHECKING:
    from gatekeeper_flask.extension import Gatekeeper, Place

MOST_PREFIXES: Final = 64
"""So many mount points of an application are told apart: a client may be able to make some up."""


class FlaskTicket(EnvironTicket):
    """A ticket that what Flask answers goes through, on its way out.

    - `waiting`: whether the request is still to be decided, or its refusal to be raised
    - `steps`, `question`: what decides it, and what that asked for that only Flask can answer
    - `told`: the refusal that was raised within Flask
    - `early`: the body, in a tuple, where it was read before it is asked for: the application may read it meanwhile
    """

    home: Home
    waiting: bool = False
    steps: Steps[int] | None = None
    question: Question | None = None
    told: Refusal | None = None
    early: tuple[bytes | None] | None = None
    body: Iterable[bytes] = ()

    def read(self, most: int) -> bytes | None:
        """The body, None if it is longer; the application is given it all the same."""
        return super().read(most) if self.early is None else self.early[0]

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The `start_response` that Flask is given."""
        if self.waiting:
            # Flask came to an answer without asking its hook, for its session could not be opened, say.
            self.home.settle(self)
            if self.refused:
                self.replace(self.gate.refusal(self), exc_info)
        if self.replaced:
            return _discard
        self.sent = code = int(status[:3])
        if code >= 500 and self.limited is not None and (limited := self.limited()) is not None:
            # The application took a decorator's refusal for a fault of its own; we know better.
            self.replace(self.gate.refusal(self, limited.verdict), exc_info)
            return _discard
        if self.is_open and self.gate.reports:
            headers = self.heed(headers)
        if self.told is not None and code == self.told.status:
            headers = headers + self._missing(headers)
        else:
            headers = headers + self.gate.respond_in_text(self)
        if exc_info is None:
            return self.start_response(status, headers)
        return self.start_response(status, headers, exc_info)

    def replace(self, refusal: Refusal, exc_info: Any = None) -> None:
        """Answer with a refusal in place of what Flask answers."""
        self.sent = refusal.status
        self.replaced = True
        error = error_of(self, refusal)
        more = () if exc_info is None else (exc_info,)
        self.body = error.get_response()(
            self.native, lambda status, headers: self.start_response(status, headers, *more)
        )

    def _missing(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The fields of a refusal that an error handler has left out. Those of its body are its own affair."""
        assert self.told is not None
        there = {name.lower() for name, _ in headers} | {"content-type", "content-length"}
        fields = [_text(field) for field in self.told.fields]
        return [(name, value) for name, value in fields if name.lower() not in there]


class Home:
    """A Flask application's gate; `keeper` is its Gatekeeper."""

    def __init__(self, extension: Gatekeeper, flask: Flask, keeper: Keeper, *, exempt_static: bool) -> None:
        keeper.require(awaiting=False)
        problems = [
            f"{path}: expected a function that is not asynchronous, under WSGI"
            for path, function in keeper.functions()
            if is_asynchronous(function)
        ]
        if problems:
            raise SettingsError(problems)
        self.extension = extension
        self.flask = flask
        self.keeper = keeper
        self._exempt_static = exempt_static
        self._app: App = flask.wsgi_app
        self._preprocess = flask.preprocess_request
        self._calls = any(True for _ in keeper.functions())
        limits = keeper.settings.limits
        # What holds even so for exempt routes: who is denied; for static files also the rules that name requests.
        self._for_exempt = {
            True: self._with([]),
            False: self._with([limit for limit in limits if limit.match is not None and limit.per == "request"]),
        }
        # What is exempt, once the first request has come; routes are complete then.
        self._exempt: Mapping[str, bool] | None = None
        self._maybe: tuple[str, ...] | None = None
        self._rules: dict[tuple[Place, int, str], tuple[Rule, Route | None]] = {}
        self._places: dict[str, tuple[Place, ...]] = {}
        self._prefixes: set[str] = set()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        keeper = self.keeper
        gate = keeper.gate
        ticket = FlaskTicket(environ)
        ticket.home = self
        ticket.start_response = start_response
        # On the instance, for what only its class has takes longer to read.
        ticket.waiting, ticket.told = False, None
        if "gatekeeper.ticket" in environ:
            ticket.outer = environ["gatekeeper.ticket"]
            if ticket.outer.under(gate) is not None:
                return self._app(environ, start_response)  # the same policy stands around us already
        maybe = self._maybe
        if maybe is None:
            maybe = self._index()
        if maybe and environ.get("PATH_INFO", "").startswith(maybe):
            gate.identify(ticket)
            ticket.waiting = True  # the route will tell
        elif self._calls:
            self._admit(ticket)
        else:
            refused = gate.admit_at_once(ticket, keeper.ask, ticket.read)
            if refused:
                ticket.refused, ticket.waiting = refused, True
        environ["gatekeeper.ticket"] = ticket
        if not IN_USE and not ticket.waiting and not ticket.is_open:
            ticket.native = None  # environ and ticket held each other: the cycle would wait for the collector
            return self._app(environ, ticket.start)
        body: Iterable[bytes] = ()
        token = CURRENT.set(ticket)
        try:
            body = self._app(environ, ticket.start)
        except Limited as limited:
            if ticket.sent:
                self._fail(ticket)
                raise
            ticket.replace(gate.refusal(ticket, limited.verdict))
        except BaseException:
            self._fail(ticket)
            raise
        finally:
            CURRENT.reset(token)
        if ticket.is_open or ticket.replaced or not ticket.sent:
            return _Body(ticket, body)
        ticket.native = None
        return body

    def hook(self, *context: Any) -> Any:
        """Flask's `preprocess_request`, which runs the `before_request` functions, and its result."""
        ticket = CURRENT.get()
        # (Whether None is of a class of a protocol takes longer to find out than to decide a request.)
        if ticket is None or not isinstance(ticket, FlaskTicket):
            return self._preprocess(*context)
        if not ticket.waiting or ticket.native is not request.environ:
            return self._preprocess(*context)
        if ticket.steps is None and not ticket.refused:
            self._route(ticket)
        if ticket.refused:
            self._raise(ticket)
        if ticket.steps is None:
            return self._preprocess(*context)
        try:
            return self._preprocess(*context)
        finally:  # whatever these answer, the request is counted
            self.settle(ticket)
            if ticket.refused:
                self._raise(ticket)

    def settle(self, ticket: FlaskTicket) -> None:
        """Come to a decision on a request that waits for one, as far as it can be had."""
        ticket.waiting = False
        if ticket.refused:
            return
        if ticket.steps is None:
            self._admit(ticket)
            ticket.waiting = False
        if ticket.steps is not None:
            assert ticket.question is not None
            steps, question = ticket.steps, ticket.question
            ticket.steps = ticket.question = None
            ticket.refused = run(_rest(steps, question), self.keeper.ask, ticket.read)

    def exempts(self, endpoint: str | None) -> bool:
        """Whether an endpoint was declared exempt (static files are not that)."""
        return self._known_exempt().get(endpoint or "", False)

    def is_static(self, endpoint: str) -> bool:
        """Whether an endpoint is that of static files, and these are under no rule that does not name them."""
        return self._known_exempt().get(endpoint) is False

    def rule(self, place: Place, route: Route | None, mount: str) -> Rule:
        """The rule of a decorator, for a request to a route of an application that is mounted at `mount`."""
        if mount and mount not in self._prefixes:
            if len(self._prefixes) < MOST_PREFIXES:
                self._prefixes.add(mount)
            else:
                mount = "/*"
        key = (place, id(route), mount)
        found = self._rules.get(key)
        if found is None:
            # The route is kept, so that no other comes to have its id.
            found = self._rules[key] = (self._rule(place, route, mount), route)
        return found[0]

    def places(self, endpoint: str) -> tuple[Place, ...]:
        """The limits of an endpoint: on its function, on the methods of its class, on its blueprints."""
        found = self._places.get(endpoint)
        if found is None:
            found = self._places[endpoint] = tuple(self.extension.places(self.flask, endpoint))
        return found

    def _rule(self, place: Place, route: Route | None, mount: str) -> Rule:
        place.check(self.keeper)
        if route is None or not (place.everywhere or place in self.places(route.endpoint)):
            return place.guard.rule(self.keeper, place.label)  # a function that views call: one quota for all of it
        host = route.host if self.flask.url_map.host_matching else route.subdomain and f"{route.subdomain}."
        return place.guard.rule(self.keeper, place.label, f"{host or ''}{mount}{route.rule}")

    def _admit(self, ticket: FlaskTicket) -> None:
        """Decide on a request, unless a function must be asked: it is called within the request's context."""
        keeper = self.keeper
        if self._calls:
            steps = keeper.gate.admit(ticket)
            try:
                question = next(steps)
            except StopIteration as stop:
                ticket.refused = stop.value
            else:
                if isinstance(question, Call):
                    ticket.steps, ticket.question = steps, question
                    if keeper.gate.reads_body:
                        ticket.early = (ticket.read(keeper.settings.identity.max_body),)
                else:
                    ticket.refused = run(_rest(steps, question), keeper.ask, ticket.read)
        else:
            ticket.refused = keeper.gate.admit_at_once(ticket, keeper.ask, ticket.read)
        ticket.waiting = ticket.refused != 0 or ticket.steps is not None

    def _route(self, ticket: FlaskTicket) -> None:
        """Decide on a request whose route is known by now and may be exempt."""
        route = request._get_current_object().url_rule  # type: ignore[attr-defined]
        declared = None if route is None else self._known_exempt().get(route.endpoint)
        if declared is None or not (declared or self._is_file(route.endpoint)):
            self._admit(ticket)
            return
        keeper = self._for_exempt[declared]
        if keeper is not None:
            if keeper.store is not self.keeper.store:  # a test has given us another
                keeper.use(self.keeper.store)
            keeper.enabled = self.keeper.enabled
            ticket.refused = run(keeper.gate.admit(ticket), keeper.ask, ticket.read)
            if declared and not ticket.refused:
                self.keeper.gate.identify(ticket)  # for decorators: these hold
        ticket.waiting = ticket.refused != 0

    def _with(self, limits: list[LimitSettings]) -> Keeper | None:
        """Our Gatekeeper with no other limits than these; None if nothing is left for it to do."""
        settings, access = self.keeper.settings, self.keeper.settings.access
        if not limits and not access.allow and not access.deny:
            return None
        return Keeper(settings.model_copy(update={"limits": limits}), store=self.keeper.store)

    def _raise(self, ticket: FlaskTicket) -> None:
        ticket.waiting = False
        ticket.told = ticket.gate.refusal(ticket)
        raise error_of(ticket, ticket.told)

    def _fail(self, ticket: FlaskTicket) -> None:
        ticket.sent = 500
        self.finish(ticket)

    def finish(self, ticket: FlaskTicket) -> None:
        """End a request, once."""
        ticket.native = None
        if ticket.is_open:
            keeper: Keeper = cast(Gate, ticket.gate).keeper
            keeper.finish(ticket)

    def _known_exempt(self) -> Mapping[str, bool]:
        if self._exempt is None:
            self._index()
        assert self._exempt is not None
        return self._exempt

    def _index(self) -> tuple[str, ...]:
        """Find the exempt endpoints: True for those that were declared so, False for those of static files.

        The result is what their paths begin with: all others can be decided before Flask sees them.
        """
        found: dict[str, bool] = {}
        beginnings: set[str] = set()
        for route in self.flask.url_map.iter_rules():
            if self.extension.exempts(self.flask, route.endpoint):
                found[route.endpoint] = True
            elif self._exempt_static and self._serves_static(route):
                found[route.endpoint] = False
            else:
                continue
            beginnings.add(route.rule.partition("<")[0])
        self._exempt = found
        self._maybe = tuple(sorted(beginnings))
        return self._maybe

    def _is_file(self, endpoint: str) -> bool:
        """Whether the static file that is asked for is there. (At the root, a static route takes all paths.)"""
        folder = getattr(self._owner(endpoint), "static_folder", None)
        path = folder and safe_join(folder, (request.view_args or {}).get("filename", ""))
        return path is not None and os.path.isfile(path)

    def _owner(self, endpoint: str) -> Flask | Blueprint | None:
        name = endpoint.rpartition(".")[0]
        return self.flask.blueprints.get(name) if name else self.flask  # type: ignore[return-value]

    def _serves_static(self, route: Route) -> bool:
        """Whether it is the route that Flask makes for a static folder, of the application or of a blueprint."""
        owner = self._owner(route.endpoint)
        return (
            route.endpoint.rpartition(".")[2] == "static"
            and owner is not None
            and owner.has_static_folder
            and route.rule.endswith(f"{owner.static_url_path}/<path:filename>")
        )

    def __repr__(self) -> str:
        return f"<Home of {self.flask.name}: {self.keeper!r}>"


class _Body:
    """The application's body where its end matters, or where it may run while it is iterated."""

    __slots__ = ("_body", "_iterator", "_rest", "_ticket")

    def __init__(self, ticket: FlaskTicket, body: Iterable[bytes]) -> None:
        self._ticket = ticket
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._rest: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        ticket = self._ticket
        if not ticket.replaced:
            chunk = self._step()
            if not ticket.replaced:
                if chunk is not None:
                    ticket.moved += len(chunk)
                    return chunk
                ticket.ended = True
                ticket.home.finish(ticket)  # test clients may forget to close
                raise StopIteration
        if self._rest is None:
            self._rest = iter(ticket.body)
            ticket.ended = True
        return next(self._rest)

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._ticket.home.finish(self._ticket)

    def __del__(self) -> None:
        # A server that forgets to close it must not hold what the request holds for ever.
        if self._ticket.is_open:
            self._ticket.home.finish(self._ticket)

    def _step(self) -> bytes | None:
        ticket = self._ticket
        token = CURRENT.set(ticket)
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator, None)
        except Limited as limited:
            if ticket.sent:
                raise
            ticket.replace(ticket.gate.refusal(ticket, limited.verdict))
            return None
        except Exception:
            ticket.sent = 500
            raise
        finally:
            CURRENT.reset(token)


def _text(field: tuple[bytes, bytes]) -> tuple[str, str]:
    """A field as WSGI has it (PEP 3333)."""
    return field[0].decode("latin-1"), field[1].decode("latin-1")


def _rest(steps: Steps[int], question: Question) -> Steps[int]:
    """What is left of steps that have asked already."""
    while True:
        answer = yield question
        try:
            question = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _discard(data: bytes) -> None:
    """The `write` of a response that was replaced."""
