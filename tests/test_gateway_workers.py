"""Several workers of one gateway: they share the address and, unless told otherwise, their counters."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Client, Gateway, Upstream, answering, request, says, silent, toml
from tests.test_gateway_command import Command

pytest.importorskip("lmdb")

GET = request("GET /")


def settings(up: Upstream, **more: Any) -> dict[str, Any]:
    pools = {"one": {"upstreams": [up.url]}}
    return {"pools": pools, "routes": [{"match": "/*", "pool": "one"}], **more}


@pytest.fixture
def up() -> Any:
    upstream = Upstream()
    upstream.script = answering(says(b"ok"))
    yield upstream
    upstream.close()


def status(gateway: Gateway) -> int:
    with Client(gateway.port) as client:
        return client.ask(GET).status


def end(gateway: Gateway) -> None:
    """For one that was not asked to end."""
    if gateway.process.poll() is None:
        gateway.process.kill()
    gateway.wait()


def stores(gateway: Gateway) -> set[str]:
    """The folders of shared stores that the workers have open."""
    found = set()
    for pid in gateway.workers:
        found.update(
            re.findall(
                r"(/\S*gatekeeper-\S+)/gatekeeper\.mdb$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE
            )
        )
    return found


def test_workers_admit_exactly_the_limit_together_and_leave_nothing_behind(up: Upstream, tmp_path: Path) -> None:
    limits = [{"name": "day", "rate": "40/day"}]
    gateway = Gateway(settings(up, limits=limits, listen={"workers": 3}), tmp_path)
    try:
        assert len(gateway.workers) == 3
        statuses = Counter(status(gateway) for _ in range(120))
        assert statuses == {200: 40, 429: 80}
        (folder,) = stores(gateway)
        gateway.signal()
        assert gateway.wait() == 0
        assert not os.path.exists(folder)
    finally:
        end(gateway)


def test_a_lease_of_one_worker_counts_in_the_others(up: Upstream, tmp_path: Path) -> None:
    limits = [{"name": "busy", "concurrency": 4}]
    gateway = Gateway(settings(up, limits=limits, listen={"workers": 2}), tmp_path)
    try:
        up.script = silent
        clients = [Client(gateway.port) for _ in range(4)]
        for client in clients:
            client.send(GET)
        up.until(lambda: len(up.completed) == 4)
        assert [status(gateway) for _ in range(6)] == [429] * 6
        for client in clients:
            client.close()
        up.until(lambda: not up.open)
        up.script = answering(says(b"ok"))
        assert [status(gateway) for _ in range(6)] == [200] * 6
    finally:
        gateway.stop()


def test_counters_in_memory_are_each_worker_s_own_and_that_is_told(up: Upstream, tmp_path: Path) -> None:
    more: dict[str, Any] = {"store": {"url": "memory://"}, "listen": {"workers": 2}}
    gateway = Gateway(settings(up, limits=[{"name": "a", "rate": "9/day"}], **more), tmp_path)
    try:
        assert "warning: store.url: each of 2 workers counts" in "".join(gateway.errors)
        assert not stores(gateway)
    finally:
        gateway.stop()


def test_when_one_worker_dies_all_end_and_the_status_says_so(up: Upstream, tmp_path: Path) -> None:
    gateway = Gateway(settings(up, listen={"workers": 2}), tmp_path)
    try:
        os.kill(gateway.workers[1], signal.SIGKILL)
        assert gateway.wait() == 1
        assert "the worker ended by itself, with status -9" in "".join(gateway.errors)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", gateway.port)).close()
    finally:
        end(gateway)


def test_when_the_parent_is_killed_the_workers_end_and_remove_their_store(up: Upstream, tmp_path: Path) -> None:
    gateway = Gateway(settings(up, limits=[{"name": "a", "rate": "9/day"}], listen={"workers": 2}), tmp_path)
    try:
        assert status(gateway) == 200
        (folder,) = stores(gateway)
        workers = gateway.workers
        gateway.signal(signal.SIGKILL)
        gateway.wait()
        deadline = time.monotonic() + 60
        while os.path.exists(folder) or any(os.path.exists(f"/proc/{pid}") for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        end(gateway)


def test_an_address_that_another_gateway_has_is_refused_though_its_workers_share_it(
    up: Upstream, tmp_path: Path
) -> None:
    gateway = Gateway(settings(up, listen={"workers": 2}), tmp_path)
    try:
        with pytest.raises(AssertionError, match="Address already in use"):
            Gateway(settings(up, listen={"workers": 2, "address": f"127.0.0.1:{gateway.port}"}), tmp_path)
    finally:
        gateway.stop()


def test_a_unix_socket_is_shared_as_well(up: Upstream, tmp_path: Path) -> None:
    listen = {"workers": 2, "address": f"unix:{tmp_path}/s"}
    limits = [{"name": "a", "rate": "5/day"}]
    file = tmp_path / "own.toml"
    document = settings(up, limits=limits, listen=listen)
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in document.items()), encoding="utf-8")
    command = Command(file, directory=tmp_path)
    try:
        assert command.line().startswith("listening on http+unix://")
        statuses: Counter[bytes] = Counter()
        for _ in range(12):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(f"{tmp_path}/s")
                sock.sendall(GET)
                statuses[sock.recv(12)] += 1
        assert statuses == {b"HTTP/1.1 200": 5, b"HTTP/1.1 429": 7}
        assert command.end(signal.SIGTERM)[0] == 0
    finally:
        command.process.kill()
        command.process.wait()
