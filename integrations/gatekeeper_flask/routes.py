"""The routes of a Flask application, and which rules cover them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from gatekeeper.coverage import Covered, RouteInfo, coverage, risks
from gatekeeper.settings import LimitSettings
from gatekeeper_flask.home import Home

_VARIABLE = re.compile(r"<(?:(?P<converter>[^:<>(]+)(?:\((?:[^()]|\([^()]*\))*\))?:)?(?P<name>[^<>]+)>")


def template(rule: str) -> str:
    """Flask's `/files/<path:name>` as `/files/{name:path}`."""
    return _VARIABLE.sub(
        lambda found: f"{{{found['name']}{':path' if found['converter'] == 'path' else ''}}}", rule
    )


def covered(home: Home) -> list[tuple[Covered, str]]:
    """Each route with what limits it, and why nothing does where that is meant: "exempt", "static" or ""."""
    app, extension = home.flask, home.extension
    found = []
    for route in app.url_map.iter_rules():
        endpoint = route.endpoint
        is_exempt, is_static = home.exempts(endpoint), home.is_static(endpoint)
        places = (*home.places(endpoint), *extension.defaults(app, endpoint))
        names = tuple(dict.fromkeys(home.rule(place, route, "").name for place in places))
        methods = None if route.methods is None else frozenset(route.methods)
        info = RouteInfo(methods, template(route.rule), endpoint, names)
        (one,) = coverage(home.keeper, [info])
        if is_exempt or is_static:
            named = (
                {rule.name for rule in home.keeper.gate.rules if rule.pattern is not None} if is_static else set()
            )
            one = Covered(info, tuple(name for name in one.rules if name in named or name in names))
        found.append((one, "exempt" if is_exempt else "static" if is_static else ""))
    return found


def warned(home: Home, workers: int | None) -> Iterator[str]:
    """What should be looked at, a line each."""
    for one, why in covered(home):
        if not one.rules and not why:
            yield f"{one.route.path} ({one.route.name}): no rule covers it"
    for place in home.extension.idle(home.flask):
        yield f"{place.label}: its limit stands above its route and limits nothing: put it below"
    yield from risks(home.keeper.settings, workers=workers, guards=_guards(home))


def known_workers() -> int | None:
    """How many processes serve, if the environment tells: `WEB_CONCURRENCY`, which gunicorn and hosters read."""
    told = os.environ.get("WEB_CONCURRENCY", "")
    return int(told) if told.isascii() and told.isdigit() else None


def _guards(home: Home) -> Iterator[tuple[str, LimitSettings]]:
    for route in home.flask.url_map.iter_rules():
        for place in (*home.places(route.endpoint), *home.extension.defaults(home.flask, route.endpoint)):
            yield f"{route.endpoint} ({template(route.rule)})", place.guard.settings
