"""The flow of one request, as generators that ask and return: admit, extend, respond, finish.

Nothing here waits, reads a clock or knows a framework. `gatekeeper.commands.run` and `arun` drive it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import NamedTuple
from weakref import ReferenceType

from gatekeeper.commands import Batch, Call, Give, Hit, Hits, Replies, Steps, Verdict, run
from gatekeeper.errors import Limited, StoreError
from gatekeeper.http.fields import Fields, wants_problem
from gatekeeper.http.message import Request
from gatekeeper.http.parts import Part
from gatekeeper.http.routes import Pattern, Router, Table
from gatekeeper.identity import Identity
from gatekeeper.ratelimit.fields import common_fields, policy_field, refusal_body, retry_seconds
from gatekeeper.ratelimit.rules import RateLimit, Rule, outcome_matches
from gatekeeper.upstreams.pool import Pool, Upstream

DENIED_WAIT_NS = 1_000_000_000
"""How long a client is told to wait when a rule denies because its store does not answer."""


class Refusal(NamedTuple):
    """The answer that is given in the application's place."""

    status: int
    fields: Fields
    body: bytes


class Charge(NamedTuple):
    """One rate of one rule, asked for one request."""

    limit: RateLimit
    key: str
    cost: int
    verdict: Verdict


class Destination(NamedTuple):
    """Where a route leads: a pool, by what its policy hashes requests, and how long it is waited for (seconds).

    `by_user` tells that the key is the user, who has to be asked for then.
    """

    pool: Pool
    key: Part | None
    by_user: bool
    connect_timeout: float
    response_timeout: float
    read_timeout: float
    idle_timeout: float


class Ticket(Request):
    """The one context of a request, in `scope["gatekeeper"]` or `environ["gatekeeper.ticket"]`.

    It is the request itself, and gathers what each stage decides of it. (A shell makes a class of its own of it,
    so that a request costs one object.)

    - `address`: the client's, behind trusted proxies; `user`: None if unknown
    - `refused`: 0 while the request is admitted, else the status it was refused with (429, or 503 when a store
      did not answer and the rule denies)
    - `sent`: the status of the response once its head was sent, else 0
    - `ended`: whether all of it was sent; kept only where the outcome matters to a rule
    - `charges`: each rate that was asked, with its verdict
    """

    gate: Gate
    address: str
    user: str | None = None
    refused: int = 0
    sent: int = 0
    ended: bool = False
    replaced: bool = False  # our refusal stands in place of the application's response
    # Rules, hits and verdicts in the order they were asked: a hit for each rate of each rule.
    rules: tuple[Rule, ...] = ()
    hits: Sequence[Hit] = ()
    verdicts: Sequence[Verdict] = ()
    # Whether `finish` has something to do.
    is_open: bool = False
    asked_user: bool = False
    # The refusal of a decorated function, as long as somebody holds it: then it is on its way to us.
    limited: ReferenceType[Limited] | None = None
    # The ticket of another policy that stands around this one.
    outer: Ticket | None = None

    def under(self, gate: Gate) -> Ticket | None:
        """This ticket, or the one of a policy around it, that is of `gate`."""
        ticket: Ticket | None = self
        while ticket is not None and ticket.gate is not gate:
            ticket = ticket.outer
        return ticket

    def of(self, gate: Gate) -> Ticket:
        """A ticket of another gate for the same request, to which nothing has been charged."""
        other = copy(self)
        for name in ("user", "refused", "rules", "hits", "verdicts", "is_open", "asked_user", "limited"):
            other.__dict__.pop(name, None)
        other.gate = gate
        other.address = gate.address(other)
        return other

    @property
    def allowed(self) -> bool:
        return not self.refused

    @property
    def charges(self) -> list[Charge]:
        return [
            Charge(limit, key, cost, verdict)  # type: ignore[arg-type]  # a gate asks only of RateLimits
            for (limit, key, cost), verdict in zip(self.hits, self.verdicts, strict=True)
        ]

    @property
    def tightest(self) -> Charge | None:
        """The charge closest to exhaustion, or the refusal with the longest wait; None if no rule applied."""
        return min(self.charges, key=lambda charge: tightness(charge.verdict), default=None)

    def __repr__(self) -> str:
        return f"<Ticket {self.method} {self.address}: {list(self.verdicts)}>"


