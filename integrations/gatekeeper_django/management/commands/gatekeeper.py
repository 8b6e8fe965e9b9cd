"""`manage.py gatekeeper check | limits | reset RULE KEY | bans [list | lift RULE KEY]`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from gatekeeper.commands import Batch
from gatekeeper.coverage import coverage, risks
from gatekeeper.errors import StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import RateLimit, Rule, bounded
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
        check.add_argument("--fail", action="store_true", help="Exit with 1 if anything is unsafe or uncovered.")
        commands.add_parser("limits", help="List the rules, of the settings and of views.")
        reset = commands.add_parser("reset", help="Make the quota of a key whole again.")
        reset.add_argument("rule", help="As `limits` lists it.")
        reset.add_argument("key", help="An address, a user's primary key, or what else the rule counts by.")
        bans = commands.add_parser("bans", help="List bans, or lift one.")
        kinds = bans.add_subparsers(dest="kind", metavar="COMMAND")
        kinds.add_parser("list", help="List the keys that are banned.")
        lift = kinds.add_parser("lift", help="Lift the ban of a key.")
        lift.add_argument("rule")
        lift.add_argument("key", help="As `list` lists it.")

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
            self.stdout.write(f"{_methods(covered.route.methods)} {covered.route.path}: {rules or 'NO LIMIT'}")
        guards = [(info.path, one.limit.guard.settings) for route, info in found for one in limits_of(route.view)]
        lines = risks(load(), workers=options["workers"] or workers(), guards=guards)
        for line in lines:
            self.stderr.write(f"warning: {line}")
        if count:
            self.stderr.write(f"warning: {count} of {len(found)} routes have no limit")
        if options["fail"] and (lines or count):
            raise CommandError("there are warnings", returncode=1)

    def _limits(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        for rule in gk.gate.rules:
            where = rule.pattern.text if rule.pattern is not None else "all requests"
            self.stdout.write(f"{rule.name}: {where}: {_policies(rule)}")
        for path, rule in _view_rules(gk):
            self.stdout.write(f"{rule.name}: {path}: {_policies(rule)}")

    def _reset(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        self._reach(gk)
        rules = [*gk.gate.rules, *(rule for _, rule in _view_rules(gk))]
        named = [rule for rule in rules if rule.name == options["rule"]]
        if not named:
            raise CommandError(f"there is no rule {options['rule']}: `limits` lists them")
        resets = [(one, key) for rule in named for one in _limits(rule) for key in _keys(rule, options["key"])]
        _asked(gk, Batch(resets=resets))
        self.stdout.write(f"{options['rule']}: {options['key']}: the quota is whole again")

    def _bans(self, gk: Gatekeeper, options: dict[str, Any]) -> None:
        self._reach(gk)
        if options["kind"] == "lift":
            try:
                gk.lift(options["rule"], options["key"])
            except KeyError as error:
                raise CommandError(error.args[0]) from None
            self.stdout.write(f"{options['rule']}: {options['key']}: lifted")
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


def _view_rules(gk: Gatekeeper) -> Iterator[tuple[str, Rule]]:
    """The rules of limited views, each with its path."""
    for route, info in route_infos():
        for limit, label in limits_of(route.view):
            yield info.path, limit.guard.rule(gk, label, route.template)


def _methods(methods: frozenset[str] | None) -> str:
    return "*" if methods is None else "|".join(sorted(methods - {"HEAD", "OPTIONS"} or methods))


def _policies(rule: Rule) -> str:
    return ", ".join(limit.policy for limit in rule.limits)


def _limits(rule: Rule) -> Iterator[RateLimit]:
    yield from rule.limits
    for limits in rule.tiers.values():
        yield from limits


def _keys(rule: Rule, key: str) -> list[str]:
    """The keys of the store that a text may stand for: as it is, as a value, as an address in a value's place."""
    return [key] if rule.by_address else [key, bounded(f"={key}"), f"@{key}"]


def _asked(gk: Gatekeeper, batch: Batch) -> None:
    for reply in gk.ask(batch):
        if isinstance(reply, StoreError):
            raise reply
