"""System checks of Django's sessions, where the engine is ours."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE  # first: Django wants its settings

# isort: split
import os
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from gatekeeper.keyfiles import generate, save_file
from gatekeeper.keys import KeyState
from gatekeeper_django.checks import check_deployment, check_settings
from tests.test_django_sessions import ENGINE

SAFE: dict[str, Any] = {
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
}
TOKEN = {"session": {"kind": "token"}}


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "1")


def ids(policy: Any, *, deploy: bool = False, **settings: Any) -> list[str]:
    """What is told, without the checks of limits."""
    changed = {"SESSION_ENGINE": ENGINE, "MIDDLEWARE": [MIDDLEWARE], **SAFE, **settings}
    with override_settings(GATEKEEPER=policy, **changed):
        found = check_deployment() if deploy else check_settings()
    return [one.id.removeprefix("gatekeeper.") for one in found if one.id != "gatekeeper.W008"]


@pytest.mark.parametrize("kind", ["store", "token"])
def test_nothing_is_wrong_with_a_sound_site(kind: str) -> None:
    """In either check."""
    assert ids({"session": {"kind": kind}}) == []
    assert ids({"session": {"kind": kind}}, deploy=True) == []


def test_a_policy_without_sessions_is_an_error() -> None:
    """Unless the engine is another."""
    assert ids({}) == ["E004"]
    assert ids({}, SESSION_ENGINE="django.contrib.sessions.backends.db") == []
    assert ids({}, SESSION_ENGINE="nothing.of.the.kind") == []


def test_a_key_that_is_weak_is_an_error() -> None:
    """It is told without being shown."""
    for key in ("short", "changeme" * 8, "a" * 64):
        with override_settings(GATEKEEPER={**TOKEN, "keys": [key]}, SESSION_ENGINE=ENGINE):
            (found,) = check_settings()
        assert found.id == "gatekeeper.E001"
        assert "keys[0]" in found.msg
        assert key not in found.msg


def test_sessions_in_the_memory_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would have its own; of tokens nothing is kept."""
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    in_memory = {"session": {"kind": "store"}, "store": {"url": "memory://"}}
    assert "W010" in ids(in_memory)
    assert "W010" in ids({"session": {"kind": "token", "store": "memory://"}})
    assert "W010" not in ids(TOKEN)
    assert "W010" not in ids({"session": {"kind": "store", "store": "redis://localhost"}})
    monkeypatch.delenv("WEB_CONCURRENCY")
    assert "W010" not in ids(in_memory)
    assert "W010" in ids(in_memory, deploy=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SESSION_COOKIE_SECURE", False),
        ("SESSION_COOKIE_HTTPONLY", False),
        ("SESSION_COOKIE_SAMESITE", False),
        ("SESSION_COOKIE_SAMESITE", "None"),
    ],
)
def test_a_cookie_that_is_not_safe_is_told_before_it_is_deployed(name: str, value: object) -> None:
    """Once for each setting, and only where the engine is ours: of others Django tells it."""
    told: dict[str, Any] = {name: value}
    assert ids(TOKEN, deploy=True, **told) == ["W011"]
    assert ids(TOKEN, **told) == []
    assert ids(TOKEN, deploy=True, SESSION_ENGINE="django.contrib.sessions.backends.db", **told) == []


def test_a_cookie_that_browsers_drop_is_told() -> None:
    """A prefix is a promise about the attributes."""
    assert ids(TOKEN, SESSION_COOKIE_NAME="__Host-s") == []
    assert ids(TOKEN, SESSION_COOKIE_NAME="__Host-s", SESSION_COOKIE_DOMAIN="a.example") == ["W012"]
    assert ids(TOKEN, SESSION_COOKIE_NAME="__Secure-s", SESSION_COOKIE_SECURE=False) == ["W012"]


def test_two_names_of_the_cookie_are_told() -> None:
    """The policy's is for who shares the sessions; Django goes by its own."""
    policy = {"session": {"kind": "token", "cookie": {"name": "s"}}}
    assert ids(policy) == ["W013"]
    assert ids(policy, SESSION_COOKIE_NAME="s") == []


def test_another_serializer_is_told() -> None:
    """It is not used."""
    assert ids(TOKEN, SESSION_SERIALIZER="tests.test_django_session_checks.Pickle") == ["W014"]


def test_a_grace_with_djangos_middleware_is_told() -> None:
    """It would give a client the key from before."""
    policy = {"session": {"kind": "store", "grace": "5s"}}
    assert ids(policy, MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"]) == ["W015"]
    assert ids(policy, MIDDLEWARE=["gatekeeper_django.SessionMiddleware", "no.such.middleware"]) == []


def test_a_file_of_keys_that_others_may_read_is_told(tmp_path: Path) -> None:
    """Who reads it signs sessions."""
    file = tmp_path / "keys.json"
    save_file(file, [(generate(state=KeyState.ACTIVE), 0)])
    assert ids({**TOKEN, "keys": [f"file:{file}"]}) == []
    os.chmod(file, 0o644)
    assert ids({**TOKEN, "keys": [f"file:{file}"]}) == ["W016"]
