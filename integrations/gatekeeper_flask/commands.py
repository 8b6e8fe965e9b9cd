"""`flask gatekeeper check|limits|reset|bans`.

Exit statuses: 0 all is well, 1 the store does not answer, or with `check --strict` there are warnings, 2 the
command is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import click
from flask.cli import AppGroup

from gatekeeper.errors import StoreError
from gatekeeper.quotas import Known, known
from gatekeeper.quotas import reset as restore
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import LimitSettings, store_scheme

if TYPE_CHECKING:
    from gatekeeper_flask.home import Home


def group(home: Home) -> AppGroup:
    """The commands of an application."""
    commands = AppGroup("gatekeeper", help="Limits: which routes they cover, counters, bans.")

    @commands.command("check")
    @click.option("--workers", type=click.IntRange(min=1), help="How many processes serve it.")
    @click.option("--strict", is_flag=True, help="End with status 1 if there is a warning.")
    def check(workers: int | None, strict: bool) -> None:
        """List each route with what limits it, and warn of what should be looked at."""
        from gatekeeper_flask.routes import covered, known_workers, warned

        for one, why in sorted(covered(home), key=lambda entry: entry[0].route.path):
            methods = "|".join(sorted((one.route.methods or frozenset()) - {"HEAD", "OPTIONS"})) or "any method"
            told = ", ".join(one.rules) or "no limit"
            click.echo(f"{methods} {one.route.path}: {told}{f' ({why})' if why else ''}")
        warnings = list(warned(home, workers or known_workers()))
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        if strict and warnings:
            raise click.exceptions.Exit(1)

    @commands.command("limits")
    def limits() -> None:
        """List the rules of the settings, and the limits of views."""
        for rule in home.keeper.gate.rules:
            matches = rule.pattern.text if rule.pattern is not None else "all requests"
            click.echo(f"{rule.name}: {matches}: {_told(rule)}")
        for rule, where in _placed(home):
            click.echo(f"{rule.name}: {where}: {_told(rule)}")

    @commands.command("reset")
    @click.argument("rule")
    @click.argument("key", nargs=-1, required=True)
    def reset(rule: str, key: tuple[str, ...]) -> None:
        """Make a quota whole again: that of RULE for KEY, the values of the parts of its key, in their order.

        RULE is a rule's name, as `limits` lists it. An address stands for a part that a request has not.
        Counters in memory are each process's own: those of a running server cannot be reached.
        """
        _needs_store(home)
        placed = (Known(one, settings) for one, _, settings in _of_places(home))
        try:
            restore(home.keeper, [*known(home.keeper), *placed], rule, key)
        except ValueError as error:
            _wrong(str(error))
        except StoreError as error:
            _failed(error)

    @commands.command("bans")
    @click.option("--lift", nargs=2, metavar="RULE KEY", help="Lift the ban of a key, as it is listed.")
    def bans(lift: tuple[str, str] | None) -> None:
        """List the keys that are banned, or lift the ban of one."""
        _needs_store(home)
        try:
            if lift is not None:
                home.keeper.lift(*lift)
                return
            for ban in home.keeper.bans():
                click.echo(f"{ban.rule} {ban.key} {ban.seconds:.0f} s")
        except KeyError as error:
            _wrong(f"RULE: {error.args[0]}")
        except StoreError as error:
            _failed(error)

    return commands


def _told(rule: Rule) -> str:
    return ", ".join(limit.policy for limit in rule.limits)


def _placed(home: Home) -> Iterator[tuple[Rule, str]]:
    """The limits of views, each with where it stands."""
    for rule, where, _ in _of_places(home):
        yield rule, where


def _of_places(home: Home) -> Iterator[tuple[Rule, str, LimitSettings]]:
    from gatekeeper_flask.routes import template

    for route in home.flask.url_map.iter_rules():
        for place in (*home.places(route.endpoint), *home.extension.defaults(home.flask, route.endpoint)):
            rule = home.rule(place, route, "")
            yield rule, f"{template(route.rule)} ({route.endpoint})", place.guard.settings


def _needs_store(home: Home) -> None:
    url = home.keeper.settings.store.url
    if url is None or store_scheme(url) == "memory":
        click.echo(
            "warning: counters in memory are each process's own; this command sees none but its own", err=True
        )


def _wrong(text: str) -> NoReturn:
    click.echo(text, err=True)
    raise click.exceptions.Exit(2)


def _failed(error: StoreError) -> NoReturn:
    click.echo(str(error), err=True)
    raise click.exceptions.Exit(1)
