"""Django's settings become a Gatekeeper: one for the process, made anew when they are overridden."""

from __future__ import annotations

import os
from collections.abc import Iterable
from threading import Lock
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from gatekeeper.commands import Batch
from gatekeeper.errors import MissingExtra, SettingsError
from gatekeeper.http.routes import Table
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import Settings, is_asynchronous, load_settings
from gatekeeper.ticket import Ticket
from gatekeeper_django.requests import user_of

SETTING: Final = "GATEKEEPER"


class Policy:
    """The Gatekeeper of Django's settings, and what the middleware need not work out for each request.

    - `needs_user`: whether some rule counts by the user, whom Django's own middleware makes known
    - `bans`: whether some rule has a penalty
    """

    __slots__ = ("_early", "bans", "keeper", "needs_user")

    def __init__(self, keeper: Gatekeeper) -> None:
        self.keeper = keeper
        rules = [rule for rule in keeper.gate.rules if not rule.messages]
        self.bans = any(rule.penalty is not None for rule in rules)
        self.needs_user = keeper.settings.identity.user is user_of and any(rule.needs_user for rule in rules)
        # Of rules that override others it cannot be told beforehand which apply.
        plain = [rule for rule in rules if rule.is_plain and not rule.asks]
        overriding = any(rule.overrides for rule in rules)
        self._early: Table[Rule] = Table((rule.pattern, rule) for rule in ([] if overriding else plain))

    def look(self, ticket: Ticket) -> Batch | None:
        """What can be asked before the user is known, spending nothing; None if there is nothing.

        So that who is over the limit of an address costs no look-up of a user.
        """
        rules = self._early.match(ticket)
        if not rules or ticket.method == "OPTIONS":
            return None
        hits = [(limit, rule.key(ticket), rule.cost) for rule in rules for limit in rule.limits]
        return Batch(hits, spend=False)  # type: ignore[arg-type]  # a plain rule's cost is a number

    def require(self, *, awaiting: bool) -> None:
        """Raises ImproperlyConfigured if the policy cannot be carried out so."""
        try:
            self.keeper.require(awaiting=awaiting)
        except MissingExtra as error:
            raise ImproperlyConfigured(f"{SETTING}: {error}") from None
        problems = [
            f"{path}: expected a function that is not asynchronous, where requests are not"
            for path, function in self.keeper.functions()
            if is_asynchronous(function)
        ]
        if problems and not awaiting:
            raise misconfigured(problems)


def written() -> Any:
    """What stands in Django's settings."""
    return getattr(django_settings, SETTING, {})


def load() -> Settings:
    """The settings, checked; the user is Django's unless they say otherwise. Raises SettingsError."""
    found = load_settings(written())
    if found.identity.user is None:
        found = found.model_copy(update={"identity": found.identity.model_copy(update={"user": user_of})})
    return found


def workers() -> int | None:
    """How many processes serve, as far as the environment tells: gunicorn and uvicorn read WEB_CONCURRENCY."""
    text = os.environ.get("WEB_CONCURRENCY", "")
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text) <= 100_000 else None


def policy() -> Policy:
    """The policy in force. Raises ImproperlyConfigured with all that is wrong with the settings."""
    return _policy or _make()


def keeper() -> Gatekeeper:
    """The Gatekeeper of Django's settings. Raises ImproperlyConfigured with all that is wrong with them.

    After `override_settings(GATEKEEPER=…)` it is another one.
    """
    return policy().keeper


def misconfigured(problems: Iterable[str]) -> ImproperlyConfigured:
    """The error that tells what is wrong with the settings."""
    error: ImproperlyConfigured = ImproperlyConfigured("\n".join(f"{SETTING}: {one}" for one in problems))
    return error


_LOCK: Final = Lock()
_policy: Policy | None = None


def _make() -> Policy:
    global _policy
    with _LOCK:
        if _policy is None:
            try:
                _policy = Policy(Gatekeeper(load(), workers=workers() or 1))
            except SettingsError as error:
                raise misconfigured(error.problems) from None
        return _policy


def _forget(*, setting: str, **_: Any) -> None:
    global _policy
    if setting == SETTING:
        with _LOCK:
            before, _policy = _policy, None
        if before is not None:
            before.keeper.close()


setting_changed.connect(_forget, dispatch_uid="gatekeeper_django.conf")
