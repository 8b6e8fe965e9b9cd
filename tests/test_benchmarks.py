"""The benchmarks: how they take turns and compare, the form of their table, their exit statuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.measure import (
    Progress,
    Result,
    Row,
    Skipped,
    Unfit,
    Work,
    added,
    interleave,
    median_ratio,
    peer,
    settle,
)

ROOT = Path(__file__).parent.parent


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


class FakeClock:
    """Time that passes only while a work runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_works_take_turns_and_the_warm_up_does_not_count() -> None:
    clock = FakeClock()
    order: list[str] = []

    def work(name: str, seconds: float) -> Work:
        def run() -> None:
            order.append(name)
            clock.now += seconds

        return run

    def works(number: int) -> Mapping[str, Work]:
        order.append(f"{number}:")
        clock.now += 1000  # what makes the works is not timed
        return {"a": work("a", 2 + number), "b": work("b", 10 + number)}

    seconds = interleave(works, 2, warm_up=1, clock=clock)
    assert order == ["0:", "a", "b", "1:", "a", "b", "2:", "a", "b"]
    assert seconds == {"a": [3, 4], "b": [11, 12]}


def test_each_round_is_reported() -> None:
    told: list[str] = []
    interleave(lambda number: {"a": lambda: None}, 2, warm_up=1, progress=told.append)
    assert told == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]


def test_timers_of_one_work_have_ended_before_the_next() -> None:
    ended = threading.Event()
    seen: list[bool] = []
    works: dict[str, Work] = {
        "leaves a timer": lambda: threading.Timer(0.01, ended.set).start(),
        "next": lambda: seen.append(ended.is_set()),
    }
    interleave(lambda number: works, 1, warm_up=0)
    assert seen == [True]
    settle()  # with none left it returns


@pytest.mark.parametrize(
    ("peer", "ours", "ratio"),
    [
        ([6.0, 10.0, 90.0], [2.0, 2.0, 3.0], 5.0),  # the ratios are 3, 5, 30
        ([4.0, 8.0], [2.0, 2.0], 3.0),
        ([5.0, 5.0, 5.0], [-1.0, 0.0, 1.0], math.inf),
        ([-1.0, 0.0, 5.0], [-1.0, 1.0, 1.0], 0.0),
    ],
)
def test_the_median_is_of_the_ratios_of_rounds(peer: list[float], ours: list[float], ratio: float) -> None:
    assert median_ratio(peer, ours) == ratio


def test_rounds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_what_is_added_is_taken_round_by_round() -> None:
    assert added([5.0, 9.0], [2.0, 10.0]) == [3.0, -1.0]


def test_a_peer_that_is_not_installed_is_skipped_by_name() -> None:
    with pytest.raises(Skipped, match="no-such-peer is not installed"):
        peer("no-such-peer")


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", "µs", 1, 3, ratio=2.5, at_least=2.5), True),
        (Row("a", "µs", 1, 3, ratio=2.4, at_least=2.5), False),
        (Row("a", "µs", 1, at_least=2.5), False),
        (Row("a", "bytes", 250, at_most=250), True),
        (Row("a", "bytes", 251, at_most=250), False),
        (Row("a", "bytes", 251), None),
    ],
)
def test_a_bar_is_met_or_missed_or_not_there(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_the_table_is_aligned() -> None:
    lines = program.table(
        [
            Row("short", "µs", 1.234, 12.34, ratio=10.0, at_least=2.5),
            Row("a longer one", "bytes", 260.4, at_most=250),
        ]
    )
    assert lines == [
        "what               ours     peer  ratio  bar                met",
        "short           1.23 µs  12.3 µs  10.0×  at least 2.5×      yes",
        "a longer one  260 bytes        -      -  at most 250 bytes  NO",
    ]


GOOD = Row("good", "µs", 1, 3, ratio=3, at_least=2)
MISSED = Row("missed", "µs", 1, 3, ratio=3, at_least=4)


def found(*rows: Row) -> Callable[[bool, Progress], Result]:
    return lambda quick, progress: Result(rows)


def fails(error: Exception) -> Callable[[bool, Progress], Result]:
    def run(quick: bool, progress: Progress) -> Result:
        raise error

    return run


@pytest.mark.parametrize(
    ("runs", "status", "printed"),
    [
        ([found(GOOD)], 0, ["good"]),
        ([found(MISSED), found(GOOD)], 1, ["missed", "good"]),
        ([fails(Skipped("x is not installed")), found(GOOD)], 0, ["b0: skipped: x is not installed", "good"]),
        ([fails(Unfit("x does not limit")), found(GOOD)], 1, ["b0: not comparable: x does not limit", "good"]),
        ([found(Row("a figure", "ms", 1))], 0, ["a figure"]),
    ],
)
def test_the_status_says_whether_all_bars_are_met(
    runs: list[Callable[[bool, Progress], Result]],
    status: int,
    printed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "BENCHMARKS", {f"b{place}": run for place, run in enumerate(runs)})
    assert program.main([]) == status
    out, err = capsys.readouterr()
    assert all(text in out for text in printed)
    assert "\x1b" not in out + err
    assert err == "".join(f"b{place} ...\n" for place in range(len(runs)))


def test_results_are_written_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "BENCHMARKS", {"one": found(GOOD, MISSED)})
    assert program.main(["one", "--quick", "--json", str(tmp_path / "results.json")]) == 1
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [(row["what"], row["ratio"], row["met"]) for row in results["rows"]] == [
        ("good", 3, True),
        ("missed", 3, False),
    ]
    assert results["quick"] is True


def test_a_file_that_cannot_be_written_is_a_wrong_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "BENCHMARKS", {"one": fails(AssertionError("nothing is to be measured"))})
    with pytest.raises(SystemExit) as exit_:
        program.main(["--json", str(tmp_path / "no" / "results.json")])
    assert exit_.value.code == 2


def test_an_unknown_name_is_a_wrong_argument() -> None:
    done = benchmarks("limitr")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "expected limiter, memory, asgi, wsgi, and not 'limitr'" in done.stderr


def test_the_limiter_benchmark_prints_its_table() -> None:
    done = benchmarks("--quick", "limiter")
    assert done.returncode in (0, 1), done.stderr
    head, *rows, note = done.stdout.splitlines()
    assert head.split() == ["what", "ours", "peer", "ratio", "bar", "met"]
    assert note.startswith("quick: ")
    form = r"limiter: .+, against limits \S+ +[\d.]+ µs +[\d.]+ µs +[\d.]+×  at least (2\.5|5)× +(yes|NO)"
    matches = [re.fullmatch(form, row) for row in rows]
    assert len(matches) == 2
    assert all(matches), done.stdout
    met = [match[2] for match in matches if match]
    assert done.returncode == (1 if "NO" in met else 0)
    assert done.stderr == "limiter ...\n"
