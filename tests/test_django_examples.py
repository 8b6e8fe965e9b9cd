"""The example project as a reader would run it: under gunicorn with two workers, and under uvicorn."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

SHOP = Path(__file__).resolve().parent.parent / "examples" / "django_shop"
PATIENCE = 30.0
"""Seconds until a process that should have answered is given up."""

A, B = "127.0.0.1", "127.0.0.2"
SEVERAL_ADDRESSES = pytest.mark.skipif(
    sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine on Linux"
)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.fields = response.headers
        self.body = response.read().decode()


class Shop:
    """The shop, served."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self, source: str = A) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE, source_address=(source, 0))

    def ask(
        self, method: str, path: str, *, source: str = A, form: dict[str, str] | None = None, cookie: str = ""
    ) -> Answer:
        fields = {"Cookie": cookie} if cookie else {}
        if form is not None:
            fields["Content-Type"] = "application/x-www-form-urlencoded"
        connection = self.connect(source)
        try:
            connection.request(method, path, None if form is None else urlencode(form), fields)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def statuses(self, path: str, times: int, source: str = A) -> list[int]:
        return [self.ask("GET", path, source=source).status for _ in range(times)]


def environ(folder: Path) -> dict[str, str]:
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "SHOP_DATABASE": str(folder / "db"), "PYTHONPATH": str(SHOP)}
    for name in ("PYTHONWARNINGS", "DJANGO_SETTINGS_MODULE", "WEB_CONCURRENCY"):
        found.pop(name, None)
    return found


def manage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "manage.py", *arguments]
    return subprocess.run(
        call, cwd=SHOP, env=environ(folder), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shop has its database, with two users."""
    folder = tmp_path_factory.mktemp("shop")
    script = "from django.contrib.auth.models import User\n" + "".join(
        f"User.objects.create_user('{name}', password='right')\n" for name in ("ada", "bob")
    )
    for arguments in (["migrate", "--verbosity=0"], ["shell", "-v0", "-c", script]):
        done = manage(folder, *arguments)
        assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def served(folder: Path, log: Path, *arguments: str, **more: str) -> Iterator[Shop]:
    """A server of the shop on a port of its own, which it is given as an open socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        shop = Shop(listener.getsockname()[1])
        call = [sys.executable, "-m", *(one.replace("FD", str(listener.fileno())) for one in arguments)]
        with log.open("w") as output:
            process = subprocess.Popen(
                call,
                cwd=SHOP,
                env={**environ(folder), **more},
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
            )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if shop.ask("GET", "/nothing", source="127.0.0.9").status == 404:
                    break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
        yield shop
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)


@pytest.fixture(params=["gunicorn", "uvicorn"])
def shop(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Shop]:
    if request.param == "gunicorn":
        pytest.importorskip("lmdb")
        store = f"shared://{tmp_path / 'counters'}"
        command = ["gunicorn", "--workers", "2", "--threads", "4", "--bind", "fd://FD", "shop.wsgi"]
        with served(folder, tmp_path / "log", *command, SHOP_STORE=store) as shop:
            yield shop
    else:
        command = ["uvicorn", "--no-proxy-headers", "--fd", "FD", "shop.asgi:application"]
        with served(folder, tmp_path / "log", *command) as shop:
            yield shop


@SEVERAL_ADDRESSES
def test_the_shop_limits_as_it_says(shop: Shop) -> None:
    index = shop.ask("GET", "/")
    assert (index.status, index.body) == (200, '{"you": "127.0.0.1", "left": 59}')
    assert index.fields["RateLimit"].startswith('"pages";r=59;t=')
    # The view's own limit: of each client, whatever the item, over all workers.
    assert [shop.ask("GET", f"/item/{pk}").status for pk in range(5)] == [200, 200, 200, 429, 429]
    assert shop.statuses("/report", 4) == [200, 200, 429, 429]
    assert shop.statuses("/report", 3, B) == [200, 200, 429]
    refused = shop.ask("GET", "/report")
    assert re.fullmatch(r"Not so fast: again in [0-9]+ seconds\.\n", refused.body)
    assert int(refused.fields["Retry-After"]) > 50
    assert refused.fields["RateLimit"].startswith('"report";r=0;t=')
    # Failed logins alone are charged.
    right, wrong = ({"username": "ada", "password": word} for word in ("right", "wrong"))
    tries = [shop.ask("POST", "/login", form=form) for form in (right, wrong, right, *[wrong] * 4, right)]
    assert [one.status for one in tries] == [200, 401, 200, 401, 401, 401, 401, 429]
    assert shop.ask("POST", "/login", form=right, source=B).status == 200
    # By the user, from wherever he comes.
    cookies = {}
    for name, source in (("ada", B), ("bob", B)):
        answer = shop.ask("POST", "/login", form={"username": name, "password": "right"}, source=source)
        cookies[name] = answer.fields["Set-Cookie"].partition(";")[0]
    asked = [shop.ask("GET", "/account/orders", source=(A, B)[n % 2], cookie=cookies["ada"]) for n in range(11)]
    assert [one.status for one in asked] == [200] * 10 + [429]
    assert asked[0].body == '{"user": "ada", "orders": []}'
    assert shop.ask("GET", "/account/orders", source=B, cookie=cookies["bob"]).status == 200


@SEVERAL_ADDRESSES
def test_an_export_is_in_progress_until_its_last_byte_or_until_its_client_leaves(
    folder: Path, tmp_path: Path
) -> None:
    command = ["uvicorn", "--no-proxy-headers", "--fd", "FD", "shop.asgi:application"]
    with served(folder, tmp_path / "log", *command) as shop:
        assert shop.ask("GET", "/export").body == "order 0\norder 1\norder 2\n"
        assert shop.ask("GET", "/export").status == 200
        connection = shop.connect()
        connection.request("GET", "/export?lines=100000&pause=0.01")
        response = connection.getresponse()
        assert response.readline() == b"order 0\n"
        assert shop.ask("GET", "/export").status == 429
        assert shop.ask("GET", "/export", source=B).status == 200
        response.close()
        connection.close()
        deadline = time.monotonic() + PATIENCE
        while shop.ask("GET", "/export").status != 200:
            assert time.monotonic() < deadline, "it is still in progress"
            time.sleep(0.1)


def test_the_shop_passes_the_checks_and_lists_its_routes(folder: Path) -> None:
    done = manage(folder, "check")
    assert (done.returncode, done.stderr) == (0, "")
    done = manage(folder, "gatekeeper", "check")
    assert done.stdout.splitlines() == [
        "* /: pages",
        "* /item/{pk}: pages, @limit (3/minute)",
        "* /login: pages, login, login-name",
        "* /report: pages, @limit (2/minute)",
        "* /export: pages, @limit (1 at a time)",
        "* /account/orders: pages, account, orders (30/hour)",
    ]
    assert (done.returncode, done.stderr) == (0, "")
    deployed = manage(folder, "check", "--deploy")
    assert "gatekeeper.W001" in deployed.stderr
    assert manage(folder, "gatekeeper", "bans").stderr.startswith("CommandError: the counters lie in the memory")
