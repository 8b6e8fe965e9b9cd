"""A small service that stands behind the gateway: `python examples/gateway/service.py NAME PORT`.

It says who it is and what it was told of the client. It keeps carts in its memory: a user whose requests went now
here, now there would find another cart each time.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import sys
from collections import Counter
from contextlib import suppress
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HOST = "127.0.0.1"
RIGHT = "correct"
LONGEST_BODY = 4096
LONGEST_WAIT = 60.0
MOST_CARTS = 1000
MOST_ITEMS = 100


class Line(JSONResponse):
    """JSON in one line, with its end, as a terminal shows it best."""

    def render(self, content: object) -> bytes:
        return super().render(content) + b"\n"


class Service:
    """One instance."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.carts: dict[str, Counter[str]] = {}
        self.waiting = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.index),
                Route("/health", self.health),
                Route("/slow", self.slow),
                Route("/login", self.login, methods=["POST"]),
                Route("/cart", self.cart),
                Route("/cart/{item}", self.add, methods=["POST"]),
            ]
        )

    async def index(self, request: Request) -> Response:
        """What reached this service. Only the gateway can connect here, so what it says of the client is true."""
        told = ("host", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "via")
        return self.answer(
            client=request.client.host if request.client is not None else None,  # as uvicorn reads X-Forwarded-For
            user=request.headers.get("x-user"),
            **{name: request.headers.get(name) for name in told},
        )

    async def health(self, request: Request) -> Response:
        return self.answer(waiting=self.waiting)

    async def slow(self, request: Request) -> Response:
        """Answers after so many seconds."""
        try:
            seconds = float(request.query_params.get("seconds", "1"))
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= LONGEST_WAIT:
            return self.answer(400, detail=f"expected seconds from 0 to {LONGEST_WAIT:.0f}")
        self.waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self.waiting -= 1
        return self.answer(waited=seconds)

    async def login(self, request: Request) -> Response:
        """A try that the gateway let through. The sixth of a minute does not come here."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST_BODY:
                return self.answer(413, detail="Too long.")
        password = parse_qs(body.decode("latin-1")).get("password", [""])[0]
        if hmac.compare_digest(password.encode(), RIGHT.encode()):
            return self.answer(detail="Welcome.")
        return self.answer(401, detail="Wrong password.")

    async def cart(self, request: Request) -> Response:
        user = request.headers.get("x-user", "nobody")
        return self.answer(user=user, cart=self.carts.get(user, {}))

    async def add(self, request: Request) -> Response:
        user, item = request.headers.get("x-user", "nobody"), request.path_params["item"]
        if user not in self.carts and len(self.carts) >= MOST_CARTS:
            return self.answer(503, detail="There is no cart left.")
        cart = self.carts.setdefault(user, Counter())
        if item not in cart and len(cart) >= MOST_ITEMS:
            return self.answer(409, detail="The cart is full.")
        cart[item] += 1
        return self.answer(user=user, cart=cart)

    def answer(self, status: int = 200, /, **what: object) -> Response:
        return Line({"service": self.name, **what}, status)


def main() -> int:
    parser = argparse.ArgumentParser(description="A small service to stand behind the gateway.")
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    config = uvicorn.Config(
        Service(options.name).app(),
        HOST,
        options.port,
        log_level="error",
        # The gateway's word on the client is believed, for it is the only one that connects.
        proxy_headers=True,
        forwarded_allow_ips=HOST,
        # Longer than the gateway keeps an unused connection (4 s): so none is closed just as the gateway takes it.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    with suppress(KeyboardInterrupt):  # uvicorn has ended in good order by then, and raises the signal once more
        uvicorn.Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
