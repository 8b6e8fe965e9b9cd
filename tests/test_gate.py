"""The core, tested by sending it replies: no store, no server, no loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from werkzeug.local import LocalProxy

from gatekeeper.commands import Call, Hits, Verdict, arun, run
from gatekeeper.errors import StoreError
from gatekeeper.gate import Gate
from gatekeeper.http.message import ScopeRequest
from gatekeeper.http.routes import Pattern
from gatekeeper.identity import Identity
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import OnError, Rule
from gatekeeper.ticket import Ticket

DOWN = StoreError("down")


class Asked(ScopeRequest, Ticket):
    """A ticket over a scope, as the ASGI shell has one."""


def request(path: str = "/", method: str = "GET") -> Asked:
    return Asked({"method": method, "path": path, "headers": [], "client": ("192.0.2.1", 1)})


def allowed(remaining: int = 1, receipt: int = 7) -> Verdict:
    return Verdict(True, 2, remaining, 5 * 10**9, 0, receipt)


def untouched() -> Verdict:
    return Verdict(True, 2, 2, 0, 0, None)


def refused(wait: int = 5) -> Verdict:
    return Verdict(False, 2, 0, wait * 10**9, wait * 10**9, None)


def rule(name: str = "one", **more: Any) -> Rule:
    return Rule(name, [Rate(2, 60)], **more)


def answer(steps: Any, *replies: object) -> tuple[list[Any], Any]:
    """Drive steps with these replies; the questions that were asked, and the result."""
    questions = []
    try:
        question = next(steps)
        for reply in replies:
            questions.append(question)
            question = steps.send(reply)
        questions.append(question)
        raise AssertionError(f"more is asked: {questions}")
    except StopIteration as stop:
        return questions, stop.value


def admit(gate: Gate, *replies: object, ticket: Ticket | None = None) -> tuple[list[Any], Ticket]:
    ticket = ticket or request()
    questions, ticket.refused = answer(gate.admit(ticket), *replies)
    return questions, ticket


def test_all_matching_rules_are_asked_in_one_batch_in_the_order_of_the_settings() -> None:
    rules = [rule("a"), rule("b", pattern=Pattern("/other")), rule("c", pattern=Pattern("/"), cost=2)]
    (batch,), ticket = admit(Gate(rules, Identity()), [allowed(), allowed()])
    assert [(limit.name, key, cost) for limit, key, cost in batch] == [("a", "192.0.2.1", 1), ("c", "192.0.2.1", 2)]
    assert ticket.allowed
    assert [charge.limit.name for charge in ticket.charges] == ["a", "c"]


def test_nothing_is_asked_where_no_rule_matches() -> None:
    questions, ticket = admit(Gate([rule(pattern=Pattern("/other"))], Identity()))
    assert questions == []
    assert ticket.allowed
    assert ticket.tightest is None
    assert ticket.gate.respond(ticket) == []


def test_the_field_is_of_the_rule_closest_to_exhaustion_in_any_order() -> None:
    for remaining in ((0, 1), (1, 0)):
        gate = Gate([rule("a"), rule("b")], Identity())
        _, ticket = admit(gate, [allowed(left) for left in remaining])
        nearest = "ab"[remaining.index(0)]
        assert ticket.tightest is not None
        assert ticket.tightest.limit.name == nearest
        assert gate.respond(ticket) == [
            (b"ratelimit", b'"%b";r=0;t=5' % nearest.encode()),
            (b"ratelimit-policy", b'"a";q=2;w=60, "b";q=2;w=60'),
        ]


def test_a_refusal_tells_the_longest_wait_of_those_that_refused() -> None:
    gate = Gate([rule("a"), rule("b"), rule("c")], Identity())
    _, ticket = admit(gate, [refused(3), untouched(), refused(9)])
    answer = gate.refusal(ticket)
    assert (answer.status, dict(answer.fields)[b"retry-after"]) == (429, b"9")
    assert b'"violated-policies": ["a", "c"]' in answer.body


def test_waits_are_rounded_up_and_are_never_nought() -> None:
    gate = Gate([rule("a")], Identity())
    for wait, told in ((1, b"1"), (10**9, b"1"), (10**9 + 1, b"2"), (0, b"1")):
        _, ticket = admit(gate, [Verdict(False, 2, 0, wait, wait, None)])
        assert dict(gate.refusal(ticket).fields)[b"retry-after"] == told


def test_a_cost_that_never_fits_is_not_told_to_wait() -> None:
    gate = Gate([rule("a")], Identity())
    _, ticket = admit(gate, [Verdict(False, 2, 2, 0, 1 << 62, None)])
    assert b"retry-after" not in dict(gate.refusal(ticket).fields)


@pytest.mark.parametrize(("on_error", "status"), [("allow", 0), ("deny", 503)])
def test_a_store_that_does_not_answer_is_decided_by_policy_and_counted(on_error: OnError, status: int) -> None:
    gate = Gate([rule("a", on_error=on_error)], Identity())
    _, ticket = admit(gate, [DOWN])
    assert ticket.refused == status
    assert gate.failures == {f"a:{on_error}": 1}
    if status:
        refusal = gate.refusal(ticket)
        assert refusal.status == 503
        assert b"temporary-reduced-capacity" in refusal.body
        assert dict(refusal.fields)[b"retry-after"] == b"1"
        assert dict(refusal.fields)[b"ratelimit"] == b'"a";r=0;t=1', "no earlier than Retry-After"
    else:
        assert ticket.charges == []
        assert gate.respond(ticket) == []


def test_the_default_is_to_count_in_this_process_while_the_store_does_not_answer() -> None:
    gate = Gate([rule("a", workers=2)], Identity())
    (_, local), ticket = admit(gate, [DOWN], [allowed()])
    assert local.local
    assert [(limit.algorithm.limit, key) for limit, key, _ in local] == [(1, "192.0.2.1")], "its share of the limit"
    assert ticket.allowed
    _, ticket = admit(gate, [DOWN], [refused()])
    assert ticket.refused == 429
    assert gate.failures == {"a:local": 2}


def test_when_a_stand_in_refuses_what_the_store_has_admitted_is_given_back() -> None:
    gate = Gate([rule("a"), rule("b")], Identity())
    (_, local, gives), ticket = admit(gate, [allowed(receipt=11), DOWN], [refused()], [])
    assert local.local
    assert not gives.local
    assert [(limit.name, receipt) for limit, _, _, receipt in gives.gives] == [("a", 11)]
    assert ticket.refused == 429


def test_a_denial_gives_back_what_stand_ins_and_store_admitted_each_to_its_own() -> None:
    gate = Gate([rule("a"), rule("b"), rule("c", on_error="deny")], Identity())
    questions, ticket = admit(gate, [allowed(receipt=1), DOWN, DOWN], [allowed(receipt=2)], [], [])
    gives = [(batch.local, [receipt for *_, receipt in batch.gives]) for batch in questions[2:]]
    assert gives == [(False, [1]), (True, [2])]
    assert ticket.refused == 503


def test_a_refusal_on_the_way_gives_nothing_back_for_the_application_has_run() -> None:
    gate = Gate([rule("a")], Identity())
    _, ticket = admit(gate, [allowed(receipt=3)])
    (batch,), refused_with = answer(gate.extend(ticket, (rule("deep"),)), [refused()])
    assert [limit.name for limit, _, _ in batch] == ["deep"]
    assert refused_with == 429
    assert not ticket.refused, "the request itself was admitted"
    assert ticket.tightest is not None
    assert ticket.tightest.limit.name == "deep"
    assert gate.respond(ticket)[1] == (b"ratelimit-policy", b'"a";q=2;w=60, "deep";q=2;w=60')


def test_a_function_called_again_and_again_is_told_once() -> None:
    gate = Gate([rule("a")], Identity())
    _, ticket = admit(gate, [allowed(receipt=3)])
    deep = rule("deep")
    for left in (9, 8, 7):
        answer(gate.extend(ticket, (deep,)), [allowed(left)])
    assert [(charge.limit.name, charge.verdict.remaining) for charge in ticket.charges] == [("a", 1), ("deep", 7)]
    assert len(ticket.rules) == 2


@pytest.mark.parametrize(
    ("outcomes", "status", "given"),
    [
        (["5xx"], 503, True), (["5xx"], 500, True), (["5xx"], 499, False), (["404"], 404, True), (["404"], 400, False),
        (["disconnect"], None, True), (["disconnect"], 200, False), (["2xx", "3xx"], 302, True), (["2xx"], None, False),
    ],
)  # fmt: skip
def test_an_outcome_that_does_not_count_is_given_back_once(
    outcomes: list[str], status: int | None, given: bool
) -> None:
    gate = Gate([rule("a", gives_back=outcomes), rule("b")], Identity())
    _, ticket = admit(gate, [allowed(receipt=1), allowed(receipt=2)])
    ticket.sent, ticket.ended = status or 200, status is not None
    questions, _ = answer(gate.finish(ticket), *[[]] * given)
    assert [[receipt for *_, receipt in batch.gives] for batch in questions] == [[1]] * given
    assert answer(gate.finish(ticket)) == ([], None)


def test_the_user_is_asked_once_and_only_if_a_rule_counts_by_user() -> None:
    def function(request: object) -> int:
        return 42

    identity = Identity(user=function)
    rules = (rule("a", keys=["user"]), rule("b", keys=["user", "ip"]))
    (call, batch), ticket = admit(Gate(rules, identity), 42, [allowed(), allowed()])
    assert isinstance(call, Call)
    assert (call.function, call.argument) == (function, ticket)
    assert [key for _, key, _ in batch] == ["=42", "2=42|9=192.0.2.1|"]
    (only,), _ = admit(Gate([rule("c")], identity), [allowed()])
    assert not isinstance(only, Call)


def test_values_that_look_alike_are_different_keys() -> None:
    keys = set()
    for first, second in (("a", "b"), ("a|1=b", ""), ("ab", ""), ("", "ab"), (None, "b"), ("a", None)):
        headers = [(name, value.encode()) for name, value in ((b"x", first), (b"y", second)) if value is not None]
        scope = {"method": "GET", "path": "/", "headers": headers, "client": ("192.0.2.1", 1)}
        gate = Gate([rule(keys=["header:x", "header:y"])], Identity())
        (batch,), _ = answer(gate.admit(Asked(scope)), [allowed()])
        keys.add(batch[0][1])
    # An empty field counts as a missing one.
    assert len(keys) == 6


def test_run_refuses_an_asynchronous_function_and_leaves_no_coroutine_behind() -> None:
    async def user(request: object) -> str:
        return "ada"

    def steps() -> Any:
        return (yield Call(user, None))

    with pytest.raises(TypeError, match="asynchronous"):
        run(steps(), lambda batch: [])


@pytest.mark.parametrize("value", ["ada", None, False, 7])
def test_a_proxy_that_a_function_returns_is_what_it_stands_for(value: object) -> None:
    async def proxy(request: object) -> Any:
        return LocalProxy(lambda: value)

    def steps(function: Any) -> Any:
        return (yield Call(function, None))

    async def never(batch: Hits) -> Any:
        raise AssertionError

    assert run(steps(lambda _: LocalProxy(lambda: value)), lambda batch: []) is value
    assert asyncio.run(arun(steps(lambda _: LocalProxy(lambda: value)), never)) is value
    assert asyncio.run(arun(steps(proxy), never)) is value


def test_arun_awaits_asynchronous_functions_and_takes_others_as_they_are() -> None:

    async def user(request: object) -> str:
        return "ada"

    def steps(function: Any) -> Any:
        return (yield Call(function, "x"))

    async def never(batch: Hits) -> Any:
        raise AssertionError

    assert asyncio.run(arun(steps(user), never)) == "ada"
    assert asyncio.run(arun(steps(len), never)) == 1
