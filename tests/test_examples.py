"""The examples run as a reader would run them: as processes, on free ports."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
            start_new_session=True,
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

    def wait_for(self, text: str) -> None:
        """Until it has printed this."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            assert time.monotonic() < deadline, f"it does not print {text!r} but: {self.output}"
            time.sleep(0.02)

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to the whole process group. The exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def end(self) -> int:
        """Wait for its end. The exit status."""
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


GATEWAY = "examples/gateway/run.py"
SETTINGS = ROOT / "examples/gateway/gatekeeper.toml"
SERVICES = ("a", "b", "c")


class Stage(Example):
    """examples/gateway, with services on free ports."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gatekeeper.toml"
        self.ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
        text = on_ports(SETTINGS.read_text(encoding="utf-8"), self.ports)
        # A trial soon after: nobody is to wait five seconds for it.
        text, changed = re.subn('eject_for = "5s"', 'eject_for = "200ms"', text)
        assert changed == 2
        self.file.write_text(text, encoding="utf-8")
        super().__init__(GATEWAY, str(self.file), "--port", "0")
        self.wait_for("A trial request lets it back in")

    @property
    def pids(self) -> dict[str, int]:
        told = self.output.partition("\n\n")[0]
        return {name: int(pid) for name, pid in re.findall(r"(\w+) \(pid (\d+)\)", told)}

    def lines(self) -> list[str]:
        """The commands that it gives to try."""
        return re.findall(r"^  (.+)$", self.output, re.MULTILINE)

    def service(self, method: str, path: str, **fields: str) -> tuple[int, str]:
        """The status, and which service answered."""
        answer = self.ask(method, path, fields={name.replace("_", "-"): value for name, value in fields.items()})
        return answer.status, json.loads(answer.body)["service"]

    def wait_for_slow(self, count: int) -> None:
        """Until so many slow requests are with the services, which are asked directly."""
        deadline = time.monotonic() + PATIENCE
        while sum(self._waiting(port) for port in self.ports.values()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _waiting(self, port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, PATIENCE)
        try:
            connection.request("GET", "/health", headers={"connection": "close"})
            waiting: int = json.loads(connection.getresponse().read())["waiting"]
            return waiting
        finally:
            connection.close()

    def at_once(self, count: int, path: str) -> list[socket.socket]:
        """So many requests, each on a connection of its own, none of which waits for another's answer."""
        clients = [socket.create_connection(("127.0.0.1", self.port), PATIENCE) for _ in range(count)]
        for client in clients:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: example\r\n\r\n".encode())
        return clients


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]


def on_ports(text: str, ports: dict[str, int]) -> str:
    """Settings whose upstreams on 9001, 9002, 9003 are at these ports."""
    for fixed, port in zip(("9001", "9002", "9003"), ports.values(), strict=True):
        assert f"127.0.0.1:{fixed}" in text
        text = text.replace(f"127.0.0.1:{fixed}", f"127.0.0.1:{port}")
    return text


def received(clients: list[socket.socket]) -> list[tuple[int, str]]:
    """The statuses and the services of their answers."""
    answers = []
    for client in clients:
        with client:
            response = http.client.HTTPResponse(client)
            response.begin()
            answers.append((response.status, json.loads(response.read())["service"]))
    return answers


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        if stage.process.poll() is None:
            stage.process.terminate()  # a kill would leave the services
            stage.end()
        stage.kill()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as stage:
        yield stage


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """For what leaves no trace in other tests: no login, nothing that ends."""
    with staged(tmp_path_factory.mktemp("gateway")) as stage:
        yield stage


def test_the_gateway_spreads_requests_by_least_connections(shared_stage: Stage) -> None:
    answers = received(shared_stage.at_once(6, "/slow?seconds=2"))
    assert Counter(answers) == {(200, name): 2 for name in SERVICES}


def test_the_gateway_tells_services_of_the_client(shared_stage: Stage) -> None:
    told = json.loads(shared_stage.ask("GET", "/", fields={"x-user": "ada", "x-forwarded-for": "192.0.2.7"}).body)
    host = f"127.0.0.1:{shared_stage.port}"
    assert told.pop("service") in SERVICES
    assert re.fullmatch(r"1\.1 gatekeeper-[0-9a-f]{8}", told.pop("via"))
    assert told == {
        "client": "192.0.2.7",
        "user": "ada",
        "host": host,
        "x-forwarded-for": "192.0.2.7, 127.0.0.1",
        "x-forwarded-proto": "http",
        "x-forwarded-host": host,
    }


@pytest.mark.skipif(not LOOPBACK_IS_WIDE, reason="needs a second loopback address")
def test_from_elsewhere_nobody_names_a_user_or_an_address(shared_stage: Stage) -> None:
    fields = {"x-user": "ada", "x-forwarded-for": "192.0.2.7"}
    told = json.loads(shared_stage.ask("GET", "/", fields=fields, source="127.0.0.3").body)
    assert (told["user"], told["client"], told["x-forwarded-for"]) == (None, "127.0.0.3", "127.0.0.3")


