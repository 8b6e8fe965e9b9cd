"""One session for all: examples/one_session, as four processes. Django writes it, FastAPI and Flask read and write it,
and the gateway before them limits by its user, each request once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.redis_servers import free_port, running

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "one_session"
PATIENCE = 60.0
BIN = Path(sys.executable).parent


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["redis", "sqlite"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A client of the gateway, and the address of the Flask application behind it."""
    ports = {name: free_port() for name in ("django", "fastapi", "flask", "gateway")}
    policy = (EXAMPLE / "policy.toml").read_text()
    for name, shown in (("django", 9101), ("fastapi", 9102), ("flask", 9103)):
        policy = policy.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{ports[name]}")
    with ExitStack() as stack:
        if request.param == "redis":
            store = stack.enter_context(running()).url
        else:
            store = f"sqlite:///{tmp_path}/sessions.db"
            policy = policy.replace("[session]\n", "[session]\ncreate_table = true\n")
        (tmp_path / "policy.toml").write_text(policy)
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | {
            "GATEKEEPER_KEY": os.urandom(32).hex(),
            "SESSION_STORE": store,
            "POLICY": str(tmp_path / "policy.toml"),
            "USERS": str(tmp_path / "users.db"),
        }
        calls = {
            "django": ["gunicorn", "--threads", "4", "--bind", f"127.0.0.1:{ports['django']}", "django_part"],
            "fastapi": ["uvicorn", "--no-proxy-headers", "--port", str(ports["fastapi"]), "fastapi_part:app"],
            "flask": ["gunicorn", "--threads", "4", "--bind", f"127.0.0.1:{ports['flask']}", "flask_part:app"],
            "gateway": ["gatekeeper", "serve", "--listen", f"127.0.0.1:{ports['gateway']}", environ["POLICY"]],
        }
        processes = {}
        log = stack.enter_context((tmp_path / "log").open("wb"))
        for name, (command, *arguments) in calls.items():
            process = subprocess.Popen(
                [BIN / command, *arguments], cwd=EXAMPLE, env=environ, stdout=log, stderr=log
            )
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.terminate)
            processes[name] = process
        deadline = time.monotonic() + PATIENCE
        while not all(listens(port) for port in ports.values()):
            told = (tmp_path / "log").read_text(errors="replace")[-2000:]
            assert all(process.poll() is None for process in processes.values()), told
            assert time.monotonic() < deadline, told
            time.sleep(0.05)
        client = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{ports['gateway']}", timeout=PATIENCE)
        )
        yield client, f"http://127.0.0.1:{ports['flask']}"


def left(response: httpx.Response) -> int:
    """What is left of the user's quota."""
    (field,) = response.headers.get_list("ratelimit")
    return int(field.partition("r=")[2].partition(";")[0])


def test_what_one_writes_the_others_read_and_each_request_is_charged_once(site: tuple[httpx.Client, str]) -> None:
    client, flask = site
    assert client.get("/fastapi/me").json() == {"user": None, "cart": []}
    assert client.post("/django/login", data={"name": "ada", "password": "wrong"}).status_code == 401
    answer = client.post("/django/login", data={"name": "ada", "password": "correct horse"})
    assert answer.status_code == 204
    assert list(client.cookies) == ["session"]

    remaining = []

    def ask(method: str, path: str) -> Any:
        response = client.request(method, path)
        assert response.status_code == 200, response.text
        remaining.append(left(response))
        return response.json()

    assert ask("GET", "/fastapi/me") == {"user": "1", "cart": []}
    assert ask("POST", "/fastapi/cart/apple") == {"cart": ["apple"]}
    assert ask("POST", "/flask/cart/pear") == {"cart": ["apple", "pear"]}
    assert ask("GET", "/django/me") == {"name": "ada", "cart": ["apple", "pear"]}
    assert ask("GET", "/flask/me") == {"user": "1", "cart": ["apple", "pear"]}
    assert ask("GET", "/fastapi/me") == {"user": "1", "cart": ["apple", "pear"]}
    assert remaining == list(range(remaining[0], remaining[0] - 6, -1))

    # A forged word of who asks is taken away, and one that skips the gateway is not believed.
    forged = {"Gatekeeper-Identity": "eyJhbGciOiJub25lIn0.e30."}
    assert client.get("/flask/me", headers=forged).json() == {"user": "1", "cart": ["apple", "pear"]}
    with httpx.Client(base_url=flask, timeout=PATIENCE) as direct:
        assert direct.get("/flask/me", headers=forged).json() == {"user": None, "cart": []}

    kept = dict(client.cookies)
    assert client.post("/fastapi/logout").status_code == 200
    assert dict(client.cookies) == {}
    client.cookies.update(kept)
    assert client.get("/django/me").json() == {"name": "", "cart": []}
    assert client.get("/flask/me").json() == {"user": None, "cart": []}
