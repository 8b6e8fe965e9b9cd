"""Pins of affinity: read again, read for the first time, written; and what the rest of them costs a request.

2,000 clients of 20 upstreams. Each request brings a text of its own, as requests do, so its hash is not known yet.
The last two rows are of a request of a browser, with 12 fields and three cookies: the pin is found in its head, and
the lines that go on are written without it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Final, TypeVar

from benchmarks.measure import Progress, Result, Row, Unfit, Work, interleave
from gatekeeper.affinity import REMEMBERED, Affinity, Pin, Pins
from gatekeeper.keys import Key, Ring
from gatekeeper.proxy.pinning import unpinned
from gatekeeper.proxy.wire import WireRequest

T = TypeVar("T")

IDS: Final = [f"http://10.0.0.{number}:8080" for number in range(20)]
TTL: Final = 3600
COUNT: Final = 2000
BAR: Final = 1.0

FIELDS: Final = """\
Host: shop.example
User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8
Accept-Language: en-US,en;q=0.5
Accept-Encoding: gzip, deflate, br
Referer: https://shop.example/
Cookie: theme=dark; gk_api={}; session=0123456789abcdef0123456789abcdef
Connection: keep-alive
Sec-Fetch-Dest: document
Sec-Fetch-Mode: navigate
Sec-Fetch-Site: same-origin
Priority: u=0, i"""


def run(quick: bool, progress: Progress) -> Result:
    rounds, count = (3, 200) if quick else (15, COUNT)
    assert count <= REMEMBERED, "what is looked up has to be there"
    now = int(time.time())
    ring = Ring([Key("k", "HS256", hashlib.sha256(b"benchmark").digest())])
    seen = made(ring)
    texts = [seen.seal(IDS[number % len(IDS)], now + number) for number in range(count)]
    verify(seen, texts, now)
    affinity = Affinity(seen, cookie="gk_api", clock=time.time)
    requests = [request(text) for text in texts]
    names = frozenset(["gk_api"])

    def works(number: int) -> Mapping[str, Work]:
        again = [f"{text[:8]}{text[8:]}" for text in texts]
        fresh = made(ring)
        return {
            "seen before": lambda: each(again, lambda text: seen.open(text, now)),
            "for the first time": lambda: each(texts, lambda text: fresh.open(text, now)),
            "written": lambda: each(texts, lambda text: seen.seal(IDS[0], now)),
            "seen before, found in a head": lambda: each(requests, affinity.read),
            "taken out of a head": lambda: each(requests, lambda one: unpinned(one.lines, names, frozenset())),
        }

    seconds = interleave(works, rounds, progress=progress)
    return Result(
        [
            Row(
                what=f"pin: {what}",
                unit="µs",
                ours=median(taken) / count * 1e6,
                at_most=BAR if what == "seen before" else None,
            )
            for what, taken in seconds.items()
        ]
    )


def made(ring: Ring) -> Pins:
    """One that has seen no pin yet."""
    return Pins(ring, "api", IDS, TTL)


def request(pin: str) -> WireRequest:
    found = WireRequest()
    found.read("\r\n".join(["GET / HTTP/1.1", *FIELDS.format(pin).splitlines()]).encode("ascii"))
    return found


def each(values: Sequence[T], work: Callable[[T], object]) -> None:
    for value in values:
        work(value)


def verify(pins: Pins, texts: list[str], now: int) -> None:
    """Each pin says its upstream, and none that was changed says any. Raises Unfit."""
    found = [pins.open(text, now) for text in texts]
    if [pin.id if isinstance(pin, Pin) else pin for pin in found] != [
        IDS[place % len(IDS)] for place in range(len(texts))
    ]:
        raise Unfit("the pins do not say what was written")
    if any(isinstance(pins.open(text[:-1] + ("A" if text[-1] != "A" else "E"), now), Pin) for text in texts):
        raise Unfit("a changed pin is believed")
