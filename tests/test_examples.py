"""The examples run as a reader would run them: as processes, on free ports."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
"""Seconds until a process that should have answered is given up."""

LOOPBACK_IS_WIDE = sys.platform == "linux"
"""Whether all of 127.0.0.0/8 is this machine."""


class Example:
    """A process that serves, and what it has printed so far."""

    def __init__(self, *arguments: str) -> None:
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        environ.pop("PYTHONWARNINGS", None)
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = self._port()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def _port(self) -> int:
        """The port it names; its socket answers by then, or soon."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            named = re.search(r"http://127\.0\.0\.1:(\d+)", self.output)
            if named:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", int(named[1]))) == 0:
                        return int(named[1])
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"it does not answer; it printed: {self.output}")

    def ask(
        self,
        method: str,
        path: str,
        *,
        body: str | None = None,
        fields: dict[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE, source_address=(source, 0))
        try:
            connection.request(method, path, body, fields or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def interrupt(self) -> int:
        """Ctrl-C. The exit status."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.fields = response.headers
        self.body = response.read().decode()


@contextmanager
def started(*arguments: str) -> Iterator[Example]:
    example = Example(*arguments)
    try:
        yield example
    finally:
        example.kill()


@pytest.fixture
def limited_app() -> Iterator[Example]:
    with started("examples/limited_app.py", "--port", "0") as example:
        yield example


FORM = {"content-type": "application/x-www-form-urlencoded"}
JSON = {"content-type": "application/json"}


def log_in(example: Example, password: str = "wrong", source: str = "127.0.0.1") -> Answer:
    return example.ask("POST", "/login", body=f"password={password}", fields=FORM, source=source)


def test_the_sixth_login_is_refused_with_fields_and_a_problem_body(limited_app: Example) -> None:
    assert [log_in(limited_app).status for _ in range(5)] == [401] * 5
    sixth = log_in(limited_app)
    assert sixth.status == 429
    assert sixth.fields["content-type"] == "application/problem+json"
    assert sixth.fields["cache-control"] == "no-store"
    left = re.fullmatch(r'"login-60s";r=0;t=(\d+)', sixth.fields["ratelimit"])
    assert left is not None
    assert sixth.fields["ratelimit-policy"] == (
        '"default";q=60;w=60, "login-60s";q=5;w=60, "login-3600s";q=20;w=3600'
    )
    # Of the five none has left the minute yet, nor will it before `t`.
    assert int(left[1]) <= int(sixth.fields["retry-after"]) <= 61
    problem = json.loads(sixth.body)
    assert problem["status"] == 429
    assert problem["type"].endswith("#quota-exceeded")
    assert problem["violated-policies"] == ["login-60s"]


def test_a_refused_login_spends_nothing_of_the_other_rules(limited_app: Example) -> None:
    for _ in range(10):
        log_in(limited_app)
    (default,) = json.loads(limited_app.ask("GET", "/quota").body)["limits"]
    assert default["remaining"] == 60 - 5 - 1


@pytest.mark.skipif(not LOOPBACK_IS_WIDE, reason="needs a second loopback address")
def test_another_address_is_not_limited(limited_app: Example) -> None:
    assert [log_in(limited_app).status for _ in range(6)] == [401] * 5 + [429]
    other = log_in(limited_app, source="127.0.0.2")
    assert other.status == 401
    assert other.fields["ratelimit"].startswith('"login-60s";r=4;')
    assert json.loads(other.body)["address"] == "127.0.0.2"


def test_a_forwarding_header_of_the_clients_own_changes_nothing(limited_app: Example) -> None:
    fields = {**FORM, "x-forwarded-for": "192.0.2.9"}
    answers = [limited_app.ask("POST", "/login", body="password=x", fields=fields) for _ in range(6)]
    assert [answer.status for answer in answers] == [401] * 5 + [429]
    assert json.loads(answers[0].body)["address"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "fields", "status"),
    [
        ("password=correct", FORM, 200),
        ("password=correct", {}, 200),
        ('{"password": "correct"}', JSON, 200),
        ('{"password": "c\\u00f6rrect"}', JSON, 401),
        ('{"password": "\\ud800"}', JSON, 401),
        ('{"password": 7}', JSON, 401),
        ('["password"]', JSON, 401),
        ("[" * 4000, JSON, 401),
        ("no JSON", JSON, 401),
        ("", FORM, 401),
        ("password=%FF%FE", FORM, 401),
        ("password=correct" + "&x=y" * 2000, FORM, 401),
    ],
)
def test_only_the_password_logs_in(shared_app: Example, body: str, fields: dict[str, str], status: int) -> None:
    # Each of these is a client of its own, where the machine has addresses enough.
    source = f"127.0.1.{next(NUMBERS)}" if LOOPBACK_IS_WIDE else "127.0.0.1"
    answer = shared_app.ask("POST", "/login", body=body, fields=fields, source=source)
    if not LOOPBACK_IS_WIDE and answer.status == 429:
        pytest.skip("needs more loopback addresses")
    assert answer.status == status


NUMBERS = iter(range(1, 255))


@pytest.fixture(scope="module")
def shared_app() -> Iterator[Example]:
    with started("examples/limited_app.py", "--port=0") as example:
        yield example


def test_the_page_shows_what_is_left(limited_app: Example) -> None:
    first = limited_app.ask("GET", "/")
    assert first.status == 200
    assert first.fields["content-type"].startswith("text/html")
    assert first.fields["ratelimit"] == '"default";r=59;t=61'
    assert "<b>59</b> of 60 left" in first.body
    assert "127.0.0.1" in first.body
    assert "<b>58</b> of 60 left" in limited_app.ask("GET", "/").body
    # It is whole in itself.
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", first.body)


def test_the_quota_is_told_as_json(limited_app: Example) -> None:
    told = json.loads(limited_app.ask("GET", "/quota").body)
    assert told["address"] == "127.0.0.1"
    assert told["tightest"] == "default"
    assert told["limits"] == [{"name": "default", "limit": 60, "window": 60, "remaining": 59, "reset_after": 61}]


def test_it_prints_what_it_serves_and_what_to_try(limited_app: Example) -> None:
    base = f"http://127.0.0.1:{limited_app.port}"
    assert f"Serving {base}/" in limited_app.output
    assert limited_app.output.count(f"{base}/login") == 3
    assert f"--interface 127.0.0.2 -d password=wrong {base}/login" in limited_app.output


def test_interrupted_it_ends_in_good_order(limited_app: Example) -> None:
    # With a connection still open, as a browser's is.
    connection = http.client.HTTPConnection("127.0.0.1", limited_app.port, PATIENCE)
    try:
        connection.request("GET", "/quota")
        connection.getresponse().read()
        assert limited_app.interrupt() == 0
    finally:
        connection.close()
    assert "Traceback" not in limited_app.output
    assert "KeyboardInterrupt" not in limited_app.output
    assert limited_app.output.endswith("/quota\n\n")  # nothing after the greeting


def test_a_port_in_use_is_one_line_on_standard_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        call = [sys.executable, "examples/limited_app.py", "--port", str(port)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    line = rf"cannot listen on 127\.0\.0\.1 port {port}: .+ \(--port takes another\)\n"
    assert re.fullmatch(line, done.stderr)


def test_a_port_that_is_none_is_refused() -> None:
    call = [sys.executable, "examples/limited_app.py", "--port", "65536"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "expected a number from 0 to 65535" in done.stderr


def test_the_flask_example_limits_the_application_and_one_function() -> None:
    with started("-m", "flask", "--app", "examples/flask_app.py", "run", "--port", "0") as example:
        first = example.ask("GET", "/")
        assert (first.status, json.loads(first.body)) == (200, {"remaining": 59})
        assert first.fields["ratelimit-policy"] == '"default";q=60;w=60'
        assert [example.ask("GET", "/report").status for _ in range(2)] == [200, 200]
        third = example.ask("GET", "/report")
        assert third.status == 429
        assert third.fields["content-type"] == "application/problem+json"
        assert third.fields["ratelimit"].startswith('"report";r=0;t=')
        assert int(third.fields["retry-after"]) > 1
        assert json.loads(third.body)["violated-policies"] == ["report"]
        # The application ran for the refused call too, so it stays charged at the door.
        assert json.loads(example.ask("GET", "/").body) == {"remaining": 60 - 5}
        if LOOPBACK_IS_WIDE:
            assert example.ask("GET", "/report", source="127.0.0.2").status == 200


def test_the_example_without_a_framework_prints_what_it_does() -> None:
    call = [sys.executable, "-W", "error", "examples/limiter.py"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.sub(r"[\d.]+ s$", "… s", done.stdout, flags=re.MULTILINE) == (
        "hit 1 of 3/minute: allowed, 2 of 3 left\n"
        "hit 2 of 3/minute: allowed, 1 of 3 left\n"
        "hit 3 of 3/minute: allowed, 0 of 3 left\n"
        "hit 4 of 3/minute: refused, again in … s\n"
        "another key: allowed, 2 of 3 left\n"
        "two rates, cost 3: allowed, 2 of 5 left\n"
        "the same again, all or nothing: refused, again in … s\n"
        "a look spends nothing: allowed, 1 of 5 left\n"
        "after a reset: allowed, 2 of 3 left\n"
        "ten at once under asyncio: 3 allowed\n"
    )
