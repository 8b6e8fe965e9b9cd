"""Passive health: what the answers to real requests tell of an upstream.

So many failures in a row eject it, for a time that grows with each ejection that follows on the last (as Envoy's
outlier detection: base × number of ejections, capped). Then one request is its trial: success lets it back, failure
ejects it again. Times are nanoseconds on the caller's clock, which never goes back.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

NS: Final = 1_000_000_000


class State(Enum):
    HEALTHY = "healthy"
    EJECTED = "ejected"
    TRIAL = "on trial"


class Event(Enum):
    SUCCEEDED = "a request succeeded"
    FAILED = "a request failed"  # while healthy: for the `failures`th time in a row
    TAKEN = "a request was sent after the time was over"


NEXT: Final[dict[tuple[State, Event], State]] = {
    (State.HEALTHY, Event.FAILED): State.EJECTED,
    # It was sent although ejected, because no upstream was healthy.
    (State.EJECTED, Event.SUCCEEDED): State.HEALTHY,
    (State.EJECTED, Event.TAKEN): State.TRIAL,
    (State.TRIAL, Event.SUCCEEDED): State.HEALTHY,
    (State.TRIAL, Event.FAILED): State.EJECTED,
    # Nothing came of the trial before: its client left, perhaps.
    (State.TRIAL, Event.TAKEN): State.TRIAL,
}
"""What follows; whatever is not here changes nothing. So failures of an ejected upstream do not prolong its time:
when none is healthy all are tried by each request, and a moment's outage would cost the longest ejection."""


class Ejection(NamedTuple):
    """When an upstream is ejected, and for how long.

    - `failures`: so many in a row eject it (default 3).
    - `eject_for_ns`: for how long at first, and how long a trial may take until another is let in (default 10 s);
      the nth ejection in a row lasts n times as long.
    - `eject_at_most_ns`: the longest (default 5 min).
    """

    failures: int = 3
    eject_for_ns: int = 10 * NS
    eject_at_most_ns: int = 300 * NS


EJECTION: Final = Ejection()
"""The defaults."""


class Health:
    """The health of one upstream.

    - `state`
    - `failures`: in a row, counted while it is healthy
    - `ejections`: in a row; 0 while it is healthy
    - `closed_until`: until when nothing is to be sent, in nanoseconds; 0 while it is healthy. Until then it is
      ejected, or a trial is on its way.
    - `term`: a number that changes when it is ejected. What a request tells counts only in the term in which it was
      sent: a service that stops refuses what is new while it still answers what it has.
    """

    __slots__ = ("_ejection", "closed_until", "ejections", "failures", "state", "term")

    def __init__(self, ejection: Ejection = EJECTION) -> None:
        self._ejection = ejection
        self.state = State.HEALTHY
        self.failures = 0
        self.ejections = 0
        self.closed_until = 0
        self.term = 0

    @property
    def is_healthy(self) -> bool:
        return self.state is State.HEALTHY

    def taken(self, now: int) -> int:
        """A request is sent at `now`. Returns the term, for `observe`."""
        if self.closed_until and now >= self.closed_until:
            self._move(Event.TAKEN, now)
        return self.term

    def observe(self, success: bool, now: int, term: int) -> bool:
        """What came of a request of `term`. Returns whether the upstream became healthy or ceased to be."""
        if term != self.term:
            return False
        if success:
            self.failures = 0
            return self.state is not State.HEALTHY and self._move(Event.SUCCEEDED, now)
        if self.state is State.HEALTHY:
            self.failures += 1
            if self.failures < self._ejection.failures:
                return False
        return self._move(Event.FAILED, now)

    def _move(self, event: Event, now: int) -> bool:
        """Go where the table says. Returns whether that made it healthy, or no longer healthy."""
        before = self.state
        after = NEXT.get((before, event))
        if after is None:
            return False
        self.state = after
        if after is State.HEALTHY:
            self.ejections = self.closed_until = 0
        elif after is State.TRIAL:
            self.closed_until = now + self._ejection.eject_for_ns
        else:
            self.ejections += 1
            self.term += 1
            lasts = min(self.ejections * self._ejection.eject_for_ns, self._ejection.eject_at_most_ns)
            self.closed_until = now + lasts
        return (before is State.HEALTHY) is not (after is State.HEALTHY)

    def __repr__(self) -> str:
        if self.state is State.HEALTHY:
            return f"<Health: healthy, {self.failures} failures>"
        return f"<Health: {self.state.value}, {self.ejections} ejections, closed until {self.closed_until} ns>"
