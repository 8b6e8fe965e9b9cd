"""For the tests of applications: time that passes when told to, no server, no sleeping, and an off-switch.

`gatekeeper.testing.plugin` has it as fixtures of pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatekeeper.testing.clock import VirtualClock

if TYPE_CHECKING:
    from gatekeeper.testing.asserts import aassert_limited, aassert_not_limited, assert_limited, assert_not_limited
    from gatekeeper.testing.clock import virtual_store
    from gatekeeper.testing.switches import disabled, enabled, virtual

__all__ = [
    "VirtualClock",
    "aassert_limited",
    "aassert_not_limited",
    "assert_limited",
    "assert_not_limited",
    "disabled",
    "enabled",
    "virtual",
    "virtual_store",
]

_HOMES = {
    "aassert_limited": "asserts",
    "aassert_not_limited": "asserts",
    "assert_limited": "asserts",
    "assert_not_limited": "asserts",
    "disabled": "switches",
    "enabled": "switches",
    "virtual": "switches",
    "virtual_store": "clock",
}


def __getattr__(name: str) -> object:
    # Lazily: the plugin is loaded by each run of pytest, whether it tests limits or not.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"gatekeeper.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
