"""System checks of sessions, where SESSION_ENGINE is ours.

- gatekeeper.E004: the policy has no `session`
- gatekeeper.W010: sessions in memory, and several worker processes (under --deploy also if it is not known)
- gatekeeper.W011 (deploy): the cookie may be read or sent where it should not
- gatekeeper.W012: the cookie's name has a prefix that its attributes break: browsers drop it
- gatekeeper.W013: the policy names another cookie than Django does
- gatekeeper.W014: a serializer that is not used
- gatekeeper.W015: ids that are good for a while after they were replaced, and middleware that hands them out again
- gatekeeper.W016: others may read a file of keys
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Warning
from django.utils.module_loading import import_string

from gatekeeper.http.cookies import wrong_prefix
from gatekeeper.keyfiles import exposed
from gatekeeper.settings import Settings
from gatekeeper_django.conf import SETTING, workers

_JSON: Final = ("django.contrib.sessions.serializers.JSONSerializer", "django.core.signing.JSONSerializer")


def session_messages(found: Settings) -> Iterator[CheckMessage]:
    """Those for each start. `found`: the policy's settings."""
    if not _is_ours():
        return
    session = found.session
    if session is None:
        yield Error(
            f"{SETTING} has no session, and SESSION_ENGINE names Gatekeeper's.",
            hint='Add "session": {"kind": "store"}, which keeps them in a store, or {"kind": "token"}.',
            id="gatekeeper.E004",
        )
        return
    many = workers()
    if many is not None and many > 1:
        yield from _memory(found, f"memory is each process's own, and {many} serve")
    name = django_settings.SESSION_COOKIE_NAME
    problem = wrong_prefix(
        name,
        secure=bool(django_settings.SESSION_COOKIE_SECURE),
        path=django_settings.SESSION_COOKIE_PATH,
        domain=django_settings.SESSION_COOKIE_DOMAIN,
    )
    if problem is not None:
        yield Warning(f"SESSION_COOKIE_NAME: {problem}: browsers drop the cookie.", id="gatekeeper.W012")
    if session.cookie.name is not None and session.cookie.name != name:
        yield Warning(
            f"{SETTING}: session.cookie.name is not SESSION_COOKIE_NAME, which Django goes by: what shares the "
            "sessions does not find them.",
            hint="Give both the same name.",
            id="gatekeeper.W013",
        )
    if django_settings.SESSION_SERIALIZER not in _JSON:
        yield Warning("SESSION_SERIALIZER is not used: sessions are JSON.", id="gatekeeper.W014")
    if session.grace and not any(_is_our_middleware(one) for one in django_settings.MIDDLEWARE):
        yield Warning(
            f"{SETTING}: session.grace: Django's SessionMiddleware gives a client the key back that was replaced.",
            hint="Name 'gatekeeper_django.SessionMiddleware' in its place in MIDDLEWARE.",
            id="gatekeeper.W015",
        )
    for line in exposed(found.keys):
        yield Warning(f"{SETTING}: {line}", id="gatekeeper.W016")


def session_deployment(found: Settings) -> Iterator[CheckMessage]:
    """Those for `check --deploy`."""
    if not _is_ours() or found.session is None:
        return
    if workers() is None:
        yield from _memory(found, "memory is each process's own, and how many serve is not known")
    if not django_settings.SESSION_COOKIE_SECURE:
        yield _cookie(
            "is sent over connections that are not encrypted, and who reads it there is its user.",
            "Set SESSION_COOKIE_SECURE = True.",
        )
    if not django_settings.SESSION_COOKIE_HTTPONLY:
        yield _cookie("can be read by scripts.", "Set SESSION_COOKIE_HTTPONLY = True.")
    if str(django_settings.SESSION_COOKIE_SAMESITE).lower() not in ("lax", "strict"):
        yield _cookie(
            "is sent with requests that other sites begin.", 'Set SESSION_COOKIE_SAMESITE = "Lax", or "Strict".'
        )


def _memory(found: Settings, why: str) -> Iterator[CheckMessage]:
    session = found.session
    assert session is not None
    # Of tokens without a store nothing is kept.
    url = session.store or ((found.store.url or "memory://") if session.kind == "store" else None)
    if url == "memory://":
        yield Warning(
            f"{SETTING}: session.store: {why}.",
            hint="Name a store that all share: shared:///PATH, redis://…, or a database; or set WEB_CONCURRENCY=1 "
            "in the environment, if there is but one process.",
            id="gatekeeper.W010",
        )


def _cookie(what: str, hint: str) -> CheckMessage:
    return Warning(f"The cookie of sessions {what}", hint=hint, id="gatekeeper.W011")


def _is_ours() -> bool:
    from gatekeeper_django.sessions import SessionStore

    try:
        engine = import_module(django_settings.SESSION_ENGINE)
    except ImportError:
        return False  # Django tells it
    return _is(getattr(engine, "SessionStore", None), SessionStore)


def _is_our_middleware(name: str) -> bool:
    from gatekeeper_django.session_middleware import SessionMiddleware

    try:
        return _is(import_string(name), SessionMiddleware)
    except ImportError:
        return False


def _is(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)
