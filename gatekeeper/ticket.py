"""The ticket of a request: what each stage decides of it, gathered in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ReferenceType

from gatekeeper.commands import Hit, Steps, Verdict
from gatekeeper.errors import Limited
from gatekeeper.http.addresses import Address
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import Request
from gatekeeper.ratelimit.rates import MOST
from gatekeeper.ratelimit.rules import RateLimit, Rule

if TYPE_CHECKING:
    from gatekeeper.affinity import Held
    from gatekeeper.sessions.state import Session


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


class Policy(Protocol):
    """What a ticket asks of the gate that made it."""

    off: bool
    rules: tuple[Rule, ...]

    def address(self, request: Request) -> str: ...

    def ip(self, request: Request) -> Address | None: ...

    def spares(self, request: Request) -> bool: ...

    def api_key(self, request: Request) -> str | None: ...

    @property
    def close_code(self) -> int: ...

    @property
    def reports(self) -> Mapping[str, tuple[str, ...]]: ...

    def respond(self, ticket: Ticket) -> Fields: ...

    def respond_in_text(self, ticket: Ticket) -> list[tuple[str, str]]: ...

    def save(self, ticket: Ticket) -> Steps[Fields]: ...

    def report(self, ticket: Ticket, name: str, value: str) -> None: ...

    def message(self, ticket: Ticket, rules: tuple[Rule, ...]) -> Steps[bool]: ...

    def refusal(self, ticket: Ticket, verdict: Verdict | None = None) -> Refusal: ...


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
    - `claims`: what is known of the user besides, where `identity.user` returns more than a name
    - `session`: what is remembered of the client; None without `[session]` in the settings
    """

    gate: Policy
    address: str
    user: str | None = None
    refused: int = 0
    sent: int = 0
    ended: bool = False
    session: Session | None = None
    blocking: bool = False  # whether the home of the request may wait for a store
    held: Held | None = None  # the pin that came, where the pool has affinity
    spared: bool = False  # of a network that is never limited
    replaced: bool = False  # our refusal stands in place of the application's response
    # Rules, hits and verdicts in the order they were asked: a hit for each rate of each rule.
    rules: tuple[Rule, ...] = ()
    hits: Sequence[Hit] = ()
    verdicts: Sequence[Verdict] = ()
    waiting_rules: tuple[Rule, ...] = ()  # those that were to be asked when something had to be found out first
    # Whether `finish` has something to do.
    is_open: bool = False
    asked_user: bool = False
    claims: Mapping[str, Any] = MappingProxyType({})
    # What functions of the settings said of the request, and the fields of its body.
    answers: Mapping[object, Any] = MappingProxyType({})
    # The real costs by rule, as far as they were told; the bytes of the response's body, where they are counted.
    settled: Mapping[str, int] = MappingProxyType({})
    moved: int = 0
    # The refusal of a decorated function, as long as somebody holds it: then it is on its way to us.
    limited: ReferenceType[Limited] | None = None
    # The ticket of another policy that stands around this one.
    outer: Ticket | None = None

    def under(self, gate: Policy) -> Ticket | None:
        """This ticket, or the one of a policy around it, that is of `gate`."""
        ticket: Ticket | None = self
        while ticket is not None and ticket.gate is not gate:
            ticket = ticket.outer
        return ticket

    def of(self, gate: Policy) -> Ticket:
        """A ticket of another gate for the same request, to which nothing has been charged."""
        other = copy(self)
        for name in (
            "user", "claims", "answers", "settled", "refused", "rules", "hits", "verdicts", "is_open",
            "asked_user", "limited",
        ):  # fmt: skip
            other.__dict__.pop(name, None)
        other.gate = gate
        other.address = gate.address(other)
        other.spared = gate.spares(other)
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
    def ip(self) -> Address | None:
        """The client's address itself; None if it has none."""
        return self.gate.ip(self)

    @property
    def api_key(self) -> str | None:
        """The key that the client sent, where `identity.api_key` says. Nobody has checked it."""
        return self.gate.api_key(self)

    def settle(self, cost: int, rule: str | None = None) -> None:
        """Tell the real cost of the request, in the rule's units; the charge becomes that once the response ends.

        `rule`: its name, where several that apply have `settle = "app"`. Told again, the last counts. What the real
        cost is above the charge is spent as far as the quota reaches.

        Where the rule does not apply to the request, or it is exempt, nothing follows of it.

        Raises ValueError if there is no such rule, or if `cost` is not from 0 to 1000000000.
        """
        if not isinstance(cost, int) or isinstance(cost, bool) or not 0 <= cost <= MOST:
            raise ValueError(f"cost: expected an integer from 0 to {MOST}")
        names = _settled_by_app(self.rules, rule)
        if len(names) == 1:
            self.settled = {**self.settled, names[0]: cost}
        elif names or not (self.gate.off or _settled_by_app(self.gate.rules, rule)):
            raise ValueError(
                f'rule: expected the name of one rule with settle = "app"; there are {", ".join(names) or "none"}'
            )

    @property
    def tightest(self) -> Charge | None:
        """The charge closest to exhaustion, or the refusal with the longest wait; None if no rule applied."""
        told = [charge for charge in self.charges if charge.limit.told]
        return min(told, key=lambda charge: tightness(charge.verdict), default=None)

    def __repr__(self) -> str:
        return f"<Ticket {self.method} {self.address}: {list(self.verdicts)}>"


class BareTicket(Ticket):
    """A ticket of no request, or of one of which nothing is known but who sent it."""

    method = path = ""
    native = None

    def __init__(self, peer: str | None = None) -> None:
        self.peer = peer

    def fields(self, name: str) -> list[str]:
        return []

    def field(self, name: str) -> str | None:
        return None

    def query(self) -> str:
        return ""


def _settled_by_app(rules: Iterable[Rule], name: str | None) -> list[str]:
    return [rule.name for rule in rules if rule.settles == "app" and name in (None, rule.name)]


def tightness(verdict: Verdict) -> tuple[bool, float]:
    """Sorts what is closest to exhaustion first: refusals, then the smallest part left."""
    if not verdict.allowed:
        return (False, -verdict.retry_ns)
    return (True, verdict.remaining / verdict.limit)
