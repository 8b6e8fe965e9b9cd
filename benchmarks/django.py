"""What a limit adds to a Django request: our decorator with the middleware on, and django-ratelimit's decorator.

All views stand in one Django, whose WSGI handler is called directly, without a server: an environ made for each
call, a start_response, the body read to its end and closed, as PEP 3333 asks of servers. What is added is the CPU
time with the limit less that of the bare view, without any middleware, in the same round: our middleware is part
of it.

Both limit by the client's address: ours in memory, django-ratelimit's in Django's cache in memory (locmem). Ours
tells the client its quota in fields of the response; the other has none. Before anything is timed, that is
verified, and that both really refuse under a small limit, and tell clients apart.
"""

from __future__ import annotations

import io
import itertools
import logging
from statistics import median
from typing import Any, Final

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, added, interleave, median_ratio, peer
from benchmarks.wsgi import ENVIRON, consume, start_response

AMOUNT: Final = 1_000_000
MIDDLEWARE: Final = "gatekeeper_django.GatekeeperMiddleware"

CLIENTS: Final = itertools.count(1)
"""Clients that nobody has counted yet."""

NOTHING: Final = io.BytesIO()
"""The body of each request."""


class Urls:
    """A URLconf of one view. Each has its own: to resolve a path costs the more the more views stand before."""

    def __init__(self, view: Any) -> None:
        from django.urls import path

        self.urlpatterns = [path("hello", view)]


class Site:
    """A WSGI handler with middleware of its own, and the URLconf that it is to be called with."""

    def __init__(self, view: Any, middleware: list[str]) -> None:
        from django.core.handlers.wsgi import WSGIHandler
        from django.test import override_settings

        with override_settings(MIDDLEWARE=middleware):
            self.handler = WSGIHandler()
        self.urls = Urls(view)

    def serve(self, requests: int) -> None:
        from django.test import override_settings

        with override_settings(ROOT_URLCONF=self.urls):
            handler = self.handler
            for _ in range(requests):
                consume(handler({**ENVIRON, "wsgi.input": NOTHING}, start_response))

    def answer(self, address: str) -> tuple[int, dict[str, str]]:
        """Status and fields of one response."""
        from django.test import override_settings

        heads: list[tuple[str, list[tuple[str, str]]]] = []

        def keep(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            heads.append((status, headers))

        with override_settings(ROOT_URLCONF=self.urls):
            consume(self.handler({**ENVIRON, "REMOTE_ADDR": address, "wsgi.input": NOTHING}, keep))
        ((status, headers),) = heads
        return int(status[:3]), {name.lower(): value for name, value in headers}


def run(quick: bool, progress: Progress) -> Result:
    against = peer("django-ratelimit")
    peer("django")
    set_up()
    rounds, requests = (5, 300) if quick else (15, 3000)
    for name, refused, site in (("ours", 429, ours("2/minute")), ("peer", 403, django_ratelimit("2/m"))):
        verify(name, refused, site)
    sites = {"bare": bare(), "ours": ours(f"{AMOUNT}/minute"), "peer": django_ratelimit(f"{AMOUNT}/m")}

    def work(site: Site) -> Work:
        return lambda: site.serve(requests)

    works = {name: work(site) for name, site in sites.items()}
    seconds = interleave(lambda number: works, rounds, progress=progress)
    mine, theirs = (added(seconds[name], seconds["bare"]) for name in ("ours", "peer"))
    row = Row(
        what=f"django: added to a request by the decorator, against {against}",
        unit="µs",
        ours=median(mine) / requests * 1e6,
        peer=median(theirs) / requests * 1e6,
        ratio=median_ratio(theirs, mine),
        at_least=3.0,
    )
    return Result([row], [f"django: the bare request takes {median(seconds['bare']) / requests * 1e6:.1f} µs"])


def set_up() -> None:
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            CACHES={"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
            GATEKEEPER={},
            LOGGING_CONFIG=None,
            SECRET_KEY="of a benchmark",
            USE_TZ=True,
        )
        django.setup()
        logging.getLogger("django").addHandler(logging.NullHandler())


def hello(request: Any) -> Any:
    from django.http import HttpResponse

    return HttpResponse("hello")


def bare() -> Site:
    return Site(hello, [])


def ours(rate: str) -> Site:
    from gatekeeper_django import limit

    return Site(limit(rate)(hello), [MIDDLEWARE])


def django_ratelimit(rate: str) -> Site:
    try:
        from django_ratelimit.decorators import ratelimit
    except ImportError as error:
        raise Skipped(f"django-ratelimit cannot be imported: {error}") from None

    return Site(ratelimit(key="ip", rate=rate)(hello), [])


def verify(name: str, refused: int, site: Site) -> None:
    """2/minute lets two requests of each client pass and not a third; ours tells the quota. Raises Unfit."""
    for _ in range(2):
        address = f"198.51.100.{next(CLIENTS)}"
        answers = [site.answer(address) for _ in range(3)]
        statuses = [status for status, _ in answers]
        if statuses != [200, 200, refused]:
            raise Unfit(f"{name} answered {statuses} to three requests under 2/minute")
        if name == "ours" and "ratelimit" not in answers[0][1]:
            raise Unfit(f"{name} answered with {sorted(answers[0][1])}: 'ratelimit' was expected")
