"""Counters in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Final

from gatekeeper.commands import Batch, Hits, Limit, Quick, Receipt, Replies, State, Verdict

OVERFLOW: Final = "\0overflow"
"""The key of the bucket that new keys beyond the bound share. No rule makes a key that begins with NUL."""

_SHARDS: Final = 64


class _Shard:
    """A part of the keys of one space, in two generations.

    Sharded by hash, so that a dict that grows or is dropped stops nobody for long.

    A key is written into `fresh`. Once a lifetime has passed since the last turn, `stale` holds only keys that
    were not written for at least so long: it is dropped unread, and `fresh` takes its place. Nothing is scanned.
    """

    __slots__ = ("fresh", "lifetime_ns", "refusal", "stale", "turn")

    def __init__(self, lifetime_ns: int, now: int) -> None:
        self.fresh: dict[str, State] = {}
        self.stale: dict[str, State] = {}
        self.lifetime_ns = lifetime_ns
        self.turn = now + lifetime_ns
        # The last refusal, until another hit is allowed: the state, the limit, until when it stands, and what is
        # told; see `MemoryStore.hitter`.
        self.refusal: tuple[State, Limit, int, int, int, int] | None = None


class MemoryStore:
    """A Store in memory, for one process and all its threads.

    - `max_keys`: how many keys it holds at most (default 1,000,000). New keys beyond it share one bucket a
      rule, which still limits them; keys already held are never put out before they expire.
    - `clock`: returns nanoseconds and never goes back; by default the system's monotonic clock. Nothing here asks
      for the time of day.

    `overflowed` counts the hits that fell into the shared buckets.
    """

    local = True

    def __init__(self, *, max_keys: int = 1_000_000, clock: Callable[[], int] | None = None) -> None:
        self.max_keys = max_keys
        self.overflowed = 0
        self._clock = clock if clock is not None else time.monotonic_ns
        lock = Lock()
        self._acquire, self._release = lock.acquire, lock.release
        self._tables: dict[str, list[_Shard]] = {}
        self._keys = 0
        self._sweep_at = 0
        self._shards: list[_Shard] = []

    def __len__(self) -> int:
        """How many keys are held, those included that have expired and are not yet dropped."""
        return self._keys

    def ask(self, batch: Hits) -> Replies:
        replies: Replies = []
        spend, refused = True, False
        self._acquire()
        try:
            now = self._clock()
            if batch.__class__ is not list:
                assert isinstance(batch, Batch)
                spend = batch.spend
                self._undo(batch, now)
            for limit, key, cost in batch:
                try:
                    shard = self._tables[limit.space][hash(key) & 63]
                except KeyError:
                    shard = self._open(limit, now)[hash(key) & 63]
                fresh = shard.fresh
                state = fresh.get(key)
                if state is not None:
                    # A limit that was changed in operation may live longer than the one the shard was made for.
                    if limit.lifetime_ns > shard.lifetime_ns:
                        shard.lifetime_ns = limit.lifetime_ns
                    after, verdict = limit.step(state, now, cost)
                    if verdict.allowed and spend:
                        fresh[key] = after
                else:
                    shard, key, state = self._find(shard, limit, key, now)
                    after, verdict = limit.step(state, now, cost)
                    if verdict.allowed and spend:
                        self._write(shard, key, after, now)
                    if key is OVERFLOW and verdict.receipt is not None:
                        verdict.receipt = (OVERFLOW, verdict.receipt)  # says where the charge lies
                replies.append(verdict)
                if not verdict.allowed and not limit.shadow:
                    refused = True
            if refused and spend and len(batch) > 1:
                self._unspend(batch, replies, now)
        finally:
            self._release()
        return replies

    def hitter(self, limit: Limit) -> Callable[[str], Verdict]:
        """A function that asks for one hit of cost 1: what `ask` answers, with nothing looked up on the way.

        A key that is refused again and again is refused from memory: as long as its state is the very same object,
        nothing was spent, given back or reset since, so what was told stands until more is left. That takes no
        lock, for state and refusal are each read in one step, and neither is changed in place: threads that hammer
        a key that is spent do not queue.
        """
        acquire, release, clock, step = self._acquire, self._release, self._clock, limit.step
        quick, total = _by_step(limit) if limit.quick is None else limit.quick(), step(None, 0, 0)[1].limit
        acquire()
        try:
            shards = self._tables.get(limit.space) or self._open(limit, clock())
            for shard in shards:
                shard.lifetime_ns = max(shard.lifetime_ns, limit.lifetime_ns)
        finally:
            release()

        def hit(key: str) -> Verdict:
            shard = shards[hash(key) & 63]
            refused = shard.refusal
            if refused is not None and refused[0] is shard.fresh.get(key):
                now = clock()
                _, of, until, left, reset, wait = refused
                if now < until and of is limit:
                    return Verdict(False, total, left, reset - now, wait - now, None)
            acquire()
            try:
                now = clock()
                fresh = shard.fresh
                state = fresh.get(key)
                if state is not None:
                    after, left, reset, receipt = quick(state, now)
                    if left >= 0:
                        fresh[key] = after
                        if refused is not None:
                            shard.refusal = None
                        return Verdict(True, total, left, reset, 0, receipt)
                    after, verdict = step(state, now, 1)
                    if verdict.allowed:
                        fresh[key] = after
                    else:
                        reset, wait = now + verdict.reset_ns, now + verdict.retry_ns
                        shard.refusal = state, limit, reset, verdict.remaining, reset, wait
                    return verdict
            finally:
                release()
            (reply,) = self.ask([(limit, key, 1)])
            assert isinstance(reply, Verdict)
            return reply

        return hit

    async def aask(self, batch: Hits) -> Replies:
        return self.ask(batch)

    def keys(self, limit: Limit) -> list[str]:
        self._acquire()
        try:
            shards = self._tables.get(limit.space, ())
            return [key for shard in shards for held in (shard.fresh, shard.stale) for key in held]
        finally:
            self._release()

    async def akeys(self, limit: Limit) -> list[str]:
        return self.keys(limit)

    def close(self) -> None:
        self._acquire()
        try:
            for shard in self._shards:  # which are kept: a hitter knows no others
                shard.fresh, shard.stale, shard.refusal = {}, {}, None
            self._keys = 0
        finally:
            self._release()

    async def aclose(self) -> None:
        self.close()

    # All that follows runs under the lock.

    def _open(self, limit: Limit, now: int) -> list[_Shard]:
        shards = [_Shard(limit.lifetime_ns, now) for _ in range(_SHARDS)]
        self._tables[limit.space] = shards
        self._shards += shards
        return shards

    def _shard(self, limit: Limit, key: str, now: int) -> _Shard:
        return (self._tables.get(limit.space) or self._open(limit, now))[hash(key) & 63]

    def _find(self, shard: _Shard, limit: Limit, key: str, now: int) -> tuple[_Shard, str, State]:
        """Where a key is, or a new one would be: in its shard, or beyond the bound in the shared bucket."""
        shard.lifetime_ns = max(shard.lifetime_ns, limit.lifetime_ns)
        # A state that has expired counts for nothing, so it does not matter whether it is still held.
        state = shard.fresh.get(key) or shard.stale.get(key)
        if state is None and self._keys >= self.max_keys:
            self._sweep(now)
            if self._keys >= self.max_keys:
                self.overflowed += 1
                key = OVERFLOW
                shard = self._tables[limit.space][hash(key) & 63]
                state = shard.fresh.get(key) or shard.stale.get(key)
        return shard, key, state

    def _held(self, limit: Limit, key: str, now: int) -> tuple[_Shard, State]:
        """A key's shard and state, where it is held."""
        shard = self._shard(limit, key, now)
        state = shard.fresh.get(key)
        return shard, shard.stale.get(key) if state is None else state

    def _write(self, shard: _Shard, key: str, state: State, now: int) -> None:
        if now >= shard.turn:
            self._turn(shard, now)
        if key in shard.fresh or shard.stale.pop(key, None) is not None:
            if state is not None:
                shard.fresh[key] = state
            else:
                shard.fresh.pop(key, None)
                self._keys -= 1
        elif state is not None:
            shard.fresh[key] = state
            self._keys += 1
            self._sweep(now)

    def _turn(self, shard: _Shard, now: int) -> None:
        self._keys -= len(shard.stale)
        shard.stale = shard.fresh
        shard.fresh = {}
        shard.turn = now + shard.lifetime_ns

    def _sweep(self, now: int) -> None:
        """Turn the next shard if it is due: with one for each new key, none that is no longer hit stays behind."""
        self._sweep_at = (self._sweep_at + 1) % len(self._shards)
        shard = self._shards[self._sweep_at]
        if now >= shard.turn:
            self._turn(shard, now)

    def _undo(self, batch: Batch, now: int) -> None:
        for limit, key, cost, receipt in batch.gives:
            self._give(limit, key, cost, receipt, now)
        for limit, key in batch.resets:
            self._write(self._held(limit, key, now)[0], key, None, now)
        for limit, key, cost in batch.takes:
            shard, key, state = self._find(self._shard(limit, key, now), limit, key, now)
            after, verdict = limit.step(state, now, cost)
            if not verdict.allowed:
                after = limit.step(state, now, min(cost, verdict.remaining))[0]
            self._write(shard, key, after, now)

    def _give(self, limit: Limit, key: str, cost: int, receipt: Receipt, now: int) -> None:
        if receipt.__class__ is tuple:
            key, receipt = receipt
        shard, state = self._held(limit, key, now)
        if state is not None:
            self._write(shard, key, limit.give(state, now, cost, receipt), now)

    def _unspend(self, batch: Hits, replies: Replies, now: int) -> None:
        """One of several hits was refused: undo the others, and let their verdicts show it."""
        for (limit, key, cost), verdict in zip(batch, replies, strict=True):
            if isinstance(verdict, Verdict) and verdict.receipt is not None:
                self._give(limit, key, cost, verdict.receipt, now)
        for place, ((limit, key, _), verdict) in enumerate(zip(batch, replies, strict=True)):
            if isinstance(verdict, Verdict) and verdict.receipt is not None:
                where = verdict.receipt[0] if verdict.receipt.__class__ is tuple else key
                replies[place] = limit.step(self._held(limit, where, now)[1], now, 0)[1]


def _by_step(limit: Limit) -> Quick:
    """The short way of a limit that has none of its own."""
    step = limit.step

    def quick(state: int, now: int) -> tuple[State, int, int, Receipt]:
        after, verdict = step(state, now, 1)
        return after, verdict.remaining if verdict.allowed else -1, verdict.reset_ns, verdict.receipt

    return quick
