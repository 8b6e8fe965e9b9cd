"""How hits are counted. Each algorithm is pure: `step(state, now, cost) -> (state, Verdict)`.

A state is one integer, None for a key never hit; a refusal leaves it as it was. What each
promises of a rate N/period, for every sequence of hits whatever their spacing:

- `sliding_window` (default): never more than N in any window of one period.
- `gcra`: at most burst + N·t/period in any time t.
- `sliding_counter`: about N; in the worst case nearly 2N in some window, for it takes the hits of the window
  before as evenly spread.
- `fixed_window`: N in each window, so up to 2N across the seam of two.
"""

from __future__ import annotations

from typing import ClassVar, Final, Protocol

from gatekeeper.commands import NEVER, Quick, Receipt, State, Verdict
from gatekeeper.ratelimit.rates import Rate

NS: Final = 1_000_000_000
_HEAD: Final = (1 << 48) - 1
_OLDEST: Final = 64 << 8  # the age of the oldest hits that count, as the difference of two heads
_TAT: Final = (1 << 64) - 1


class Algorithm(Protocol):
    """An algorithm bound to a rate of `limit` units of cost in `period` seconds."""

    kind: ClassVar[str]
    """Its name, by which a store that carries it out itself knows it."""

    version: ClassVar[int]
    """The version of the state's layout: states of another are never read."""

    limit: int
    window_ns: int
    """The window that `limit` is for, in nanoseconds."""

    lifetime_ns: int
    """How long after the last step a state can still matter, in nanoseconds."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """What a store that carries the algorithm out itself must know: the limit, and the period in nanoseconds.

        For `gcra` the burst, and the nanoseconds between two tokens.
        """

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        """Decide on a hit of `cost` units at `now` (nanoseconds); cost 0 is a look that changes nothing."""

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        """Take back a hit of `cost` units; what of it no longer counts is not given twice."""

    def ends(self, state: State) -> int:
        """When, in nanoseconds, the state will be as if the key had never been hit."""


class SlidingWindow:
    """An exact log of the hits, merged into ticks of period/64: never more than `limit` in any window.

    A hit stops counting when 65 ticks have begun since its own: never early, and at most 1/64 of a period later
    than in a log with exact times.

    The whole log is one integer, so that it ages by a shift and is summed by a remainder::

        … | hits 2 ticks ago | hits 1 tick ago | hits of this tick | sum of all | tick (40 bits) | width (8 bits)

    Each count is `width` bits wide, which holds limit + 1. For digits d of base B the number is ≡ Σd mod B − 1,
    and Σd ≤ limit < B − 1: the remainder *is* the sum. It is kept beside them, for most hits fall into the tick
    of the one before: they read the low end and add to it, however long the log. The width depends on the limit
    and stands in the state, so that a state outlives a change of the limit. (One integer and no tuple: a million
    of these are nothing to the garbage collector.)
    """

    __slots__ = (
        "_base", "_low", "_mask", "_nines", "_one", "_tick", "_tick_ns", "_width", "_young", "lifetime_ns", "limit",
        "window_ns",
    )  # fmt: skip

    kind: ClassVar[str] = "sliding_window"
    version: ClassVar[int] = 1
    TICKS: ClassVar[int] = 64

    def __init__(self, limit: int, period: int) -> None:
        self.limit = limit
        self.window_ns = period * NS
        self._tick_ns = self.window_ns // self.TICKS  # exact: 64 divides 10⁹
        self.lifetime_ns = self._tick_ns * (self.TICKS + 1)
        self._width = width = (limit + 1).bit_length()
        self._nines = (1 << width) - 1  # B − 1: the greatest digit, too
        self._mask = (1 << width * (self.TICKS + 1)) - 1
        self._base = 48 + width  # where the log begins
        self._low = (1 << self._base) - 1  # the sum, the tick and the width
        self._one = 1 << 48 + width | 1 << 48  # a hit of this tick: one more there, and in the sum
        self._young = (1 << 48 + 2 * width) - 1  # above it are hits of earlier ticks
        self._tick = self._tick_of(0)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.limit, self.window_ns

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        start, end, head, expires = self._tick
        if not start <= now < end:
            start, end, head, expires = self._tick = self._tick_of(now)
        aged = state
        if aged is None:
            aged, spent = head, 0
        else:
            low = aged & self._low
            age = head - (low & _HEAD)
            if not age:
                spent = low >> 48
            elif age & 0xFF or not 0 < age <= _OLDEST:
                aged, spent, head, expires = self._aged(aged, head, expires)
            else:
                log = (aged >> self._base) << (age >> 8) * self._width & self._mask
                spent = log % self._nines
                aged = log << self._base | spent << 48 | head
        limit = self.limit
        left = limit - spent - cost
        if left >= 0:
            aged += self._one if cost == 1 else cost * self._one
            if aged > self._young:
                expires -= ((aged.bit_length() - 49) // self._width - 1) * self._tick_ns  # as `_oldest`
            elif left == limit:  # nothing is left of earlier hits, and this was but a look
                return None, Verdict(True, limit, left, 0, 0, None)
            return aged, Verdict(True, limit, left, expires - now, 0, head if cost else None)
        if not spent:
            return state, Verdict(False, limit, limit, 0, NEVER, None)
        oldest = self._oldest(aged)
        log = aged >> 48 + self._width
        free = oldest
        if spent > limit:  # it was lowered since: what is above it has to leave, too, before more is there
            free = self._wait(log, spent, oldest, spent - limit + 1)  # type: ignore[assignment]
        reset = expires - free * self._tick_ns - now
        if not cost:
            return aged, Verdict(True, limit, 0, reset, 0, None)
        wait = self._wait(log, spent, oldest, -left)
        wait = NEVER if wait is None else expires - wait * self._tick_ns - now
        return state, Verdict(False, limit, max(0, limit - spent), reset, wait, None)

    def quick(self) -> Quick:
        """`step` for hits of cost 1 that are admitted, with all numbers at hand and no Verdict made.

        It remembers its own last tick: times must not go back from one call to the next.
        """
        width, base, low, mask, nines = self._width, self._base, self._low, self._mask, self._nines
        most, one, tick_ns = self.limit - 1, self._one, self._tick_ns
        end = head = expires = 0

        def quick(state: int, now: int) -> tuple[State, int, int, Receipt]:
            nonlocal end, head, expires
            if now >= end:
                _, end, head, expires = self._tick_of(now)
                expires += tick_ns  # for the age below is one too great
            if state & _HEAD == head:
                left = most - ((state & low) >> 48)
            else:
                age = head - (state & _HEAD)
                if age & 0xFF or age < 0:
                    return None, -1, 0, None
                log = (state >> base) << (age >> 8) * width & mask if age <= _OLDEST else 0
                spent = log % nines
                left = most - spent
                state = log << base | spent << 48 | head
            state += one
            # The age of the oldest as in `_oldest`.
            return state, left, expires - (state.bit_length() - 49) // width * tick_ns - now, head

        return quick

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        if state is None:
            return None
        head = state & _HEAD
        width = head & 0xFF
        log = state >> 48 + width
        age = (head >> 8) - (receipt >> 8)
        if not 0 <= age <= self.TICKS:
            return state
        back = min(log >> width * age & (1 << width) - 1, cost)
        return state - (back << 48 + width * (age + 1)) - (back << 48) if log != back << width * age else None

    def ends(self, state: State) -> int:
        if state is None:
            return 0
        head = state & _HEAD
        log = state >> 48 + (head & 0xFF)
        # The newest hit goes last: it stands in the lowest digit that is not nought.
        newest = ((log & -log).bit_length() - 1) // (head & 0xFF)
        return int(((head >> 8) - newest + self.TICKS + 1) * self._tick_ns)

    def _tick_of(self, now: int) -> tuple[int, int, int, int]:
        """The tick of a time: its start and end, the head of a state written in it, when its hits expire.

        The last one is remembered, for most steps fall into the tick of the one before.
        """
        tick = now // self._tick_ns
        start = tick * self._tick_ns
        return start, start + self._tick_ns, tick << 8 | self._width, start + self.lifetime_ns

    def _aged(self, state: int, head: int, expires: int) -> tuple[int, int, int, int]:
        """A state as it is in the tick of `head`, whatever tick it was written in: with its sum, and the last two.

        Those differ from what was asked where another process's clock is ahead of ours: then time stands still
        until we are there.
        """
        written = state & _HEAD
        width = self._width
        log = state >> 48 + (written & 0xFF)
        if written & 0xFF != width:  # the limit, and so the width, was another when this was written
            log = self._recast(log, written & 0xFF)
        age = (head >> 8) - (written >> 8)
        if age >= 0:
            log = (log << age * width) & self._mask if age <= self.TICKS else 0
        else:
            head -= age << 8
            expires -= age * self._tick_ns
        spent = log % self._nines
        return (log << width | spent) << 48 | head, spent, head, expires

    def _oldest(self, state: int) -> int:
        """The age of the oldest hits: they are in the highest digit."""
        return (state.bit_length() - 49) // self._width - 1

    def _wait(self, log: int, spent: int, oldest: int, need: int) -> int | None:
        """The age of the hits with which, the oldest first, `need` units have left the window; None for never."""
        if spent < need:
            return None
        age = oldest
        while True:
            need -= log >> age * self._width & self._nines
            if need <= 0:
                return age
            age -= 1

    def _recast(self, log: int, width: int) -> int:
        """The log in digits of our width. Of more hits than our limit only the newest can matter: they are kept."""
        digit = (1 << width) - 1
        room = self.limit
        recast = shift = 0
        while log and room:
            count = min(log & digit, room)
            recast |= count << shift
            room -= count
            shift += self._width
            log >>= width
        return recast


class Gcra:
    """The generic cell rate algorithm (ITU-T I.371): a token bucket of `burst` tokens, `limit` a period refilled.

    Tokens come one by one, each `period / limit` after the last, rounded up to a whole nanosecond. The state is
    the theoretical arrival time (TAT): when the bucket will be full again. Above its 64 bits stands how much
    time was given back while any hit had not flowed off; the receipt of a hit is the state that it left.
    """

    __slots__ = ("_emission_ns", "lifetime_ns", "limit", "window_ns")

    kind: ClassVar[str] = "gcra"
    version: ClassVar[int] = 1

    def __init__(self, limit: int, period: int, burst: int | None = None) -> None:
        self._emission_ns = -(-period * NS // limit)
        self.limit = limit if burst is None else burst
        self.window_ns = self.lifetime_ns = self.limit * self._emission_ns

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.limit, self._emission_ns

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        emission = self._emission_ns
        limit = self.limit
        tat, given = state or 0, 0
        if tat > _TAT:
            given = tat & ~_TAT
            tat &= _TAT
        if tat <= now:
            if tat + (given >> 64) <= now:  # the last of what was ever charged has flowed off
                given = 0
            tat = now
        then = tat + cost * emission
        room = now + self.lifetime_ns - then
        if room >= 0:
            left = room // emission
            if left == limit:
                return state if given else None, Verdict(True, limit, left, 0, 0, None)
            then += given
            return then, Verdict(True, limit, left, (left + 1) * emission - room, 0, then if cost else None)
        missing = max(0, tat - now)
        left = max(0, self.lifetime_ns - missing) // emission
        # Above the whole burst (it was lowered since) more than one token may be missing before one is there.
        reset = missing - (limit - left - 1) * emission if missing else 0
        return state, Verdict(False, limit, left, reset, -room if cost <= limit else NEVER, None)

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        # Hits flow off in the order they came, each when the TAT it left has passed. Of this one there is left
        # what lies between now and its TAT, and that lies the nearer the more was given back since: perhaps of
        # hits before it. To give more would give twice what has flowed off already.
        if state is None:
            return None
        tat, given = state & _TAT, state >> 64
        flows_off = (receipt & _TAT) - max(0, given - (receipt >> 64))
        back = max(0, min(cost * self._emission_ns, flows_off - now))
        tat -= back
        given += back
        # It is remembered until the last hit would have flowed off, for receipts tell where that was.
        return given << 64 | tat if tat + given > now else None

    def ends(self, state: State) -> int:
        return 0 if state is None else int(state) & _TAT


class SlidingCounter:
    """Two counters, of this window and the one before, the latter weighted by how much of it is still in view.

    An estimate, for it takes the earlier hits as evenly spread: when they stood at the window's end, nearly
    2 × limit may fall within one period; when at its start, hits are refused that an exact log would admit.
    """

    __slots__ = ("lifetime_ns", "limit", "window_ns")

    kind: ClassVar[str] = "sliding_counter"
    version: ClassVar[int] = 1

    def __init__(self, limit: int, period: int) -> None:
        self.limit = limit
        self.window_ns = period * NS
        self.lifetime_ns = 2 * self.window_ns

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.limit, self.window_ns

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        limit, width = self.limit, self.window_ns
        window, passed, here, before = self._at(state, now)
        weight = -(-before * (width - passed) // width)
        left = limit - here - weight
        if cost <= left:
            here += cost
            reset = self._falls(passed, here, before, here + weight - 1)
            verdict = Verdict(True, limit, left - cost, reset, 0, window if cost else None)
            return (window << 64 | here << 32 | before) if here or before else None, verdict
        reset = self._falls(passed, here, before, here + weight - 1)
        wait = self._falls(passed, here, before, limit - cost) if cost <= limit else NEVER
        return state, Verdict(False, limit, max(0, left), reset, wait, None)

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        if state is None:
            return None
        window, here, before = state >> 64, state >> 32 & 0xFFFF_FFFF, state & 0xFFFF_FFFF
        if receipt == window:
            here = max(0, here - cost)
        elif receipt == window - 1:
            before = max(0, before - cost)
        return window << 64 | here << 32 | before if here or before else None

    def ends(self, state: State) -> int:
        if state is None:
            return 0
        return (int(state >> 64) + (2 if state >> 32 & 0xFFFF_FFFF else 1)) * self.window_ns

    def _at(self, state: State, now: int) -> tuple[int, int, int, int]:
        """(window, time passed in it, hits in it, hits in the one before) at `now`."""
        window, passed = divmod(now, self.window_ns)
        if state is None:
            return window, passed, 0, 0
        written, here, before = state >> 64, state >> 32 & 0xFFFF_FFFF, state & 0xFFFF_FFFF
        if window == written:
            return window, passed, here, before
        if window < written:  # another process's clock is ahead of ours: stand at the start of its window
            return written, 0, here, before
        return window, passed, 0, here if window == written + 1 else 0

    def _falls(self, passed: int, here: int, before: int, target: int) -> int:
        """How long until the estimate is at most `target`, if nothing else comes."""
        if target < 0:
            return 0
        width = self.window_ns
        if here + -(-before * (width - passed) // width) <= target:
            return 0
        if here <= target:
            return width - (target - here) * width // before - passed
        return width - passed + width - target * width // here


class FixedWindow:
    """A counter that begins with a key's first hit and is forgotten one period later."""

    __slots__ = ("lifetime_ns", "limit", "window_ns")

    kind: ClassVar[str] = "fixed_window"
    version: ClassVar[int] = 1

    def __init__(self, limit: int, period: int) -> None:
        self.limit = limit
        self.window_ns = self.lifetime_ns = period * NS

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.limit, self.window_ns

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        limit = self.limit
        start, count = (now, 0) if state is None else (state >> 32, state & 0xFFFF_FFFF)
        if start + self.window_ns <= now:
            start, count = now, 0
        left = limit - count - cost
        reset = start + self.window_ns - now
        if left >= 0:
            if not count + cost:
                return None, Verdict(True, limit, left, 0, 0, None)
            return start << 32 | count + cost, Verdict(True, limit, left, reset, 0, start if cost else None)
        wait = reset if cost <= limit else NEVER
        return state, Verdict(False, limit, max(0, limit - count), reset if count else 0, wait, None)

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        if state is None or receipt != state >> 32:
            return state
        count = (state & 0xFFFF_FFFF) - cost
        return receipt << 32 | count if count > 0 else None

    def ends(self, state: State) -> int:
        return 0 if state is None else int(state >> 32) + self.window_ns