class Gate:
    """A policy, compiled: the same for every request until another gate takes its place.

    - `rules`, in the order of the settings
    - `fields`: whether responses tell the client its quota
    - `routes`: where a gateway sends requests; an application's middleware has none
    - `failures`: how often a rule was decided without its store, by "rule:policy"
    - `off`: whether nothing is charged, not even by decorators
    """

    __slots__ = (
        "_always", "_asks_user", "_direct", "_fields", "_hashes_user", "_identity", "_policies", "_table",
        "failures", "off", "route", "rules",
    )  # fmt: skip

    def __init__(
        self,
        rules: Iterable[Rule],
        identity: Identity,
        *,
        fields: bool = True,
        routes: Iterable[tuple[Pattern, Destination]] = (),
    ) -> None:
        routes = list(routes)
        self.route: Callable[[Request], Destination | None] = Router(routes).find
        """Where a request goes; None if no route is for it."""
        self.rules = tuple(rules)
        self.failures: Counter[str] = Counter()
        self.off = False
        self._identity = identity
        self._fields = fields
        self._direct = identity.direct
        self._table = Table((rule.pattern, rule) for rule in self.rules)
        # Where no rule has a pattern all of them apply to each request.
        self._always = self._table.always or ()
        # Whom the user is to be asked for: for some pool, thus always; for some rule, where it applies.
        self._hashes_user = any(destination.by_user for _, destination in routes)
        self._asks_user = self._hashes_user or any(rule.needs_user for rule in self.rules)
        self._policies: dict[tuple[Rule, ...], tuple[bytes, bytes]] = {}

    def address(self, request: Request) -> str:
        """The name under which the client is counted."""
        return self._identity.address(request)

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer is a proxy whose word on the client is believed."""
        return self._identity.trusts(peer)

    def admit(self, ticket: Ticket) -> Steps[int]:
        """Identify the client and charge the rules that match.

        The result is for `Ticket.refused`: 0, or the status to refuse the request with.
        """
        steps = self.extend(ticket, self._begin(ticket))
        return self._user_first(ticket, steps) if self._hashes_user else steps

    def admit_at_once(self, ticket: Ticket, ask: Callable[[Hits], Replies]) -> int:
        """`admit`, for a store that does not wait: a request that one batch decides costs no generator.

        (The generator and its driver are a tenth of all that a request costs.)
        """
        if self._asks_user:
            return run(self.admit(ticket), ask)
        rules = self._begin(ticket)
        if not rules:
            return 0
        hits = self._hits(ticket, rules)
        verdicts = ask(hits)
        for verdict in verdicts:
            if not verdict.allowed:
                return run(self._settle(ticket, rules, hits, verdicts), ask)
        ticket.rules, ticket.hits, ticket.verdicts = rules, hits, verdicts  # type: ignore[assignment]
        return 0

    def extend(self, ticket: Ticket, rules: tuple[Rule, ...]) -> Steps[int]:
        """Charge a request for rules: those that match, later those of decorators on its way.

        All of these or none. What was charged before stays charged: the application has run for it since, and
        were it given back, a client refused within would be let in for ever.
        """
        if not rules or self.off:
            return 0
        if not ticket.asked_user and any(rule.needs_user for rule in rules):
            yield from self._ask_user(ticket)
        hits = self._hits(ticket, rules)
        verdicts: Replies = yield hits
        return (yield from self._settle(ticket, rules, hits, verdicts))

    def _begin(self, ticket: Ticket) -> tuple[Rule, ...]:
        """Identify the client; the rules that match."""
        ticket.gate = self
        # On the instance, for what only its class has takes longer to read, and these are read for each message.
        ticket.replaced, ticket.is_open, ticket.hits = False, False, ()
        # A client that is its own peer, and was seen before, is one look-up.
        ticket.address = self._direct.get(ticket.peer) or self._identity.address(ticket)
        rules = self._always or self._table.match(ticket)
        if rules and ticket.method == "OPTIONS" and _is_preflight(ticket):
            rules = tuple(rule for rule in rules if rule.preflights)
        return rules

    def _user_first(self, ticket: Ticket, steps: Steps[int]) -> Steps[int]:
        yield from self._ask_user(ticket)
        return (yield from steps)

    def _hits(self, ticket: Ticket, rules: tuple[Rule, ...]) -> list[Hit]:
        """A hit for each rate of each rule."""
        hits: list[Hit] = []
        for rule in rules:
            if rule.gives_back:
                ticket.is_open = True
            key = ticket.address if rule.by_address else rule.key(ticket)
            cost = rule.cost
            for limit in rule.limits:
                hits.append((limit, key, cost))
        return hits

    def _settle(self, ticket: Ticket, rules: tuple[Rule, ...], hits: list[Hit], verdicts: Replies) -> Steps[int]:
        """Keep what was decided on the ticket, once what no store decided is decided too."""
        refused = 0
        for verdict in verdicts:
            if not verdict.allowed:
                refused, hits, verdicts = yield from self._refuse(hits, verdicts)
                break
        if ticket.hits:
            # Those of a decorator come last; of a function called again only its last call is told.
            earlier = [
                (hit, verdict)
                for hit, verdict in zip(ticket.hits, ticket.verdicts, strict=True)
                if hit[0].rule not in rules  # type: ignore[attr-defined]
            ]
            hits = [hit for hit, _ in earlier] + hits
            verdicts = [*(verdict for _, verdict in earlier), *verdicts]
            rules = tuple(rule for rule in ticket.rules if rule not in rules) + rules
        ticket.rules = rules
        ticket.hits = hits
        ticket.verdicts = verdicts  # type: ignore[assignment]  # no StoreError is left
        return refused

    def reads_alike(self, ticket: Ticket, readings: Iterable[str]) -> bool:
        """Whether a request is under the same rules and on the same route, however its path is read.

        Servers differ in what they make of `%2F`, `%5C`, `%25` and `;`. Where another reading would be under other
        rules, or lead elsewhere, there is no saying what the path means.
        """
        path, rules, route = ticket.path, set(self._table.match(ticket)), self.route(ticket)
        try:
            for reading in readings:
                ticket.path = reading
                if set(self._table.match(ticket)) != rules or self.route(ticket) is not route:
                    return False
        finally:
            ticket.path = path
        return True

    def choose(self, ticket: Ticket, destination: Destination, now: int, draw: float) -> Iterator[Upstream]:
        """The upstreams to turn to, in order of preference. `now` in nanoseconds; `draw` is from [0, 1)."""
        key = ticket.address if destination.key is None else destination.key(ticket) or ticket.address
        return destination.pool.choose(key, now, draw)

    def respond(self, ticket: Ticket) -> Fields:
        """The fields to add to a response, before its head is sent.

        `RateLimit` of the charge closest to exhaustion, and `RateLimit-Policy` of all that applied.
        """
        hits = ticket.hits
        if not hits or not self._fields:
            return []
        rules, place = ticket.rules, 0
        if len(hits) > 1:
            verdicts = ticket.verdicts
            place = min(range(len(hits)), key=lambda place: tightness(verdicts[place]))
        verdict = ticket.verdicts[place]
        # Seconds are rounded up: what `t` promises is there when it has passed.
        seconds = (verdict.reset_ns + 999_999_999) // 1_000_000_000
        return [
            (b"ratelimit", hits[place][0].item % (verdict.remaining, seconds)),  # type: ignore[attr-defined]
            self._policies.get(rules) or self._policy(rules),
        ]

    def _policy(self, rules: tuple[Rule, ...]) -> tuple[bytes, bytes]:
        # There are as many as ways through decorated functions: few, but a body may choose its way.
        if len(self._policies) >= 1024:
            self._policies.clear()
        policy = self._policies[rules] = policy_field(rules)
        return policy

    def finish(self, ticket: Ticket) -> Steps[None]:
        """End a request. An answer that neither ended nor failed was broken off: the client left."""
        if ticket.is_open:
            ticket.is_open = False
            status = ticket.sent if ticket.ended or ticket.sent >= 500 else None
            yield from self._give_back(
                charge for charge in ticket.charges if outcome_matches(charge.limit.rule.gives_back, status)
            )

    def refusal(self, ticket: Ticket, verdict: Verdict | None = None) -> Refusal:
        """The answer to a request whose ticket is not allowed, or that `verdict` of another limit refused."""
        refused = [charge for charge in ticket.charges if not charge.verdict.allowed]
        status = ticket.refused or 429
        verdicts = [charge.verdict for charge in refused]
        retry = retry_seconds([verdict] if verdict is not None and not verdicts else verdicts)
        kind, body = refusal_body(
            [charge.limit.name for charge in refused],
            retry,
            status=status,
            problem=wants_problem(ticket.field("accept")),
        )
        return Refusal(status, common_fields(retry, kind, body) + self.respond(ticket), body)

    def _ask_user(self, ticket: Ticket) -> Steps[None]:
        identity = self._identity
        ticket.asked_user = True
        if identity.user is None:
            ticket.user = identity.named_user(ticket)
        else:
            user = yield Call(identity.user, ticket)
            ticket.user = None if user is None else str(user)

    def _refuse(self, hits: list[Hit], verdicts: Replies) -> Steps[tuple[int, list[Hit], Replies]]:
        """Some hit was not allowed: refused, or its store did not answer and the rule's policy decides.

        Returns the status to refuse with (0 if the policy lets pass), and the hits that remain with verdicts.
        """
        kept: list[tuple[Hit, Verdict]] = []
        standins: list[Hit] = []
        refused = denied = False
        for hit, verdict in zip(hits, verdicts, strict=True):
            if not isinstance(verdict, StoreError):
                kept.append((hit, verdict))
                refused = refused or not verdict.allowed
                continue
            limit: RateLimit = hit[0]  # type: ignore[assignment]
            policy = limit.rule.on_error
            self.failures[f"{limit.rule.name}:{policy}"] += 1
            if policy == "deny":
                denied = True
                kept.append((hit, Verdict(False, limit.algorithm.limit, 0, 0, DENIED_WAIT_NS, None)))
            elif policy == "local" and limit.standin is not None:
                standins.append((limit.standin, *hit[1:]))
        if standins:
            replies: Replies = yield Batch(standins, local=True)
            for hit, verdict in zip(standins, replies, strict=True):
                assert isinstance(verdict, Verdict)  # the process's own store is memory: it always answers
                kept.append((hit, verdict))
                refused = refused or not verdict.allowed
        if refused or denied:
            yield from self._give_back(Charge(*hit, verdict) for hit, verdict in kept)  # type: ignore[arg-type]
        status = 429 if refused else 503 if denied else 0
        return status, [hit for hit, _ in kept], [verdict for _, verdict in kept]

    def _give_back(self, charges: Iterable[Charge]) -> Steps[None]:
        """Undo these charges, each exactly, and each at most once."""
        gives: dict[bool, list[Give]] = {False: [], True: []}
        for limit, key, cost, verdict in charges:
            if verdict.receipt is not None:
                gives[limit.standin is None].append((limit, key, cost, verdict.receipt))
                verdict.receipt = None
                verdict.remaining += cost
        for local, batch in gives.items():
            if batch:
                yield Batch(gives=batch, local=local)


def _is_preflight(request: Request) -> bool:
    """A browser asks whether a script may send a request (Fetch standard, CORS-preflight)."""
    return request.field("origin") is not None and request.field("access-control-request-method") is not None


def tightness(verdict: Verdict) -> tuple[bool, float]:
    """Sorts what is closest to exhaustion first: refusals, then the smallest part left."""
    if not verdict.allowed:
        return (False, -verdict.retry_ns)
    return (True, verdict.remaining / verdict.limit)
