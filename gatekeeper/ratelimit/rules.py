"""Rules: which requests a limit is for, and whose quota they spend."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hmac import compare_digest
from typing import Any, Final, Literal, Protocol, TypeAlias

from gatekeeper.commands import Verdict
from gatekeeper.errors import GatekeeperError
from gatekeeper.http.addresses import Address, Networks
from gatekeeper.http.fields import quoted
from gatekeeper.http.parts import PartError, Subject, as_text, part
from gatekeeper.http.routes import Pattern
from gatekeeper.ratelimit.algorithms import Algorithm, Penalty, SlidingWindow, bind
from gatekeeper.ratelimit.rates import MOST, Rate

Function: TypeAlias = Callable[[Any], Any]
"""A function of the user's, of the request. It may be asynchronous."""

OnError: TypeAlias = Literal["local", "allow", "deny"]
"""What a rule does while its store does not answer: count in this process, let pass, refuse (503)."""

LONGEST_KEY: Final = 128


KEYS: Final = (
    "ip, ip/BITS, user, api_key, route, method, host, global, header:NAME, cookie:NAME, query:NAME, param:NAME, "
    'claim:NAME, form:NAME, json:PATH, or "package.module:function"'
)
"""The parts of a key.

A request that lacks a part (no user, no such field) is counted by its address in its place, so that nobody escapes
a limit by leaving something out.
"""

Reading: TypeAlias = Callable[["Asker"], str | None]
"""What reads a part of a key from a request whose functions were called and whose body was read."""

BODY_FIELDS: Final = ("form", "json")


class Native:
    """A part of a key that a framework's adapter reads off its own request, as rules read theirs.

    A function of the user's is called by the shell, for it may do anything; this one need not be.
    """

    def __init__(self, read: Reading) -> None:
        self.read = read

    def __call__(self, asker: Asker) -> str | None:
        return self.read(asker)


class Asker(Subject, Protocol):
    """A request, and what had to be asked for before it could be decided."""

    @property
    def answers(self) -> Mapping[object, Any]:
        """What functions of the user's returned, by the function; the fields of the body, by (kind, name)."""

    @property
    def ip(self) -> Address | None: ...


class KeyPartError(GatekeeperError, ValueError):
    """The text names no part of a key."""


def key_part(text: str, route: str = "*", pattern: Pattern | None = None) -> Reading:
    """What reads a part of a key from a request; `route` is what "route" stands for.

    Raises KeyPartError for an unknown name, or for a parameter that the pattern has not.
    """
    if text == "route":
        return lambda asker: route
    if text == "global":
        return lambda asker: ""
    if text == "api_key":  # a secret: it lies in no store
        return lambda asker: secret(asker.api_key)
    kind, _, name = text.partition(":")
    if kind in BODY_FIELDS and re.fullmatch(r"[!-~]{1,128}", name):
        return lambda asker: as_text(asker.answers.get((kind, name)))
    if kind == "param":
        if pattern is not None and name in pattern.names:
            return lambda asker: pattern.parameter(name, asker.path)
        raise KeyPartError("expected the name of a {name} in the rule's match")
    if text != "path":
        with suppress(PartError):
            read = part(text)
            is_secret = kind == "cookie" or text.lower() == "header:authorization"
            return (lambda asker: secret(read(asker))) if is_secret else read
    raise KeyPartError(f"expected {KEYS}")


def secret(text: str | None) -> str | None:
    """A digest in place of what must not lie in a store."""
    if text is None:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def bounded(key: str) -> str:
    """The key itself, or a digest in place of a long one, so that no client decides how much a key holds."""
    if len(key) <= LONGEST_KEY:
        return key
    return "blake2b:" + hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=24).hexdigest()


