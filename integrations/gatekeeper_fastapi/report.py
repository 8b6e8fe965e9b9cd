"""What limits the routes of an application, and what does not: `check(app)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from gatekeeper.asgi import GatekeeperMiddleware
from gatekeeper.coverage import Covered, RouteInfo, coverage, risks
from gatekeeper.decorators import Guard
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import LimitSettings, warnings
from gatekeeper_fastapi.dependency import limits_of
from gatekeeper_fastapi.endpoints import idle
from gatekeeper_fastapi.places import Leaf, label_of, leaves
from gatekeeper_fastapi.tickets import keeper_for


@dataclass(frozen=True)
class Report:
    """What limits an application. `str` of it is for people.

    - `routes`: each with what limits it
    - `uncovered`: those that nothing limits, but for FastAPI's own pages of documentation
    - `warnings`: what is wrong or risky, a line each
    """

    routes: tuple[Covered, ...]
    uncovered: tuple[RouteInfo, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(_methods(route), route.path, ", ".join(rules) or "no limit") for route, rules in self.routes] or [
            ("", "", "no routes")
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{methods:{widths[0]}}  {path:{widths[1]}}  {rules}".rstrip() for methods, path, rules in rows]
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])


def _methods(route: RouteInfo) -> str:
    return "*" if route.methods is None else "|".join(sorted(route.methods - {"HEAD"} or route.methods))


def uncovered(app: Any) -> list[RouteInfo]:
    """The routes of an application that no limit is for."""
    return list(check(app).uncovered)


def check(app: Any, *, workers: int | None = None) -> Report:
    """What limits the routes of a FastAPI or Starlette application, those mounted and included with them.

    - `workers`: how many processes serve; by default what WEB_CONCURRENCY says, if anything

    A test may assert that nothing is uncovered: `assert not check(app).uncovered`. On the command line:
    `python -m gatekeeper_fastapi package.module:app`.
    """
    if workers is None:
        told = os.environ.get("WEB_CONCURRENCY", "")
        workers = int(told) if told.isascii() and told.isdigit() else None
    policies = _Policies()
    covered: list[Covered] = []
    bare: list[RouteInfo] = []
    guards: list[tuple[str, LimitSettings]] = []
    ends: list[Any] = []
    for leaf in leaves(app):
        ends.append(leaf.endpoint)
        if leaf.is_mount or (leaf.methods is not None and leaf.endpoint is None and leaf.dependant is None):
            continue
        keepers = [policies.keeper(one) for one in leaf.around if not isinstance(one, Guard)]
        standing = list(_guards(leaf))
        keeper = keepers[0] if keepers else policies.own(app)
        names = tuple(guard.rule(keeper, label, leaf.template).name for label, guard in standing)
        info = RouteInfo(leaf.methods, leaf.path, leaf.name, names)
        ((_, rules),) = coverage(keeper, [info]) if keepers else [Covered(info, names)]
        for other in keepers[1:]:
            ((_, more),) = coverage(other, [info._replace(guards=())])
            rules = (*more, *rules)
        covered.append(Covered(info, rules))
        if not rules and not str(getattr(leaf.endpoint, "__module__", "")).startswith("fastapi."):
            bare.append(info)
        guards += [(leaf.path, guard.settings) for _, guard in standing]
    lines: list[str] = []
    for keeper in policies.seen or [policies.own(app)]:
        lines += warnings(keeper.settings)
        lines += risks(keeper.settings, workers=workers, guards=guards)
        if not policies.seen and keeper.settings.limits:
            lines.append("limits: they are for GatekeeperMiddleware, which the application has not")
    lines += _standing(app)
    lines += [f"{label}: its limit stands above its route and limits nothing: put it below" for label in idle(ends)]
    lines += [f"{_methods(route)} {route.path}: no limit is for it" for route in bare]
    return Report(tuple(covered), tuple(bare), tuple(dict.fromkeys(lines)))


class _Policies:
    """The Gatekeepers of an application, made of settings where it gives its middleware those."""

    def __init__(self) -> None:
        self.seen: list[Gatekeeper] = []
        self._made: dict[int, tuple[Any, Gatekeeper]] = {}

    def keeper(self, policy: Any) -> Gatekeeper:
        _, keeper = self._made.setdefault(id(policy), (policy, _made(policy)))
        if keeper not in self.seen:
            self.seen.append(keeper)
        return keeper

    def own(self, app: Any) -> Gatekeeper:
        while not isinstance(app, Starlette) and hasattr(app, "app"):
            app = app.app
        return keeper_for({"app": app})


def _made(policy: Any) -> Gatekeeper:
    return policy if isinstance(policy, Gatekeeper) else Gatekeeper(policy)


def _guards(leaf: Leaf) -> Iterator[tuple[str, Guard]]:
    """The guards of a route, from the outermost, each with the label of its place."""
    label = label_of(leaf.endpoint) if leaf.endpoint is not None else leaf.name
    yield from ((label, one) for one in leaf.around if isinstance(one, Guard))
    yield from ((label + one.mark(leaf.dependant), one.guard) for one in limits_of(leaf.dependant))
    yield from _numbered(label, getattr(leaf.endpoint, "__gatekeeper__", ()))
    if isinstance(leaf.endpoint, type):
        for name in ("get", "post", "put", "patch", "delete", "query", "on_connect", "on_receive"):
            method = getattr(leaf.endpoint, name, None)
            yield from _numbered(f"{label}.{name}", getattr(method, "__gatekeeper__", ()))


def _numbered(label: str, guards: Iterable[Guard]) -> Iterator[tuple[str, Guard]]:
    for number, guard in enumerate(guards):
        yield label + (f"#{number + 1}" if number and guard.name is None else ""), guard


def _standing(app: Any) -> Iterator[str]:
    """Whether the middleware stands where scripts of a browser can read its refusals."""
    if not isinstance(app, Starlette):
        return
    order: list[Any] = [one.cls for one in app.user_middleware]
    inside = False
    for one in order:
        inside = inside or one is CORSMiddleware
        if (
            isinstance(one, type)
            and issubclass(one, GatekeeperMiddleware)
            and not inside
            and CORSMiddleware in order
        ):
            yield (
                "GatekeeperMiddleware: it stands outside of CORSMiddleware: scripts cannot read its refusals; "
                "add it before CORSMiddleware, for what is added last stands outermost"
            )
