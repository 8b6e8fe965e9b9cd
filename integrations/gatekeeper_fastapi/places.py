"""The routes of an application, each with the whole of its template, and which of them a request is on.

A route knows only its own path. What it is mounted or included under stands in the routes around it, so the tree is
walked once, from the outermost router, and found again by the objects that a request's scope names.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final, NamedTuple

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router, compile_path

from gatekeeper.asgi import GatekeeperMiddleware
from gatekeeper.decorators import of_route

_DEEPEST: Final = 32  # an application may be mounted in itself
_MOST: Final = 1024


class Leaf(NamedTuple):
    """A route that answers.

    - `route`: the object that a request's scope names: the route, or FastAPI's context of an included one
    - `path`: its template below `host`, with all that it is under
    - `methods`: None for all, and for WebSockets
    - `dependant`: FastAPI's tree of its dependencies; None for Starlette's own routes
    - `around`: what stands around it: the Gatekeepers or settings of middleware, and guards
    - `is_mount`: whether other routes are below it
    """

    route: Any
    host: str
    path: str
    methods: frozenset[str] | None
    name: str
    endpoint: Any
    dependant: Any
    around: tuple[Any, ...]
    is_mount: bool = False

    @property
    def template(self) -> str:
        return self.host + self.path


def leaves(app: Any) -> Iterator[Leaf]:
    """All routes of an application, of those mounted in it and of its routers, in the order they are tried in."""
    return _below(app, "", "", (), 0)


def _below(app: Any, host: str, path: str, around: tuple[Any, ...], depth: int) -> Iterator[Leaf]:
    found = around
    while app is not None and not hasattr(app, "routes"):
        if isinstance(app, GatekeeperMiddleware):
            found = (*found, app.keeper)
        found = (*found, *getattr(app, "__gatekeeper__", ()))
        app = getattr(app, "app", None)  # what middleware is around, by everybody's convention
    if app is None or depth > _DEEPEST:
        return
    if isinstance(app, Starlette):
        found = (*found, *policies_of(app))
    yield from _each(app.routes, host, path, found, depth)
    # FastAPI's static frontends are tried last.
    router = getattr(app, "router", app)
    for group in getattr(router, "_low_priority_routes", ()):
        for route in getattr(group, "routes", ()):
            below = f"{path}{route.path}".rstrip("/") + "/*"
            yield Leaf(group, host, below, frozenset(route.methods), "frontend", None, group.dependant, found)


def _each(routes: Iterable[Any], host: str, path: str, around: tuple[Any, ...], depth: int) -> Iterator[Leaf]:
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is not None:  # an included router of FastAPI's
            for context in contexts():
                if context.starlette_route is not None:
                    yield from _each([context.starlette_route], host, path, around, depth)
                elif context.endpoint is not None:
                    yield _leaf(context, host, path, around)
        elif isinstance(route, Mount):
            below = path + route.path
            inner = list(_below(route.app, host, below, around, depth + 1))
            yield Leaf(
                route,
                host,
                f"{below}/*",
                None,
                route.name or "mount",
                route.app,
                None,
                around,
                is_mount=bool(inner),
            )
            yield from inner
        elif isinstance(route, Host):
            yield from _below(route.app, route.host, path, around, depth + 1)
        elif isinstance(route, BaseRoute) and hasattr(route, "path"):
            yield _leaf(route, host, path, around)


def _leaf(route: Any, host: str, path: str, around: tuple[Any, ...]) -> Leaf:
    methods = getattr(route, "methods", None)
    return Leaf(
        route,
        host,
        path + route.path,
        frozenset(methods) if methods else None,
        str(getattr(route, "name", "")),
        getattr(route, "endpoint", None),
        getattr(route, "dependant", None),
        around,
    )


def is_application(app: Any) -> bool:
    """Whether it has routes, or is middleware around what has some."""
    while app is not None and not isinstance(app, Router | Starlette):
        app = getattr(app, "app", None)
    return app is not None


def policies_of(app: Starlette) -> Iterator[Any]:
    """What the middleware of an application was given: Gatekeepers, or settings."""
    for one in app.user_middleware:
        if isinstance(one.cls, type) and issubclass(one.cls, GatekeeperMiddleware):
            yield one.kwargs["settings"] if "settings" in one.kwargs else one.args[0]


class _Index:
    """The routes below an outermost router, by what scopes name them by."""

    def __init__(self, router: Any) -> None:
        self.router = router  # kept: an id is only good for as long as its object
        self.found: dict[int, list[Leaf]] = {}
        self.missed: dict[int, Any] = {}
        for leaf in leaves(router):
            for key in (leaf.route, leaf.endpoint):
                if key is not None:
                    self.found.setdefault(id(key), []).append(leaf)


_INDEXES: Final[dict[int, _Index]] = {}


def key_of(scope: MutableMapping[str, Any]) -> Any:
    """The object by which a request's route is known; None if nobody has routed it."""
    route = scope.get("route")
    fastapi = scope.get("fastapi")
    if fastapi:
        context = fastapi.get("effective_route_context")
        # What an earlier router left behind is of another route.
        if context is not None and context.original_route is route:
            return context
    endpoint = scope.get("endpoint")
    if route is not None and getattr(route, "endpoint", None) is endpoint:
        return route
    return route if endpoint is None else endpoint