class RateLimit:
    """One rate of a rule: the limit that a store counts, and the words for it in fields.

    `standin` is the same limit for this process alone, counted while the store does not answer; a stand-in has
    none itself. `told` is whether clients are told of it; `alone` and `alone_in_text`, in which fields, where it is
    all that applied. `shadow`, `refusals_last` and `listed` are as `gatekeeper.commands.Limit` says.
    """

    __slots__ = (
        "algorithm", "alone", "alone_in_text", "give", "item", "kind", "lifetime_ns", "listed", "name", "numbers",
        "policy", "quick", "refusals_last", "rule", "shadow", "space", "standin", "step", "told",
    )  # fmt: skip

    def __init__(self, rule: Rule, name: str, space: str, algorithm: Algorithm, standin: RateLimit | None) -> None:
        self.rule = rule
        self.name = name
        self.space = space
        self.algorithm = algorithm
        self.standin = standin
        self.step = algorithm.step  # bound once: a store looks nothing up on the way
        self.give = algorithm.give
        self.quick = algorithm.quick if isinstance(algorithm, SlidingWindow) else None
        self.lifetime_ns = algorithm.lifetime_ns
        self.kind = algorithm.kind
        self.numbers = algorithm.numbers
        self.shadow = rule.shadow
        self.listed = algorithm.kind == "penalty"
        self.told = not (self.shadow or self.listed)
        self.refusals_last = not (rule.may_undo or self.listed)
        if self.kind == "concurrency":  # what is in progress ends when it does: there is no window
            self.policy = f'{quoted(name)};q={algorithm.limit};qu="concurrent-requests"'
        else:
            self.policy = f"{quoted(name)};q={algorithm.limit};w={max(1, round(algorithm.window_ns / 1e9))}"
        item = quoted(name).replace("%", "%%") + ";r=%d;t=%d"  # to be filled in
        self.item = item.encode("ascii")
        # What is said where it is all there is to say: `RateLimit` to be filled in, and `RateLimit-Policy`.
        is_own = self.told and standin is not None
        self.alone = (self.item, (b"ratelimit-policy", self.policy.encode("ascii"))) if is_own else None
        self.alone_in_text = (item, ("ratelimit-policy", self.policy)) if is_own else None

    def __repr__(self) -> str:
        return f"<RateLimit {self.policy}>"


