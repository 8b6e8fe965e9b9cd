"""What clients are told: the fields of responses, and the answers that refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gatekeeper.commands import Verdict
from gatekeeper.http.fields import Fields, wants_problem
from gatekeeper.ratelimit.fields import (
    BANNED,
    NO_SESSION,
    Manner,
    common_fields,
    older_fields,
    own_body,
    policy_field,
    refusal_body,
    retry_seconds,
)
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.ticket import Refusal, Ticket, tightness


class Answers:
    """A policy's answers, of what its tickets have gathered. `manner`: how clients are told."""

    __slots__ = ("_is_usual", "_manner", "_policies", "_told")

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._is_usual = manner.fields and manner.x_ratelimit is None
        self._told = manner.fields or manner.x_ratelimit is not None
        self._policies: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def respond(self, ticket: Ticket) -> Fields:
        """The fields to add to a response, before its head is sent.

        `RateLimit` of the charge closest to exhaustion, and `RateLimit-Policy` of all that applied.
        """
        hits = ticket.hits
        if len(hits) == 1 and self._is_usual and (alone := hits[0][0].alone) is not None:  # type: ignore[attr-defined]
            verdict = ticket.verdicts[0]
            seconds = (verdict.reset_ns + 999_999_999) // 1_000_000_000
            return [(b"ratelimit", alone[0] % (verdict.remaining, seconds)), alone[1]]
        if not hits or not self._told:
            return []
        place, verdicts, rules = 0, ticket.verdicts, ticket.rules
        if len(hits) > 1:
            places = [place for place, hit in enumerate(hits) if hit[0].told]  # type: ignore[attr-defined]
            if not places:
                return []
            place = min(places, key=lambda place: tightness(verdicts[place]))
        limit, verdict = hits[place][0], verdicts[place]
        if not limit.told:  # type: ignore[attr-defined]  # a gate asks only of RateLimits
            return []
        older = [] if self._manner.x_ratelimit is None else older_fields(verdict, self._manner)
        if not self._manner.fields:
            return older
        # Seconds are rounded up: what `t` promises is there when it has passed.
        seconds = (verdict.reset_ns + 999_999_999) // 1_000_000_000
        return [
            (b"ratelimit", limit.item % (verdict.remaining, seconds)),  # type: ignore[attr-defined]
            self._policies.get(rules) or self._policy(ticket),
            *older,
        ]

    def respond_in_text(self, ticket: Ticket) -> list[tuple[str, str]]:
        """As `respond`, for homes whose fields are texts."""
        hits = ticket.hits
        if len(hits) == 1 and self._is_usual and (alone := hits[0][0].alone_in_text) is not None:  # type: ignore[attr-defined]
            verdict = ticket.verdicts[0]
            seconds = (verdict.reset_ns + 999_999_999) // 1_000_000_000
            return [("ratelimit", alone[0] % (verdict.remaining, seconds)), alone[1]]
        return [(name.decode(), value.decode()) for name, value in self.respond(ticket)]

    def refusal(self, ticket: Ticket, verdict: Verdict | None = None) -> Refusal:
        """The answer to a request whose ticket is not allowed, or that `verdict` of another limit refused."""
        manner = self._manner
        refused = [charge for charge in ticket.charges if not charge.verdict.allowed and not charge.limit.shadow]
        status = ticket.refused or 429
        verdicts = [charge.verdict for charge in refused]
        retry = retry_seconds([verdict] if verdict is not None and not verdicts else verdicts)
        if status not in (429, 503):
            retry = None
        elif retry is not None and manner.jitter:
            retry += round(manner.draw() * manner.jitter)
        violated = list(dict.fromkeys(charge.limit.name for charge in refused))
        if manner.body is not None:
            kind, body = own_body(manner, violated, retry, status)
        else:
            told: tuple[str | None, str, str] | None = None
            if status == 429 and any(charge.limit.kind == "penalty" for charge in refused):
                told = BANNED
            elif status == 503 and ticket.session is not None and ticket.session.failure is not None:
                told = NO_SESSION
            problem = wants_problem(ticket.field("accept"))
            kind, body = refusal_body(violated, retry, status=status, problem=problem, told=told)
        refusal = Refusal(status, common_fields(retry, kind, body) + self.respond(ticket), body)
        return refusal if manner.handler is None else handled(manner.handler, ticket, refusal)

    def _policy(self, ticket: Ticket) -> tuple[bytes, bytes]:
        key: tuple[Any, ...] = ticket.rules
        if not all(rule.is_plain for rule in ticket.rules):
            key = tuple(dict.fromkeys(hit[0] for hit in ticket.hits if hit[0].told))  # type: ignore[attr-defined]
        policy = self._policies.get(key)
        if policy is None:
            # There are as many as ways through decorated functions: few, but a body may choose its way.
            if len(self._policies) >= 1024:
                self._policies.clear()
            limits = [limit for one in key for limit in (one.limits if isinstance(one, Rule) else [one])]
            policy = self._policies[key] = policy_field(limits)
        return policy


def handled(handler: Callable[[Any, Any], Any], ticket: Ticket, refusal: Refusal) -> Refusal:
    """What a handler of the settings makes of a refusal. Raises TypeError unless it is a Refusal."""
    answer = handler(ticket, refusal)
    if not isinstance(answer, Refusal):
        raise TypeError(f"response.handler: expected a Refusal to be returned, and not {type(answer).__name__}")
    return answer
