"""What is asked to carry out a batch, and what its answers mean. Two drivers ask: blocking and awaiting."""

from __future__ import annotations

import random
import time
from threading import Lock
from typing import Final

from hiredis import ReplyError

from gatekeeper.commands import Batch, Hits, Limit, Replies, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis.address import Address, Target
from gatekeeper.stores.redis.breaker import Breaker, Condition
from gatekeeper.stores.redis.packing import Packer, command, slot_of, text_of, verdicts, with_script
from gatekeeper.stores.redis.routes import Answer, Rounds, Send, redirection, routes_to

LATE: Final = "the store did not answer in time"
LOST: Final = "there is no connection to the store"
REFUSED: Final = "the store refused the login, or the database"
PAUSED: Final = "the store does not answer, and is not asked for the moment"

MOMENT: Final = 0.002
"""Seconds that a driver waits when nothing is to be sent."""

_HOPS: Final = 5
_SEARCH_GAP: Final = 0.05
"""Seconds between two searches for the servers, at least."""

_MOST_KEYS: Final = 100_000
_SERVICE: Final = Address("", 0)  # stands for the server behind sentinels, wherever it is

_ELSEWHERE: Final = frozenset({"NOSCRIPT", "MOVED", "ASK"})
_CODES: Final = ("WRONGTYPE", "OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM")
_NOT_HERE: Final = ("READONLY", "CLUSTERDOWN", "MASTERDOWN")


class _Group:
    """What of a batch is on one slot, and the places of its hits in the batch."""

    __slots__ = ("batch", "places", "slot")

    def __init__(self, slot: int, batch: Hits, places: list[int]) -> None:
        self.slot = slot
        self.batch = batch
        self.places = places


