"""Gatekeeper for Django (5.2 and later).

`GATEKEEPER` in Django's settings is the policy; `GatekeeperMiddleware` carries it out; `limit` is for single views.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatekeeper.errors import Limited
    from gatekeeper_django.conf import keeper
    from gatekeeper_django.decorators import Limit, limit
    from gatekeeper_django.middleware import GatekeeperMiddleware
    from gatekeeper_django.requests import user_of
    from gatekeeper_django.session_middleware import SessionMiddleware
    from gatekeeper_django.signals import banned, limited

__all__ = [
    "GatekeeperMiddleware",
    "Limit",
    "Limited",
    "SessionMiddleware",
    "banned",
    "keeper",
    "limit",
    "limited",
    "user_of",
]

_HOMES = {
    "GatekeeperMiddleware": "gatekeeper_django.middleware",
    "Limit": "gatekeeper_django.decorators",
    "Limited": "gatekeeper.errors",
    "SessionMiddleware": "gatekeeper_django.session_middleware",
    "banned": "gatekeeper_django.signals",
    "keeper": "gatekeeper_django.conf",
    "limit": "gatekeeper_django.decorators",
    "limited": "gatekeeper_django.signals",
    "user_of": "gatekeeper_django.requests",
}


def __getattr__(name: str) -> object:
    # Lazily: Django imports this package before its settings and applications are ready.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
