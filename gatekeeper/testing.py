"""For tests: time that passes when told to."""

from __future__ import annotations

from gatekeeper.commands import Store
from gatekeeper.stores.memory import MemoryStore


class VirtualClock:
    """A clock that stands still until `advance`. It begins at a whole hour; call it for nanoseconds."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = round(start * 1e9)

    def __call__(self) -> int:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises ValueError for a negative time: the clocks of stores never go back."""
        if seconds < 0:
            raise ValueError("expected a time that is not negative: the clocks of stores never go back")
        self._now += round(seconds * 1e9)


def virtual_store(clock: VirtualClock, *, max_keys: int = 1_000_000) -> Store:
    """A memory store on a virtual clock, for `Gatekeeper(settings, store=…)` and `Limiter(store)`."""
    return MemoryStore(max_keys=max_keys, clock=clock)
