"""`gatekeeper serve` as a command: what it says, where it listens, how it begins and how it ends."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest

from tests.gateway import PATIENCE, Upstream, silent, toml

START: Final = "from gatekeeper.cli import main; main()"
GET: Final = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"


class Command:
    """A started `gatekeeper serve`."""

    def __init__(self, *arguments: str | Path, directory: Path, start: str = START) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "serve", *arguments],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"COLUMNS": "500", "NO_COLOR": "1", "TERM": "dumb"},
        )
        self.told = b""

    def line(self) -> str:
        """The next line on standard error; empty if it ends before one."""
        assert self.process.stderr is not None
        descriptor = self.process.stderr.fileno()
        while b"\n" not in self.told:
            assert select.select([descriptor], [], [], 2 * PATIENCE)[0], "it says nothing"
            data = os.read(descriptor, 65536)
            if not data:
                break
            self.told += data
        line, _, self.told = self.told.partition(b"\n")
        return line.decode()

    @property
    def worker(self) -> int:
        """The process id of its worker, once it has one."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return int(until(lambda: children.read_text().split())[0])

    def end(self, number: int | None = None) -> tuple[int, str]:
        """The exit status and the rest of standard error, once nobody holds it any more. First a signal."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=2 * PATIENCE)
        return self.process.returncode, (self.told + errors).decode()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stderr is not None and not self.process.stderr.closed:
            self.process.communicate(timeout=2 * PATIENCE)


def until(true: Callable[[], Any]) -> Any:
    """What this gives once it is true. Of other processes nobody tells, so it is asked again and again."""
    deadline = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


def asked(address: tuple[str, int] | str) -> tuple[int, bytes]:
    """The answer to a GET at an address: host and port, or the path of a Unix socket."""
    family = (
        socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    )
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        sock.sendall(GET)
        with HTTPResponse(sock) as response:
            response.begin()
            return response.status, response.read()


@pytest.fixture
def up() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()
    assert not upstream.errors


@pytest.fixture
def directory() -> Iterator[Path]:
    """One with a short path: that of a Unix socket has at most some hundred bytes."""
    with TemporaryDirectory(prefix="gk") as name:
        yield Path(name)


@pytest.fixture
def begin(directory: Path) -> Iterator[Callable[..., Command]]:
    """Starts the command with settings; what still runs at the end is killed."""
    begun: list[Command] = []

    def begin(settings: Mapping[str, Any], *arguments: str | Path, start: str = START) -> Command:
        file = directory / f"gatekeeper-{len(begun)}.toml"
        file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in settings.items()), encoding="utf-8")
        begun.append(Command(file, *arguments, directory=directory, start=start))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()


def towards(url: str, address: str = "127.0.0.1:0", **more: Any) -> dict[str, Any]:
    """Settings: all requests to this upstream."""
    return {
        "listen": {"address": address, **more},
        "pools": {"one": {"upstreams": [url]}},
        "routes": [{"match": "/*", "pool": "one"}],
    }


NOBODY: Final = "http://127.0.0.1:9"
"""An upstream that is not asked."""


def port_of(line: str, host: str = "127.0.0.1") -> int:
    found = re.fullmatch(rf"listening on http://{re.escape(host)}:([0-9]+)", line)
    assert found, line
    return int(found[1])


# --------------------------------------------------------------------------------------------- what begins nothing


def test_wrong_settings_are_all_told_and_nothing_is_started(begin: Callable[..., Command], directory: Path) -> None:
    settings = towards("https://inner.example:secret", f"unix:{directory}/s", drain_timeout="soon")
    settings["routes"] += [{"match": "/a", "pool": "on"}]
    status, errors = begin(settings).end()
    *lines, count = errors.splitlines()
    assert (status, count) == (2, "3 errors")
    told = [line.removeprefix(f"{directory}/gatekeeper-0.toml: ").partition(":")[0] for line in lines]
    assert told == ["listen.drain_timeout", "pools.one.upstreams[0]", "routes[1].pool"]
    assert "secret" not in errors
    assert not (directory / "s").exists()


def test_a_gateway_without_a_route_is_a_wrong_setting(begin: Callable[..., Command], directory: Path) -> None:
    settings = towards(NOBODY, f"unix:{directory}/s") | {"routes": []}
    status, errors = begin(settings).end()
    assert status == 2
    assert errors == f"{directory}/gatekeeper-0.toml: routes: expected at least one route to a pool\n1 error\n"
    assert not (directory / "s").exists()


def test_a_file_that_is_not_there_is_a_wrong_setting(directory: Path) -> None:
    status, errors = Command("none.toml", directory=directory).end()
    assert (status, errors) == (2, "none.toml: No such file or directory\n1 error\n")


def test_a_wrong_address_on_the_command_line_is_told_as_such(begin: Callable[..., Command]) -> None:
    status, errors = begin(towards(NOBODY), "--listen", "127.0.0.1:99999").end()
    assert status == 2
    assert errors.startswith('--listen: expected "host:port"')
    assert errors.endswith("\n1 error\n")


def test_an_address_in_use_is_told_in_one_line(begin: Callable[..., Command]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert begin(towards(NOBODY, address)).end() == (1, f"{address}: Address already in use\n")


def test_an_address_that_is_not_this_machines_is_told_in_one_line(begin: Callable[..., Command]) -> None:
    assert begin(towards(NOBODY, "192.0.2.1:0")).end() == (1, "192.0.2.1:0: Cannot assign requested address\n")
    status, errors = begin(towards(NOBODY, "no-such-host.invalid:80")).end()
    assert status == 1
    assert re.fullmatch(r"no-such-host\.invalid:80: .+\n", errors)


POLICIES: Final = """
class Raises:
    def __init__(self, upstreams):
        raise RuntimeError("s3cret")

