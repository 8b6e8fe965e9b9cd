"""The `gatekeeper` command, run as its users run it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest

from gatekeeper import Gatekeeper, __version__
from gatekeeper.commands import Batch
from gatekeeper.settings import GREATEST_FILE, json_schema

COMMAND = Path(sys.executable).with_name("gatekeeper")

RIGHT = """\
[[limits]]
name = "default"
rate = "300/minute"

[[limits]]
name = "login"
match = "POST /login"
rate = ["5/minute", "20/hour"]
"""


def run(
    *arguments: str | Path, output: IO[str] | int = subprocess.PIPE, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """The command's outcome, on a terminal so wide that no line is broken."""
    return subprocess.run(
        [COMMAND, *arguments],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=60,
        env=os.environ | {"COLUMNS": "500", "NO_COLOR": "1", "PYTHONIOENCODING": encoding, "TERM": "dumb"},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gatekeeper.toml"


def test_a_right_file_passes_and_its_rules_are_told(file: Path) -> None:
    file.write_text(RIGHT, encoding="utf-8")
    done = run("check", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        'default: all requests: "default";q=300;w=60',
        'login: POST /login: "login-60s";q=5;w=60, "login-3600s";q=20;w=3600',
    ]


def test_a_file_without_limits_passes_and_says_so(file: Path) -> None:
    file.write_text("", encoding="utf-8")
    done = run("check", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no limits: every request passes\n"


GATEWAY = """\
[identity]
user = "header:X-User"

[pools.api]
upstreams = ["http://127.0.0.1:9001", { id = "b", url = "http://127.0.0.1:9002" }]

[pools.carts]
policy = "ring"
key = "user"
upstreams = "http+unix:///run/carts.sock"

[pools.own]
policy = "gatekeeper.upstreams.policies:Random"
upstreams = ["http://own"]

[[routes]]
match = "/api/*"
pool = "api"

[[routes]]
match = "GET shop.example.com/carts/{id}"
pool = "carts"

[[routes]]
match = "/own"
pool = "own"
"""


def test_pools_and_routes_are_told_without_the_urls_of_upstreams(file: Path) -> None:
    file.write_text(RIGHT + GATEWAY, encoding="utf-8")
    done = run("check", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2:] == [
        "pool api: least_connections over 2 upstreams",
        "pool carts: ring by user over 1 upstream",
        "pool own: Random over 1 upstream",
        "route /api/*: api",
        "route GET shop.example.com/carts/{id}: carts",
        "route /own: own",
    ]
    assert "127.0.0.1" not in done.stdout


def test_affinity_and_drains_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what clients keep to theirs, for how long, and how many upstreams get no new ones."""
    monkeypatch.setenv("GATEKEEPER_KEY", secrets.token_urlsafe(32))
    document = """
keys = ["env:GATEKEEPER_KEY"]
[pools.api]
upstreams = [{ url = "http://127.0.0.1:9001", drain = true }, "http://127.0.0.1:9002"]
affinity = { header = "X-Pin", cookie = "pin", strict = true, ttl = "90s" }
[pools.web]
upstreams = ["http://127.0.0.1:9003"]
affinity = {}
"""
    file.write_text(
        document + "".join(f'[[routes]]\nmatch = "/{name}"\npool = "{name}"\n' for name in ("api", "web"))
    )
    done = run("check", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith("pool")] == [
        "pool api: least_connections over 2 upstreams, 1 of which drains",
        "pool api: clients keep to theirs for 90 s, by cookie pin or field X-Pin, strictly",
        "pool web: least_connections over 1 upstream",
        "pool web: clients keep to theirs for 3600 s, by cookie gk_web",
    ]


def test_what_is_odd_but_right_is_a_warning_with_status_0(file: Path) -> None:
    file.write_text('[pools.api]\npolicy = "ring"\nkey = "user"\nupstreams = "http://a"\n', encoding="utf-8")
    done = run("check", file)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "no limits: every request passes",
        "pool api: ring by user over 1 upstream",
    ]
    assert done.stderr.splitlines() == [
        "warning: pools.api.key: no identity.user tells the user, so each client is its address",
        "warning: pools.api: no route leads to it",
    ]


def test_what_is_wrong_with_the_gateway_is_told_without_its_values(file: Path) -> None:
    file.write_text(
        '[pools.api]\nupstreams = ["https://u:hunter2@host"]\n[[routes]]\nmatch = "/*"\npool = "apl"\n',
        encoding="utf-8",
    )
    done = run("check", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f'{file}: pools.api.upstreams[0]: expected "http://host:port"; TLS to upstreams is not there yet',
        f'{file}: routes[0].pool: expected the name of a pool; did you mean "api"?',
        "2 errors",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["schema"], ["--version"], ["check"]])
def test_output_that_cannot_be_written_is_told_in_one_line_with_status_1(arguments: list[str], file: Path) -> None:
    file.write_text(RIGHT, encoding="utf-8")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run(*arguments, *([file] if arguments == ["check"] else []), output=full)
    assert done.returncode == 1
    assert done.stderr == "standard output: No space left on device\n"


def test_all_that_is_wrong_goes_to_standard_error_with_status_2(file: Path) -> None:
    file.write_text(
        '[stroe]\n[store]\nurl = "redis:/hunter2@host"\n[[limits]]\nname = "a"\nrate = "hunter2"\n',
        encoding="utf-8",
    )
    done = run("check", file)
    assert (done.returncode, done.stdout) == (2, "")
    *problems, count = done.stderr.splitlines()
    assert count == "3 errors"
    assert sorted(problem.removeprefix(f"{file}: ").partition(":")[0] for problem in problems) == [
        "limits[0].rate",
        "store.url",
        "stroe",
    ]
    assert all(problem.startswith(f"{file}: ") for problem in problems)
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[store]\nurl = "hunter2\n', "expected TOML: Illegal character '\\n' (at line 2, column 15)"),
        (b"# \xff\n", "expected UTF-8 (line 1)"),
        (b"\xef\xbb\xbf[store]\n", "expected UTF-8 without a byte order mark, and the file begins with one"),
        (b"#" * (GREATEST_FILE + 1), f"expected at most {GREATEST_FILE} bytes"),
        (b"a = " + b"[" * 100_000, "expected TOML that is not nested so deep"),
    ],
    ids=["TOML", "UTF-8", "mark", "size", "depth"],
)
def test_a_file_that_cannot_be_read_as_settings_is_told_in_one_line(
    file: Path, content: bytes, expected: str
) -> None:
    file.write_bytes(content)
    done = run("check", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{file}: {expected}\n1 error\n"


def test_a_missing_file_and_a_directory_are_told_with_status_2(file: Path, tmp_path: Path) -> None:
    for path, expected in ((file, "No such file or directory"), (tmp_path, "Is a directory")):
        done = run("check", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{path}: {expected}\n1 error\n"


def test_the_schema_is_printed_as_json() -> None:
    done = run("schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


def test_the_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gatekeeper {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["chekc"], ["check"], ["check", "a.toml", "b.toml"], ["schema", "x"], ["--verzion"]]
)
def test_a_wrong_command_is_told_on_standard_error_with_status_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: gatekeeper" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["schema", "--help"]])
def test_each_command_has_a_page_of_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: gatekeeper" in done.stdout


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("shared://dev/shm/x", "expected an absolute path"),
        ("redis://localhost:99999", "expected"),
        ("redis://localhost/abc", "expected"),
        ("memory://foo", "expected memory://"),
    ],
)
def test_check_finds_what_is_wrong_with_the_url_of_a_store_and_opens_nothing(
    file: Path, url: str, problem: str
) -> None:
    file.write_text(f'[store]\nurl = "{url}"\n', encoding="utf-8")
    done = run("check", file)
    assert done.returncode == 2
    assert "store.url: " in done.stderr
    assert problem in done.stderr
    assert url.partition("://")[2] not in done.stderr.replace(str(file), "")


BANNING = """\
[store]
url = "shared://{}"
size = "1MiB"
[[limits]]
name = "a"
rate = "1/minute"
penalty = {{ strikes = 1, ban = "10m" }}
"""


def test_bans_are_listed_and_lifted_on_the_command_line(file: Path, tmp_path: Path) -> None:
    file.write_text(BANNING.format(tmp_path / "store"), encoding="utf-8")
    keeper = Gatekeeper(file)
    limit = keeper.gate.rules[0].penalty
    assert limit is not None
    keeper.ask(Batch([(limit, "192.0.2.1", 1)]))
    listed = run("bans", file)
    assert (listed.returncode, listed.stderr) == (0, "")
    rule, seconds, key = listed.stdout.split()
    assert (rule, key) == ("a", "192.0.2.1")
    assert 500 < int(seconds) <= 600
    assert run("bans", file, "--lift", "b", "192.0.2.1").returncode == 2
    assert run("bans", file, "--lift", "a", "192.0.2.1").returncode == 0
    assert run("bans", file, "--lift", "a", "192.0.2.1").returncode == 1
    assert run("bans", file).stdout == ""
    keeper.close()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_banned_key_is_printed_harmlessly_and_lifted_by_what_was_printed(
    encoding: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(BANNING.format(tmp_path / "store"), encoding="utf-8")
    keys = ["=\x1b[2J\n\r\t", "=\\x41", "=\\", "=Bj\xf6rn \u202e \U0001f600", "=\ud800", "", "=" + "\0" * 90]
    with closing(Gatekeeper(file)) as keeper:
        penalty = keeper.gate.rules[0].penalty
        assert penalty is not None
        for key in keys:
            keeper.ask(Batch([(penalty, key, 1)]))
        listed = run("bans", file, encoding=encoding)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert listed.stdout.replace("\n", "").isprintable()
        lines = listed.stdout.splitlines()
        assert len(lines) == len(keys)
        for line in lines:
            rule, _, key = line.split(" ", 2)
            assert run("bans", file, "--lift", rule, key).returncode == 0
        assert keeper.bans() == []


def test_bans_of_a_store_that_nobody_has_used_are_none_and_nothing_is_made(file: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "store", tmp_path):
        file.write_text(BANNING.format(folder), encoding="utf-8")
        listed = run("bans", file)
        assert (listed.returncode, listed.stdout) == (0, "")
        assert listed.stderr == "nothing is counted there yet: no process has used the store\n"
        assert run("bans", file, "--lift", "b", "x").returncode == 2
        assert run("bans", file, "--lift", "a", "x").returncode == 1
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("store", ["", 'store = { url = "memory://" }', "listen = { workers = 2 }"])
def test_bans_that_no_other_process_can_see_are_told_to_need_the_url_of_a_store(store: str, file: Path) -> None:
    file.write_text(store, encoding="utf-8")
    done = run("bans", file)
    assert done.returncode == 2
    assert "store.url: expected one that processes share, such as shared:///dev/shm/gatekeeper" in done.stderr