def leaf_of(scope: MutableMapping[str, Any], key: Any) -> tuple[Leaf | None, bool]:
    """The route of a request, None if it cannot be found; and whether the key alone says so."""
    router = scope.get("router")
    if router is None or key is None:
        return None, True
    index = _INDEXES.get(id(router))
    if index is None or index.router is not router:
        index = _new_index(router)
    candidates = index.found.get(id(key), [])
    if not candidates and id(key) not in index.missed:
        index = _new_index(router)  # it was added since
        candidates = index.found.get(id(key), [])
        if not candidates:
            if len(index.missed) >= _MOST:
                index.missed.clear()
            index.missed[id(key)] = key
    if len(candidates) < 2:
        return (candidates[0] if candidates else None), True
    path = _path_of(scope)
    for leaf in candidates:
        if _matcher(leaf.path).match(path):
            return leaf, False
    return candidates[0], False


@functools.lru_cache(maxsize=_MOST)
def _matcher(path: str) -> re.Pattern[str]:
    """What matches the paths of a template. A mount and a route in it may have parameters of one name."""
    numbers = itertools.count()
    return compile_path(re.sub(r"\{\w+", lambda _: f"{{p{next(numbers)}", path.replace("/*", "/{p:path}")))[0]


def _new_index(router: Any) -> _Index:
    if len(_INDEXES) >= 64:
        _INDEXES.clear()
    before = _INDEXES.get(id(router))
    index = _INDEXES[id(router)] = _Index(router)
    if before is not None and before.router is router:
        index.missed = before.missed
    return index


def _path_of(scope: MutableMapping[str, Any]) -> str:
    """The path without what a server or a proxy in front says that the whole application is under."""
    path: str = scope["path"]
    root: str = scope.get("app_root_path", scope.get("root_path", ""))
    return path.removeprefix(root) if root and re.match(re.escape(root) + r"(/|\Z)", path) else path


def template_of(leaf: Leaf | None, key: Any) -> str:
    """A request's template. Where it is under something that cannot be looked into, that does not count."""
    if leaf is not None:
        return leaf.template
    path = getattr(key, "path_format", None)
    return "*" if path is None else f"*{path}"


def label_of(endpoint: Any) -> str:
    """The name of a function or a class, with its module."""
    while hasattr(endpoint, "func"):  # a partial
        endpoint = endpoint.func
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    return f"{named.__module__}.{named.__qualname__}"


def with_parameters(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a guard, whose key may name a parameter of the path, as Starlette has found it out."""
    return of_route(settings, lambda ticket: ticket.native.get("path_params"))
