"""Rate limits, sessions and dispatch at the front door of a Python web application."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatekeeper.commands import Verdict
    from gatekeeper.errors import GatekeeperError, Limited, SessionError, SettingsError, StoreError
    from gatekeeper.keeper import Ban, Gatekeeper
    from gatekeeper.limiter import Limiter
    from gatekeeper.sessions.state import Session
    from gatekeeper.ticket import Refusal, Ticket

__version__ = "0.1.0"

__all__ = [
    "Ban",
    "Gatekeeper",
    "GatekeeperError",
    "Limited",
    "Limiter",
    "Refusal",
    "Session",
    "SessionError",
    "SettingsError",
    "StoreError",
    "Ticket",
    "Verdict",
]

_HOMES = {
    "Ban": "gatekeeper.keeper",
    "Gatekeeper": "gatekeeper.keeper",
    "GatekeeperError": "gatekeeper.errors",
    "Limited": "gatekeeper.errors",
    "Limiter": "gatekeeper.limiter",
    "Refusal": "gatekeeper.ticket",
    "Session": "gatekeeper.sessions.state",
    "SessionError": "gatekeeper.errors",
    "SettingsError": "gatekeeper.errors",
    "StoreError": "gatekeeper.errors",
    "Ticket": "gatekeeper.ticket",
    "Verdict": "gatekeeper.commands",
}


def __getattr__(name: str) -> object:
    # Lazily, so that importing one room does not import the house.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
