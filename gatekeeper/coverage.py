"""Which rules cover which routes of an application, and what is risky about its settings.

The adapters of frameworks list their routes; what that means is found out here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from gatekeeper.http.routes import Pattern, normalise
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import LimitSettings, Settings, store_scheme

_PARAMETER: Final = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")
_AUTOMATIC: Final = frozenset(["HEAD", "OPTIONS"])
"""Methods that frameworks add by themselves."""

_AUTHENTICATES: Final = re.compile(
    r"(?<![a-z])(?:log[-_]?[io]n|sign[-_]?(?:in|up)|(?:otp|mfa|2fa)(?![a-z]))|token|passw|auth(?!or)",
    re.IGNORECASE,
)


class RouteInfo(NamedTuple):
    """A route of an application.

    - `methods` in upper case; None for all, and for a WebSocket
    - `path`: the template with what it is mounted under. `{name}` is one segment, `{name:path}` any number of them,
      whatever the framework writes; a final `/*` stands for all below.
    - `name`: of the function, the view or the endpoint
    - `guards`: what limits it where it stands (decorators, dependencies), as clients are told
    """

    methods: frozenset[str] | None
    path: str
    name: str
    guards: tuple[str, ...] = ()


class Covered(NamedTuple):
    """A route and what limits it: rules of the settings, then its guards. Rules in shadow mode limit nothing."""

    route: RouteInfo
    rules: tuple[str, ...]


def coverage(keeper: Gatekeeper, routes: Iterable[RouteInfo]) -> list[Covered]:
    """The routes, in their order, each with the names of all that limits it.

    A rule covers a route if it applies to whatever the variable parts of the path stand for, and to one of its
    methods. Rules for one host, or for some methods, count as well. Rules of the settings need the middleware.
    """
    rules = [rule for rule in keeper.gate.rules if not rule.messages]
    return [Covered(route, (*_covering(rules, route), *route.guards)) for route in routes]


def _covering(rules: Iterable[Rule], route: RouteInfo) -> tuple[str, ...]:
    paths = _samples(route.path)
    applying = [rule for rule in rules if rule.pattern is None or _covers(rule.pattern, route.methods, paths)]
    overridden = frozenset[str]().union(*(rule.overrides for rule in applying))
    return tuple(rule.name for rule in applying if not rule.shadow and rule.name not in overridden)


def _covers(pattern: Pattern, methods: frozenset[str] | None, paths: Iterable[str]) -> bool:
    wanted = (pattern.methods or ["GET"]) if methods is None else (methods - _AUTOMATIC or methods)
    host = (pattern.host or "").replace("*", "www")
    return any(all(pattern.covers(method, host, path) for path in paths) for method in wanted)


def _samples(path: str) -> list[str]:
    """Paths that a template stands for, such as no literal pattern is meant for."""
    samples = []
    for many in ("~", "~/~", "~/~/~"):
        told = _PARAMETER.sub(lambda part, many=many: many if part[2] == "path" else "~", path)  # type: ignore[misc]
        samples.append(normalise(re.sub(r"/\*$", f"/{many}", told)))
    return list(dict.fromkeys(samples))


def risks(
    settings: Settings, *, workers: int | None, guards: Iterable[tuple[str, LimitSettings]] = ()
) -> list[str]:
    """What is dangerous about settings that are right, a line each. No line shows a secret or a store's URL.

    - `workers`: how many processes serve; None if that is not known
    - `guards`: the limits of decorators and dependencies, each with what to call it (a path, a function)
    """
    return list(dict.fromkeys(_risks(settings, workers, guards)))


def _risks(settings: Settings, workers: int | None, guards: Iterable[tuple[str, LimitSettings]]) -> Iterator[str]:
    if not settings.enabled:
        yield "enabled: nothing is limited at all"
    is_memory = settings.store.url is None or store_scheme(settings.store.url) == "memory"
    if is_memory and workers is not None and workers > 1:
        yield (
            f"store.url: memory is each process's own: with {workers} workers a client has {workers} times each "
            "quota; shared:///dev/shm/gatekeeper or redis:// counts for all"
        )
    yield from _spoofable(settings)
    if is_memory:  # it always answers
        return
    limits = [(f"limits[{place}]", limit.match or "", limit) for place, limit in enumerate(settings.limits)]
    for where, what, limit in (*limits, *((place, place, limit) for place, limit in guards)):
        policy = limit.on_error or settings.store.on_error
        if policy != "deny" and not limit.shadow and _AUTHENTICATES.search(f"{what} {limit.name}"):
            outcome = "lets all pass" if policy == "allow" else "lets each process count by itself"
            when = "while the store does not answer"
            yield f'{where}.on_error: "{policy}" {outcome} {when}, and passwords are tried here'


def _spoofable(settings: Settings) -> Iterator[str]:
    """Addresses and names that clients may choose for themselves, or that nobody can have."""
    identity = settings.identity
    for text in identity.trusted_proxies:
        if text == "unix":
            continue
        network = ipaddress.ip_network(text)
        if network.prefixlen == 0:
            yield f"identity.trusted_proxies: {text} trusts everybody, so that each client may name its own address"
        elif network.is_global and network.prefixlen < (8 if network.version == 4 else 19):
            yield f"identity.trusted_proxies: {text} trusts more of the Internet than any provider has"
    if not identity.trusted_proxies:
        if "header" in identity.model_fields_set:
            yield "identity.header: nobody is believed who writes it; trusted_proxies names who is"
        if isinstance(identity.user, str) and identity.user.startswith("header:"):
            yield "identity.user: nobody is believed who writes that header; trusted_proxies names who is"
