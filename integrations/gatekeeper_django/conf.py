"""Django's settings become a Gatekeeper: one for the process, made anew when they are overridden."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from threading import Lock
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.encoding import force_bytes

from gatekeeper.errors import MissingExtra, SettingsError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.keys import hkdf
from gatekeeper.settings import Settings, is_asynchronous, load_settings
from gatekeeper.settings.keys import KeySettings
from gatekeeper.settings.session import SessionSettings
from gatekeeper.settings.values import LONGEST_NS
from gatekeeper_django.requests import user_of

SETTING: Final = "GATEKEEPER"

USER: Final = "_auth_user_id"
"""The member of a session that says whose it is: django.contrib.auth writes it."""

EXPIRY: Final = "_session_expiry"
"""The member of a session that Django's `set_expiry` writes."""

_OTHERS: Final = ("SECRET_KEY", "SECRET_KEY_FALLBACKS", "SESSION_COOKIE_NAME")
"""Settings of Django's that a Gatekeeper is made of besides."""


class Policy:
    """The Gatekeeper of Django's settings, and what the middleware need not work out for each request.

    - `needs_user`: whether some rule counts by the user, whom Django's own middleware makes known
    - `bans`: whether some rule has a penalty
    - `slides`: whether a session lives on because it is read; Django's own do only when they are changed
    """

    __slots__ = ("bans", "keeper", "needs_user", "slides")

    def __init__(self, keeper: Gatekeeper) -> None:
        self.keeper = keeper
        rules = [rule for rule in keeper.gate.rules if not rule.messages]
        self.bans = any(rule.penalty is not None for rule in rules)
        self.needs_user = keeper.settings.identity.user is user_of and any(rule.needs_user for rule in rules)
        self.slides = keeper.settings.session is not None and "idle" in keeper.settings.session.model_fields_set

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
    """The settings, checked; what they do not say of users, keys and sessions is Django's. Raises SettingsError."""
    found = load_settings(written())
    if found.identity.user is None:
        found = found.model_copy(update={"identity": found.identity.model_copy(update={"user": user_of})})
    if found.session is not None:
        found = found.model_copy(update={"keys": found.keys or _secret_keys(), "session": _aged(found.session)})
    return found


def _secret_keys() -> list[KeySettings]:
    """Keys derived of SECRET_KEY, which signs, and SECRET_KEY_FALLBACKS, which verify."""
    secrets = (django_settings.SECRET_KEY, *django_settings.SECRET_KEY_FALLBACKS)
    drawn = (hkdf(force_bytes(secret), b"gatekeeper/django", 32) for secret in dict.fromkeys(secrets))
    return [KeySettings(key=urlsafe_b64encode(key).rstrip(b"=").decode("ascii")) for key in drawn]


def _aged(session: SessionSettings) -> SessionSettings:
    """Where nothing is said of how long sessions live, it is as long as Django's do, which have no absolute end."""
    if session.model_fields_set & {"idle", "absolute"}:
        return session
    return session.model_copy(update={"absolute": LONGEST_NS})


def lives(idle: int | None) -> Callable[[Mapping[str, Any], int], int]:
    """How many seconds a session lives that was written then: as `set_expiry` or SESSION_COOKIE_AGE say.

    `idle`: what they cannot exceed, if anything.
    """

    def life(data: Mapping[str, Any], seen: int) -> int:
        age: int = django_settings.SESSION_COOKIE_AGE
        expiry = data.get(EXPIRY)
        if isinstance(expiry, str):
            with suppress(ValueError, OverflowError, OSError):  # what is no date is none of Django's
                age = int(datetime.fromisoformat(expiry).timestamp()) - seen
        elif expiry and isinstance(expiry, int | float) and expiry is not True:
            age = int(expiry)
        return age if idle is None else min(age, idle)

    return life


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
                _policy = Policy(_keeper(load()))
            except SettingsError as error:
                raise misconfigured(error.problems) from None
        return _policy


def _keeper(settings: Settings) -> Gatekeeper:
    keeper = Gatekeeper(settings, workers=workers() or 1)
    if keeper.sessions is not None:
        flow = keeper.sessions.flow
        # The cookie is Django's SessionMiddleware's.
        flow.cookie = flow.cookie._replace(name=django_settings.SESSION_COOKIE_NAME)
        if not str(settings.identity.user).startswith("session:"):
            flow.user = USER
        session = settings.session
        assert session is not None
        flow.lives = lives(flow.idle if "idle" in session.model_fields_set else None)
    return keeper


def _forget(*, setting: str, **_: Any) -> None:
    global _policy
    if setting == SETTING or setting in _OTHERS:
        with _LOCK:
            before, _policy = _policy, None
        if before is not None:
            before.keeper.close()


setting_changed.connect(_forget, dispatch_uid="gatekeeper_django.conf")