class Takes:
    pass

def nothing(upstreams):
    return None

class Last:
    needs_key = False

    def __init__(self, upstreams):
        self.upstreams = upstreams

    def order(self, key, turn, draw):
        return reversed(self.upstreams)
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("Raises", "RuntimeError"), ("Takes", "TypeError"), ("nothing", "AttributeError")]
)
def test_a_policy_that_cannot_be_made_is_a_wrong_setting_and_no_traceback(
    begin: Callable[..., Command], directory: Path, name: str, kind: str
) -> None:
    (directory / "mine.py").write_text(POLICIES, encoding="utf-8")
    settings = towards(NOBODY)
    settings["pools"]["one"]["policy"] = f"mine:{name}"
    status, errors = begin(settings).end()
    line, count = errors.splitlines()
    assert (status, count) == (2, "1 error")
    assert line == f"pools.one.policy: expected a policy; making it of the upstreams raised {kind}"


@pytest.mark.parametrize("module", ["uvloop", "typer"])
def test_what_is_not_installed_is_told_with_the_extra_that_brings_it(
    begin: Callable[..., Command], module: str
) -> None:
    status, errors = begin(towards(NOBODY), start=f"import sys; sys.modules[{module!r}] = None; {START}").end()
    assert status == 2
    extra = {"uvloop": "gateway", "typer": "cli"}[module]
    install = rf"pip install 'gatekeeper-http\[{extra}\]' \(in a checkout: pip install -e '\.\[{extra}\]'\)"
    assert re.fullmatch(rf"The [a-z ]+ needs more packages: {install}\n", errors)


# ------------------------------------------------------------------------------------------------ where it listens


def test_a_free_port_is_told_and_served(begin: Callable[..., Command], up: Upstream) -> None:
    command = begin(towards(up.url))
    port = port_of(command.line())
    assert port != 0
    assert asked(("127.0.0.1", port)) == (200, b"ok")
    assert command.end(signal.SIGTERM) == (0, "")


def test_the_command_line_overrides_the_address_of_the_settings(
    begin: Callable[..., Command], up: Upstream, directory: Path
) -> None:
    command = begin(towards(up.url, f"unix:{directory}/s"), "--listen", "127.0.0.1:0")
    assert asked(("127.0.0.1", port_of(command.line()))) == (200, b"ok")
    assert not (directory / "s").exists()
    assert command.end(signal.SIGTERM) == (0, "")


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_told_in_brackets_and_served(begin: Callable[..., Command], up: Upstream) -> None:
    command = begin(towards(up.url, "[::1]:0"))
    assert asked(("::1", port_of(command.line(), "[::1]"))) == (200, b"ok")
    assert up.one().all("x-forwarded-for") == [b"::1"]
    assert command.end(signal.SIGTERM) == (0, "")


def test_a_port_that_was_in_use_a_moment_ago_is_taken(begin: Callable[..., Command], up: Upstream) -> None:
    """Its last connections stay behind for a minute (TIME_WAIT), and that hinders nobody."""
    command = begin(towards(up.url))
    port = port_of(command.line())
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(GET)
        assert client.recv(12) == b"HTTP/1.1 200"
        assert command.end(signal.SIGTERM) == (0, "")
    command = begin(towards(up.url, f"127.0.0.1:{port}"))
    assert port_of(command.line()) == port
    assert asked(("127.0.0.1", port)) == (200, b"ok")


def test_a_unix_socket_is_served_and_removed_at_the_end(
    begin: Callable[..., Command], up: Upstream, directory: Path
) -> None:
    path = f"{directory}/s"
    command = begin(towards(up.url, f"unix:{path}"))
    assert command.line() == f"listening on http+unix://{path}"
    assert asked(path) == (200, b"ok")
    assert up.one().all("x-forwarded-for") == []
    assert command.end(signal.SIGTERM) == (0, "")
    assert not os.path.lexists(path)


