"""Support for the tests of the shared store: fresh, empty ones in temporary folders, and processes that hit them."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_uint64
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gatekeeper.commands import Store
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule
from gatekeeper.stores.shared import SharedStore

MEMORY = Path("/dev/shm")
SIZE = 4 << 20
DAY = 86_400


def temporary_folder() -> Path:
    """Where a folder may be made, in memory if the system has that."""
    return Path(tempfile.mkdtemp(prefix="gatekeeper-test-", dir=MEMORY if MEMORY.is_dir() else None)) / "store"


def shared_store(clock: Callable[[], int], *, max_keys: int = 1_000_000, size: int = SIZE) -> Store:
    """A fresh, empty store, whose folder is deleted with it."""
    path = temporary_folder()
    store = SharedStore(path, max_keys=max_keys, size=size, clock=clock)
    weakref.finalize(store, shutil.rmtree, path.parent, ignore_errors=True)
    return store


def limit(amount: int, period: int = DAY, *, name: str = "rule", algorithm: str = "sliding_window") -> RateLimit:
    return Rule(name, [Rate(amount, period)], algorithm=algorithm).limits[0]


def counts(how: str, workers: int) -> Any:
    """A number for each process, which others can read while it is written and after it was killed."""
    return multiprocessing.get_context(how).RawArray(c_uint64, workers)


def hit(path: Path, amount: int, hits: int, admitted: Any, place: int, together: Any = None) -> None:
    """Hit one key so often (0: for ever), and count what was admitted after each. They begin `together`."""
    store, one = SharedStore(path, size=SIZE), limit(amount)
    if together is not None:
        together.wait(60)
    number = 0
    while not hits or number < hits:
        number += 1
        reply = store.ask([(one, "key", 1)])[0]
        if reply.allowed:
            admitted[place] += 1
        if isinstance(reply, Exception):
            raise reply
    store.close()


def hit_with_strangers(path: Path, amount: int, hits: int, admitted: Any, place: int) -> None:
    """As `hit`, with new keys and batches of several hits in between, so that pages split and keys are swept."""
    store, one = SharedStore(path, size=SIZE), limit(amount)
    brief, other = limit(3, 1, name="brief"), limit(10**9, name="other")
    number = 0
    while not hits or number < hits:
        number += 1
        replies = store.ask([(brief, f"{place}-{number}", 1), (other, f"{number % 50}", 1), (one, "key", 1)])
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        if all(reply.allowed for reply in replies):
            admitted[place] += 1
    store.close()


def barrier(how: str, workers: int) -> Any:
    return multiprocessing.get_context(how).Barrier(workers)


def started(how: str, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[BaseProcess]:
    """A process for each set of arguments; `how` is "fork" or "spawn"."""
    context: Any = multiprocessing.get_context(how)
    processes = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    with warnings.catch_warnings():
        # Newer Pythons warn of forking where there are threads: those of the test runner.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    return processes


def joined(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """How they ended; those that did not in time are killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join(10)
    return [process.exitcode for process in processes]
