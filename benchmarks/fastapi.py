"""What a limit adds to a FastAPI request: our dependency above an empty one, and slowapi's decorator.

`Depends(RateLimit(...))` stands where an empty asynchronous dependency stands in the application that it is
compared with: alone, and in an application with the middleware, which then sees the response. slowapi's decorator
is on the function of an application with the empty dependency, too, so that what is added is the limit alone. The
applications are called, and what is added is taken, as in `benchmarks.asgi`. All limit by the client's address, in
memory, one rate, and tell the client its quota in fields of the response; that they do, and refuse, is verified
first.

A limit whose value nobody wants, as in the bar's cases, is asked before FastAPI solves dependencies, and so saves
what that takes. One whose value the endpoint takes cannot be: it is shown beside, against an empty one likewise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any, Final

from benchmarks.asgi import RATE, serve, verify
from benchmarks.measure import Progress, Result, Row, Skipped, Work, added, interleave, median_ratio, peer
from gatekeeper import Gatekeeper
from gatekeeper.asgi import App, GatekeeperMiddleware


def run(quick: bool, progress: Progress) -> Result:
    against = peer("slowapi")
    peer("fastapi")
    rounds, requests = (5, 200) if quick else (25, 1500)
    apps: dict[str, App] = {"empty": empty(), "empty inside": inside(empty()), "empty taken": taken(nothing)}
    with asyncio.Runner() as runner:
        for build, field in FIELDS.items():
            runner.run(verify(build.__name__, build(RATE), build("2/minute"), field))
            apps[build.__name__] = build(RATE)

        def work(app: App) -> Work:
            return lambda: runner.run(serve(app, requests))

        works = {name: work(app) for name, app in apps.items()}
        seconds = interleave(lambda number: works, rounds, progress=progress)
    theirs = added(seconds["slowapi"], seconds["empty"])
    rows = []
    for what, build, above, at_most in (
        ("the dependency", dependency, "empty", 5.0),
        ("the dependency in the middleware", dependency_inside, "empty inside", 5.0),
        ("a dependency whose value is taken", dependency_taken, "empty taken", None),
    ):
        mine = added(seconds[build.__name__], seconds[above])
        rows.append(
            Row(
                what=f"fastapi: added by {what}, against {against}'s decorator",
                unit="µs",
                ours=median(mine) / requests * 1e6,
                peer=median(theirs) / requests * 1e6,
                ratio=median_ratio(theirs, mine),
                at_most=at_most,
            )
        )
    bare = median(seconds["empty"]) / requests * 1e6
    return Result(rows, [f"fastapi: the request with an empty dependency takes {bare:.1f} µs"])


def application(*dependencies: Any) -> Any:
    from fastapi import FastAPI

    app = FastAPI(openapi_url=None)

    @app.get("/hello", dependencies=list(dependencies))
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    return app


async def nothing() -> None:
    pass


def empty() -> Any:
    from fastapi import Depends

    return application(Depends(nothing))


def inside(app: Any) -> Any:
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper({}))
    return app


def dependency(rate: str) -> App:
    from fastapi import Depends

    from gatekeeper_fastapi import RateLimit

    # Each has counters of its own, as applications have that are not in one process.
    return application(Depends(RateLimit(rate, keeper=Gatekeeper({}))))  # type: ignore[no-any-return]


def dependency_inside(rate: str) -> App:
    from fastapi import Depends

    from gatekeeper_fastapi import RateLimit

    return inside(application(Depends(RateLimit(rate))))  # type: ignore[no-any-return]


def taken(depended: Any) -> Any:
    from fastapi import Depends, FastAPI

    app = FastAPI(openapi_url=None)

    async def hello(value: Any) -> dict[str, str]:
        return {"hello": "world"}

    hello.__annotations__["value"] = Annotated[Any, Depends(depended)]
    app.get("/hello")(hello)
    return app


def dependency_taken(rate: str) -> App:
    from gatekeeper_fastapi import RateLimit

    return taken(RateLimit(rate, keeper=Gatekeeper({})))  # type: ignore[no-any-return]


def slowapi(rate: str) -> App:
    from fastapi import Depends, FastAPI, Request, Response

    try:
        from slowapi import Limiter, _rate_limit_exceeded_handler
        from slowapi.errors import RateLimitExceeded
        from slowapi.util import get_remote_address
    except ImportError as error:
        raise Skipped(f"slowapi cannot be imported: {error}") from None

    limiter = Limiter(key_func=get_remote_address, headers_enabled=True)
    app = FastAPI(openapi_url=None)
    app.state.limiter = limiter
    handler: Any = _rate_limit_exceeded_handler
    app.add_exception_handler(RateLimitExceeded, handler)

    async def hello(request: Any, response: Any) -> dict[str, str]:
        return {"hello": "world"}

    hello.__annotations__ = {"request": Request, "response": Response, "return": dict[str, str]}
    app.get("/hello", dependencies=[Depends(nothing)])(limiter.limit(rate)(hello))
    return app


FIELDS: Final[dict[Callable[[str], App], bytes]] = {
    dependency: b"ratelimit",
    dependency_inside: b"ratelimit",
    dependency_taken: b"ratelimit",
    slowapi: b"x-ratelimit-remaining",
}
"""What is compared, each with a field by which it tells the client its quota."""
