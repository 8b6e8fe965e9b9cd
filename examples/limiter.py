"""Limits without a framework, blocking and awaiting: `python examples/limiter.py`."""

from __future__ import annotations

import asyncio

from gatekeeper import Limiter, Verdict

limiter = Limiter("memory://")


def told(verdict: Verdict) -> str:
    if verdict:
        return f"allowed, {verdict.remaining} of {verdict.limit} left"
    return f"refused, again in {verdict.retry_after:.1f} s"


def blocking() -> None:
    for attempt in range(1, 5):
        print(f"hit {attempt} of 3/minute: {told(limiter.hit('3/minute', 'user:7'))}")
    print(f"another key: {told(limiter.hit('3/minute', 'user:8'))}")
    print(f"two rates, cost 3: {told(limiter.hit('5/minute; 20/hour', 'export:7', cost=3))}")
    print(f"the same again, all or nothing: {told(limiter.hit('5/minute; 20/hour', 'export:7', cost=3))}")
    print(f"a look spends nothing: {told(limiter.peek('5/minute; 20/hour', 'export:7'))}")
    limiter.reset("3/minute", "user:7")
    print(f"after a reset: {told(limiter.hit('3/minute', 'user:7'))}")


async def awaiting() -> None:
    verdicts = await asyncio.gather(*(limiter.ahit("3/minute", "job:1") for _ in range(10)))
    print(f"ten at once under asyncio: {sum(verdict.allowed for verdict in verdicts)} allowed")


if __name__ == "__main__":
    blocking()
    asyncio.run(awaiting())
