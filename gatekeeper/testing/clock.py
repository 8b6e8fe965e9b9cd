"""Time that passes when told to, and a store that lives by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatekeeper.commands import Store


class VirtualClock:
    """A clock that stands still until `advance`. Call it for nanoseconds.

    - `start`: where it begins, in seconds since 1970 (default: a whole hour in the year 2027).
    """

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = round(start * 1e9)

    def __call__(self) -> int:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises ValueError for a negative time: the clocks of stores never go back."""
        if seconds < 0:
            raise ValueError("expected a time that is not negative: the clocks of stores never go back")
        self._now += round(seconds * 1e9)

    def __repr__(self) -> str:
        return f"<VirtualClock {self._now / 1e9:.3f}>"


def virtual_store(clock: VirtualClock, *, max_keys: int = 1_000_000) -> Store:
    """A memory store on a virtual clock, for `Gatekeeper(settings, store=…)` and `Limiter(store)`.

    It holds at most `max_keys` keys; new ones beyond them share one quota a rule.
    """
    from gatekeeper.stores.memory import MemoryStore

    return MemoryStore(max_keys=max_keys, clock=clock)
