"""examples/fastapi_shop.py under uvicorn, as a reader would run it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from examples.fastapi_shop import app
from gatekeeper_fastapi import check

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
ADA, BOB = ({"authorization": f"Bearer {name}-secret"} for name in ("ada", "bob"))


@pytest.fixture
def shop() -> Iterator[str]:
    """The address at which the shop serves."""
    call = [sys.executable, "-m", "uvicorn", "examples.fastapi_shop:app", "--port", "0", "--no-use-colors"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    lines: list[str] = []
    with subprocess.Popen(call, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as server:
        try:
            reader = Thread(target=lambda: lines.extend(server.stderr or ()), daemon=True)
            reader.start()
            deadline = time.monotonic() + PATIENCE
            while not (named := re.search(r"running on (http://127\.0\.0\.1:\d+)", "".join(lines))):
                assert server.poll() is None, lines
                assert time.monotonic() < deadline, lines
                time.sleep(0.02)
            yield named[1]
        finally:
            server.terminate()
            server.wait(PATIENCE)
            reader.join(PATIENCE)
    assert "Traceback" not in "".join(lines)


def test_the_routes_are_limited_each_as_it_says(shop: str) -> None:
    with httpx.Client(base_url=shop, timeout=PATIENCE) as client:
        first = client.get("/")
        assert first.json() == {"site": 299, "index": 59}
        assert first.headers["ratelimit-policy"] == '"site";q=300;w=60, "index";q=60;w=60'
        statuses = [client.get(f"/items/{number}").status_code for number in range(21)]
        assert statuses == [200] * 20 + [429]
        for user in (ADA, BOB):
            assert [client.get("/items/report", headers=user).status_code for _ in range(3)] == [200, 200, 429]
        refusal = client.get("/items/report", headers={**ADA, "origin": "https://shop.example"})
        assert refusal.json()["violated-policies"] == ["report"]
        assert refusal.headers["access-control-allow-origin"] == "https://shop.example"
        assert 1 <= int(refusal.headers["retry-after"]) <= 61
        assert client.get("/items/report").status_code == 401


def test_wrong_passwords_are_counted_by_the_name_and_forgiven(shop: str) -> None:
    with httpx.Client(base_url=shop, timeout=PATIENCE) as client:

        def log_in(name: str, password: str) -> int:
            return client.post("/login", json={"name": name, "password": password}).status_code

        assert [log_in("ada", "wrong") for _ in range(4)] == [401] * 4
        assert log_in("ada", "correct") == 200
        assert [log_in("ada", "wrong") for _ in range(6)] == [401] * 5 + [429]
        assert [log_in(" ADA", "wrong"), log_in("bob", "horse")] == [429, 200]


def test_an_answer_costs_what_it_has_really_cost(shop: str) -> None:
    def left(response: httpx.Response) -> int:
        return int(response.headers["ratelimit"].partition("r=")[2].partition(";")[0])

    with httpx.Client(base_url=shop, timeout=PATIENCE) as client:
        question = {"text": "what is the meaning of it"}  # 8 words with "ada asks:"
        remaining = []
        for _ in range(3):
            remaining.append(left(client.post("/ask", headers=ADA, json=question)))
            client.get("/docs")  # meanwhile it is settled: the client has its answer before the request has ended
        assert remaining == [900, 820, 740]
        assert left(client.post("/ask", headers=BOB, json=question)) == 900
        long = {"text": "word " * 78}
        assert left(client.post("/ask", headers=ADA, json=long)) == 660
        assert client.post("/ask", headers=ADA, json=question).status_code == 429


def test_the_chat_is_limited_in_connections_and_messages(shop: str) -> None:
    url = shop.replace("http", "ws") + "/chat"

    async def said(socket: ClientConnection, text: str) -> Any:
        await socket.send(text)
        return await asyncio.wait_for(socket.recv(), PATIENCE)

    async def said_often(socket: ClientConnection, times: int) -> None:
        for _ in range(times):
            await said(socket, "c")

    async def trial() -> None:
        async with connect(url) as one:
            async with connect(url) as two:
                assert [await said(one, "a"), await said(two, "b")] == ["A", "B"]
                with pytest.raises(InvalidStatus) as refused:
                    await connect(url)
                assert refused.value.response.status_code == 429
                assert json.loads(refused.value.response.body or b"")["violated-policies"] == ["chats"]
            with pytest.raises(ConnectionClosed) as closed:  # 30 messages a minute
                await said_often(one, 31)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013

    asyncio.run(trial())


def test_nothing_in_the_shop_is_uncovered() -> None:
    report = check(app)
    assert report.uncovered == ()
    assert report.warnings == ()
    assert app.openapi()["paths"]["/items/{number}"]["get"]["responses"]["429"]["headers"]
