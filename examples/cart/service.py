"""A cart service, one of several behind the gateway: `python examples/cart/service.py NAME PORT FILE`.

FILE is the settings of the gateway and of this. It keeps carts in two ways: under /session in the session, which
any server reads; under /memory, and /scattered, in its own memory, by a cookie with a number that nobody guesses.
"""

from __future__ import annotations

import argparse
import secrets
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gatekeeper.asgi import GatekeeperMiddleware

MOST_CARTS = 1000
MOST_ITEMS = 100


class Service:
    """One server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.carts: dict[str, list[str]] = {}

    def app(self) -> Starlette:
        routes = [Route("/session", self.kept), Route("/session/{item}", self.keep, methods=["POST"])]
        for path in ("/memory", "/scattered"):
            routes += [Route(path, self.held), Route(f"{path}/{{item}}", self.hold, methods=["POST"])]
        return Starlette(routes=routes)

    async def kept(self, request: Request) -> Response:
        session = await request.scope["session"].aload()
        return self.answer(session.get("cart", []))

    async def keep(self, request: Request) -> Response:
        session = await request.scope["session"].aload()
        cart = session.setdefault("cart", [])
        if len(cart) < MOST_ITEMS:
            cart.append(request.path_params["item"])
        return self.answer(cart)

    async def held(self, request: Request) -> Response:
        return self.answer(self.carts.get(request.cookies.get("cart", ""), []))

    async def hold(self, request: Request) -> Response:
        number = request.cookies.get("cart", "")
        if number not in self.carts:  # it is nobody's here: one that a client made up is no number of ours
            number = secrets.token_urlsafe(16)
            while len(self.carts) >= MOST_CARTS:
                del self.carts[next(iter(self.carts))]
        cart = self.carts.setdefault(number, [])
        if len(cart) < MOST_ITEMS:
            cart.append(request.path_params["item"])
        answer = self.answer(cart)
        answer.set_cookie("cart", number, httponly=True, samesite="lax")
        return answer

    def answer(self, cart: list[str]) -> Response:
        return JSONResponse({"server": self.name, "cart": cart})


def main() -> None:
    parser = argparse.ArgumentParser(description="A cart service to stand behind the gateway.")
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    app = GatekeeperMiddleware(Service(options.name).app(), options.file)
    config = uvicorn.Config(app, "127.0.0.1", options.port, log_level="error", timeout_keep_alive=30)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
