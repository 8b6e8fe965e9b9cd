"""What an attack on the gateway found, and must not come back."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import pytest

from tests.gateway import Client, Deaf, answering, request, says, staged

GET = request("GET /")
OK = says(b"ok")


def test_the_time_for_a_head_does_not_run_on_while_an_upstream_is_connected_to(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    deaf = Deaf()

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"head_timeout": "300ms"},
            "pools": {
                "one": {"policy": "round_robin", "upstreams": [deaf.url, urls["up"]], "connect_timeout": "700ms"}
            },
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("deaf"), settings, others=[deaf]) as stage:
        stage.up.script = answering(OK)
        assert [stage.ask(GET).status for _ in range(2)] == [200, 200]
        stage.check()


def test_clients_that_begin_a_head_and_leave_leave_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {"pools": {"one": {"upstreams": [urls["up"]]}}, "routes": [{"match": "/*", "pool": "one"}]}

    with staged(tmp_path_factory.mktemp("begun"), settings) as stage:
        stage.up.script = answering(OK)
        assert stage.ask(GET).status == 200

        def begin(times: int) -> None:
            for _ in range(times):
                with socket.create_connection(("127.0.0.1", stage.gateway.port)) as client:
                    client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 30_000)
            assert stage.ask(GET).status == 200  # all of them were seen

        begin(200)
        before = stage.gateway.resident()
        begin(1500)  # 45 MB of heads
        assert stage.gateway.resident() - before < 15 * 2**20
        stage.check()


def test_a_lone_cr_before_a_head_does_not_buy_it_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"head_timeout": "300ms", "idle_timeout": "1h"},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("cr"), settings) as stage:
        stage.up.script = answering(OK)
        client: Client = stage.client()
        assert client.ask(GET).status == 200
        client.send(b"\r")
        client.send(b"\nGET / HTTP/1.1\r\n")
        assert client.answer().status == 408
        stage.check()
