"""`manage.py gatekeeper check [--strict] | limits | reset RULE KEY… | bans [--lift RULE KEY]`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from gatekeeper.coverage import coverage, risks
from gatekeeper.errors import StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.quotas import Known, known, reset
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import LimitSettings
from gatekeeper.stores.memory import MemoryStore
from gatekeeper_django.checks import route_infos
from gatekeeper_django.conf import keeper, load, workers
from gatekeeper_django.decorators import limits_of


class Command(BaseCommand):  # type: ignore[misc]  # Django has no hints of its own
    help = "Rate limits: what covers which route, what the rules are, and what they hold at the moment."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        check = commands.add_parser("check", help="List each route with what limits it, and what is unsafe.")
        check.add_argument("--workers", type=int, help="How many processes serve.")
        check.add_argument("--strict", action="store_true", help="Exit with 1 if there is a warning.")
        commands.add_parser("limits", help="List the rules, of the settings and of views.")
        whole = commands.add_parser("reset", help="Make the quota of a key whole again.")
        whole.add_argument("rule", help="As `limits` lists it.")
        whole.add_argument(
            "key", nargs="+", help="An address, a user's primary key, or what else the parts of the rule's key are."
        )
        bans = commands.add_parser("bans", help="List bans, or lift one.")
        bans.add_argument("--lift", nargs=2, metavar=("RULE", "KEY"), help="Lift the ban of a key, as listed.")

    def handle(self, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self, f"_{options['command']}")(keeper(), options)
        except StoreError as error:
            raise CommandError(f"the store does not answer: {error}") from None

    def _check(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        found = list(route_infos())
        count = 0
        for covered in coverage(gk, [info for _, info in found]):
            rules = ", ".join(covered.rules)
            count += not rules
            self.stdout.write(f"{_methods(covered.route.methods)} {covered.route.path}: {rules or 'no limit'}")
        guards = [(info.path, one.limit.guard.settings) for route, info in found for one in limits_of(route.view)]
        lines = risks(load(), workers=options["workers"] or workers(), guards=guards)
        for line in lines:
            self.stderr.write(f"warning: {line}")
        if count:
            self.stderr.write(f"warning: {count} of {len(found)} routes have no limit")
        if options["strict"] and (lines or count):
            raise CommandError("there are warnings", returncode=1)

    def _limits(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        for rule in gk.gate.rules:
            where = rule.pattern.text if rule.pattern is not None else "all requests"
            self.stdout.write(f"{rule.name}: {where}: {_policies(rule)}")
        for path, rule, _ in _view_rules(gk):
            self.stdout.write(f"{rule.name}: {path}: {_policies(rule)}")

    def _reset(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        self._reach(gk)
        name, values = options["rule"], options["key"]
        placed = (Known(rule, settings) for _, rule, settings in _view_rules(gk))
        try:
            reset(gk, [*known(gk), *placed], name, values)
        except ValueError as error:
            raise CommandError(str(error)) from None
        self.stdout.write(f"{name}: {' '.join(values)}: the quota is whole again")

    def _bans(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        self._reach(gk)
        if options["lift"]:
            name, key = options["lift"]
            try:
                gk.lift(name, key)
            except KeyError as error:
                raise CommandError(error.args[0]) from None
            self.stdout.write(f"{name}: {key}: lifted")
            return
        bans = gk.bans()
        for ban in bans:
            self.stdout.write(f"{ban.rule}: {ban.key}: {ban.seconds:.0f} s")
        if not bans:
            self.stdout.write("nobody is banned")

    def _reach(self, gk: Gatekeeper) -> None:
        """Raises CommandError if what is counted lies in the memory of other processes."""
        if isinstance(gk.store, MemoryStore) and self._called_from_command_line:
            raise CommandError(
                "the counters lie in the memory of the processes that serve: this one cannot reach them"
            )


def _view_rules(gk: Gatekeeper) -> Iterator[tuple[str, Rule, LimitSettings]]:
    """The rules of limited views, each with its path and its settings."""
    for route, info in route_infos():
        for limit, label in limits_of(route.view):
            yield info.path, limit.guard.rule(gk, label, route.template), limit.guard.settings


def _methods(methods: frozenset[str] | None) -> str:
    return "*" if methods is None else "|".join(sorted(methods - {"HEAD", "OPTIONS"} or methods))


def _policies(rule: Rule) -> str:
    return ", ".join(limit.policy for limit in rule.limits)
