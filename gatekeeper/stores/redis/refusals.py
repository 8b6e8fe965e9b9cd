"""Refusals that need not be asked for again."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple, TypeAlias

from gatekeeper.commands import NEVER, Batch, Hits, Replies, Verdict

MOST: Final = 10_000

_Key: TypeAlias = tuple[object, ...]


class _Refusal(NamedTuple):
    until: int
    since: int
    replies: list[Verdict]
    counters: list[tuple[str, str]]


class Refusals:
    """Batches that were refused, until their wait is over: the keys of a flood cost the server nothing.

    Only of limits whose refusals last (`refusals_last`) and of which nothing was left, and never of peeks: so until
    more is left, the store would answer the same. What this process gives back or resets itself is forgotten at
    once. What is told of the hits that were not the reason is as old as the refusal. At most 10,000 are held, the
    oldest make room. Times are nanoseconds of `clock`.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._held: dict[_Key, _Refusal] = {}
        self._of: dict[tuple[str, str], set[_Key]] = {}
        self._undone = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def begin(self) -> tuple[int, int]:
        """What `keep` wants to know of the moment in which a batch was asked."""
        return self._clock(), self._undone

    def answer(self, batch: Hits) -> Replies | None:
        """The refusal that still stands, its waits counted down; None if the store is to be asked."""
        if not self._held or not _may_last(batch):
            return None
        key = _key(batch)
        refusal = self._held.get(key)
        if refusal is None:
            return None
        now = self._clock()
        if now >= refusal.until:
            with self._lock:
                self._drop(key)
            return None
        return [_later(verdict, now - refusal.since) for verdict in refusal.replies]

    def keep(self, batch: Hits, replies: Replies, asked: tuple[int, int]) -> None:
        """Remember an answer, if it is a refusal that lasts; and forget what the batch undid.

        It ends counted from when it was asked, so that it is told for no longer than it stands; the waits in it are
        counted from when the answer came, so that nobody is told to come too early.
        """
        if batch.__class__ is not list:
            assert isinstance(batch, Batch)
            self._forget(batch)
        lasts = NEVER
        refused = False
        verdicts: list[Verdict] = []
        for (limit, _, _), reply in zip(batch, replies, strict=True):
            if not isinstance(reply, Verdict):
                return
            if not reply.allowed:
                if reply.remaining or not limit.refusals_last:
                    return
                refused = refused or not limit.shadow
                lasts = min(lasts, reply.retry_ns, reply.reset_ns)
            verdicts.append(reply)
        if not refused or not _may_last(batch):
            return
        key = _key(batch)
        at, undone = asked
        with self._lock:
            if undone != self._undone:  # meanwhile something was undone: perhaps of this
                return
            self._drop(key)
            if len(self._held) >= MOST:
                self._drop(next(iter(self._held)))
            counters = [(limit.space, text) for limit, text, _ in batch]
            self._held[key] = _Refusal(at + lasts, self._clock(), verdicts, counters)
            for counter in counters:
                self._of.setdefault(counter, set()).add(key)

    def _forget(self, batch: Batch) -> None:
        if batch.gives or batch.resets:
            undone = [(limit, key) for limit, key, _, _ in batch.gives] + list(batch.resets)
            with self._lock:
                for limit, text in undone:
                    if limit.refusals_last:
                        self._undone += 1
                        for key in list(self._of.get((limit.space, text), ())):
                            self._drop(key)

    def _drop(self, key: _Key) -> None:
        refusal = self._held.pop(key, None)
        if refusal is not None:
            for counter in refusal.counters:
                keys = self._of.get(counter)
                if keys is not None:
                    keys.discard(key)
                    if not keys:
                        del self._of[counter]


def _may_last(batch: Hits) -> bool:
    if batch.__class__ is not list:
        assert isinstance(batch, Batch)
        if not batch.spend or batch.gives or batch.resets or batch.takes:
            return False
    return any(limit.refusals_last for limit, _, _ in batch)


def _key(batch: Hits) -> _Key:
    return tuple((limit.space, key, cost, limit.numbers, limit.shadow) for limit, key, cost in batch)


def _later(verdict: Verdict, passed: int) -> Verdict:
    reset, wait = max(0, verdict.reset_ns - passed), verdict.retry_ns
    if 0 < wait < NEVER:
        wait -= passed
    return Verdict(verdict.allowed, verdict.limit, verdict.remaining, reset, wait, None)