class Core:
    """The store without its sockets. `timeout`: seconds."""

    def __init__(self, target: Target, packer: Packer, timeout: float) -> None:
        self.target = target
        self.packer = packer
        self.timeout = timeout
        self.routes = routes_to(target)
        self.is_single = target.topology == "single"
        self.is_cluster = target.topology == "cluster"
        self._search = Breaker()
        self._search_at = 0.0
        self.begin()

    def begin(self) -> None:
        """At first, and after a fork: what other threads held is nobody's there."""
        self._lock = Lock()
        self._searching = False
        self._breakers: dict[Address, Breaker] = {}

    # What drivers tell of the servers, and ask.

    def breaker(self, address: Address) -> Breaker:
        if self.target.topology == "sentinel" and not address.sentinel:
            address = _SERVICE
        return self._breakers.get(address) or self._breakers.setdefault(address, Breaker())

    def answered(self, address: Address) -> None:
        breaker = self.breaker(address)
        if not breaker.is_calm:
            with self._lock:
                breaker.answered()

    def failed(self, address: Address) -> None:
        breaker = self.breaker(address)
        with self._lock:
            breaker.failed(time.monotonic(), random.random())  # noqa: S311  # no secret depends on it
        if not address.sentinel:
            self.routes.lost()

    def may_ask(self, address: Address) -> bool:
        breaker = self.breaker(address)
        if breaker.is_calm:
            return True
        with self._lock:
            return breaker.allows(time.monotonic())

    # What an answer means.

    def replies(self, batch: Hits, answer: Answer) -> Replies:
        """The answer to a batch as replies to its hits."""
        if isinstance(answer, list):
            return verdicts(batch, answer)
        error = told(answer) if isinstance(answer, ReplyError) else answer
        assert isinstance(error, StoreError)
        return [error] * len(batch)

    def undoing(self, batch: Hits, replies: Replies) -> Batch | None:
        """What gives back all that a batch spent; None if that is nothing."""
        if isinstance(batch, Batch) and not batch.spend:
            return None
        gives = [
            (limit, key, cost, reply.receipt)
            for (limit, key, cost), reply in zip(batch, replies, strict=True)
            if isinstance(reply, Verdict) and reply.receipt is not None
        ]
        return Batch(gives=gives) if gives else None

    # What is asked.

    def decide(self, batch: Hits) -> Rounds[Replies]:
        """Carry out a batch."""
        if not self.is_cluster:
            (answer,) = yield from self._carry_out([(0, batch)])
            return self.replies(batch, answer)
        groups = self._groups(batch)
        answers = yield from self._carry_out([(group.slot, group.batch) for group in groups])
        if len(groups) == 1:
            return self.replies(batch, answers[0])
        replies: Replies = [StoreError(LOST)] * len(batch)
        for group, answer in zip(groups, answers, strict=True):
            for place, reply in zip(group.places, self.replies(group.batch, answer), strict=True):
                replies[place] = reply
        if not isinstance(batch, Batch) or batch.spend:
            yield from self._unspend(batch, groups, replies)
        return replies

    def keys(self, limit: Limit) -> Rounds[list[str]]:
        """The keys of a limit, at most 100,000 of them. Raises StoreError."""
        pattern, before, after = self.packer.pattern(limit)
        found: dict[str, None] = {}
        yield from self._locate()
        masters = self.routes.masters()
        if not masters:
            raise StoreError(LOST)
        for master in masters:
            cursor = b"0"
            while True:
                if not self.may_ask(master):
                    raise StoreError(PAUSED)
                scan = command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"1000")
                (answer,) = yield [Send(master, scan)]
                if not isinstance(answer, list):
                    raise told(answer) if isinstance(answer, ReplyError) else answer
                cursor, names = answer
                for name in names:
                    if name.startswith(before) and name.endswith(after):
                        key = text_of(name[len(before) : len(name) - len(after)])
                        if key is not None:
                            found[key] = None
                if cursor == b"0" or len(found) >= _MOST_KEYS:
                    break
        return list(found)[:_MOST_KEYS]

    # How.

    def _carry_out(self, batches: list[tuple[int, Hits]]) -> Rounds[list[Answer]]:
        """The answers to batches each of which is on one slot, asked for together."""
        return self.carry_out([(slot, self.packer.pack(batch), batch) for slot, batch in batches])

    def carry_out(self, commands: list[tuple[int, bytes, Hits | None]]) -> Rounds[list[Answer]]:
        """The answers to commands, each for a slot, with the batch that it carries out; asked for together.

        Each is an answer of the server, an error of its (ReplyError), or a StoreError.
        """
        yield from self._locate()
        answers: list[Answer] = [StoreError(LOST)] * len(commands)
        packets = [packet for _, packet, _ in commands]
        redirected: dict[int, tuple[Address, bool]] = {}
        todo = list(range(len(commands)))
        for _ in range(_HOPS):
            sends, asked = [], []
            for place in todo:
                slot, _, batch = commands[place]
                address, asking = redirected.get(place) or (self.routes.address(slot), False)
                if address is not None and not self.breaker(address).is_calm:
                    address = yield from self._probe(slot, address)
                    answers[place] = StoreError(PAUSED)
                if address is not None:
                    sends.append(Send(address, packets[place], batch, asking))
                    asked.append(place)
            if not sends:
                break
            todo = []
            for place, send, answer in zip(asked, sends, (yield sends), strict=True):
                answers[place] = answer
                if isinstance(answer, ReplyError):
                    again = self._again(send, answer)
                    if again is not None:
                        redirected[place] = again.address, again.asking
                        packets[place] = again.packet
                        todo.append(place)
        return answers

    def _again(self, send: Send, error: ReplyError) -> Send | None:
        """What is to be sent instead, where a server's error says that; None if it is the answer."""
        code = code_of(error)
        if code == "NOSCRIPT":
            return send._replace(packet=with_script(send.packet))
        if code in ("MOVED", "ASK") and self.is_cluster:
            slot, address = redirection(error, send.address)
            if code == "MOVED":
                self.routes.moved(slot, address)
            return send._replace(address=address, asking=code == "ASK")
        if any(word in str(error) for word in _NOT_HERE):
            self.routes.lost()
        return None

    def _probe(self, slot: int, address: Address) -> Rounds[Address | None]:
        """Where to ask, of a server that failed before; None for nowhere, for now."""
        probing = self.breaker(address).condition is not Condition.CLOSED
        if not self.may_ask(address):
            return None
        if probing and not self.is_single:
            # Who probes looks first whether another has taken over.
            self._search_at = 0.0
            self.routes.lost()
            yield from self._locate()
            return self.routes.address(slot)
        return address

    def _locate(self) -> Rounds[None]:
        """Find out where the servers are, if that is to be done, one search at a time."""
        waited = 0.0
        while self.routes.is_stale:
            with self._lock:
                now = time.monotonic()
                mine = not self._searching and now >= self._search_at and self._search.allows(now)
                if mine:
                    self._searching = True
                elsewhere = self._searching
            if mine:
                found = False
                try:
                    found = yield from self.routes.find()
                finally:
                    with self._lock:
                        now = time.monotonic()
                        self._searching = False
                        self._search_at = now + _SEARCH_GAP
                        if found:
                            self._search.answered()
                        else:
                            self._search.failed(now, random.random())  # noqa: S311
                return
            if self.routes.masters() or not elsewhere or waited > self.timeout:
                return  # with what is known
            yield []
            waited += MOMENT

    def _groups(self, batch: Hits) -> list[_Group]:
        """A batch by slots."""
        gives, resets, takes, hits = ([slot_of(tag) for tag in tags] for tags in self.packer.tags(batch))
        slots = dict.fromkeys([*gives, *resets, *takes, *hits])
        if len(slots) <= 1:
            return [_Group(next(iter(slots), 0), batch, list(range(len(batch))))]
        groups = []
        for slot in slots:
            places = [place for place, its in enumerate(hits) if its == slot]
            of_slot: Hits = [batch[place] for place in places]
            if isinstance(batch, Batch):
                of_slot = Batch(
                    of_slot,
                    gives=[one for one, its in zip(batch.gives, gives, strict=True) if its == slot],
                    resets=[one for one, its in zip(batch.resets, resets, strict=True) if its == slot],
                    takes=[one for one, its in zip(batch.takes, takes, strict=True) if its == slot],
                    spend=batch.spend,
                )
            groups.append(_Group(slot, of_slot, places))
        return groups

    def _unspend(self, batch: Hits, groups: list[_Group], replies: Replies) -> Rounds[None]:
        """If one slot refused: give back what others admitted, and let their verdicts show it."""
        if not any(_refuses(hit[0], reply) for hit, reply in zip(batch, replies, strict=True)):
            return
        undone: list[tuple[int, Hits]] = []
        where: list[list[int]] = []
        for group in groups:
            spent = [
                (place, batch[place], reply.receipt)
                for place in group.places
                if isinstance(reply := replies[place], Verdict) and reply.receipt is not None
            ]
            if spent:
                gives = [(*hit, receipt) for _, hit, receipt in spent]
                looks = [(limit, key, 0) for _, (limit, key, _), _ in spent]
                undone.append((group.slot, Batch(looks, gives=gives, spend=False)))
                where.append([place for place, _, _ in spent])
        if undone:
            answers = yield from self._carry_out(undone)
            for places, (_, looked_at), answer in zip(where, undone, answers, strict=True):
                for place, reply in zip(places, self.replies(looked_at, answer), strict=True):
                    replies[place] = reply


def _refuses(limit: Limit, reply: object) -> bool:
    return isinstance(reply, Verdict) and not reply.allowed and not limit.shadow


def code_of(error: ReplyError) -> str:
    return str(error).partition(" ")[0]


def is_elsewhere(error: ReplyError) -> bool:
    """Whether the same, asked otherwise or of another server, may be answered."""
    return code_of(error) in _ELSEWHERE


def told(error: ReplyError) -> StoreError:
    """An error of the server as one that may be shown: its code, and not its words."""
    text = str(error)
    if "FOREIGN" in text:
        return StoreError("what is stored under the key of a counter was not written by Gatekeeper")
    # Before Redis 7 the error of a script tells that of the command in it somewhere further on.
    code = next((code for code in _CODES if code in text), code_of(error))
    return StoreError(f"the store answered with an error: {code if code.isalnum() and code.isupper() else 'ERR'}")