class Rule:
    """A rule as the gate applies it, all that can be known beforehand worked out.

    - `rates`: each is a limit of its own; several are told apart by their window: `login-60s`.
    - `algorithm` by its name in `ALGORITHMS`; `burst` for `gcra` alone. Or "concurrency": then the rate's amount
      may be in progress at a time, and its period (seconds) is how long a lease lasts that nobody renews.
    - `pattern`: the requests it is for; None for all.
    - `keys`: the parts of its key, as in `KEYS`, or functions of the request.
    - `route`: what "route" stands for in a key: the template of the framework's route, or the pattern.
    - `cost`: units a request costs, or a function of the request that says how many.
    - `gives_back`: outcomes for which the charge is undone: statuses as "404" or "5xx", and "disconnect".
    - `resets_on`: outcomes after which the key's quota is whole again.
    - `settles`: how the real cost comes to be known once it is: "app" (which tells it), "bytes" (of the response's
      body), or "header:NAME" of the response; None if the cost is real from the first.
    - `preflights`: whether CORS preflights are charged.
    - `space`: keeps its counters apart from those of others; by default its name. `is_shared` tells that other
      rules have the same: a request that is under several of them is charged once.
    - `tier`: the part of the request, or the function, that names its tier; `tiers`: the rates of those whose rates
      are not the rule's own, none for a tier without limits.
    - `exempt`: requests that it is not for after all.
    - `penalty`: bans a key that is refused again and again.
    - `shadow`: decides, counts and is logged, and never refuses.
    - `overrides`: the names of rules that do not apply where this one does.
    - `messages`: whether it is for the messages within a WebSocket instead of for requests.
    - `workers`: among how many processes a stand-in divides the limit.
    - `digest`: tells it from any other rule, in another process too; "" for one that need not be.

    Raises KeyPartError.
    """

    __slots__ = (
        "__weakref__", "_parts", "_tier", "asks", "body_fields", "by_address", "claims", "cost", "digest", "exempt",
        "functions", "gives_back", "hit", "is_open", "is_plain", "is_shared", "limits", "may_undo", "messages",
        "name", "needs_user", "on_error", "overrides", "pattern", "penalty", "preflights", "resets_on", "route",
        "settles", "shadow", "spaces", "tiers",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        rates: Sequence[Rate],
        *,
        algorithm: str = "sliding_window",
        burst: int | None = None,
        pattern: Pattern | None = None,
        keys: Sequence[str | Function] = ("ip",),
        route: str | None = None,
        cost: int | Function = 1,
        on_error: OnError = "local",
        gives_back: Sequence[str] = (),
        resets_on: Sequence[str] = (),
        settles: str | None = None,
        preflights: bool = False,
        workers: int = 1,
        space: str | None = None,
        is_shared: bool = False,
        tier: str | Function | None = None,
        tiers: Mapping[str, Sequence[Rate]] | None = None,
        exempt: Exemption | None = None,
        penalty: Penalty | None = None,
        shadow: bool = False,
        overrides: Iterable[str] = (),
        messages: bool = False,
        digest: str = "",
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.route: str = route if route is not None else pattern.text if pattern is not None else "*"
        self.cost = cost
        self.on_error: OnError = on_error
        self.gives_back = frozenset(gives_back)
        self.resets_on = frozenset(resets_on)
        self.settles = settles
        self.preflights = preflights
        self.is_shared = is_shared
        self.exempt = exempt
        self.shadow = shadow
        self.overrides = frozenset(overrides)
        self.messages = messages
        self.digest = digest
        self._parts = tuple(self._reading(one) for one in keys)
        self._tier = None if tier is None else self._reading(tier)
        texts = [text for text in (*keys, tier) if isinstance(text, str)]
        called = [one for one in (*keys, tier, cost) if callable(one) and not isinstance(one, Native)]
        # What has to be asked for before this can be decided.
        self.needs_user = (exempt is not None and exempt.needs_user) or any(_of_user(text) for text in texts)
        self.functions: tuple[Function, ...] = (*called, *(exempt.functions if exempt is not None else ()))
        self.body_fields = tuple(
            (kind, field) for kind, _, field in (text.partition(":") for text in texts) if kind in BODY_FIELDS
        )
        self.claims = tuple(text.removeprefix("claim:") for text in texts if text.startswith("claim:"))
        self.asks = bool(self.needs_user or self.functions or self.body_fields)
        # Whether `finish` has something to do for it, and whether a charge may then be undone.
        self.is_open = bool(gives_back or resets_on or settles) or algorithm == "concurrency"
        self.may_undo = self.is_open
        # The usual key, for which `key` need not be called.
        self.by_address = tuple(keys) == ("ip",)
        space = space or name
        self.limits = self._limits(rates, algorithm, burst, space, workers)
        self.tiers = {
            text: self._limits(others, algorithm, burst, space, workers) for text, others in (tiers or {}).items()
        }
        self.spaces = frozenset(limit.space for limits in (self.limits, *self.tiers.values()) for limit in limits)
        """Where it counts. A rule of the same name may count there as well."""
        self.penalty: RateLimit | None = None
        if penalty is not None:
            table = f"{space}/penalty.{penalty.version}"
            self.penalty = RateLimit(self, name, table, penalty, RateLimit(self, name, table, penalty, None))
        # A rule of which there is nothing to know but its limits, a fixed cost and a key.
        self.is_plain = not (
            callable(cost) or self.is_open or is_shared or tiers or exempt or penalty or shadow or messages
        )
        self.hit: Callable[[str], Verdict] | None = None
        """Asks the store for a hit of the only limit there is, where store and rule are so simple; else None."""

    def _reading(self, one: str | Function) -> Reading:
        if isinstance(one, Native):
            return one.read
        if callable(one):
            return lambda asker: as_text(asker.answers.get(one))
        return key_part(one, self.route, self.pattern)

    def _limits(
        self, rates: Sequence[Rate], algorithm: str, burst: int | None, space: str, workers: int
    ) -> tuple[RateLimit, ...]:
        limits = []
        for rate in rates:
            told = self.name if len(rates) == 1 else f"{self.name}-{rate.period}s"
            whole = bind(algorithm, rate, burst)
            table = f"{space}/{whole.kind}.{whole.version}/{rate.period}"
            share = bind(algorithm, Rate(max(1, rate.amount // workers), rate.period), burst)
            limits.append(RateLimit(self, told, table, whole, RateLimit(self, told, table, share, None)))
        return tuple(limits)

    def limits_of(self, asker: Asker) -> tuple[RateLimit, ...]:
        """The limits of a request: its tier's."""
        if self._tier is None:
            return self.limits
        return self.tiers.get(self._tier(asker) or "", self.limits)

    def cost_of(self, asker: Asker) -> int:
        """The units that a request costs. Raises TypeError or ValueError for what a function cannot mean."""
        if not callable(self.cost):
            return self.cost
        cost = asker.answers[self.cost]
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise TypeError(f"{self.name}: expected a cost that is an integer, and not {type(cost).__name__}")
        if not 0 <= cost <= MOST:
            raise ValueError(f"{self.name}: expected a cost from 0 to {MOST}")
        return cost

    def key(self, asker: Asker) -> str:
        """Whose quota a request spends."""
        if self.by_address:
            return asker.address
        if len(self._parts) == 1:
            value = self._parts[0](asker)
            # What stands in for a missing part is marked, so that no value can be mistaken for an address.
            return f"@{asker.address}" if value is None else bounded(f"={value}")
        key = ""
        for read in self._parts:
            value = read(asker)
            # The length before each part: ("a/b", "c") and ("a", "b/c") are two keys.
            key += f"@{asker.address}|" if value is None else f"{len(value)}={value}|"
        return bounded(key)

    def __repr__(self) -> str:
        return f"<Rule {self.name}: {', '.join(limit.policy for limit in self.limits)}>"


def _of_user(text: str) -> bool:
    return text == "user" or text.startswith("claim:")


class Exemption:
    """Requests that a rule is not for.

    - `networks` of the client's address; `users` by name; `fields`: names of fields and the values they must have;
      `functions` of the request that return something true.
    """

    __slots__ = ("_fields", "_networks", "_users", "functions")

    def __init__(
        self,
        *,
        networks: Networks | None = None,
        users: Iterable[str] = (),
        fields: Mapping[str, str] | None = None,
        functions: Iterable[Function] = (),
    ) -> None:
        self._networks = networks
        self._users = frozenset(users)
        self._fields = {name.lower(): value for name, value in (fields or {}).items()}
        self.functions = tuple(functions)

    @property
    def needs_user(self) -> bool:
        return bool(self._users)

    def covers(self, asker: Asker) -> bool:
        """Whether a request is exempt."""
        if self._networks is not None and asker.ip in self._networks:
            return True
        if asker.user is not None and asker.user in self._users:
            return True
        for name, value in self._fields.items():
            given = asker.field(name)
            # In constant time: such a value is a password.
            if given is not None and compare_digest(given.encode("utf-8", "replace"), value.encode()):
                return True
        return any(asker.answers.get(function) for function in self.functions)


def outcome_matches(wanted: frozenset[str], status: int | None) -> bool:
    """Whether an outcome is among the wanted: a status, or None for a client that left before the answer ended."""
    if status is None:
        return "disconnect" in wanted
    return f"{status}" in wanted or f"{status // 100}xx" in wanted
