"""What the Flask extension adds to a request, beside Flask-Limiter, each on the same bare application.

One limit by the client's address, in memory, fields on: as a rule of the settings beside Flask-Limiter's
`default_limits`, and as a decorator on the view beside Flask-Limiter's. The applications are called, and what is
added is taken, as in `benchmarks.wsgi`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Progress, Result, Row, Skipped, Work, added, interleave, median_ratio, peer
from benchmarks.wsgi import RATE, bare, flask_limiter, serve, verify
from gatekeeper.wsgi import App

if TYPE_CHECKING:
    from flask import Flask


def run(quick: bool, progress: Progress) -> Result:
    against = peer("flask-limiter")
    peer("flask")
    rounds, requests = (5, 300) if quick else (15, 3000)
    rows, notes = [], []
    for what, ours, theirs in (
        ("the extension", settings_rule, flask_limiter),
        ("a decorated view", decorator, flask_limiter_decorator),
    ):
        # A pair at a time: an application that has no limited functions is not to pay for those of another.
        verify(ours.__name__, ours(RATE), ours("2/minute"), "ratelimit")
        verify(theirs.__name__, theirs(RATE), theirs("2/minute"), "x-ratelimit-remaining")
        apps: Mapping[str, App] = {"bare": bare(), "ours": ours(RATE), "peer": theirs(RATE)}
        works = {name: work(app, requests) for name, app in apps.items()}
        seconds = interleave(lambda number, works=works: works, rounds, progress=progress)  # type: ignore[misc]
        mine, others = (added(seconds[name], seconds["bare"]) for name in ("ours", "peer"))
        rows.append(
            Row(
                what=f"flask: added by {what}, against {against}",
                unit="µs",
                ours=median(mine) / requests * 1e6,
                peer=median(others) / requests * 1e6,
                ratio=median_ratio(others, mine),
                at_least=10.0,
            )
        )
        notes = [f"flask: the bare request takes {median(seconds['bare']) / requests * 1e6:.1f} µs"]
    return Result(rows, notes)


def work(app: App, requests: int) -> Work:
    return lambda: serve(app, requests)


def settings_rule(rate: str) -> Flask:
    from gatekeeper_flask import Gatekeeper

    app = bare()
    Gatekeeper(app, {"limits": [{"name": "default", "rate": rate}]})
    return app


def decorator(rate: str) -> Flask:
    from gatekeeper_flask import Gatekeeper

    app = bare()
    gk = Gatekeeper(app)
    views: dict[str, Any] = app.view_functions
    views["hello"] = gk.limit(rate)(views["hello"])
    return app


def flask_limiter_decorator(rate: str) -> Flask:
    try:
        from flask_limiter import Limiter
        from flask_limiter.util import get_remote_address
    except ImportError as error:
        raise Skipped(f"flask-limiter cannot be imported: {error}") from None

    app = bare()
    limiter = Limiter(get_remote_address, app=app, headers_enabled=True, storage_uri="memory://")
    views: dict[str, Any] = app.view_functions
    views["hello"] = limiter.limit(rate)(views["hello"])
    return app
