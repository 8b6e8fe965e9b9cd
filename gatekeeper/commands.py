"""What the core may ask of a store or of the shell around it, and the two drivers that carry it out.

The core never waits. It is written as generators that *yield* questions and *return* results; `run` answers
them blocking, `arun` awaiting. So one core serves WSGI and ASGI, and is tested by sending answers to it.

Times are integers of nanoseconds on the store's clock: integers make decisions exact, and equal in each store.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar

from gatekeeper.errors import StoreError

NEVER: Final = 1 << 62
"""A wait in nanoseconds that does not end (some 146 years): the cost is greater than the limit itself."""

State: TypeAlias = int | None
"""All that an algorithm remembers of a key, in one integer; None is a key that was never hit."""


Receipt: TypeAlias = Any
"""What a store needs to undo exactly one hit; only it knows how to read it."""

Quick: TypeAlias = Callable[[int, int], tuple[State, int, int, Receipt]]
"""(state, now) -> (the state to keep, what remains, nanoseconds until that grows, receipt), of a hit of cost 1.

What remains is negative where the hit was not decided, for it is of another kind or will be refused.
"""


class Verdict:
    """The answer to one hit.

    - `allowed`: whether the hit was admitted (and, unless it was a peek, spent).
    - `limit`: the quota (for `gcra` the burst), in units of cost.
    - `remaining`: what is left of it after this answer, never negative.
    - `reset_after`: seconds until `remaining` grows, 0.0 when the quota is whole.
    - `retry_after`: seconds until the same cost would be admitted if nothing else came; 0.0 when it was;
      `math.inf` when the cost is above the limit.
    - `receipt`: hand it to a give-back to undo exactly this hit; None if nothing was spent.
    """

    __slots__ = ("allowed", "limit", "receipt", "remaining", "reset_ns", "retry_ns")

    def __init__(
        self, allowed: bool, limit: int, remaining: int, reset_ns: int, retry_ns: int, receipt: Receipt | None
    ) -> None:
        self.allowed = allowed
        self.limit = limit
        self.remaining = remaining
        self.reset_ns = reset_ns
        self.retry_ns = retry_ns
        self.receipt = receipt

    @property
    def reset_after(self) -> float:
        return self.reset_ns / 1e9

    @property
    def retry_after(self) -> float:
        return math.inf if self.retry_ns >= NEVER else self.retry_ns / 1e9

    def __bool__(self) -> bool:
        return self.allowed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Verdict):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]  # mutable, as its neighbours are

    def __repr__(self) -> str:
        what = "allowed" if self.allowed else f"refused, retry after {self.retry_after:g} s"
        return f"<Verdict {what}, {self.remaining} of {self.limit} left, reset after {self.reset_after:g} s>"


class Limit(Protocol):
    """What a hit counts against: an algorithm with its numbers, and the space its keys live in."""

    @property
    def space(self) -> str:
        """Names the table of keys: rule, algorithm, schema version and period, never the amount.

        So that raising a limit keeps what was used, and changing the algorithm never reads foreign state.
        """

    @property
    def step(self) -> Callable[[State, int, int], tuple[State, Verdict]]:
        """(state, now, cost) -> (the state to keep, verdict). A refusal returns the state as it was."""

    @property
    def give(self) -> Callable[[State, int, int, int], State]:
        """(state, now, cost, receipt) -> the state without that hit, as far as it still counts."""

    @property
    def quick(self) -> Callable[[], Quick] | None:
        """Makes a shorter way than `step` for most hits, for the callers under one lock; None if there is none."""

    @property
    def lifetime_ns(self) -> int:
        """How long after the last step a state can still matter."""

    @property
    def kind(self) -> str:
        """Names the algorithm, for a store that carries it out itself (as Redis does)."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """All the numbers that the algorithm of that kind needs; times are in nanoseconds."""

    @property
    def shadow(self) -> bool:
        """Whether its refusals are but told: the other hits of the batch are spent all the same."""

    @property
    def refusals_last(self) -> bool:
        """Whether a refusal stands until its wait is over: nothing is given back or reset before."""

    @property
    def listed(self) -> bool:
        """Whether its keys can be listed: a store keeps their text then."""


Hit: TypeAlias = tuple[Limit, str, int]
"""(limit, key, cost). A bare tuple, for one is built for each rate of each request."""

Give: TypeAlias = tuple[Limit, str, int, Receipt]
"""(limit, key, cost, receipt)."""


Hits: TypeAlias = list[Hit]
"""A batch of hits and nothing else, as most are: a plain list."""


class Batch(Hits):
    """Commands for one store, carried out in one atomic step: `gives`, `resets`, `takes`, then the hits in it.

    All hits are admitted, or none is spent (those of shadow limits apart, which refuse nothing); with `spend`
    false they are only looked at. A take spends of its cost as much as there is, and has no answer. `local` sends
    the batch to the process's own store, the stand-in while the real one does not answer.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        *,
        gives: Sequence[Give] = (),
        resets: Sequence[tuple[Limit, str]] = (),
        takes: Sequence[Hit] = (),
        spend: bool = True,
        local: bool = False,
    ) -> None:
        super().__init__(hits)
        self.gives = gives
        self.resets = resets
        self.takes = takes
        self.spend = spend
        self.local = local

    def __repr__(self) -> str:
        told = f"hits={list(self)} gives={self.gives} resets={self.resets} takes={self.takes} spend={self.spend}"
        return f"<Batch {told}>"


