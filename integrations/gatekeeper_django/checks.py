"""System checks: `manage.py check` tells what is wrong with the settings, `check --deploy` what is unsafe as well.

- gatekeeper.E001: the settings are wrong; a line for each error
- gatekeeper.E002: what the settings name needs a package that is not installed
- gatekeeper.E003: a view that is not asynchronous has a limit that needs an asynchronous function
- gatekeeper.W001: counters in memory, and several worker processes
- gatekeeper.W002: rules without the middleware
- gatekeeper.W003: the middleware stands twice, or where others spoil its answers
- gatekeeper.W004: rules that count by the user, and no middleware that authenticates
- gatekeeper.W005: clients may choose the address, or the name, that they are counted by
- gatekeeper.W006: passwords may be tried without limit while the store does not answer
- gatekeeper.W007: a rule counts by nothing but what clients make up
- gatekeeper.W008 (deploy): nothing is limited
- gatekeeper.W009 (deploy): a rule counts by a cookie that is sent over connections that are not encrypted

Those of sessions, E004 and W010 to W016, are in `session_checks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning
from django.core.checks import register as register_check
from django.utils.module_loading import import_string

from gatekeeper.coverage import RouteInfo, risks
from gatekeeper.errors import MissingExtra, SettingsError
from gatekeeper.settings import LimitSettings, Settings, store_scheme
from gatekeeper_django.conf import SETTING, keeper, load, workers
from gatekeeper_django.decorators import Limit, limits_of
from gatekeeper_django.middleware import GatekeeperMiddleware
from gatekeeper_django.requests import user_of
from gatekeeper_django.routes import Route, as_pattern, methods_of, routes
from gatekeeper_django.session_checks import session_deployment, session_messages

_KINDS: Final = (("enabled", "W008"), ("store.", "W001"), ("identity.", "W005"))
"""The beginnings of lines of `risks`, and their ids; the others are about `on_error`."""

_OUTSIDE: Final = {
    "corsheaders.middleware.CorsMiddleware": "scripts of other origins cannot read a refusal without its fields",
}
"""Middleware that must stand before ours, and why."""

_INSIDE: Final = {
    "django.middleware.cache.UpdateCacheMiddleware": "it would keep one client's fields for all others",
}
"""Middleware that must stand behind ours, and why."""

_MADE_UP: Final = ("header:", "cookie:", "query:", "form:", "json:", "api_key", "host")
_BESIDES: Final = ("method", "route", "param:")


def register() -> None:
    """Have Django carry them out."""
    register_check(check_settings, Tags.security)
    register_check(check_deployment, Tags.security, deploy=True)


def check_settings(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    """Those for each start."""
    try:
        found = load()
        keeper()
    except SettingsError as error:
        return [Error(f"{SETTING}: {problem}", id="gatekeeper.E001") for problem in error.problems]
    except MissingExtra as error:
        return [Error(f"{SETTING}: {error}", id="gatekeeper.E002")]
    except Exception as error:  # files that the settings name
        return [Error(str(error), id="gatekeeper.E001")]
    places = list(_limited_routes())
    return [
        *_asynchronous(places),
        *_middleware(found),
        *_keys(found),
        *(one for one in _risky(found, places) if one.id != "gatekeeper.W008"),
        *session_messages(found),
    ]


def check_deployment(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    """Those for `check --deploy`."""
    try:
        found = load()
    except SettingsError:
        return []  # told already
    messages = [one for one in _risky(found, []) if one.id == "gatekeeper.W008"]
    if _is_memory(found) and workers() is None:
        messages.append(
            Warning(
                f"{SETTING}: store.url: memory is each process's own, and how many serve is not known",
                hint="Name a store that counts for all, such as shared:///dev/shm/gatekeeper or redis://; or set "
                "WEB_CONCURRENCY=1 in the environment, if there is but one.",
                id="gatekeeper.W001",
            )
        )
    return [*messages, *_cookies(found), *session_deployment(found)]


def route_infos() -> Iterator[tuple[Route, RouteInfo]]:
    """Every route of the root URLconf, as the core's report wants it."""
    for route in routes():
        guards = tuple(_told(placed.limit) for placed in limits_of(route.view))
        name = route.name or f"{getattr(route.view, '__module__', '')}.{getattr(route.view, '__qualname__', '')}"
        yield route, RouteInfo(methods_of(route.view), as_pattern(route.template), name, guards)


def _told(limit: Limit) -> str:
    settings = limit.guard.settings
    what = ", ".join(settings.rate) if settings.concurrency is None else f"{settings.concurrency} at a time"
    only = "" if limit.methods is None else f" on {'|'.join(sorted(limit.methods - {'HEAD'}))}"
    return f"{limit.guard.name or '@limit'} ({what}{only})"


