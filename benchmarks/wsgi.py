"""What a limit adds to a Flask request: our middleware and Flask-Limiter, each over the same bare application.

The applications are called directly, without a server: an environ copied for each call, a start_response, the body
read to its end and closed, as PEP 3333 asks of servers. What is added is the CPU time with the limit less the bare
application's in the same round.

Both limit by the client's address, in memory, one rate for all, and both tell the client its quota in fields of
the response. Before anything is timed, that is verified, and that both really refuse under a small limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, added, interleave, median_ratio, peer
from gatekeeper.wsgi import App, GatekeeperMiddleware

if TYPE_CHECKING:
    from flask import Flask

RATE: Final = "1000000/minute"
ENVIRON: Final[dict[str, Any]] = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/hello",
    "QUERY_STRING": "page=2",
    "SERVER_NAME": "10.0.0.5",
    "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": "203.0.113.7",
    "REMOTE_PORT": "50412",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.multithread": True,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
    "HTTP_HOST": "shop.example.com",
    "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "HTTP_ACCEPT": "application/json, text/plain;q=0.9, */*;q=0.8",
    "HTTP_ACCEPT_LANGUAGE": "en-GB,en;q=0.7,de;q=0.3",
    "HTTP_ACCEPT_ENCODING": "gzip, deflate, br, zstd",
    "HTTP_REFERER": "https://shop.example.com/basket",
    "HTTP_COOKIE": "session=6f1f0c2e9b8d4a7e8c55; theme=dark; consent=1",
    "HTTP_CONNECTION": "keep-alive",
    "HTTP_CACHE_CONTROL": "no-cache",
    "HTTP_SEC_FETCH_MODE": "cors",
    "HTTP_SEC_FETCH_SITE": "same-origin",
    "HTTP_X_REQUEST_ID": "0190f5c2-7b7e-7c3a-9a53-0c2f6d1b4e90",
}


def run(quick: bool, progress: Progress) -> Result:
    against = peer("flask-limiter")
    peer("flask")
    rounds, requests = (5, 300) if quick else (15, 3000)
    for build, field in ((ours, "ratelimit"), (flask_limiter, "x-ratelimit-remaining")):
        verify(build.__name__, build(RATE), build("2/minute"), field)
    apps: dict[str, App] = {"bare": bare(), "ours": ours(RATE), "peer": flask_limiter(RATE)}

    def work(app: App) -> Work:
        return lambda: serve(app, requests)

    works = {name: work(app) for name, app in apps.items()}
    seconds = interleave(lambda number: works, rounds, progress=progress)
    mine, theirs = (added(seconds[name], seconds["bare"]) for name in ("ours", "peer"))
    row = Row(
        what=f"wsgi: added to a Flask request, against {against}",
        unit="µs",
        ours=median(mine) / requests * 1e6,
        peer=median(theirs) / requests * 1e6,
        ratio=median_ratio(theirs, mine),
        at_least=10.0,
    )
    return Result([row], [f"wsgi: the bare request takes {median(seconds['bare']) / requests * 1e6:.1f} µs"])


def bare() -> Flask:
    from flask import Flask

    app = Flask("benchmarks")

    @app.get("/hello")
    def hello() -> str:
        return "hello"

    return app


def ours(rate: str) -> App:
    app = bare()
    settings = {"limits": [{"name": "default", "rate": rate}]}
    app.wsgi_app = GatekeeperMiddleware(app.wsgi_app, settings)  # type: ignore[method-assign]
    return app


def flask_limiter(rate: str) -> App:
    try:
        from flask_limiter import Limiter
        from flask_limiter.util import get_remote_address
    except ImportError as error:
        raise Skipped(f"flask-limiter cannot be imported: {error}") from None

    app = bare()
    Limiter(get_remote_address, app=app, default_limits=[rate], headers_enabled=True, storage_uri="memory://")
    return app


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
    """Of a server that keeps nothing."""


def consume(body: Iterable[bytes]) -> None:
    try:
        for _ in body:
            pass
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()


def serve(app: App, requests: int) -> None:
    for _ in range(requests):
        consume(app(ENVIRON.copy(), start_response))


def answer(app: App) -> tuple[int, dict[str, str]]:
    """Status and fields of one response."""
    heads: list[tuple[str, list[tuple[str, str]]]] = []

    def keep(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        heads.append((status, headers))

    consume(app(ENVIRON.copy(), keep))
    ((status, headers),) = heads
    return int(status[:3]), {name.lower(): value for name, value in headers}


def verify(name: str, wide: App, narrow: App, field: str) -> None:
    """The response tells the quota, and 2/minute lets two requests pass and not a third. Raises Unfit."""
    status, fields = answer(wide)
    if status != 200 or field not in fields:
        raise Unfit(f"{name} answered {status} with {sorted(fields)}: {field!r} was expected")
    statuses = [answer(narrow)[0] for _ in range(3)]
    if statuses != [200, 200, 429]:
        raise Unfit(f"{name} answered {statuses} to three requests under 2/minute")
