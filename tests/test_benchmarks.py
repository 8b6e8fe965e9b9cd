"""The benchmarks: how they take turns and compare, the form of their table, their exit statuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import gateway, gateway_memory, loopback, proxies, traffic
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
    names = ", ".join(program.BENCHMARKS)
    assert f"expected {names}, and not 'limitr'" in " ".join(done.stderr.split())


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


linux = pytest.mark.skipif(sys.platform != "linux", reason="another process is accounted as Linux does it")
traffics = pytest.mark.skipif(not find_spec("uvloop"), reason="the load and its upstreams run on uvloop")


@pytest.fixture
def upstreams() -> Iterator[list[int]]:
    with traffic.upstream("a") as a, traffic.upstream("b") as b:
        yield [a, b]


@linux
def test_cpu_time_by_process_id_is_that_of_the_process() -> None:
    before = time.process_time()
    by_id = loopback.cpu_seconds(os.getpid())
    assert before <= by_id <= time.process_time()


def fail_once_started(process: loopback.Running) -> None:
    process.port_told(r"port (\d+)")
    assert process.pid in loopback.children(os.getpid())
    process.fail("is not right")


@linux
def test_processes_end_with_their_context_also_when_it_fails() -> None:
    sleeps = [sys.executable, "-c", "import time; print('port 1', flush=True); time.sleep(600)"]
    with pytest.raises(Unfit, match="sleeper is not right"), loopback.running("sleeper", sleeps) as process:
        fail_once_started(process)
    assert process.process.poll() is not None


def test_a_process_that_ends_too_early_is_quoted() -> None:
    fails = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with (
        pytest.raises(Unfit, match="the peer ended with 1: no such thing"),
        loopback.running("the peer", fails) as process,
    ):
        process.port_told(r"port (\d+)")


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("place", [0, 7])
def test_the_load_sends_twelve_fields_and_a_body_of_their_length(post: bool, place: int) -> None:
    head, _, body = traffic.request(place, 17, post=post).partition(b"\r\n\r\n")
    _, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(lines) == len(fields) == 12
    assert int(fields.get("Content-Length", 0)) == len(body)
    assert traffic.request(place, 18, post=post) != traffic.request(place, 17, post=post)


@linux
@traffics
def test_the_load_looks_at_every_answer(upstreams: list[int]) -> None:
    with traffic.load() as driver:
        driver.open(upstreams[0])
        driver.send(200)
        driver.close()
        with pytest.raises(Unfit, match="refused"):
            driver.open(loopback.free_port())


@linux
@traffics
def test_a_proxy_that_does_not_say_for_whom_is_not_compared(upstreams: list[int]) -> None:
    with pytest.raises(Unfit, match="a bare upstream sent 'x-forwarded-proto' as None"):
        gateway.verify("a bare upstream", upstreams[0])


@linux
@traffics
@pytest.mark.parametrize("name", gateway.PEERS)
def test_a_peer_passes_the_load_on_and_is_accounted(name: str, upstreams: list[int]) -> None:
    with ExitStack() as stack:
        try:
            proxy = stack.enter_context(gateway.PEERS[name].start(upstreams))
        except Skipped as reason:
            pytest.skip(str(reason))
        driver = stack.enter_context(traffic.load())
        gateway.verify(name, proxy.port)
        seconds = gateway.timed({name: proxy}, driver, {name: 64}, 1)
    assert list(seconds) == [name]
    assert 0 < seconds[name][0] < 1


@linux
@traffics
def test_memory_is_counted_for_long_bodies_and_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_memory, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(proxies, "ours", lambda upstreams, listen: proxies.asgi("aiohttp", upstreams))
    try:
        (up, down), _ = gateway_memory.long_bodies(8 * gateway_memory.MIB, lambda text: None)
        idle, notes = gateway_memory.idle_connections(20, lambda text: None)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert (up.unit, down.unit, idle.unit) == ("MiB", "MiB", "KiB")
    assert not notes
