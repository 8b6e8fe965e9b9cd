"""Three services and the gateway before them: `python examples/gateway/run.py [--port N] [FILE]`.

FILE is the gateway's settings, by default gatekeeper.toml beside this file. A service is started for each upstream
that it names. Ctrl-C or SIGTERM ends all in order: the gateway drains first, then the services stop. A second one
ends all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from gatekeeper import SettingsError
from gatekeeper.settings import Settings, load_settings

HERE = Path(__file__).resolve().parent
SERVICE = HERE / "service.py"
GATEKEEPER = "from gatekeeper.cli import main; main()"  # what the command `gatekeeper` does
PATIENCE = 20.0
"""Seconds until a service that does not come up is given up."""


class StartError(Exception):
    """Something does not start. The message says what and why; it is empty if that was told already."""


class Stage:
    """The processes that were started."""

    def __init__(self) -> None:
        self.services: dict[str, Process] = {}
        self.gateway: Process | None = None
        self.watchers: list[asyncio.Task[None]] = []

    async def start(self, *arguments: str, stderr: int | None = None) -> Process:
        # A session of its own: a terminal sends Ctrl-C to all of ours, and that would end the services too early.
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stderr=stderr, start_new_session=True
        )

    async def start_services(self, addresses: dict[str, int]) -> None:
        for name, port in addresses.items():
            self.services[name] = await self.start(str(SERVICE), name, str(port))
        deadline = time.monotonic() + PATIENCE
        for name, port in addresses.items():
            while not answers(port):
                if self.services[name].returncode is not None or time.monotonic() > deadline:
                    raise StartError(f"the service {name} did not start")
                await asyncio.sleep(0.02)
        for name, process in self.services.items():
            self.watchers.append(asyncio.create_task(tell_end(name, process)))

    async def start_gateway(self, file: Path, port: int) -> str:
        """Its URL, once it accepts."""
        call = ("-c", GATEKEEPER, "serve", str(file), "--listen", f"127.0.0.1:{port}")
        self.gateway = await self.start(*call, stderr=PIPE)
        assert self.gateway.stderr is not None
        while line := (await self.gateway.stderr.readline()).decode():
            if ready := re.fullmatch(r"listening on (http://\S+)\n", line):
                self.watchers.append(asyncio.create_task(pass_on(self.gateway.stderr)))
                return ready[1]
            sys.stderr.write(line)
        raise StartError

    async def stop(self) -> int:
        """End all in order: the gateway first, which lets requests in progress end. Its exit status."""
        status = 0
        if self.gateway is not None:
            status = await end(self.gateway)
        for watcher in self.watchers:
            watcher.cancel()
        await asyncio.gather(*map(end, self.services.values()))
        return status

    def stop_at_once(self) -> None:
        if self.gateway is not None and self.gateway.returncode is None:
            self.gateway.terminate()  # for the second time: it breaks off what is in progress
        for process in self.services.values():
            if process.returncode is None:
                process.kill()


async def end(process: Process) -> int:
    if process.returncode is None:
        process.terminate()
    return await process.wait()


async def tell_end(name: str, process: Process) -> None:
    status = await process.wait()
    print(f"the service {name} (pid {process.pid}) has ended, with status {status}", flush=True)


async def pass_on(lines: asyncio.StreamReader) -> None:
    """What the gateway tells of its upstreams."""
    while line := await lines.readline():
        sys.stderr.write(line.decode())
        sys.stderr.flush()


def services_of(settings: Settings) -> dict[str, int]:
    """The ports of the upstreams, by id; a service may be in several pools."""
    upstreams = (one for pool in settings.pools.values() for one in pool.upstreams)
    return {one.id: urlsplit(one.url).port or 80 for one in upstreams}


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def require_free(port: int, hint: str = "") -> None:
    """Raises StartError if nobody can listen there."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise StartError(f"cannot listen on 127.0.0.1 port {port}: {reason}{hint}") from None


def greeting(base: str, file: Path, stage: Stage, ports: dict[str, int]) -> str:
    pids = {name: process.pid for name, process in stage.services.items()}
    told = ", ".join(f"{name} (pid {pid})" for name, pid in pids.items())
    name, pid = list(pids.items())[len(pids) // 2]
    again = " ".join(map(quote, (relative(Path(sys.executable)), relative(SERVICE), name, str(ports[name]))))
    return f"""\
Serving {base}/ with the settings of {relative(file)}. Ctrl-C drains and stops all.
Behind it are the services {told}.

Who answers, and what it is told of the client. Of services that are as busy one is drawn by lot:
  for i in 1 2 3 4 5 6; do curl -s {base}/; done

Six at once, of a second each. The least busy is chosen, so each service has two:
  (for i in 1 2 3 4 5 6; do curl -s '{base}/slow?seconds=1' & done; wait)

Carts are hashed by user: the same user, the same service, the same cart:
  for user in ada ada bob bob cyd cyd dan dan; do curl -s -H "X-User: $user" -X POST {base}/cart/apple; done

Six logins; the sixth is answered 429 by the gateway, with its fields and a problem body:
  for i in 1 2 3 4 5; do curl -s -d password=wrong {base}/login; done; curl -si -d password=wrong {base}/login; echo

Six slow requests, and the service {name} is killed under two of them. Those are sent to another; none fails:
  (for i in 1 2 3 4 5 6; do curl -s '{base}/slow?seconds=2' & done; sleep 1; kill -9 {pid}; wait)

The service {name} again (in a terminal of its own). A trial request lets it back in, within seconds:
  {again}
"""


def relative(path: Path) -> str:
    """As one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


async def serve(file: Path, port: int) -> int:
    """Serve until the task is cancelled, or the gateway ends. The exit status."""
    stage = Stage()
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    signals = 0

    def signalled() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            this.cancel()
        else:
            stage.stop_at_once()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    try:
        ports = services_of(load_settings(file))
        require_free(port, " (--port, or make run PORT=…, takes another)")
        for service in ports.values():
            require_free(service)
        await stage.start_services(ports)
        base = await stage.start_gateway(file, port)
        print(greeting(base, file, stage, ports), flush=True)
        assert stage.gateway is not None
        await stage.gateway.wait()
    except asyncio.CancelledError:
        pass
    except (StartError, SettingsError) as error:
        if str(error):
            print(error, file=sys.stderr)
        await stage.stop()
        return 2 if isinstance(error, SettingsError) else 1
    status = await stage.stop()
    return status if signals else 1


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 65536):
        raise argparse.ArgumentTypeError("expected a number from 0 to 65535")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Three services and the gateway before them.")
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "gatekeeper.toml", help="the settings")
    parser.add_argument("--port", type=port_number, default=8080, help="0 takes a free one (default: %(default)s)")
    options = parser.parse_args()
    return asyncio.run(serve(options.file.resolve(), options.port))


if __name__ == "__main__":
    sys.exit(main())
