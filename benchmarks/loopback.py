"""Processes for the benchmarks of the gateway: started, waited for, accounted, and ended whatever happens.

CPU time and memory are those of one process, as the operating system's books say: all its threads, nothing of its
children or of the load.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, NoReturn

from benchmarks.measure import Skipped, Unfit

HOST: Final = "127.0.0.1"
ROOT: Final = Path(__file__).parent.parent
PATIENCE: Final = 30.0
"""Seconds that a process may take to start, and to end by itself once it is asked to."""

_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG: Final = 1


class Running:
    """A process that was started, and what it has written so far (unless its output is a pipe)."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.name = name
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """The end of what it wrote."""
        length = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4000, max(0, length - 4000)).decode(errors="replace").strip()

    def fail(self, what: str) -> NoReturn:
        raise Unfit(f"{self.name} {what}: {self.said() or 'it said nothing'}")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises Unfit when the process ends, or is not ready in time."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None:
                self.fail(f"ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                self.fail(f"was not ready within {PATIENCE:g} s")
            time.sleep(0.02)

    def port_told(self, form: str) -> int:
        """The port that it writes, the first group of `form`, once it has."""
        self.wait_until(lambda: re.search(form, self.said()) is not None)
        told = re.search(form, self.said())
        assert told is not None
        return int(told[1])

    def wait_for_port(self, port: int) -> None:
        self.wait_until(lambda: is_open(port))


@contextmanager
def running(name: str, command: Sequence[str | Path], *, talks: bool = False) -> Iterator[Running]:
    """A process for as long as the context lasts. With `talks` its standard input and output are pipes."""
    with tempfile.TemporaryFile() as log:
        pipe = subprocess.PIPE if talks else None
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or log,
            stderr=log,
            preexec_fn=end_with_parent,  # where this process is killed, nobody else would end its children
        )
        try:
            yield Running(name, process, log)
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:  # the parent last: killed, it ends no worker
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def end_with_parent() -> None:
    """In a process just forked: SIGTERM when the parent ends, see prctl(2)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def accountable() -> None:
    """Raises Skipped where another process's CPU time and memory cannot be read as below."""
    if sys.platform != "linux":
        raise Skipped("the CPU time and memory of another process are read as Linux gives them")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, of all its threads, with nanoseconds: the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def memory(pid: int, field: str) -> int:
    """Bytes by a field of /proc/PID/status: VmRSS, what is resident; VmHWM, the most that ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise Unfit(f"/proc/{pid}/status has no {field}")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # after the name, which stands in brackets and may hold anything: state, parent, …
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def only_child(parent: Running) -> int:
    """The process id of the one worker. Raises Unfit unless there is one child and no other."""
    parent.wait_until(lambda: bool(children(parent.pid)))  # it may listen before it forks
    found = children(parent.pid)
    if len(found) != 1:
        parent.fail(f"has {len(found)} children and not one worker")
    return found[0]


def free_port() -> int:
    """A port for what cannot tell which one it was given."""
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True