def test_a_unix_socket_that_is_left_over_is_replaced(
    begin: Callable[..., Command], up: Upstream, directory: Path
) -> None:
    path = f"{directory}/s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    command = begin(towards(up.url, f"unix:{path}"))
    assert command.line() == f"listening on http+unix://{path}"
    assert asked(path) == (200, b"ok")
    command.process.kill()
    command.end()
    assert os.path.lexists(path), "killed, it cannot tidy up"
    command = begin(towards(up.url, f"unix:{path}"))
    assert command.line() == f"listening on http+unix://{path}"
    assert asked(path) == (200, b"ok")


def test_a_unix_socket_on_which_another_listens_stays_his(
    begin: Callable[..., Command], up: Upstream, directory: Path
) -> None:
    path = f"{directory}/s"
    first = begin(towards(up.url, f"unix:{path}"))
    first.line()
    assert begin(towards(up.url, f"unix:{path}")).end() == (1, f"unix:{path}: Address already in use\n")
    assert asked(path) == (200, b"ok")
    assert first.end(signal.SIGTERM) == (0, "")


def test_another_file_in_the_place_of_a_unix_socket_is_not_touched(
    begin: Callable[..., Command], directory: Path
) -> None:
    path = directory / "s"
    path.write_text("precious", encoding="utf-8")
    assert begin(towards(NOBODY, f"unix:{path}")).end() == (1, f"unix:{path}: Address already in use\n")
    assert path.read_text(encoding="utf-8") == "precious"
    nowhere = f"unix:{directory}/none/s"
    assert begin(towards(NOBODY, nowhere)).end() == (1, f"{nowhere}: No such file or directory\n")


def test_what_settings_import_is_found_in_the_working_directory_by_the_worker_too(
    begin: Callable[..., Command], up: Upstream, directory: Path
) -> None:
    (directory / "mine.py").write_text(POLICIES, encoding="utf-8")
    settings = towards(up.url)
    settings["pools"]["one"] = {"policy": "mine:Last", "upstreams": [NOBODY, up.url]}
    command = begin(settings)
    assert asked(("127.0.0.1", port_of(command.line()))) == (200, b"ok")
    assert command.end(signal.SIGTERM) == (0, "")


# ------------------------------------------------------------------------------------------------------ how it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(begin: Callable[..., Command], up: Upstream, number: int) -> None:
    command = begin(towards(up.url))
    port = port_of(command.line())
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as kept:
        kept.sendall(GET)
        with HTTPResponse(kept) as response:
            response.begin()
            assert response.read() == b"ok"
        assert command.end(number) == (0, "")
        assert kept.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        asked(("127.0.0.1", port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_anybody_listens_ends_it_too(begin: Callable[..., Command], number: int) -> None:
    command = begin(towards(NOBODY))
    assert command.worker
    status, errors = command.end(number)
    assert status == 0
    assert re.fullmatch(r"(listening on .*\n)?", errors)


def test_a_second_signal_ends_it_at_once(begin: Callable[..., Command], up: Upstream) -> None:
    command = begin(towards(up.url, drain_timeout="1h"))
    address = ("127.0.0.1", port_of(command.line()))
    with (
        socket.create_connection(address, PATIENCE) as kept,
        socket.create_connection(address, PATIENCE) as waiting,
    ):
        kept.sendall(GET)
        with HTTPResponse(kept) as response:
            response.begin()
            assert response.read() == b"ok"
        up.script = silent
        waiting.sendall(GET)
        up.until(lambda: len(up.requests) == 2)
        worker = command.worker
        command.process.send_signal(signal.SIGTERM)
        assert kept.recv(1) == b"", "it drains"
        assert command.process.poll() is None, "it waits for the request"
        assert command.end(signal.SIGINT) == (1, "")
        assert is_gone(worker)


def is_gone(pid: int) -> bool:
    """Whether a process has ended. (One that nobody has waited for yet has, too.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_worker_that_is_killed_takes_its_parent_along_which_says_so(begin: Callable[..., Command]) -> None:
    command = begin(towards(NOBODY))
    command.line()
    os.kill(command.worker, signal.SIGKILL)
    assert command.end() == (1, "the worker ended by itself, with status -9\n")


def test_a_parent_that_is_killed_takes_its_worker_along(begin: Callable[..., Command], up: Upstream) -> None:
    command = begin(towards(up.url))
    port = port_of(command.line())
    worker = command.worker
    assert asked(("127.0.0.1", port)) == (200, b"ok")
    assert command.end(signal.SIGKILL) == (-signal.SIGKILL, "")
    until(lambda: is_gone(worker))
    with pytest.raises(ConnectionRefusedError):
        asked(("127.0.0.1", port))
