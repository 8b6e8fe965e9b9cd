"""When a server that does not answer is asked again."""

from __future__ import annotations

from enum import Enum
from typing import Final

FAILURES: Final = 5
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0


class Condition(Enum):
    CLOSED = "asked"
    OPEN = "not asked"
    PROBING = "asked once, to see whether it answers"


class Event(Enum):
    ANSWERED = "it answered"
    FAILED = "it did not"
    TOO_OFTEN = "it did not, as often before"
    DUE = "the pause is over"


NEXT: Final[dict[tuple[Condition, Event], Condition]] = {
    (Condition.CLOSED, Event.ANSWERED): Condition.CLOSED,
    (Condition.CLOSED, Event.FAILED): Condition.CLOSED,
    (Condition.CLOSED, Event.TOO_OFTEN): Condition.OPEN,
    (Condition.OPEN, Event.ANSWERED): Condition.CLOSED,  # a late answer is an answer
    (Condition.OPEN, Event.FAILED): Condition.OPEN,  # asked before it was opened
    (Condition.OPEN, Event.DUE): Condition.PROBING,
    (Condition.PROBING, Event.ANSWERED): Condition.CLOSED,
    (Condition.PROBING, Event.FAILED): Condition.OPEN,
    (Condition.PROBING, Event.DUE): Condition.PROBING,  # nothing was heard of the probe: another one
}
"""What is not in the table leaves all as it is."""


class Breaker:
    """Asks no more of a server after some failures in a row, but for one probe after each pause.

    The pauses double, from 0.1 s up to 5 s, each shortened by chance to at least half of it, so that many processes
    do not probe together. Times are seconds on any clock that does not go back; `draw` a number from [0, 1).
    """

    __slots__ = ("_failures", "_pause", "_until", "condition")

    def __init__(self) -> None:
        self.condition = Condition.CLOSED
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._until = 0.0

    @property
    def is_calm(self) -> bool:
        """Whether nothing failed since the last answer: then an answer need not be told."""
        return not self._failures

    def allows(self, now: float) -> bool:
        """Whether the server may be asked now. If not closed, the one who may is the probe."""
        if self.condition is Condition.CLOSED:
            return True
        if now < self._until:
            return False
        self._move(Event.DUE)
        self._until = now + LONGEST_PAUSE  # for a probe of which nothing is heard
        return True

    def answered(self) -> None:
        self._move(Event.ANSWERED)
        self._failures = 0
        self._pause = FIRST_PAUSE

    def failed(self, now: float, draw: float) -> None:
        self._failures += 1
        before = self.condition
        self._move(Event.TOO_OFTEN if before is Condition.CLOSED and self._failures >= FAILURES else Event.FAILED)
        if self.condition is Condition.OPEN and before is not Condition.OPEN:
            self._until = now + self._pause * (0.5 + 0.5 * draw)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _move(self, event: Event) -> None:
        self.condition = NEXT.get((self.condition, event), self.condition)

    def __repr__(self) -> str:
        return f"<Breaker {self.condition.name.lower()}, {self._failures} failures>"
