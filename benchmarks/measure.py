"""How things are timed: in turns, by the CPU time of the process, compared round by round.

Machines speed up and slow down while a benchmark runs. So the works take turns (A, B, A, B, ...), each round
gives one ratio, made of times that lie next to one another, and the median of the ratios is what counts. CPU time
leaves out what other processes do. It covers all threads of this one: a peer that tidies up in a thread of its
own pays for that too, as its users do.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import TypeAlias

Work: TypeAlias = Callable[[], object]
Progress: TypeAlias = Callable[[str], None]


class Skipped(Exception):
    """A benchmark cannot run here; the message says what is missing."""


class Unfit(Exception):
    """What was about to be compared does not do the same; the message says what was seen."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    - `ours`, `peer`: medians, in `unit`; the peer is None where nothing was measured beside ours.
    - `ratio`: how many times ours the peer takes; None where no ratio is claimed.
    - `at_least`: the bar for the ratio; `at_most`: the bar for ours. A row without either only informs.
    """

    what: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if self.at_least is not None:
            return self.ratio is not None and self.ratio >= self.at_least
        if self.at_most is not None:
            return self.ours <= self.at_most
        return None


@dataclass(frozen=True)
class Result:
    """What a benchmark found: lines of the table, and remarks that go below it."""

    rows: Sequence[Row]
    notes: Sequence[str] = ()


def peer(distribution: str) -> str:
    """A peer's name with its version. Raises Skipped when it is not installed."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        raise Skipped(f"{distribution} is not installed") from None


def interleave(
    works: Callable[[int], Mapping[str, Work]],
    rounds: int,
    *,
    warm_up: int = 1,
    progress: Progress = lambda text: None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """The seconds that each work took in each round, the works taking turns.

    `works` is called with the number of each round, outside the timing, and may answer with fresh works. The first
    `warm_up` rounds are run and not counted.
    """
    seconds: dict[str, list[float]] = {}
    for number in range(warm_up + rounds):
        progress(f"round {number + 1} of {warm_up + rounds}")
        for name, work in works(number).items():
            settle()
            started = clock()
            work()
            ended = clock()
            if number >= warm_up:
                seconds.setdefault(name, []).append(ended - started)
    settle()
    return seconds


def settle() -> None:
    """Wait for timers that the work before left behind, so that the next one's CPU time is its own."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def median_ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of peer / ours.

    What is added to a request is a difference, and noise can bring it to nothing: where ours is not above zero
    the ratio of that round is infinite, where the peer's is not, it is zero.
    """
    return median(
        0.0 if theirs <= 0 else theirs / mine if mine > 0 else math.inf
        for theirs, mine in zip(peer, ours, strict=True)
    )


def added(with_it: Sequence[float], bare: Sequence[float]) -> list[float]:
    """What something adds, round by round."""
    return [with_seconds - without for with_seconds, without in zip(with_it, bare, strict=True)]
