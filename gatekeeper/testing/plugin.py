"""Fixtures of pytest. Each run of pytest loads this file, so that it imports what it needs only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gatekeeper.commands import Store
    from gatekeeper.testing.clock import VirtualClock


@pytest.fixture
def gatekeeper_clock() -> VirtualClock:
    """A clock of this test that stands still until it is told to advance."""
    from gatekeeper.testing.clock import VirtualClock

    return VirtualClock()


@pytest.fixture
def gatekeeper_store(gatekeeper_clock: VirtualClock) -> Store:
    """A fresh store in memory that lives by `gatekeeper_clock`, for a Gatekeeper or Limiter of the test's own."""
    from gatekeeper.testing.clock import virtual_store

    return virtual_store(gatekeeper_clock)


@pytest.fixture
def gatekeeper_fresh(gatekeeper_clock: VirtualClock) -> Iterator[VirtualClock]:
    """Each Gatekeeper of the process counts from nought, in memory, on `gatekeeper_clock`, which is the value."""
    from gatekeeper.testing.switches import virtual

    with virtual(clock=gatekeeper_clock) as clock:
        yield clock


@pytest.fixture
def gatekeeper_off() -> Iterator[None]:
    """Nothing is limited in this test."""
    from gatekeeper.testing.switches import disabled

    with disabled():
        yield


@pytest.fixture
def gatekeeper_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limits count in this test, even where `gatekeeper_off` is in use or the settings have them off."""
    from gatekeeper.testing.switches import enabled

    if "gatekeeper_off" in request.fixturenames:
        request.getfixturevalue("gatekeeper_off")  # first, so that this one has the last word
    with enabled():
        yield