Replies: TypeAlias = list[Verdict | StoreError]
"""The answers to a batch: one for each hit, in order, and each may be a StoreError of its own.

When one hit is refused, the verdicts of the others show their quota unspent, with no receipt.
"""


class Call:
    """A function of the user's to be called by the shell, which may await it."""

    __slots__ = ("argument", "function")

    def __init__(self, function: Callable[[Any], Any], argument: object) -> None:
        self.function = function
        self.argument = argument


class Read:
    """The body of the request is to be read by the shell, and still to reach the application.

    The answer is a Body.
    """

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        self.most = most


Body: TypeAlias = bytes | Mapping[str, Sequence[str]] | None
"""A body as it was read; None if it is longer than was asked for.

Or the values by name of a form, where a framework has parsed it and nothing is left of the body.
"""


class Record(NamedTuple):
    """A session as a store keeps it.

    - `data`: the session as text, which the store does not read
    - `version`: another after each write; a later write names it, so that none is lost
    """

    data: bytes
    version: int


class SessionCommand:
    """What is asked of a session store. Each answer may be a StoreError instead."""

    __slots__ = ("store",)

    store: SessionStore


class Load(SessionCommand):
    """A session by its key: 64 hexadecimal digits, the SHA-256 of the id that the client holds.

    The answer is a Record, or None.
    """

    __slots__ = ("key",)

    def __init__(self, store: SessionStore, key: str) -> None:
        self.store = store
        self.key = key


class Save(SessionCommand):
    """Write a session, if it is still as it was read.

    - `version`: of the Record that was read; None for a session that must not exist yet
    - `ttl`: seconds, 1 or more, after which it is gone unless it is written again
    - `owner`: whose it is, for `Owned`; None for nobody's

    The answer is its new version; or the Record that is there instead; or None if it is gone, deleted or expired:
    what is gone is never written again.
    """

    __slots__ = ("data", "key", "owner", "ttl", "version")

    def __init__(
        self, store: SessionStore, key: str, data: bytes, *, version: int | None, ttl: int, owner: str | None = None
    ) -> None:
        self.store = store
        self.key = key
        self.data = data
        self.version = version
        self.ttl = ttl
        self.owner = owner


class Delete(SessionCommand):
    """End a session. The answer is the Record that was there in that moment, or None."""

    __slots__ = ("key",)

    def __init__(self, store: SessionStore, key: str) -> None:
        self.store = store
        self.key = key


