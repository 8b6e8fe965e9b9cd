"""Django's session engine: the contract of SessionBase, over every kind of session and store."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

# isort: split
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from gatekeeper_django.sessions import SessionStore
from tests.redis_servers import shared_server

KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: {"kind": "store"},
    "redis": lambda path: {"kind": "store", "store": shared_server().unix_url},
    "shared": lambda path: {"kind": "store", "store": f"shared://{path}/shared"},
    "sqlite": lambda path: {"kind": "store", "store": f"sqlite:///{path}/sessions", "create_table": True},
    "token": lambda path: {"kind": "token"},
    "encrypted token": lambda path: {"kind": "token", "encrypt": True},
    "revocable token": lambda path: {"kind": "token", "store": "memory://"},
}
ENGINE = "gatekeeper_django.sessions"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with override_settings(GATEKEEPER={"session": KINDS[request.param](tmp_path)}, SESSION_ENGINE=ENGINE):
        yield request.param


class TestContract:
    def test_what_was_saved_is_loaded_by_its_key(self, kind: str) -> None:
        """A store of the same key reads what another has saved."""
        one = SessionStore()
        one["cart"] = ["apple"]
        one.save()
        two = SessionStore(one.session_key)
        assert two["cart"] == ["apple"]
        assert two.session_key == one.session_key