def test_the_carts_of_a_user_are_always_on_the_same_service(shared_stage: Stage) -> None:
    owners = {}
    for user in (f"user{number}" for number in range(12)):
        answers = [shared_stage.ask("POST", "/cart/apple", fields={"x-user": user}) for _ in range(3)]
        assert [answer.status for answer in answers] == [200] * 3
        told = [json.loads(answer.body) for answer in answers]
        assert [one["cart"] for one in told] == [{"apple": 1}, {"apple": 2}, {"apple": 3}]
        (owners[user],) = {one["service"] for one in told}
    # Where a user falls is fixed for ever, for these ids.
    assert set(owners.values()) == set(SERVICES)
    assert shared_stage.service("GET", "/cart", x_user="user0") == (200, owners["user0"])


def test_the_sixth_login_is_refused_by_the_gateway(stage: Stage) -> None:
    assert [log_in(stage).status for _ in range(5)] == [401] * 5
    sixth = log_in(stage)
    assert sixth.status == 429
    assert sixth.fields["content-type"] == "application/problem+json"
    assert re.fullmatch(r'"login";r=0;t=\d+', sixth.fields["ratelimit"])
    assert sixth.fields["ratelimit-policy"] == '"default";q=600;w=60, "login";q=5;w=60'
    assert 1 <= int(sixth.fields["retry-after"]) <= 61
    assert json.loads(sixth.body)["violated-policies"] == ["login"]


def test_no_request_fails_when_a_service_is_killed_before_it_answers(stage: Stage) -> None:
    killed = stage.pids["b"]
    clients = stage.at_once(6, "/slow?seconds=2")
    stage.wait_for_slow(6)
    os.kill(killed, signal.SIGKILL)
    answers = received(clients)
    assert {status for status, _ in answers} == {200}
    assert {name for _, name in answers} == {"a", "c"}
    assert {stage.service("GET", "/") for _ in range(30)} <= {(200, "a"), (200, "c")}
    stage.wait_for(f"the service b (pid {killed}) has ended, with status -9\n")


