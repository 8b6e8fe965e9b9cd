"""The Flask example, run as a reader would run it: by gunicorn, on a free port."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
"""Seconds until a process that should have answered is given up."""

LOOPBACK_IS_WIDE = sys.platform == "linux"
"""Whether all of 127.0.0.0/8 is this machine."""


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.fields = response.headers
        self.body = response.read().decode()


class Shop:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self,
        path: str,
        method: str = "GET",
        form: dict[str, str] | None = None,
        source: str = "127.0.0.1",
        **fields: str,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE, source_address=(source, 0))
        if form is not None:
            fields["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            connection.request(method, path, None if form is None else urlencode(form), fields)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def log_in(self, name: str, password: str, source: str = "127.0.0.1") -> Answer:
        return self.ask("/login", "POST", {"name": name, "password": password}, source)


@pytest.fixture
def shop() -> Iterator[Shop]:
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environ.pop("PYTHONWARNINGS", None)
    call = ["-m", "gunicorn", "--threads", "8", "--bind", "127.0.0.1:0", "--chdir", "examples", "flask_shop:app"]
    with subprocess.Popen(
        [sys.executable, *call], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            yield Shop(port_of(process))
        finally:
            process.terminate()
            process.stderr.read()
            process.wait(PATIENCE)


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that gunicorn names, once a worker answers there."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        named = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", line)
        if named:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", int(named[1]))) == 0:
                        return int(named[1])
                time.sleep(0.02)
    raise AssertionError(f"gunicorn does not answer; it said: {said}")


def test_a_program_is_told_when_to_return_and_a_browser_gets_the_shops_own_page(shop: Shop) -> None:
    assert [shop.ask(f"/report/{year}").status for year in (2020, 2021)] == [200, 200]
    refused = shop.ask("/report/2022")
    assert (refused.status, refused.fields["Content-Type"]) == (429, "application/problem+json")
    assert json.loads(refused.body)["violated-policies"] == ["report"]
    assert 1 <= int(refused.fields["Retry-After"]) <= 61
    page = shop.ask("/report/2022", Accept="text/html,*/*;q=0.8")
    assert (page.status, page.fields["Content-Type"]) == (429, "text/html; charset=utf-8")
    assert "Come again in" in page.body
    assert page.fields["Retry-After"]
    assert page.fields["RateLimit"].startswith('"report";r=0')


@pytest.mark.skipif(not LOOPBACK_IS_WIDE, reason="needs a second loopback address")
def test_another_address_has_a_quota_of_its_own(shop: Shop) -> None:
    assert [shop.ask("/report/2020").status for _ in range(3)] == [200, 200, 429]
    assert shop.ask("/report/2020", source="127.0.0.2").status == 200


def test_only_failed_logins_count_and_one_that_succeeds_forgives_them(shop: Shop) -> None:
    assert [shop.log_in("ada", "correct").status for _ in range(7)] == [200] * 7
    assert [shop.log_in("ada", "wrong").status for _ in range(4)] == [401] * 4
    assert shop.log_in("ada", "correct").status == 200
    assert [shop.log_in("ada", "wrong").status for _ in range(6)] == [401] * 5 + [429]
    assert shop.log_in("bob", "wrong").status == 401


@pytest.mark.skipif(not LOOPBACK_IS_WIDE, reason="needs a second loopback address")
def test_a_user_has_one_quota_wherever_he_comes_from(shop: Shop) -> None:
    cookie = shop.log_in("ada", "correct").fields["Set-Cookie"].partition(";")[0]
    here = shop.ask("/api/items/1", Cookie=cookie)
    there = shop.ask("/api/items/2", source="127.0.0.2", Cookie=cookie)
    left = [re.search(r'"user";q=60', answer.fields["RateLimit-Policy"]) is not None for answer in (here, there)]
    assert left == [True, True]
    assert [json.loads(answer.body)["left"] for answer in (here, there)] == [
        29,
        29,
    ]  # of the blueprint's, by address


def test_the_blueprint_limits_each_route_nested_in_it(shop: Shop) -> None:
    policies = shop.ask("/api/items/").fields["RateLimit-Policy"]
    assert policies == '"api";q=30;w=60, "default";q=300;w=60, "user";q=60;w=60'
    put = shop.ask("/api/items/1", "PUT").fields["RateLimit"]
    assert put.startswith('"item";r=19;')


def test_a_stream_arrives_whole_and_lets_the_next_begin(shop: Shop) -> None:
    for _ in range(3):
        answer = shop.ask("/export?rows=5000")
        assert (answer.status, answer.body.count("\n")) == (200, 5000)


def test_health_is_under_no_limit(shop: Shop) -> None:
    assert "RateLimit" not in shop.ask("/health").fields
    assert shop.ask("/no/such").fields["RateLimit"].startswith('"default";r=299;')


def test_check_finds_every_route_of_the_example_covered() -> None:
    call = [sys.executable, "-m", "flask", "--app", "examples/flask_shop.py", "gatekeeper", "check", "--strict"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "GET /: default",
        "GET /api/items/: default, user, api",
        "GET|PUT /api/items/{number}: default, user, api, item",
        "GET /export: default, export",
        "GET /health: no limit (exempt)",
        "POST /login: default, login",
        "GET /report/{year}: default, report",
        "GET /static/{filename:path}: no limit (static)",
    ]
