"""What the gateway holds in memory: of long bodies whose receiver is slow at first, and of connections that idle.

A body of 1 GiB goes through in each direction. Its receiver reads at 10 MB/s for the first seconds, so that whoever
reads ahead of it gathers what it cannot pass on; then as fast as it can. What counts is how far the worker's
resident memory rises at its peak. For the idle connections it is the growth of resident memory over all of them,
each having carried one request, whose head is another one each time.

`python -m benchmarks.gateway_memory` is the upstream of the long bodies; it prints its port.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Final

from benchmarks import proxies
from benchmarks.loopback import HOST, accountable, cpu_seconds, memory, running
from benchmarks.measure import Progress, Result, Row, Unfit
from benchmarks.traffic import ANSWER_BODY, request, upstream

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

SLOW_RATE: Final = 10_000_000  # bytes a second
SLOW_SECONDS: Final = 3.0
PIECE: Final = 64 * KIB
TIMEOUT: Final = 60.0  # seconds without a byte
WARM_UP: Final = 64
"""Idle connections that are there before the counting begins: what the first ones bring is not theirs alone."""

LONG: Final = 'max_body = "2GiB"'
MANY: Final = 'max_connections = 20000\nmax_connections_per_address = 0\nidle_timeout = "10m"'


def run(quick: bool, progress: Progress) -> Result:
    accountable()
    length, connections = (64 * MIB, 1000) if quick else (GIB, 10_000)
    rows, notes = long_bodies(length, progress)
    row, remarks = idle_connections(connections, progress)
    return Result([*rows, row], [*notes, *remarks])


def long_bodies(length: int, progress: Progress) -> tuple[list[Row], list[str]]:
    rows = []
    with ExitStack() as stack:
        service = stack.enter_context(
            running("the upstream of long bodies", [sys.executable, "-m", "benchmarks.gateway_memory"])
        )
        gateway = stack.enter_context(proxies.ours([service.port_told(r"port (\d+)\n?")], LONG))
        for way, transfer in (("up", upload), ("down", download)):
            progress(f"{length // MIB} MiB {way}")
            transfer(gateway.port, MIB)
            grown, is_exact = peak(gateway.worker, lambda transfer=transfer: transfer(gateway.port, length))  # type: ignore[misc]
            what = f"gateway: peak growth, {length // MIB:,} MiB {way}, the receiver slow at first"
            rows.append(Row(what, "MiB", grown / MIB, at_most=64.0))
    return rows, [] if is_exact else ["gateway: the peak was sampled: it cannot be reset here"]


def upload(port: int, length: int) -> None:
    """The upstream is slow at first. Raises Unfit unless it got all."""
    with closing(socket.create_connection((HOST, port), timeout=TIMEOUT)) as client:
        client.sendall(b"POST /in HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length)
        send(client, length)
        with client.makefile("rb") as answer:
            status, fields = read_head(answer)
            body = answer.read(int(fields["content-length"]))
    if not status.startswith("HTTP/1.1 200 ") or int(body) != length:
        raise Unfit(f"the gateway answered {status!r} to an upload of {length} bytes: {body[:200]!r}")


def download(port: int, length: int) -> None:
    """The client is slow at first. Raises Unfit unless it gets all."""
    with closing(socket.create_connection((HOST, port), timeout=TIMEOUT)) as client:
        client.sendall(b"GET /out/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % length)
        with client.makefile("rb") as answer:
            status, fields = read_head(answer)
            told = int(fields.get("content-length", -1))
            if not status.startswith("HTTP/1.1 200 ") or told != length:
                raise Unfit(f"the gateway answered {status!r} with {told} bytes: 200 with {length} was expected")
            got = receive(answer, length)
    if got != length:
        raise Unfit(f"{got} of {length} bytes came down")


def peak(pid: int, work: Callable[[], object]) -> tuple[int, bool]:
    """(how far the resident memory rose at most while `work` ran, whether that is exact)

    Linux keeps the peak itself, and resets it when it is asked to. Where that is not allowed, samples are taken.
    """
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return sampled_peak(pid, work), False
    before = memory(pid, "VmRSS")
    work()
    return memory(pid, "VmHWM") - before, True


def sampled_peak(pid: int, work: Callable[[], object]) -> int:
    before = memory(pid, "VmRSS")
    highest = before
    has_ended = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not has_ended.wait(0.005):
            highest = max(highest, memory(pid, "VmRSS"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        has_ended.set()
        sampler.join()
    return highest - before


def idle_connections(number: int, progress: Progress) -> tuple[Row, list[str]]:
    with ExitStack() as stack:
        room = stack.enter_context(room_for_files(number))
        port = stack.enter_context(upstream("a"))
        gateway = stack.enter_context(proxies.ours([port], MANY))
        opened = [stack.enter_context(kept(gateway.port, place)) for place in range(WARM_UP)]
        settled(gateway.worker)
        before = memory(gateway.worker, "VmRSS")
        for place in range(room):
            if not place % 500:
                progress(f"{place:,} of {room:,} connections")
            opened.append(stack.enter_context(kept(gateway.port, WARM_UP + place)))
        settled(gateway.worker)
        grown = memory(gateway.worker, "VmRSS") - before
        for client in (opened[0], opened[-1]):  # still kept
            exchange(client, 0)
    row = Row(f"gateway: an idle kept connection, {room:,} of them", "KiB", grown / room / KIB, at_most=12.0)
    return row, [] if room == number else [f"gateway: the limit of open files leaves room for {room:,} connections"]


@contextmanager
def room_for_files(number: int) -> Iterator[int]:
    """How many connections may be open here and in processes started meanwhile: the number asked for, or fewer."""
    import resource  # not on every system

    others = WARM_UP + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield number if hard == resource.RLIM_INFINITY else min(number, hard - others)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def kept(port: int, place: int) -> socket.socket:
    """A connection that has carried one request."""
    client = socket.create_connection((HOST, port), timeout=TIMEOUT)
    try:
        exchange(client, place)
    except BaseException:
        client.close()
        raise
    return client


def exchange(client: socket.socket, place: int) -> None:
    client.sendall(request(place, place, post=False))
    answer = b""
    while not answer.endswith(ANSWER_BODY):
        piece = client.recv(PIECE)
        if not piece or not (answer or piece).startswith(b"HTTP/1.1 200 "):
            raise Unfit(f"connection {place} got {answer + piece!r}")
        answer += piece


def settled(pid: int) -> None:
    """Wait until the process has nothing to do: it may tidy up after what it answered."""
    for _ in range(100):
        before = cpu_seconds(pid)
        time.sleep(0.1)
        if cpu_seconds(pid) - before < 0.002:
            return


def serve() -> None:
    with socket.create_server((HOST, 0)) as listener:
        print(f"port {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            connection.settimeout(None)
            threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    """Read what is sent to /in, slowly at first; send the number of bytes that /out/… names."""
    with connection, connection.makefile("rb") as stream:
        while line := stream.readline():
            _, target, _ = line.decode("latin-1").split()
            fields = read_fields(stream)
            if target == "/in":
                body = b"%d" % receive(stream, int(fields["content-length"]))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            else:
                length = int(target.rpartition("/")[2])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
                send(connection, length)


def read_head(stream: BufferedReader) -> tuple[str, dict[str, str]]:
    return stream.readline().decode("latin-1"), read_fields(stream)


def read_fields(stream: BufferedReader) -> dict[str, str]:
    fields = {}
    while (line := stream.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    return fields


def send(connection: socket.socket, length: int) -> None:
    piece = bytes(PIECE)
    for _ in range(length // PIECE):
        connection.sendall(piece)
    connection.sendall(piece[: length % PIECE])


def receive(stream: BufferedReader, length: int) -> int:
    """The bytes that came of those expected: SLOW_RATE for SLOW_SECONDS, then as fast as they come."""
    into = memoryview(bytearray(PIECE))
    started = time.monotonic()
    got = 0
    while got < length:
        number = stream.readinto(into[: min(PIECE, length - got)])
        if not number:
            break
        got += number
        due = started + got / SLOW_RATE
        if due < started + SLOW_SECONDS:
            time.sleep(max(0.0, due - time.monotonic()))
    return got


if __name__ == "__main__":
    serve()