def test_a_service_that_was_killed_is_let_in_again(stage: Stage) -> None:
    os.kill(stage.pids["b"], signal.SIGKILL)
    clients = (f"192.0.2.{number % 250}" for number in itertools.count())  # each has a quota of its own
    while "upstream b is ejected" not in stage.output:
        assert stage.service("GET", "/", X_Forwarded_For=next(clients))[0] == 200
    again = stage.lines()[-1].split()
    assert again[-2:] == ["b", str(stage.ports["b"])]
    with subprocess.Popen([sys.executable, *again[1:]], cwd=ROOT) as service:
        try:
            deadline = time.monotonic() + PATIENCE
            while (answer := stage.service("GET", "/", X_Forwarded_For=next(clients))) != (200, "b"):
                assert answer[0] == 200
                assert time.monotonic() < deadline
        finally:
            service.terminate()
            service.wait(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_drains_and_stops_all(stage: Stage, number: signal.Signals) -> None:
    (idle,) = stage.at_once(1, "/health")
    clients = stage.at_once(6, "/slow?seconds=2")
    with idle, ThreadPoolExecutor() as pool:
        idle.recv(1)
        receiving = pool.submit(received, clients)
        stage.wait_for_slow(6)
        if number == signal.SIGINT:
            assert stage.interrupt() == 0
        else:
            stage.process.terminate()
            assert stage.end() == 0
        assert [status for status, _ in receiving.result(PATIENCE)] == [200] * 6
    for port in (stage.port, *stage.ports.values()):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    for pid in stage.pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "Traceback" not in stage.output
    assert stage.output.endswith(f"{stage.lines()[-1]}\n\n")  # nothing after the greeting


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_that_it_gives_to_try_do_what_it_says(stage: Stage) -> None:
    def run(line: str) -> str:
        call = ["sh", "-c", line]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout

    who, slow, carts, logins, kill, _ = stage.lines()
    assert len(run(who).splitlines()) == 6
    told = [json.loads(line) for line in run(slow).splitlines()]
    assert Counter(one["service"] for one in told) == dict.fromkeys(SERVICES, 2)
    told = [json.loads(line) for line in run(carts).splitlines()]
    assert [one["cart"] for one in told] == [{"apple": 1}, {"apple": 2}] * 4
    assert len({(one["user"], one["service"]) for one in told}) == 4
    shown = run(logins)
    assert shown.count("Wrong password.") == 5
    assert "HTTP/1.1 429 Too Many Requests" in shown
    assert '"violated-policies": ["login"]' in shown
    told = [json.loads(line) for line in run(kill).splitlines()]
    assert len(told) == 6
    assert all(one["waited"] == 2 and one["service"] != "b" for one in told)


@pytest.mark.parametrize("whose", ["gateway", "service"])
def test_a_port_in_use_ends_the_gateway_example_with_one_line(tmp_path: Path, whose: str) -> None:
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = other.getsockname()[1]
        if whose == "service":
            ports["b"] = used
        file = tmp_path / "gatekeeper.toml"
        file.write_text(on_ports(SETTINGS.read_text(encoding="utf-8"), ports), encoding="utf-8")
        call = [sys.executable, GATEWAY, str(file), "--port", str(used if whose == "gateway" else 0)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    hint = re.escape(" (--port, or make run PORT=…, takes another)") if whose == "gateway" else ""
    assert re.fullmatch(rf"cannot listen on 127\.0\.0\.1 port {used}: [\w ]+{hint}\n", done.stderr)


@contextmanager
def served(stage: Stage, folder: Path, text: str) -> Iterator[Example]:
    """A gateway with settings of its own, before the services of the stage."""
    file = folder / "other.toml"
    file.write_text(text, encoding="utf-8")
    call = ("-c", "from gatekeeper.cli import main; main()", "serve", str(file), "--listen", "127.0.0.1:0")
    with started(*call) as gateway:
        yield gateway
        gateway.process.terminate()
        assert gateway.end() == 0


def test_the_gateway_settings_of_the_readme_serve(shared_stage: Stage, tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (text,) = (block for block in blocks if "[[routes]]" in block)
    with served(shared_stage, tmp_path, on_ports(text, shared_stage.ports)) as gateway:
        assert gateway.ask("GET", "/").status == 200
        assert [log_in(gateway).status for _ in range(6)] == [401] * 5 + [429]


def test_of_two_carts_the_one_in_the_session_outlives_the_server(tmp_path: Path) -> None:
    """In memory a cart needs affinity, and goes with its server; in the session it needs neither. All is told, and ended."""
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    file = tmp_path / "gatekeeper.toml"
    file.write_text(on_ports((ROOT / "examples/cart/gatekeeper.toml").read_text(encoding="utf-8"), ports), "utf-8")
    call = [sys.executable, "-W", "error", "examples/cart/run.py", str(file)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    scattered, memory, session, after, again = done.stdout.split("\n\n")

    def seen(text: str) -> list[tuple[str, str]]:
        return re.findall(r"^  \w+ +/\S+ +server (\w): (.+)$", text, re.MULTILINE)

    assert [cart for _, cart in seen(scattered)] == ["apple", "bread", "cheese", "nothing"]
    growing = ["apple", "apple, bread", "apple, bread, cheese", "apple, bread, cheese"]
    for text in (memory, session, again):
        assert [cart for _, cart in seen(text)] == growing
    ((own, _),) = set(seen(memory)[:1])
    assert {server for server, _ in seen(memory)} == {own}
    assert {server for server, _ in seen(session)} == set(SERVICES)
    (lost, nothing), (other, kept) = seen(after)
    assert lost != own != other
    assert (nothing, kept) == ("nothing", "apple, bread, cheese")
    assert f"Server {own} is killed" in after
    assert "The cart in memory is lost; that in the session is there." in after
    assert {server for server, _ in seen(again)} == {lost}
    for port in ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_cart_example_says_in_one_line_that_a_port_is_in_use(tmp_path: Path) -> None:
    """Nothing is left running, and the status tells it."""
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    file = tmp_path / "gatekeeper.toml"
    file.write_text(on_ports((ROOT / "examples/cart/gatekeeper.toml").read_text(encoding="utf-8"), ports), "utf-8")
    with socket.create_server(("127.0.0.1", ports["b"])):
        call = [sys.executable, "examples/cart/run.py", str(file)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"port {ports['b']} is in use\n"


RING_BY_USER = """
[identity]
trusted_proxies = "127.0.0.1"
user = "header:X-User"

[pools.carts]
policy = "ring"
key = "user"
upstreams = [
    { id = "a", url = "http://127.0.0.1:9001" },
    { id = "b", url = "http://127.0.0.1:9002" },
    { id = "c", url = "http://127.0.0.1:9003" },
]

[[routes]]
match = "/*"
pool = "carts"
"""


def test_a_ring_by_user_needs_no_rule_by_user(shared_stage: Stage, tmp_path: Path) -> None:
    with served(shared_stage, tmp_path, on_ports(RING_BY_USER, shared_stage.ports)) as gateway:
        answers = [gateway.ask("GET", "/", fields={"x-user": f"user{number}"}) for number in range(12)]
    assert {json.loads(answer.body)["service"] for answer in answers} == set(SERVICES)