def _limited_routes() -> Iterator[tuple[Route, Limit]]:
    """The routes with decorated views. A URLconf that cannot be read is told by Django's own checks."""
    try:
        found = list(routes())
    except Exception:
        return
    for route in found:
        for placed in limits_of(route.view):
            yield route, placed.limit


def _asynchronous(places: Iterable[tuple[Route, Limit]]) -> Iterator[CheckMessage]:
    from asgiref.sync import iscoroutinefunction

    for route, limit in places:
        if limit.guard.awaited(keeper()) and not iscoroutinefunction(route.view):
            yield Error(
                f"The view at /{route.template} is not asynchronous, and a function of its limit's settings is.",
                id="gatekeeper.E003",
            )


def _middleware(found: Settings) -> Iterator[CheckMessage]:
    names = list(getattr(django_settings, "MIDDLEWARE", ()))
    ours = [place for place, name in enumerate(names) if _is(name, GatekeeperMiddleware)]
    if not ours:
        if found.limits or found.access.deny:
            yield Warning(
                f"{SETTING} has rules, and nothing carries them out.",
                hint="Add 'gatekeeper_django.GatekeeperMiddleware' to MIDDLEWARE.",
                id="gatekeeper.W002",
            )
        return
    if len(ours) > 1:
        yield Warning("GatekeeperMiddleware stands twice in MIDDLEWARE.", id="gatekeeper.W003")
    for place, name in enumerate(names):
        if name in _OUTSIDE and place > ours[0]:
            yield Warning(
                f"GatekeeperMiddleware should stand behind {name}: {_OUTSIDE[name]}.", id="gatekeeper.W003"
            )
        if name in _INSIDE and place < ours[0]:
            yield Warning(
                f"GatekeeperMiddleware should stand before {name}: {_INSIDE[name]}.", id="gatekeeper.W003"
            )
    counts_by_user = any("user" in limit.key or limit.tier == "user" for limit in found.limits)
    if counts_by_user and found.identity.user is user_of and not any(_authenticates(name) for name in names):
        yield Warning(
            f"{SETTING} has rules that count by the user, and no middleware says who it is.",
            hint="Add 'django.contrib.auth.middleware.AuthenticationMiddleware' to MIDDLEWARE, or name a function "
            "as identity.user.",
            id="gatekeeper.W004",
        )


def _is(name: str, kind: type) -> bool:
    try:
        found = import_string(name)
    except ImportError:
        return False  # Django tells it
    return isinstance(found, type) and issubclass(found, kind)


def _authenticates(name: str) -> bool:
    try:
        from django.contrib.auth.middleware import AuthenticationMiddleware
    except Exception:  # it wants to be an installed application
        return False
    return _is(name, AuthenticationMiddleware)


def _keys(found: Settings) -> Iterator[CheckMessage]:
    by_address = {limit.match for limit in found.limits if "ip" in limit.key and not limit.shadow}
    for place, limit in enumerate(found.limits):
        if limit.shadow or None in by_address or limit.match in by_address:
            continue
        texts = [part for part in limit.key if isinstance(part, str)]
        made_up = [text for text in texts if text.startswith(_MADE_UP)]
        if made_up and len(texts) == len(limit.key) and all(text.startswith(_MADE_UP + _BESIDES) for text in texts):
            yield Warning(
                f"{SETTING}: limits[{place}].key: {', '.join(made_up)} is what a client makes up: with another "
                "value each time there is no limit.",
                hint="Add 'ip' to the key, or a rule of the same match that counts by it.",
                id="gatekeeper.W007",
            )


def _risky(found: Settings, places: Iterable[tuple[Route, Limit]]) -> Iterator[CheckMessage]:
    guards: list[tuple[str, LimitSettings]] = [
        (f"/{route.template}", limit.guard.settings) for route, limit in places
    ]
    for line in risks(found, workers=workers(), guards=guards):
        number = next((number for beginning, number in _KINDS if line.startswith(beginning)), "W006")
        yield Warning(f"{SETTING}: {line}", id=f"gatekeeper.{number}")


def _is_memory(found: Settings) -> bool:
    return found.store.url is None or store_scheme(found.store.url) == "memory"


def _cookies(found: Settings) -> Iterator[CheckMessage]:
    for kind in ("SESSION", "CSRF"):
        name, is_secure = (getattr(django_settings, f"{kind}_COOKIE_{what}") for what in ("NAME", "SECURE"))
        for place, limit in enumerate(found.limits):
            if f"cookie:{name}" in limit.key and not is_secure:
                yield Warning(
                    f"{SETTING}: limits[{place}].key: the cookie {name} is sent over connections that are not "
                    "encrypted, and who reads it there spends its owner's quota.",
                    hint=f"Set {kind}_COOKIE_SECURE = True.",
                    id="gatekeeper.W009",
                )
