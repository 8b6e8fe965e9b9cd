"""What becomes of a cart when its server is lost: `python examples/cart/run.py [FILE]`.

Starts three cart services and the gateway before them, fills carts of three kinds, kills a server, and tells what
is left of each. FILE is the settings, by default gatekeeper.toml beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from gatekeeper import SettingsError
from gatekeeper.settings import load_settings

HERE = Path(__file__).resolve().parent
GATEKEEPER = "from gatekeeper.cli import main; main()"  # what the command `gatekeeper` does
PATIENCE = 20.0
"""Seconds until a process that does not come up is given up."""

ITEMS = ("apple", "bread", "cheese")


class StartError(Exception):
    """Something does not start."""


class Seen(NamedTuple):
    """Who answered, and with which cart."""

    server: str
    cart: list[str]

    def __str__(self) -> str:
        return f"server {self.server}: {', '.join(self.cart) or 'nothing'}"


class Browser:
    """A client that keeps its cookies."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._cookies: dict[str, str] = {}

    def ask(self, method: str, path: str) -> Seen:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            cookies = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
            connection.request(method, path, headers={"Cookie": cookies} if cookies else {})
            answer = connection.getresponse()
            for text in answer.headers.get_all("set-cookie", []):
                self._cookies |= {name: morsel.value for name, morsel in SimpleCookie(text).items()}
            body = answer.read()
            if answer.status != 200:
                raise StartError(f"{method} {path} was answered {answer.status}")
            return Seen(**json.loads(body))
        finally:
            connection.close()

    def fill(self, kind: str) -> Seen:
        """Put each item into the cart of a kind, and look at it."""
        for item in ITEMS:
            self.tell("POST", f"/{kind}/{item}")
        return self.tell("GET", f"/{kind}")

    def tell(self, method: str, path: str) -> Seen:
        seen = self.ask(method, path)
        print(f"  {method:4} {path:18} {seen}", flush=True)
        return seen


def start(stack: ExitStack, *arguments: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    call = [sys.executable, *arguments]
    process = subprocess.Popen(call, env=environ, stderr=subprocess.PIPE, text=True)  # noqa: S603  # ourselves
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate(timeout=PATIENCE)


def start_services(stack: ExitStack, file: Path, environ: dict[str, str]) -> dict[str, subprocess.Popen[str]]:
    ports = {one.id: urlsplit(one.url).port or 80 for one in load_settings(file).pools["pinned"].upstreams}
    services = {}
    for name, port in ports.items():
        if listens(port):
            raise StartError(f"port {port} is in use")
        services[name] = start(stack, str(HERE / "service.py"), name, str(port), str(file), environ=environ)
    deadline = time.monotonic() + PATIENCE
    for name, port in ports.items():
        while not listens(port):
            if services[name].poll() is not None or time.monotonic() > deadline:
                raise StartError(f"the server {name} did not start")
            time.sleep(0.02)
    return services


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_gateway(stack: ExitStack, file: Path, environ: dict[str, str]) -> int:
    """The port on which it listens."""
    call = ("-c", GATEKEEPER, "serve", str(file), "--listen", "127.0.0.1:0")
    gateway = start(stack, *call, environ=environ)
    assert gateway.stderr is not None
    told = ""
    for line in gateway.stderr:
        told += line
        if ready := re.match(r"listening on http://127\.0\.0\.1:(\d+)", line):
            return int(ready[1])
    raise StartError(f"the gateway did not start: {told}")


def show(file: Path) -> None:
    environ = {**os.environ, "GATEKEEPER_KEY": secrets.token_urlsafe(32)}
    with ExitStack() as stack:
        services = start_services(stack, file, environ)
        port = start_gateway(stack, file, environ)

        print("In the memory of a server, and each request goes to another one:")
        Browser(port).fill("scattered")
        print("The cart is in pieces: each server began one of its own.\n")

        print("In the memory of a server, with affinity, so that each request comes back to it:")
        pinned = Browser(port)
        held = pinned.fill("memory")
        print(f"The cart is whole, on server {held.server}.\n")

        print("In the session, and each request goes to another server:")
        free = Browser(port)
        free.fill("session")
        print("The cart is whole, on any server.\n")

        services[held.server].kill()
        services[held.server].wait()
        print(f"Server {held.server} is killed (kill -9). Both carts again:")
        lost = pinned.tell("GET", "/memory")
        kept = free.tell("GET", "/session")
        print(f"The cart in memory is {'there' if lost.cart else 'lost'}; that in the session is ", end="")
        print(f"{'there' if kept.cart == list(ITEMS) else 'lost'}.\n")

        print("The client whose server was lost is pinned to another one now:")
        pinned.fill("memory")


def main() -> int:
    parser = argparse.ArgumentParser(description="What becomes of a cart when its server is lost.")
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "gatekeeper.toml", help="the settings")
    try:
        show(parser.parse_args().file.resolve())
    except (StartError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