class Concurrency(SlidingWindow):
    """At most `limit` in progress: a hit is a lease, given back at the end, which counts for `period` at the most.

    So it is a sliding window of the leases that nobody has given back yet. One that lasts is renewed: given back
    and taken anew in one batch. One whose holder died expires, at most 1/64 of the period later than promised.
    """

    __slots__ = ()

    kind: ClassVar[str] = "concurrency"

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        state, verdict = super().step(state, now, cost)
        # When somebody else will be done cannot be known: a second is said.
        verdict.reset_ns = NS if verdict.remaining < verdict.limit else 0
        if not verdict.allowed and verdict.retry_ns < NEVER:
            verdict.retry_ns = NS
        return state, verdict


class Penalty:
    """A ban of a key that was refused again and again, for longer each time.

    A hit of cost 0 is a look, refused while the key is banned; a hit of cost 1 is a strike. `strikes` of them
    within `within_ns` ban the key for `first_ns`, and each time twice as long as the last, up to `most_ns`. Once
    the key has been free for `most_ns` without another ban, the next ban is a first one again.

    The state, from the high end: the number of bans (8 bits), the end of the last one (64), the beginning of the
    time in which strikes are counted (64), and their number (32).
    """

    __slots__ = ("first_ns", "lifetime_ns", "limit", "most_ns", "window_ns")

    kind: ClassVar[str] = "penalty"
    version: ClassVar[int] = 1

    def __init__(self, strikes: int, within_ns: int, first_ns: int, most_ns: int) -> None:
        self.limit = strikes
        self.window_ns = within_ns
        self.first_ns = first_ns
        self.most_ns = most_ns
        self.lifetime_ns = max(within_ns, 2 * most_ns)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.limit, self.window_ns, self.first_ns, self.most_ns

    def step(self, state: State, now: int, cost: int) -> tuple[State, Verdict]:
        bans, until, since, strikes = self._read(state, now)
        if now < until:
            return state, Verdict(False, self.limit, 0, until - now, until - now, None)
        if cost:
            if not strikes:
                since = now
            strikes += 1
            if strikes >= self.limit:
                bans = min(bans + 1, 255)
                until = now + min(self.first_ns << min(bans - 1, 62), self.most_ns)
                since = strikes = 0
        left = self.limit - strikes
        reset = since + self.window_ns - now if strikes else 0
        after = bans << 160 | until << 96 | since << 32 | strikes if bans or strikes else None
        return after, Verdict(True, self.limit, left, reset, 0, None)

    def give(self, state: State, now: int, cost: int, receipt: int) -> State:
        return state  # a strike is a strike: it has no receipt

    def ends(self, state: State) -> int:
        bans, until, since, strikes = self._read(state, 0)
        return max(until + self.most_ns if bans else 0, since + self.window_ns if strikes else 0)

    def _read(self, state: State, now: int) -> tuple[int, int, int, int]:
        """(bans, end of the last one, beginning of the strikes, their number), what has expired left out."""
        if state is None:
            return 0, 0, 0, 0
        bans, until = state >> 160, state >> 96 & _TAT
        since, strikes = state >> 32 & _TAT, state & 0xFFFF_FFFF
        if now >= since + self.window_ns:
            since = strikes = 0
        if now >= until + self.most_ns:
            bans = until = 0
        return bans, until, since, strikes


ALGORITHMS: Final[dict[str, type[SlidingWindow | Gcra | SlidingCounter | FixedWindow]]] = {
    "sliding_window": SlidingWindow,
    "gcra": Gcra,
    "sliding_counter": SlidingCounter,
    "fixed_window": FixedWindow,
}
"""By the names that settings use. `gcra` alone takes a burst."""


def bind(algorithm: str, rate: Rate, burst: int | None = None) -> Algorithm:
    """The algorithm of that name, or "concurrency", with its numbers. Raises KeyError for an unknown name."""
    if algorithm == "concurrency":
        return Concurrency(rate.amount, rate.period)
    if algorithm == "gcra":
        return Gcra(rate.amount, rate.period, burst)
    return ALGORITHMS[algorithm](rate.amount, rate.period)
