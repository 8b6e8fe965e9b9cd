"""The flow of one request, as generators that ask and return: admit, extend, respond, finish.

Nothing here waits, reads a clock or knows a framework. `gatekeeper.commands.run` and `arun` drive it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol
from unicodedata import normalize

from gatekeeper.answers import Answers
from gatekeeper.commands import Batch, Body, Call, Give, Hit, Hits, Limit, Read, Replies, Steps, Verdict, run
from gatekeeper.errors import StoreError
from gatekeeper.http.addresses import Address, Networks
from gatekeeper.http.bodies import AmbiguousField, form_field, json_field, parsed_field
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import Request
from gatekeeper.http.parts import Part, as_text, bearer_token
from gatekeeper.http.routes import Pattern, Router, Table
from gatekeeper.identity import Identity
from gatekeeper.ratelimit.fields import (
    DEFAULT_MANNER,
    Manner,
)
from gatekeeper.ratelimit.rates import MOST
from gatekeeper.ratelimit.rules import RateLimit, Rule, outcome_matches
from gatekeeper.sessions.tokens import TokenError
from gatekeeper.ticket import Charge, Ticket
from gatekeeper.upstreams.pool import Pool, Upstream

if TYPE_CHECKING:
    from gatekeeper.affinity import Affinity
    from gatekeeper.sessions.flow import Sessions
    from gatekeeper.sessions.foreign import Bearer
    from gatekeeper.sessions.vouchers import Vouchers

DENIED_WAIT_NS: Final = 1_000_000_000
"""How long a client is told to wait when a rule denies because its store does not answer."""


_LONGEST_FOLDED: Final = 1024
"""Characters of a field of the body that are normalised: it takes up to the square of their number."""


class Access(NamedTuple):
    """Networks that are never limited, and such as are not answered; who is in both is answered."""

    allow: Networks
    deny: Networks


class Leases(Protocol):
    """Where tickets are kept whose leases must be renewed while they last."""

    def add(self, ticket: Ticket) -> None: ...

    def discard(self, ticket: Ticket) -> None:
        """After this the receipts of the ticket's verdicts are nobody else's."""


class Destination(NamedTuple):
    """Where a route leads: a pool, by what its policy hashes requests, and how long it is waited for (seconds).

    `by_user` tells that the user has to be asked for: the key is made of it, or the upstreams are told; `vouches`,
    that they are. `affinity`: how clients keep to their upstreams, if they do.
    """

    pool: Pool
    key: Part | None
    by_user: bool
    connect_timeout: float
    response_timeout: float
    read_timeout: float
    idle_timeout: float
    vouches: bool = False
    affinity: Affinity | None = None


class Gate:
    """A policy, compiled: the same for every request until another gate takes its place.

    - `rules`, in the order of the settings
    - `manner`: how clients are told
    - `routes`: where a gateway sends requests; an application's middleware has none
    - `access`: who is let through, or turned away, whatever the rules
    - `leases`: keeps the tickets whose leases have to be renewed
    - `most_body`: so many bytes of a body are read for the fields that rules count by
    - `failures`: how often a rule was decided without its store, by "rule:policy"
    - `shadowed`: how often a rule in shadow mode would have refused, by its name
    - `unpinned`: how often a pin was not kept, by "pool:why": forged, expired, foreign, repeated; full; or moved
      (its upstream is ejected, gone, or did not answer)
    - `off`: whether nothing is charged, not even by decorators
    """

    __slots__ = (
        "_access", "_always", "_asks", "_claims", "_direct", "_hashes_user", "_identity", "_leases", "_messages",
        "_most_body", "_overrides", "_table", "_undone", "bearer", "close_code", "failures", "keeper", "off",
        "pin_cookies", "pin_fields", "reads_body", "refusal", "reports", "respond", "respond_in_text", "route",
        "rules", "sessions", "shadowed", "unpinned", "vouchers", "vouching",
    )  # fmt: skip

    def __init__(
        self,
        rules: Iterable[Rule],
        identity: Identity,
        *,
        manner: Manner = DEFAULT_MANNER,
        routes: Iterable[tuple[Pattern, Destination]] = (),
        access: Access | None = None,
        leases: Leases | None = None,
        most_body: int = 65_536,
    ) -> None:
        routes = list(routes)
        self.route: Callable[[Request], Destination | None] = Router(routes).find
        """Where a request goes; None if no route is for it."""
        self.rules = tuple(rules)
        self.failures: Counter[str] = Counter()
        self.shadowed: Counter[str] = Counter()
        self.unpinned: Counter[str] = Counter()
        pinning = [one.affinity for _, one in routes if one.affinity is not None]
        self.pin_cookies = frozenset(one.cookie for one in pinning if one.cookie is not None)
        """The cookies that hold pins, of all pools: no upstream sees them."""
        self.pin_fields = frozenset(one.field for one in pinning if one.field is not None)
        """The fields of requests that do, in lower case."""
        self.off = False
        self.sessions: Sessions | None = None
        """What is remembered of clients."""
        self.bearer: Bearer | None = None
        """Reads the tokens of an identity provider that say who the user is."""
        self.vouchers: Vouchers | None = None
        """Reads what a gateway in front vouches for."""
        self.vouching: Vouchers | None = None
        """Writes it, for upstreams that are told."""
        self.keeper: Any = None
        """Whose gate this is, for guards that find it by a request's ticket."""
        self._identity = identity
        answers = Answers(manner)
        self.respond = answers.respond
        self.respond_in_text = answers.respond_in_text
        self.refusal = answers.refusal
        self.close_code = manner.close_code
        """The close code of a WebSocket that a limit ends."""
        self._access = access
        self._leases = leases
        self._most_body = most_body
        self._direct = identity.direct
        self._table = Table((rule.pattern, rule) for rule in self.rules if not rule.messages)
        self._messages = Table((rule.pattern, rule) for rule in self.rules if rule.messages)
        self._overrides = any(rule.overrides for rule in self.rules)
        self._undone: dict[tuple[Rule, ...], tuple[Rule, ...]] = {}
        # Where no rule has a pattern all of them apply to each request.
        self._always = self._remaining(self._table.always or ())
        # Whom the user is to be asked for: for some pool, thus always; for some rule, where it applies.
        self._hashes_user = any(destination.by_user for _, destination in routes)
        # Whether a request may need more than one batch.
        self._asks = self._hashes_user or access is not None or any(rule.asks for rule in self.rules)
        self.reads_body = any(rule.body_fields for rule in self.rules)
        """Whether some rule counts by a field of the body."""
        self.reports: Mapping[str, tuple[str, ...]] = _reports(self.rules)
        """The fields of responses, in lower case, that tell the real cost of a request; for which rules."""
        # The claims that rules name, and so those that an application's rules may ask for, too.
        self._claims = sorted({name for rule in self.rules for name in rule.claims})

    def address(self, request: Request) -> str:
        """The name under which the client is counted."""
        return self._identity.address(request)

    def ip(self, request: Request) -> Address | None:
        """The client's address itself; None if it has none."""
        return self._identity.ip(request)

    def spares(self, request: Request) -> bool:
        """Whether the client is of a network that is never limited."""
        return self._access is not None and self._identity.ip(request) in self._access.allow

    def api_key(self, request: Request) -> str | None:
        """The API key that the client sent."""
        return self._identity.api_key(request)

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer is a proxy whose word on the client is believed."""
        return self._identity.trusts(peer)

    def admit(self, ticket: Ticket) -> Steps[int]:
        """Identify the client and charge the rules that match.

        The result is for `Ticket.refused`: 0, or the status to refuse the request with.
        """
        rules = self._begin(ticket)
        if self._access is not None and self._look_up(ticket):
            return 403
        if self._hashes_user and not ticket.asked_user:
            yield from self._ask_user(ticket)
        return (yield from self.extend(ticket, rules))

    def admit_at_once(
        self, ticket: Ticket, ask: Callable[[Hits], Replies], read: Callable[[int], Body] | None = None
    ) -> int:
        """`admit`, for a store that does not wait: a request that one batch decides costs no generator.

        (The generator and its driver are a tenth of all that a request costs.)
        """
        if self._asks:
            return run(self.admit(ticket), ask, read)
        rules = self._begin(ticket)
        if not rules:
            return 0
        if len(rules) == 1 and (spend := rules[0].hit) is not None:
            rule = rules[0]
            key = ticket.address if rule.by_address else rule.key(ticket)
            answer = spend(key)
            hit: Hit = (rule.limits[0], key, 1)
            if not answer.allowed:
                return run(self._settle(ticket, rules, [hit], [answer]), ask)
            ticket.rules, ticket.hits, ticket.verdicts = rules, (hit,), (answer,)
            return 0
        hits = self._hits(ticket, rules)
        if not hits:
            ticket.rules = rules
            return 0
        verdicts = ask(hits)
        for verdict in verdicts:
            if not verdict.allowed:
                return run(self._settle(ticket, rules, hits, verdicts), ask)
        ticket.rules, ticket.hits, ticket.verdicts = rules, hits, verdicts  # type: ignore[assignment]
        if ticket.is_open:
            self._hold(ticket)
        return 0

    def extend(self, ticket: Ticket, rules: tuple[Rule, ...]) -> Steps[int]:
        """Charge a request for rules: those that match, later those of decorators on its way.

        All of these or none. What was charged before stays charged: the application has run for it since, and
        were it given back, a client refused within would be let in for ever.
        """
        if not rules or self.off or ticket.spared:
            return 0
        if any(rule.asks for rule in rules):
            ticket.waiting_rules = rules
            status = yield from self._ask(ticket, rules)
            if status:
                return status
        hits = self._hits(ticket, rules)
        if not hits:
            ticket.rules = (*ticket.rules, *rules)
            return 0
        gives = _again(ticket, hits)
        verdicts: Replies = yield Batch(hits, gives=gives) if gives else hits
        return (yield from self._settle(ticket, rules, hits, verdicts))

    def look(self, ticket: Ticket) -> Batch | None:
        """What can be asked of a store while an admission waits for the user, spending nothing; None if nothing.

        So that who is over the limit of an address costs no look-up of a user, where that is made known late.
        """
        rules = _knowing(ticket.waiting_rules)
        return Batch(self._hits(ticket, rules), spend=False) if rules else None

    def extend_at_once(self, ticket: Ticket, rule: Rule, ask: Callable[[Hits], Replies]) -> bool:
        """`extend` by one plain rule, for a store that does not wait, as `admit_at_once` is `admit`.

        False where it is not so simple: then nothing was spent, and `extend` has to decide.
        """
        if ticket.spared or self.off:
            return False
        for hit in ticket.hits:
            if hit[0].space in rule.spaces:
                return False
        hits: Any
        verdicts: Any
        spend = rule.hit
        if spend is not None:
            key = ticket.address if rule.by_address else rule.key(ticket)
            verdict = spend(key)
            if not verdict.allowed:
                return False
            hits, verdicts = ((rule.limits[0], key, 1),), (verdict,)
        elif not rule.is_plain or rule.asks:
            return False
        else:
            key, cost = rule.key(ticket), rule.cost
            hits = [(limit, key, cost) for limit in rule.limits]
            verdicts = ask(hits)
            for verdict in verdicts:
                if not verdict.allowed:
                    return False
        if ticket.hits:
            ticket.rules = (*ticket.rules, rule)
            ticket.hits = [*ticket.hits, *hits]
            ticket.verdicts = [*ticket.verdicts, *verdicts]
        else:
            ticket.rules, ticket.hits, ticket.verdicts = (*ticket.rules, rule), hits, verdicts
        return True

    def message_rules(self, ticket: Ticket) -> tuple[Rule, ...]:
        """The rules for the messages that a client sends within a WebSocket; `ticket` is its handshake's."""
        return () if self.off or ticket.spared else self._messages.match(ticket)

    def message(self, ticket: Ticket, rules: tuple[Rule, ...]) -> Steps[bool]:
        """Charge one message of a WebSocket for the rules of its messages. Whether it may go on."""
        if any(rule.asks for rule in rules):
            yield from self._ask(ticket, rules)
        hits = self._hits(ticket, rules)
        if not hits:
            return True
        verdicts: Replies = yield hits
        if all(verdict.allowed for verdict in verdicts):
            return True
        refused, _, _ = yield from self._refuse(hits, verdicts)
        return not refused

    def identify(self, ticket: Ticket) -> None:
        """Begin a request: who is asking. `admit` does it; a guard of a request that nobody admitted must."""
        self._begin(ticket)
        if self._access is not None:
            self._look_up(ticket)

    def _begin(self, ticket: Ticket) -> tuple[Rule, ...]:
        """Identify the client; the rules that match."""
        ticket.gate = self
        # On the instance, for what only its class has takes longer to read, and these are read for each message.
        ticket.replaced, ticket.is_open, ticket.hits = False, False, ()
        # A client that is its own peer, and was seen before, is one look-up.
        ticket.address = self._direct.get(ticket.peer) or self._identity.address(ticket)
        if self.sessions is not None and ticket.session is None:
            ticket.session = self.sessions.open(ticket, blocking=ticket.blocking)
        rules = self._always or (self._table.match(ticket) if self.rules else ())
        if self._overrides:
            rules = self._remaining(rules)
        if self.vouchers is not None and self._identity.trusts(ticket.peer):
            rules = self._vouched(ticket, rules, self.vouchers)
        if rules and ticket.method == "OPTIONS" and is_preflight(ticket):
            rules = tuple(rule for rule in rules if rule.preflights)
        return rules

    def _vouched(self, ticket: Ticket, rules: tuple[Rule, ...], vouchers: Vouchers) -> tuple[Rule, ...]:
        """Believe a gateway's word: the rules that are still to be charged."""
        try:
            vouched = vouchers.read(ticket)
        except TokenError:
            self.failures["identity"] += 1
            return rules
        if vouched is None:
            return rules
        if vouched.user is not None:
            ticket.user, ticket.claims, ticket.asked_user = vouched.user, vouched.claims, True
        return tuple(rule for rule in rules if rule.digest not in vouched.charged)

    def vouch(self, ticket: Ticket) -> bytes | None:
        """What to tell an upstream of the client in the field Gatekeeper-Identity; None if it is told nothing.

        Nor is it told of a user whose claims no field can hold: it finds out for itself. That is counted.
        """
        if self.vouching is None:
            return None
        claims = {name: ticket.claims[name] for name in self._claims if name in ticket.claims}
        charged = [rule.digest for rule in ticket.rules]
        try:
            return self.vouching.write(ticket, ticket.user, claims, charged).encode("ascii")
        except ValueError:  # they are of a session, or of a provider's token: the user may have chosen them
            self.failures["identity"] += 1
            return None

    def _look_up(self, ticket: Ticket) -> bool:
        """Whether the client's network is denied; the ticket learns whether it is allowed, which outweighs that."""
        if self._access is None:
            return False
        ip = self._identity.ip(ticket)
        ticket.spared = ip in self._access.allow
        return not ticket.spared and ip in self._access.deny

    def _remaining(self, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        """Rules without those that another of them overrides."""
        remaining = self._undone.get(rules)
        if remaining is None:
            if len(self._undone) >= 1024:  # a client may choose among many
                self._undone.clear()
            overridden = frozenset[str]().union(*(rule.overrides for rule in rules))
            remaining = self._undone[rules] = tuple(rule for rule in rules if rule.name not in overridden)
        return remaining

    def _ask(self, ticket: Ticket, rules: tuple[Rule, ...]) -> Steps[int]:
        """Find out what rules need to know of a request. 0, or the status to refuse it with."""
        if not ticket.asked_user and any(rule.needs_user for rule in rules):
            yield from self._ask_user(ticket)
        answers = dict(ticket.answers)
        ticket.answers = answers
        for rule in rules:
            for function in rule.functions:
                if function not in answers:
                    answers[function] = yield Call(function, ticket)
        fields = {field for rule in rules for field in rule.body_fields} - answers.keys()
        if fields:
            # Who is over another limit is not waited for: a body may come slowly, or never.
            knowing = _knowing(rules)
            if knowing:
                look = self._hits(ticket, knowing)
                verdicts: Replies = yield Batch(look, spend=False)
                if any(isinstance(verdict, Verdict) and not verdict.allowed for verdict in verdicts):
                    return (yield from self._settle(ticket, knowing, look, verdicts))
            body: Body = yield Read(self._most_body)
            if body is None:
                return 413
            try:
                for kind, name in fields:
                    if not isinstance(body, bytes):
                        found = parsed_field(body, name) if kind == "form" else None
                    elif kind == "json":
                        found = json_field(body, name)
                    else:
                        found = form_field(ticket.fields("content-type"), body, name)
                    answers[kind, name] = folded(found)
            except AmbiguousField:
                return 400
        return 0

    def _hits(self, ticket: Ticket, rules: tuple[Rule, ...]) -> list[Hit]:
        """A hit for each rate of each rule."""
        hits: list[Hit] = []
        for rule in rules:
            if rule.is_plain:
                key = ticket.address if rule.by_address else rule.key(ticket)
                cost = rule.cost
                for limit in rule.limits:
                    hits.append((limit, key, cost))  # type: ignore[arg-type]  # a plain rule's cost is a number
            elif rule.exempt is None or not rule.exempt.covers(ticket):
                self._add_hits(hits, ticket, rule)
        return hits

    def _add_hits(self, hits: list[Hit], ticket: Ticket, rule: Rule) -> None:
        limits = rule.limits_of(ticket)
        if not limits:
            return
        key, cost = rule.key(ticket), rule.cost_of(ticket)
        if rule.is_open:
            ticket.is_open = True
        if rule.penalty is not None:
            hits.append((rule.penalty, key, 0))  # a look: whether the key is banned
        for limit in limits:
            if rule.is_shared:
                _add_shared(hits, ticket, limit, key, cost)
            else:
                hits.append((limit, key, cost))

    def _settle(self, ticket: Ticket, rules: tuple[Rule, ...], hits: list[Hit], verdicts: Replies) -> Steps[int]:
        """Keep what was decided on the ticket, once what no store decided is decided too."""
        refused = 0
        for verdict in verdicts:
            if not verdict.allowed:
                refused, hits, verdicts = yield from self._refuse(hits, verdicts)
                break
        if ticket.hits:
            # Those of a decorator come last; of a function called again only its last call is told. (What is still
            # to be undone is kept, though.)
            earlier = [
                (hit, verdict)
                for hit, verdict in zip(ticket.hits, ticket.verdicts, strict=True)
                if hit[0].rule not in rules or hit[0].rule.is_open  # type: ignore[attr-defined]
            ]
            hits = [hit for hit, _ in earlier] + hits
            verdicts = [*(verdict for _, verdict in earlier), *verdicts]
            rules = tuple(rule for rule in ticket.rules if rule not in rules) + rules
        ticket.rules = rules
        ticket.hits = hits
        ticket.verdicts = verdicts  # type: ignore[assignment]  # no StoreError is left
        if ticket.is_open:
            self._hold(ticket)
        return refused

    def _hold(self, ticket: Ticket) -> None:
        """Have the leases of a ticket renewed, if there are any."""
        if self._leases is not None and any(
            hit[0].kind == "concurrency" and verdict.receipt is not None
            for hit, verdict in zip(ticket.hits, ticket.verdicts, strict=True)
        ):
            self._leases.add(ticket)

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
        pool, affinity = destination.pool, destination.affinity
        if affinity is None:
            return pool.choose(key, now, draw)
        held = ticket.held = affinity.read(ticket)
        if held.fault is not None:
            self.unpinned[f"{pool.name}:{held.fault}"] += 1
        if held.pin is None:
            return pool.choose(key, now, draw)
        if pool.is_merely_full(held.pin.id, now):
            ticket.held = held._replace(stays=True)
            self.unpinned[f"{pool.name}:full"] += 1
        return pool.keep(held.pin.id, key, now, strict=affinity.strict)

    def pin(self, ticket: Ticket, destination: Destination, upstream: Upstream, *, ends: bool) -> Fields:
        """The fields that tell a client that it keeps to the upstream that answered; none where that is no news.

        `ends`: whether the application says that it need not any more.
        """
        held, affinity = ticket.held, destination.affinity
        if held is None or affinity is None:
            return []
        if ends:
            return affinity.ended(held)
        if held.pin is not None and held.pin.id != upstream.id and not held.stays:
            self.unpinned[f"{destination.pool.name}:moved"] += 1
        return affinity.kept(held, upstream.id)

    def save(self, ticket: Ticket) -> Steps[Fields]:
        """Write the session of a request before the head of its response is sent: the fields to add to it.

        Raises SessionError; and StoreError where its store does not answer, unless it may be empty then. `refusal`
        is to be the answer in that case: what the application tells the client would not be so.
        """
        session, sessions = ticket.session, self.sessions
        if session is None or sessions is None or session.is_written:
            return []
        try:
            return (yield from sessions.save(session))
        except StoreError:
            ticket.refused = 503
            raise

    def report(self, ticket: Ticket, name: str, value: str) -> None:
        """A field of the response, one of `reports`, tells the real cost. What is no number tells nothing."""
        if value.isascii() and value.isdigit() and len(value) <= 18:
            told = dict.fromkeys(self.reports[name], min(int(value), MOST))
            ticket.settled = {**ticket.settled, **told}

    def finish(self, ticket: Ticket) -> Steps[None]:
        """End a request: what it held is given up, and its charges become what they are by its outcome.

        An answer that neither ended nor failed was broken off: the client left.
        """
        if not ticket.is_open:
            return
        ticket.is_open = False
        if self._leases is not None:
            self._leases.discard(ticket)
        status = ticket.sent if ticket.ended or ticket.sent >= 500 else None
        batches: dict[bool, tuple[list[Give], list[tuple[Limit, str]], Hits]] = {
            False: ([], [], []),
            True: ([], [], []),
        }
        for (limit, key, cost), verdict in zip(ticket.hits, ticket.verdicts, strict=True):
            rule: Rule = limit.rule  # type: ignore[attr-defined]
            if not rule.is_open or limit.kind == "penalty":
                continue
            gives, resets, takes = batches[limit.standin is None]  # type: ignore[attr-defined]
            if verdict.receipt is not None:
                real = cost
                if limit.kind == "concurrency" or outcome_matches(rule.gives_back, status):
                    real = 0
                elif rule.settles is not None:
                    real = ticket.moved if rule.settles == "bytes" else ticket.settled.get(rule.name, cost)
                if real < cost:
                    gives.append((limit, key, cost - real, verdict.receipt))
                    verdict.remaining += cost - real
                elif real > cost:
                    takes.append((limit, key, min(real - cost, MOST)))
                verdict.receipt = None
            if verdict.allowed and outcome_matches(rule.resets_on, status):
                resets.append((limit, key))
        for local, (gives, resets, takes) in batches.items():
            if gives or resets or takes:
                yield Batch(gives=gives, resets=resets, takes=takes, local=local)

    def _ask_user(self, ticket: Ticket) -> Steps[None]:
        identity = self._identity
        ticket.asked_user = True
        if identity.by_session:
            session = ticket.session
            if session is not None and self.sessions is not None:
                yield from self.sessions.load(session)
                ticket.claims, ticket.user = session.held, self.sessions.owner(session.held)
            return
        if self.bearer is not None:
            token = bearer_token(ticket)
            if token is not None:
                now = int(self.bearer.clock())
                claims = yield from self.bearer.tokens.claims(token, now, blocking=ticket.blocking)
                if claims is not None:
                    ticket.claims, ticket.user = claims, as_text(claims.get(self.bearer.claim))
            return
        if identity.user is None:
            ticket.user = identity.named_user(ticket)
            return
        user = yield Call(identity.user, ticket)
        if isinstance(user, Mapping):
            ticket.claims = user
            user = user.get("sub")
        # No text at all and False (of `known and name`) name nobody: else all who are nobody were one.
        named = user is not None and user is not False
        ticket.user = (as_text(user) if isinstance(user, str | int | float) else str(user)) if named else None

    def _refuse(self, hits: list[Hit], verdicts: Replies) -> Steps[tuple[int, list[Hit], Replies]]:
        """Some hit was not allowed: refused, or its store did not answer and the rule's policy decides.

        Returns the status to refuse with (0 if the policy lets pass), and the hits that remain with verdicts.
        """
        kept: list[tuple[Hit, Verdict]] = []
        standins: list[Hit] = []
        denied: list[Hit] = []
        for hit, verdict in zip(hits, verdicts, strict=True):
            if not isinstance(verdict, StoreError):
                kept.append((hit, verdict))
                continue
            limit: RateLimit = hit[0]  # type: ignore[assignment]
            policy = "allow" if limit.shadow else limit.rule.on_error
            self.failures[f"{limit.rule.name}:{policy}"] += 1
            if policy == "deny":
                denied.append(hit)
            elif policy == "local" and limit.standin is not None:
                standins.append((limit.standin, *hit[1:]))
        if standins:
            replies: Replies = yield Batch(standins, local=True)
            for hit, verdict in zip(standins, replies, strict=True):
                assert isinstance(verdict, Verdict)  # the process's own store is memory: it always answers
                kept.append((hit, verdict))
        refused = [hit[0] for hit, verdict in kept if not verdict.allowed]
        for name in {limit.rule.name for limit in refused if limit.shadow}:  # type: ignore[attr-defined]
            self.shadowed[name] += 1
        is_refused = any(not limit.shadow for limit in refused)
        for hit in denied:
            whole = hit[0].algorithm.limit  # type: ignore[attr-defined]
            kept.append((hit, Verdict(False, whole, 0, DENIED_WAIT_NS, DENIED_WAIT_NS, None)))
        if is_refused or denied:
            yield from self._give_back(Charge(*hit, verdict) for hit, verdict in kept)  # type: ignore[arg-type]
        yield from self._strike([hit for hit, _ in kept if hit[0].kind == "penalty"], refused)
        status = 429 if is_refused else 503 if denied else 0
        return status, [hit for hit, _ in kept], [verdict for _, verdict in kept]

    def _strike(self, looks: list[Hit], refused: list[Any]) -> Steps[None]:
        """A refusal is a strike against the key, unless it was banned already."""
        rules = {limit.rule for limit in refused}
        strikes = [
            (limit, key, 1)
            for limit, key, _ in looks
            if limit.rule in rules and limit not in refused  # type: ignore[attr-defined]
        ]
        for local in (False, True):
            batch = Batch([hit for hit in strikes if (hit[0].standin is None) is local], local=local)  # type: ignore[attr-defined]
            if batch:
                yield batch

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


def _knowing(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Those of the rules that can be asked for at once, and of which a look tells all."""
    return tuple(rule for rule in rules if rule.is_plain and not rule.asks)


def _add_shared(hits: list[Hit], ticket: Ticket, limit: RateLimit, key: str, cost: int) -> None:
    """A hit within a scope: of all rules that a request is under there, the greatest cost is charged, once."""
    quota = limit.space, key
    # What was asked for before and refused is not charged: it has no receipt.
    charged = sum(
        spent
        for (other, held, spent), verdict in zip(ticket.hits, ticket.verdicts, strict=True)
        if (other.space, held) == quota and verdict.receipt is not None
    )
    hit: Hit = (limit, key, cost - charged)
    for place, (other, held, least) in enumerate(hits):
        if (other.space, held) == quota:
            if least < cost - charged:
                hits[place] = hit
            return
    if not charged or cost > charged:
        hits.append(hit)


def _again(ticket: Ticket, hits: list[Any]) -> list[Give]:
    """What a request has been charged to the very quotas of these hits, by other rules of that name.

    It is to be given back as they are charged, each with the greater cost: a request spends a quota once.
    """
    gives: list[Give] = []
    charges = ticket.charges if ticket.hits else []
    for place, (limit, key, cost) in enumerate(hits):
        for other, held, spent, verdict in charges:
            if held == key and verdict.receipt is not None and _is_other_for_one_quota(other, limit):
                gives.append((other, held, spent, verdict.receipt))
                verdict.receipt = None
                hits[place] = limit, key, max(cost, spent)
    return gives


def _is_other_for_one_quota(other: RateLimit, limit: RateLimit) -> bool:
    if other.space != limit.space or other.rule is limit.rule or limit.rule.is_shared or other.standin is None:
        return False
    # A token of `gcra` weighs what its rate says: of two rates the lighter would let too much in.
    return limit.kind != "gcra" or other.numbers == limit.numbers


def _reports(rules: Iterable[Rule]) -> dict[str, tuple[str, ...]]:
    reports: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        kind, _, name = (rule.settles or "").partition(":")
        if kind == "header":
            reports[name.lower()] = (*reports.get(name.lower(), ()), rule.name)
    return reports


def folded(text: str | None) -> str | None:
    """A field of the body as a key: to most applications `Bob` and `bob ` log in as the same."""
    if text is None:
        return None
    text = text.strip()
    if len(text) > _LONGEST_FOLDED:
        return text.casefold()
    return normalize("NFKC", normalize("NFKC", text).strip().casefold())


def is_preflight(request: Request) -> bool:
    """A browser asks whether a script may send a request (Fetch standard, CORS-preflight).

    It does so without a body and without credentials. With them it is none: where an application takes any method,
    passwords would else be guessed by OPTIONS, free of charge.
    """
    field = request.field
    return (
        field("origin") is not None
        and field("access-control-request-method") is not None
        and field("content-length") in (None, "", "0")
        and not any(field(name) for name in ("transfer-encoding", "cookie", "authorization"))
    )
