"""`python -m benchmarks [NAME ...] [--quick] [--json FILE]`: run benchmarks, print one table.

Exit statuses: 0 all bars are met, 1 one is missed or could not be measured fairly, 2 the arguments are wrong. A
benchmark whose peer is not installed is skipped, named below the table, and misses nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final, TextIO

from benchmarks import (
    affinity,
    asgi,
    django,
    fastapi,
    flask,
    gateway,
    gateway_memory,
    hashing,
    limiter,
    memory,
    redis,
    shared,
    throttled,
    tokens,
    wsgi,
)
from benchmarks.measure import Progress, Result, Row, Skipped, Unfit
from gatekeeper import __version__

BENCHMARKS: Final[dict[str, Callable[[bool, Progress], Result]]] = {
    "limiter": limiter.run,
    "throttled": throttled.run,
    "memory": memory.run,
    "shared": shared.run,
    "redis": redis.run,
    "asgi": asgi.run,
    "wsgi": wsgi.run,
    "django": django.run,
    "fastapi": fastapi.run,
    "flask": flask.run,
    "gateway": gateway.run,
    "gateway_memory": gateway_memory.run,
    "hashing": hashing.run,
    "tokens": tokens.run,
    "affinity": affinity.run,
}
"""By name, in the order they run. Called with (quick, progress)."""

HEADS: Final = ("what", "ours", "peer", "ratio", "bar", "met")


class Reporter:
    """Tells how far a run is: on a terminal one line, written over; elsewhere a plain line for each benchmark."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._name = ""

    def begin(self, name: str) -> None:
        self._name = name
        if self._live:
            self.step("")
        else:
            self._write(f"{name} ...\n")

    def step(self, text: str) -> None:
        if self._live:
            self._write(f"\r\x1b[K{self._name}: {text}")

    def end(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What Gatekeeper costs, beside peers."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that all runs, not for figures")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in BENCHMARKS:
            parser.error(f"NAME: expected {', '.join(BENCHMARKS)}, and not {name!r}")
    with ExitStack() as stack:
        file: TextIO | None = None
        if chosen.json is not None:
            try:  # before anything is measured: a run takes minutes
                file = stack.enter_context(open(chosen.json, "w", encoding="utf-8"))
            except OSError as error:
                parser.error(f"--json: {error.strerror}: {chosen.json}")
        rows, notes, unfit = measured(list(dict.fromkeys(chosen.names)) or list(BENCHMARKS), chosen.quick)
        for line in [*table(rows), *notes]:
            print(line)
        if file is not None:
            json.dump(record(rows, notes, chosen.quick), file, indent=2)
            file.write("\n")
    return 1 if unfit or any(row.met is False for row in rows) else 0


def measured(names: Sequence[str], quick: bool) -> tuple[list[Row], list[str], bool]:
    """(rows, notes, whether one could not be measured fairly)"""
    rows: list[Row] = []
    notes: list[str] = []
    unfit = False
    reporter = Reporter(sys.stderr)
    for name in names:
        reporter.begin(name)
        try:
            result = BENCHMARKS[name](quick, reporter.step)
        except Skipped as reason:
            notes.append(f"{name}: skipped: {reason}")
        except Unfit as reason:
            unfit = True
            notes.append(f"{name}: not comparable: {reason}")
        else:
            rows += result.rows
            notes += result.notes
    reporter.end()
    if quick:
        notes.append("quick: too few rounds for figures to be quoted")
    return rows, notes, unfit


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as aligned lines, under their heads."""
    lines = [HEADS, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < place < 4 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def cells(row: Row) -> tuple[str, ...]:
    if row.at_least is not None:
        bar = f"at least {row.at_least:g}×"
    else:
        bar = "-" if row.at_most is None else f"at most {row.at_most:g} {row.unit}"
    return (
        row.what,
        f"{figure(row.ours)} {row.unit}",
        "-" if row.peer is None else f"{figure(row.peer)} {row.unit}",
        "-" if row.ratio is None else f"{figure(row.ratio)}×",
        bar,
        {True: "yes", False: "NO", None: "-"}[row.met],
    )


def figure(value: float) -> str:
    """About three digits."""
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def record(rows: Sequence[Row], notes: Sequence[str], quick: bool) -> dict[str, object]:
    """What is written as JSON: the rows, and what they were measured with."""
    return {
        "gatekeeper": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
        "quick": quick,
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "notes": list(notes),
    }


if __name__ == "__main__":
    sys.exit(main())
