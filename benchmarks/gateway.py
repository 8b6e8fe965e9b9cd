"""What the gateway costs for a request that it passes on: CPU time of its worker, beside other proxies.

The same load goes through each proxy in turns (see traffic.py; proxies.py says how they are set up), over kept
connections that are opened and warmed up before the timing. What counts is the CPU time of the one process that
does the proxy's work, as the operating system's books say; load and upstreams are other processes.

Before anything is timed it is verified that each proxy sends requests to both upstreams, passes all fields on, and
sets the same X-Forwarded-*. In the timed rounds each answer's head, length and body are looked at.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from ipaddress import ip_address
from statistics import median
from typing import Final, NamedTuple, TypeAlias

from benchmarks import proxies
from benchmarks.loopback import HOST, accountable, cpu_seconds
from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, median_ratio
from benchmarks.proxies import Proxy
from benchmarks.traffic import CONNECTIONS, HOSTNAME, SEEN, Driver, load, request, upstream

Start: TypeAlias = Callable[[Sequence[int]], AbstractContextManager[Proxy]]

ATTEMPTS: Final = 64
"""Requests until both upstreams must have been seen: by chance a fair proxy misses one once in 2⁶³ runs."""


class Peer(NamedTuple):
    start: Start
    at_least: float
    """How many times ours it is to take."""
    requests: int
    """In one round: enough to be measured, few where one takes a millisecond."""


REQUESTS: Final = 16_000
PEERS: Final[dict[str, Peer]] = {
    "nginx": Peer(proxies.nginx, 0.455, REQUESTS),  # ours at most 2.2 times nginx
    "envoy": Peer(proxies.envoy, 1.0, REQUESTS),
    "aiohttp": Peer(partial(proxies.asgi, "aiohttp"), 2.0, REQUESTS // 4),
    "httpx": Peer(partial(proxies.asgi, "httpx"), 20.0, REQUESTS // 40),
}


def run(quick: bool, progress: Progress) -> Result:
    accountable()
    rounds, share = (3, 10) if quick else (15, 1)
    notes = []
    with ExitStack() as stack:
        upstreams = [stack.enter_context(upstream(name)) for name in "ab"]
        driver = stack.enter_context(load())
        progress("starting")
        running = {"ours": stack.enter_context(proxies.ours(upstreams))}
        for name, each in PEERS.items():
            try:
                running[name] = stack.enter_context(each.start(upstreams))
            except Skipped as reason:
                notes.append(f"gateway: without {name}: {reason}")
        for proxy in running.values():
            progress(f"verifying {proxy.name}")
            verify(proxy.name, proxy.port)
        requests = {name: PEERS[name].requests if name in PEERS else REQUESTS for name in running}
        requests = {name: number // share for name, number in requests.items()}
        seconds = timed(running, driver, requests, rounds, progress)
    mine = seconds.pop("ours")
    rows = [
        Row(
            what=f"gateway: a proxied request, against {running[name].name}",
            unit="µs",
            ours=median(mine) * 1e6,
            peer=median(theirs) * 1e6,
            ratio=median_ratio(theirs, mine),
            at_least=PEERS[name].at_least,
        )
        for name, theirs in seconds.items()
    ]
    notes.append(
        f"gateway: CPU of the worker, {CONNECTIONS} kept connections, two upstreams, 12 and 10 fields; ours at most"
        f" 2.2× nginx is a ratio of at least {PEERS['nginx'].at_least:g}"
    )
    return Result(rows, notes)


def timed(
    running: Mapping[str, Proxy],
    driver: Driver,
    requests: Mapping[str, int],
    rounds: int,
    progress: Progress = lambda text: None,
) -> dict[str, list[float]]:
    """CPU seconds a request in each round, the proxies taking turns; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(1 + rounds):
        progress(f"round {number + 1} of {1 + rounds}")
        for name, proxy in running.items():
            driver.open(proxy.port)
            try:
                driver.send(4 * CONNECTIONS)  # not counted: connections to the upstreams are made
                started = cpu_seconds(proxy.worker)
                driver.send(requests[name])
                taken = cpu_seconds(proxy.worker) - started
            except Unfit as error:
                raise Unfit(f"{proxy.name}: {error}; {proxy.process.said()}") from None
            driver.close()
            if number:
                seconds[name].append(taken / requests[name])
    return seconds


def verify(name: str, port: int) -> None:
    """Requests reach both upstreams whole, with X-Forwarded-* set. Raises Unfit."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    upstreams = set()
    try:
        for _ in range(ATTEMPTS):
            upstream, lines = seen(connection)
            upstreams.add(upstream)
            compare(name, lines)
            if len(upstreams) == 2:
                return
    except (OSError, http.client.HTTPException) as error:
        raise Unfit(f"{name} does not answer: {error!r}") from None
    finally:
        connection.close()
    raise Unfit(f"{name} sent {ATTEMPTS} requests to upstream {min(upstreams)} and none to the other")


def sent() -> dict[str, str]:
    """The fields of a request as the load makes them."""
    _, *lines = request(0, 1, post=False).decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if line)


def seen(connection: http.client.HTTPConnection) -> tuple[str, list[str]]:
    """(which upstream a request reached, the lines of the head that it got)"""
    connection.request("GET", SEEN, headers=sent())
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise Unfit(f"port {connection.port} answered {response.status}: {body[:200]!r}")
    upstream, lines = json.loads(body)
    return upstream, lines


def compare(name: str, lines: Sequence[str]) -> None:
    came: dict[str, list[str]] = {}
    for line in lines[1:]:
        field, _, value = line.partition(":")
        came.setdefault(field.lower(), []).append(value.strip())
    expected = {
        **{field.lower(): value for field, value in sent().items()},
        "x-forwarded-proto": "http",
        "x-forwarded-host": HOSTNAME,
    }
    for field, value in expected.items():
        if came.get(field) != [value]:
            raise Unfit(f"{name} sent {field!r} as {came.get(field)}: {[value]} was expected")
    try:  # for clients on loopback Envoy writes an address of the machine, and not theirs
        (client,) = came.get("x-forwarded-for", [])
        ip_address(client)
    except ValueError:
        raise Unfit(f"{name} sent 'x-forwarded-for' as {came.get('x-forwarded-for')}") from None