class Owned(SessionCommand):
    """The sessions of an owner. The answer is a list of (key, Record), in no order."""

    __slots__ = ("owner",)

    def __init__(self, store: SessionStore, owner: str) -> None:
        self.store = store
        self.owner = owner


class SessionStore(Protocol):
    """Where sessions live. `ask` and `aask` give the same answers; neither raises StoreError: it is the answer.

    An `aask` that is cancelled while it waits may have been carried out, but never by halves.
    """

    local: bool
    """True if `ask` never waits for another machine, so that it may be called on an event loop."""

    def ask(self, command: SessionCommand) -> Any: ...

    async def aask(self, command: SessionCommand) -> Any: ...

    def sweep(self) -> int:
        """Drop what has expired, in portions; how many sessions that were. Raises StoreError."""

    async def asweep(self) -> int: ...

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


R = TypeVar("R")
Question: TypeAlias = Hits | Call | Read | SessionCommand  # a Batch is Hits
Steps: TypeAlias = Generator[Question, Any, R]


class Store(Protocol):
    """Where counters live. `ask` and `aask` give the same answers; neither raises StoreError: it is a reply.

    An `aask` that is cancelled while it waits leaves nothing spent: what the store had carried out it undoes.
    """

    local: bool
    """True if `ask` never waits for another machine, so that it may be called on an event loop."""

    def ask(self, batch: Hits) -> Replies: ...

    async def aask(self, batch: Hits) -> Replies: ...

    def keys(self, limit: Limit) -> list[str]:
        """The keys of a `listed` limit that the store holds, in no order; some may have expired.

        Raises StoreError.
        """

    async def akeys(self, limit: Limit) -> list[str]: ...

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


def run(steps: Steps[R], ask: Callable[[Hits], Replies], read: Callable[[int], Body] | None = None) -> R:
    """Drive a core generator to its result, blocking. `read` reads the body, where there is one."""
    answer: Any = None
    try:
        while True:
            question = steps.send(answer)
            if isinstance(question, Call):
                answer = _call(question)
            elif isinstance(question, Read):
                answer = b"" if read is None else read(question.most)
            elif isinstance(question, SessionCommand):
                answer = question.store.ask(question)
            else:
                answer = ask(question)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def arun(
    steps: Steps[R],
    ask: Callable[[Hits], Awaitable[Replies]],
    read: Callable[[int], Awaitable[Body]] | None = None,
) -> R:
    """Drive a core generator to its result, awaiting. `read` reads the body, where there is one."""
    answer: Any = None
    try:
        while True:
            question = steps.send(answer)
            if isinstance(question, Call):
                answer = _unwrapped(question.function(question.argument))
                if isawaitable(answer):
                    answer = _unwrapped(await answer)
            elif isinstance(question, Read):
                answer = b"" if read is None else await read(question.most)
            elif isinstance(question, SessionCommand):
                answer = await question.store.aask(question)
            else:
                answer = await ask(question)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def nobody(batch: Hits) -> NoReturn:
    """Answers steps that ask of no limits."""
    raise AssertionError("asked of limits")


async def anobody(batch: Hits) -> NoReturn:
    """As `nobody`, awaited."""
    raise AssertionError("asked of limits")


def _unwrapped(answer: Any) -> Any:
    """What a function of the user's returned; of Werkzeug's LocalProxy (as `current_user` is) what it stands for.

    The proxy itself has an `__await__`, whatever it stands for, and is not None where it stands for None.
    """
    if answer.__class__ is type(answer):
        return answer
    current = getattr(answer, "_get_current_object", None)
    return answer if current is None else current()


def _call(question: Call) -> object:
    answer = _unwrapped(question.function(question.argument))
    if isawaitable(answer):
        close = getattr(answer, "close", None)
        if close is not None:
            close()
        raise TypeError(f"{question.function!r} is asynchronous and cannot be called from blocking code")
    return answer
