"""Rules: which requests a limit is for, and whose quota they spend."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal, TypeAlias

from gatekeeper.errors import GatekeeperError
from gatekeeper.http.fields import quoted
from gatekeeper.http.parts import Part, PartError, Subject, part
from gatekeeper.http.routes import Pattern
from gatekeeper.ratelimit.algorithms import ALGORITHMS, Algorithm, bind
from gatekeeper.ratelimit.rates import Rate

OnError: TypeAlias = Literal["local", "allow", "deny"]
"""What a rule does while its store does not answer: count in this process, let pass, refuse (503)."""

LONGEST_KEY: Final = 128


KEYS: Final = ("ip", "user", "route", "method", "host", "global")
"""The parts of a key by name; besides them there are "header:NAME" and "cookie:NAME".

A request that lacks a part (no user, no such field) is counted by its address in its place, so that nobody
escapes a limit by leaving something out.
"""


class KeyPartError(GatekeeperError, ValueError):
    """The text names no part of a key."""


def key_part(text: str, route: str = "*") -> Part:
    """What reads a part of a key from a request; `route` is what "route" stands for.

    Raises KeyPartError for an unknown name.
    """
    if text == "route":
        return lambda subject: route
    if text == "global":
        return lambda subject: ""
    if text in KEYS or text.startswith(("header:", "cookie:")):
        with suppress(PartError):
            return part(text)
    raise KeyPartError(f"expected {', '.join(KEYS)}, header:NAME or cookie:NAME")


def bounded(key: str) -> str:
    """The key itself, or a digest in place of a long one, so that no client decides how much a key holds."""
    if len(key) <= LONGEST_KEY:
        return key
    return "blake2b:" + hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=24).hexdigest()


class RateLimit:
    """One rate of a rule: the limit that a store counts, and the words for it in fields.

    `standin` is the same limit for this process alone, counted while the store does not answer; a stand-in has
    none itself. `shadow`, `refusals_last` and `listed` are as `gatekeeper.commands.Limit` says.
    """

    __slots__ = (
        "algorithm", "give", "item", "kind", "lifetime_ns", "listed", "name", "numbers", "policy", "refusals_last",
        "rule", "shadow", "space", "standin", "step",
    )  # fmt: skip

    def __init__(self, rule: Rule, name: str, space: str, algorithm: Algorithm, standin: RateLimit | None) -> None:
        self.rule = rule
        self.name = name
        self.space = space
        self.algorithm = algorithm
        self.standin = standin
        self.step = algorithm.step  # bound once: a store looks nothing up on the way
        self.give = algorithm.give
        self.lifetime_ns = algorithm.lifetime_ns
        self.kind = algorithm.kind
        self.numbers = algorithm.numbers
        self.shadow = False
        self.refusals_last = False
        self.listed = False
        self.policy = f"{quoted(name)};q={algorithm.limit};w={max(1, round(algorithm.window_ns / 1e9))}"
        self.item = quoted(name).replace("%", "%%").encode("ascii") + b";r=%d;t=%d"  # to be filled in

    def __repr__(self) -> str:
        return f"<RateLimit {self.policy}>"


class Rule:
    """A rule as the gate applies it, all that can be known beforehand worked out.

    - `rates`: each is a limit of its own; several are told apart by their window: `login-60s`.
    - `algorithm` by its name in `ALGORITHMS`; `burst` for `gcra` alone.
    - `pattern`: the requests it is for; None for all.
    - `keys`: the parts of its key, as in `KEYS`.
    - `route`: what "route" stands for in a key: the template of the framework's route, or the pattern.
    - `cost`: units a request costs.
    - `gives_back`: outcomes for which the charge is undone: statuses as "404" or "5xx", and "disconnect".
    - `preflights`: whether CORS preflights are charged.
    - `space`: keeps its counters apart from those of others; by default its name.
    - `workers`: among how many processes a stand-in divides the limit.

    Raises KeyPartError.
    """

    __slots__ = (
        "_parts", "by_address", "cost", "gives_back", "limits", "name", "needs_user", "on_error",
        "pattern", "preflights", "route",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        rates: Sequence[Rate],
        *,
        algorithm: str = "sliding_window",
        burst: int | None = None,
        pattern: Pattern | None = None,
        keys: Sequence[str] = ("ip",),
        route: str | None = None,
        cost: int = 1,
        on_error: OnError = "local",
        gives_back: Sequence[str] = (),
        preflights: bool = False,
        workers: int = 1,
        space: str | None = None,
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.route: str = route if route is not None else pattern.text if pattern is not None else "*"
        self.cost = cost
        self.on_error: OnError = on_error
        self.gives_back = frozenset(gives_back)
        self.preflights = preflights
        self.needs_user = "user" in keys
        self._parts = tuple(key_part(text, self.route) for text in keys)
        # The usual key, for which `key` need not be called.
        self.by_address = tuple(keys) == ("ip",)
        limits = []
        for rate in rates:
            told = name if len(rates) == 1 else f"{name}-{rate.period}s"
            table = f"{space or name}/{algorithm}.{ALGORITHMS[algorithm].version}/{rate.period}"
            share = bind(algorithm, Rate(max(1, rate.amount // workers), rate.period), burst)
            standin = RateLimit(self, told, table, share, None)
            limits.append(RateLimit(self, told, table, bind(algorithm, rate, burst), standin))
        self.limits = tuple(limits)

    def key(self, subject: Subject) -> str:
        """Whose quota a request spends."""
        if self.by_address:
            return subject.address
        if len(self._parts) == 1:
            value = self._parts[0](subject)
            # What stands in for a missing part is marked, so that no value can be mistaken for an address.
            return f"@{subject.address}" if value is None else bounded(f"={value}")
        key = ""
        for read in self._parts:
            value = read(subject)
            # The length before each part: ("a/b", "c") and ("a", "b/c") are two keys.
            key += f"@{subject.address}|" if value is None else f"{len(value)}={value}|"
        return bounded(key)

    def __repr__(self) -> str:
        return f"<Rule {self.name}: {', '.join(limit.policy for limit in self.limits)}>"


def outcome_matches(wanted: frozenset[str], status: int | None) -> bool:
    """Whether an outcome is among the wanted: a status, or None for a client that left before the answer ended."""
    if status is None:
        return "disconnect" in wanted
    return f"{status}" in wanted or f"{status // 100}xx" in wanted
