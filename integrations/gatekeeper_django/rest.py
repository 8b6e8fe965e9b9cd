"""Limits for Django REST framework: throttles that count as everything else here does."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

from gatekeeper.errors import MissingExtra

try:
    from rest_framework.throttling import BaseThrottle
except ImportError:
    raise MissingExtra("A throttle of Django REST framework", "rest") from None

from collections.abc import Mapping, Sequence

from django.core.exceptions import ImproperlyConfigured

from gatekeeper.commands import run
from gatekeeper_django.answers import announce, watching
from gatekeeper_django.decorators import Limit, charged, found

_ENOUGH: Final = 365 * 86_400.0
"""Seconds. Who is told to wait for longer is told nothing: a date so far away is no date."""


class GatekeeperThrottle(BaseThrottle):  # type: ignore[misc]  # the framework has no hints of its own
    """A throttle with a quota of its own on each route of each view, to be subclassed::

        class Searches(GatekeeperThrottle):
            rate = "60/minute"
            key = "user"

    - `rate`: "60/minute", or several
    - `key`: whose quota a request spends; by default `["user"]`, and the address of the anonymous
    - `name`: told to clients; views whose throttle has one share the quota
    - `settings`: as those of a rule in `GATEKEEPER` besides, such as `{"burst": 10}`

    It is decided after the framework has authenticated, so that users of its tokens are known. The framework
    answers a refusal, with `Retry-After`; GatekeeperMiddleware adds the fields of the quota to all responses.
    """

    rate: ClassVar[str | Sequence[str] | None] = None
    key: ClassVar[Any] = "user"
    name: ClassVar[str | None] = None
    settings: ClassVar[Mapping[str, Any]] = {}
    limit: ClassVar[Limit | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.rate is not None:
            cls.limit = Limit(cls.rate, name=cls.name, **{"key": cls.key, **cls.settings})

    def __init__(self) -> None:
        if self.limit is None:
            raise ImproperlyConfigured(f"{type(self).__qualname__}: expected a rate, as in rate = '60/minute'")
        self._wait: float | None = None

    def allow_request(self, request: Any, view: Any) -> bool:
        """Charge a request. Whether it is within the limit."""
        limit = self.limit
        assert limit is not None
        native = getattr(request, "_request", request)
        ticket, keeper, is_own = found(native)
        if ticket.gate.off:
            return True
        kind = type(view)
        rule = limit.rule(keeper, f"{kind.__module__}.{kind.__qualname__}", native, awaiting=False)
        if is_own and rule.is_open:
            raise ImproperlyConfigured(
                f"{type(self).__qualname__}: what is settled by the outcome needs GatekeeperMiddleware"
            )
        ticket.awaiting = False
        ask = keeper.ask if rule.penalty is None else watching(ticket, keeper.ask)
        status = run(charged(limit.guard, ticket, rule), ask, ticket.read)
        if not status:
            return True
        refused = [charge.verdict for charge in ticket.charges if charge.limit.rule is rule]
        verdict = max((one for one in refused if not one.allowed), key=lambda one: one.retry_ns)
        announce(ticket, verdict)
        # The framework rounds down, and a client that came back so early would be refused again.
        wait = verdict.retry_after
        self._wait = float(math.ceil(wait)) if wait < _ENOUGH else None
        return False

    def wait(self) -> float | None:
        """How many seconds the client should wait, whole ones; None where waiting does not help."""
        return self._wait
