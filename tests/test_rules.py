"""What rules of every kind decide, asked of a gate on a virtual clock: keys, costs, tiers, exemptions, bans and so on."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gatekeeper import Gatekeeper, Limited, Refusal, SettingsError
from gatekeeper.commands import run
from gatekeeper.decorators import Guard
from gatekeeper.errors import StoreError
from gatekeeper.http.message import ScopeRequest
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, virtual_store
from gatekeeper.ticket import Ticket
from gatekeeper.upkeep import GREATEST_LIST, start_thread


class Asked(ScopeRequest, Ticket):
    """The ticket of a request, with the body that a shell would read."""

    body = b""


class Policy:
    """A Gatekeeper on a virtual clock, asked for one request after the other."""

    def __init__(self, *limits: Mapping[str, Any], **settings: Any) -> None:
        self.clock = VirtualClock()
        document = {"limits": [{"name": f"rule{place}", **limit} for place, limit in enumerate(limits)], **settings}
        self.keeper = Gatekeeper(document, store=virtual_store(self.clock))

    def begin(
        self, target: str = "/", peer: str = "192.0.2.1", method: str = "GET", body: bytes = b"", **fields: str
    ) -> Asked:
        """Admit a request, and leave it open."""
        path, _, query = target.partition("?")
        ticket = Asked(
            {
                "type": "http", "method": method, "path": path, "query_string": query.encode(), "client": (peer, 1),
                "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()],
            }
        )  # fmt: skip
        ticket.refused = self.keeper.gate.admit_at_once(
            ticket, self.keeper.ask, lambda most: body if len(body) <= most else None
        )
        return ticket

    def end(self, ticket: Ticket, status: int = 200, *, ended: bool = True) -> None:
        ticket.sent, ticket.ended = status, ended
        run(self.keeper.gate.finish(ticket), self.keeper.ask)

    def ask(self, target: str = "/", status: int = 200, **more: Any) -> int:
        """A whole request: 200, or the status that it is refused with."""
        ticket = self.begin(target, **more)
        if not ticket.refused:
            self.end(ticket, status)
        return ticket.refused or 200

    def admitted(self, times: int, *arguments: Any, **more: Any) -> int:
        return sum(self.ask(*arguments, **more) == 200 for _ in range(times))


# Keys


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("ip", {"peer": "192.0.2.1"}, {"peer": "192.0.2.2"}),
        ("ip/24", {"peer": "192.0.2.1"}, {"peer": "192.0.3.1"}),
        ("ip/24/48", {"peer": "2001:db8:1:1::1"}, {"peer": "2001:db8:2::1"}),
        ("api_key", {"x_api_key": "a"}, {"x_api_key": "b"}),
        ("header:X-Tenant", {"x_tenant": "a"}, {"x_tenant": "b"}),
        ("cookie:tenant", {"cookie": "tenant=a"}, {"cookie": "tenant=b"}),
        ("query:q", {"target": "/?q=a"}, {"target": "/?q=b"}),
        ("method", {"method": "GET"}, {"method": "PUT"}),
        ("host", {"host": "a.example"}, {"host": "b.example"}),
        ("json:user.name", {"body": b'{"user": {"name": "a"}}'}, {"body": b'{"user": {"name": "b"}}'}),
        (lambda request: request.field("x-plan"), {"x_plan": "a"}, {"x_plan": "b"}),
        (["ip", "query:q"], {"target": "/?q=a"}, {"target": "/?q=b"}),
    ],
)  # fmt: skip
def test_two_that_differ_in_the_key_have_a_quota_each(key: Any, one: Any, other: Any) -> None:
    policy = Policy({"rate": "2/minute", "key": key})
    assert policy.admitted(4, **one) == 2
    assert policy.admitted(4, **other) == 2
    assert policy.admitted(1, **one) == 0


@pytest.mark.parametrize(
    ("key", "requests"),
    [
        ("ip/24", [{"peer": "192.0.2.1"}, {"peer": "192.0.2.200"}]),
        ("ip/24/48", [{"peer": "2001:db8:1:1::1"}, {"peer": "2001:db8:1:ffff::1"}]),
        ("ip/32", [{"peer": "2001:db8:1:1::1"}, {"peer": "2001:db8:1:1:ffff::1"}]),
        ("global", [{"peer": "192.0.2.1"}, {"peer": "198.51.100.1"}]),
        ("query:q", [{"target": "/?q=%61"}, {"target": "/?x=1&%71=a"}]),
        ("json:name", [{"body": b'{"name": "Bob"}'}, {"body": b'{"name": " bob\\n"}'}]),
        ("json:id", [{"body": b'{"id": 7}'}, {"body": b'{"id": "7"}'}]),
        ("json:id", [{"body": b'{"id": 7}'}, {"body": b'{"id": 7.0}'}]),
        ("json:name", [{"body": b'{"name": "bob"}'}, {"body": b'{"name": "bob", "x": "\xff"}'}]),
        ("json:name", [{"body": b'{"name": "bob"}'}, {"body": '{"name": "bob"}'.encode("utf-16")}]),
    ],
)
def test_two_that_are_the_same_by_the_key_share_a_quota(key: str, requests: list[Any]) -> None:
    policy = Policy({"rate": "2/minute", "key": key})
    assert [policy.ask(**request) for request in (*requests, *requests)] == [200, 200, 429, 429]


FORM = "application/x-www-form-urlencoded"
PARTS = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="name"\r\n\r\nbob\r\n'
    b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n%b\r\n--x--\r\n'
)


def test_a_field_of_a_form_is_a_key_however_the_form_is_encoded() -> None:
    policy = Policy({"rate": "1/minute", "key": "form:name", "match": "POST /login"})
    plain: dict[str, Any] = {"target": "/login", "method": "POST", "content_type": FORM}
    parts: dict[str, Any] = {
        "target": "/login",
        "method": "POST",
        "content_type": 'multipart/form-data; boundary="x"',
    }
    assert policy.ask(body=b"a=1&name=Bob+1", **plain) == 200
    assert policy.ask(body=b"n%61me=bob%201", **plain, peer="192.0.2.2") == 429
    assert policy.ask(body=PARTS % b"bob 1", **parts, peer="192.0.2.3") == 429
    assert policy.ask(body=PARTS % b"alice", **parts, peer="192.0.2.3") == 200


@pytest.mark.parametrize(
    ("key", "request_"),
    [
        ("query:q", {"target": "/?q=decoy{n}&q=real"}),
        ("query:q", {"target": "/"}),
        ("api_key", {}),
        ("user", {}),
        ("json:name", {"body": b"name={n}"}),
        ("json:name", {"body": b'["name", {n}'}),
        ("json:name", {"body": b'{"name": {"x": 1}}'}),
        ("json:name", {"body": b"\xff\xfe\x00"}),
        ("form:name", {"body": b"name=a{n}", "content_type": "text/plain"}),
        (lambda request: None, {}),
        (lambda request: ["no", "text"], {}),
    ],
)
def test_who_lacks_what_a_key_is_made_of_is_counted_by_address(key: Any, request_: dict[str, Any]) -> None:
    request_ = dict(request_)
    body: Any = request_.pop("body", b"")
    policy = Policy({"rate": "2/minute", "key": key})
    target = request_.pop("target", "/")
    outcomes = [
        policy.ask(target.replace("{n}", str(n)), body=body.replace(b"{n}", b"%d" % n), **request_)
        for n in range(3)
    ]
    assert outcomes == [200, 200, 429]
    assert policy.ask(target, body=body, peer="192.0.2.9", **request_) == 200


def test_a_body_that_says_a_field_twice_or_is_too_long_is_refused_and_costs_nothing() -> None:
    policy = Policy({"rate": "1/minute", "key": "form:name"}, {"rate": "1/minute", "key": "json:name"})
    assert policy.ask(body=b"name=a&name=b", content_type=FORM) == 400
    assert policy.ask(body=b'{"name": "a", "name": "b"}') == 400
    assert policy.ask(body=b"x" * 65_537) == 413
    assert policy.ask(body=b"x" * 65_536) == 200


def test_a_name_is_the_same_however_it_is_composed_and_a_long_one_takes_no_time() -> None:
    policy = Policy({"rate": "1/minute", "key": "json:name"})
    bodies = [
        f'{{"name": "{name}"}}'.encode() for name in ("Jos\u00e9", " jose\u0301", "\uff2a\uff4f\uff53\u00e9 ")
    ]
    assert [policy.ask(body=body) for body in bodies] == [200, 429, 429]
    # To put these in order takes seconds: each of one half goes before each of the other.
    body = f'{{"name": "a{chr(0x301) * 16_000}{chr(0x323) * 16_000}"}}'.encode()
    begun = time.process_time()
    assert [policy.ask(body=body) for _ in range(2)] == [200, 429]
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    "body",
    [
        b'{"user": {"name": "a", "Name": "b"}}',
        b'{"user": {"name": "a"}, "USER": {}}',
        b'{"user": {"NAME": "a"}}',
        '{"u\u017fer": {"name": "a"}}'.encode(),  # the long s, which some parsers take for an s
        b'{"user": {"name": "a"}',
        b'{"user": {"name": "a"}} and more',
        b'\xef\xbb\xbf {"user": {"name": "a",}}',
        b'{"user": {"name": ' + b"7" * 5000 + b"}}",
        b'{"x": ' + b"-" + b"7" * 5000 + b', "user": {"name": "a"}}',
        b'{"user": {"name": "a"}, "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"x": ' * 9000,
    ],
    ids=range(11),
)
def test_a_document_that_parsers_read_in_several_ways_is_refused_and_counted_under_no_other_key(
    body: bytes,
) -> None:
    """Else a client would have the quota of its address, in place of one of the name that the application reads."""
    policy = Policy({"rate": "1/minute", "key": "json:user.name"})
    refused = policy.begin(body=body)
    assert refused.refused == 400
    assert b"several ways" in policy.keeper.gate.refusal(refused).body
    assert policy.ask(body=b"{}") == 200  # of the address nothing was spent


def test_a_parameter_of_the_path_is_a_key() -> None:
    policy = Policy({"rate": "1/minute", "key": "param:id", "match": "/items/{id}/{rest:path}"})
    assert policy.ask("/items/1/a") == 200
    assert policy.ask("/items/1/b", peer="192.0.2.2") == 429
    assert policy.ask("/items/%31/../1/c", peer="192.0.2.3") in (200, 429)
    assert policy.ask("/items/2/a") == 200


def test_what_a_function_of_the_user_returns_are_claims() -> None:
    claims = {"sub": "bob", "team": 7}
    policy = Policy({"rate": "1/minute", "key": "claim:team"}, identity={"user": lambda request: claims})
    assert policy.ask(peer="192.0.2.1") == 200
    assert policy.ask(peer="192.0.2.2") == 429
    claims = {"sub": "bob", "team": 8}
    assert policy.ask(peer="192.0.2.1") == 200


HUGE = 10**5000
"""More digits than Python writes."""


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, 2.5, float("nan"), float("inf"), True, "x" * 10**6, "\ud800", "\0"], ids=range(9)
)
@pytest.mark.parametrize("which", ["key", "claim", "user"])
def test_whatever_number_truth_or_text_a_function_returns_is_a_key_of_its_own(which: str, value: Any) -> None:
    def function(request: Any) -> Any:
        found = "other" if request.peer == "192.0.2.9" else value
        return {"sub": "bob", "x": found} if which == "claim" else found

    if which == "key":
        policy = Policy({"rate": "1/minute", "key": function})
    else:
        key = "user" if which == "user" else "claim:x"
        policy = Policy({"rate": "1/minute", "key": key}, identity={"user": function})
    assert [policy.ask(peer=peer) for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.9")] == [200, 429, 200]


@pytest.mark.parametrize("value", [None, False, ""])
def test_a_user_that_is_nobody_is_counted_by_address(value: Any) -> None:
    policy = Policy({"rate": "1/minute", "key": "user"}, identity={"user": lambda request: value})
    assert [policy.ask(peer=peer) for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.1")] == [200, 200, 429]


@pytest.mark.parametrize("cost", [HUGE, -HUGE, -1, 10**9 + 1, 1.0, float("nan"), True, None, "1"], ids=range(9))
def test_a_function_that_returns_no_cost_raises_what_was_expected_and_charges_nothing(cost: Any) -> None:
    costs = [cost, 1, 1]
    policy = Policy({"rate": "1/minute"}, {"rate": "1/minute", "cost": lambda request: costs.pop(0)})
    with pytest.raises((TypeError, ValueError), match=r"^rule1: expected a cost ") as error:
        policy.ask()
    assert len(str(error.value)) < 100
    assert policy.admitted(2) == 1


def test_secrets_lie_in_no_store() -> None:
    policy = Policy(
        *({"rate": "9/minute", "key": key} for key in ("api_key", "cookie:session", "header:Authorization"))
    )
    ticket = policy.begin(x_api_key="hunter2", cookie="session=hunter2", authorization="Bearer hunter2")
    assert len(ticket.charges) == 3
    assert not any("hunter2" in charge.key for charge in ticket.charges)


# Cost


def test_a_cost_may_be_a_function_of_the_request() -> None:
    policy = Policy({"rate": "10/minute", "cost": lambda request: int(request.field("x-rows") or 1)})
    assert policy.ask(x_rows="7") == 200
    assert policy.ask(x_rows="4") == 429
    assert policy.ask(x_rows="3") == 200
    assert policy.ask(x_rows="0") == 200
    with pytest.raises(ValueError, match="expected a cost from 0"):
        policy.ask(x_rows="-1")


def test_a_reserved_cost_becomes_the_real_one_when_the_application_tells_it() -> None:
    policy = Policy({"rate": "100/minute", "cost": 40, "settle": "app"})
    one = policy.begin()
    one.settle(10)
    policy.end(one)
    two = policy.begin()
    assert two.verdicts[0].remaining == 50
    two.settle(70)
    policy.end(two)
    assert policy.begin().refused == 429
    policy.clock.advance(61)
    three = policy.begin()
    three.settle(500)  # more than there is: the quota is empty then
    policy.end(three)
    assert policy.begin().refused == 429
    policy.clock.advance(61)
    assert policy.begin().verdicts[0].remaining == 60


def test_what_is_not_told_stays_charged_and_what_cannot_be_told_is_refused() -> None:
    policy = Policy({"rate": "100/minute", "cost": 40, "settle": "app"}, {"rate": "100/minute"})
    policy.end(policy.begin())
    ticket = policy.begin()
    assert ticket.verdicts[0].remaining == 20
    for wrong in (-1, 10**9 + 1, True, 1.5):
        with pytest.raises(ValueError, match="cost: expected"):
            ticket.settle(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rule: expected .* there are none"):
        ticket.settle(1, "rule1")


def test_a_field_or_the_bytes_of_the_response_tell_the_real_cost() -> None:
    policy = Policy(
        {"rate": "100/minute", "cost": 40, "settle": "header:X-Cost"}, {"rate": "1000/minute", "settle": "bytes"}
    )
    one = policy.begin()
    for value in ("x", "-5", "1.5", "٣", "9" * 100):
        policy.keeper.gate.report(one, "x-cost", value)
    assert not one.settled
    policy.keeper.gate.report(one, "x-cost", "5")
    one.moved = 300
    policy.end(one)
    assert [verdict.remaining for verdict in policy.begin().verdicts] == [55, 699]


def test_outcomes_give_back_or_make_the_quota_whole() -> None:
    policy = Policy({"rate": "3/minute", "give_back": ["5xx", "disconnect"], "reset_on": "204"})
    assert policy.admitted(5, status=503) == 5
    ticket = policy.begin()
    policy.end(ticket, ended=False)
    assert [policy.ask(status=401) for _ in range(2)] == [200, 200]
    assert policy.ask(status=204) == 200
    assert policy.admitted(5, status=401) == 3


# Concurrency


def test_so_many_are_in_progress_and_no_more() -> None:
    policy = Policy({"concurrency": 2}, {"rate": "100/minute"})
    first, second = policy.begin(), policy.begin()
    refused = policy.begin()
    assert (first.refused, second.refused, refused.refused) == (0, 0, 429)
    assert dict(policy.keeper.gate.refusal(refused).fields)[b"retry-after"] == b"1"
    assert b'"rule0";q=2;qu="concurrent-requests"' in dict(policy.keeper.gate.respond(first))[b"ratelimit-policy"]
    assert policy.begin(peer="192.0.2.2").refused == 0
    policy.end(first, ended=False)
    third = policy.begin()
    assert third.refused == 0
    assert third.verdicts[1].remaining == 97, "the refused request spent nothing"


def test_a_lease_that_nobody_renews_expires_and_one_that_is_renewed_does_not() -> None:
    policy = Policy({"concurrency": 1, "lease": "60s"})
    ticket = policy.begin()
    for _ in range(5):
        policy.clock.advance(50)
        policy.keeper._leases._renew(ticket)
        assert policy.begin().refused == 429
    policy.clock.advance(61)
    assert policy.ask() == 200, "its process is gone"
    policy.end(ticket)
    other = policy.begin()
    assert other.refused == 0
    assert policy.begin().refused == 429, "what had expired is not given back again"


def test_a_request_that_ends_while_its_lease_is_renewed_leaves_none_behind() -> None:
    policy = Policy({"concurrency": 1})
    ticket = policy.begin()
    store = policy.keeper.store
    ended: list[bool] = []

    class Slow(MemoryStore):
        """Ends the request while the renewal is asked."""

        def ask(self, batch: Any) -> Any:
            replies = store.ask(batch)
            if batch and not ended:
                ended.append(True)
                policy.end(ticket)
            return replies

    policy.keeper.use(Slow())
    policy.keeper._leases._renew(ticket)
    policy.keeper.use(store)
    assert ended
    assert policy.begin().refused == 0


def test_leases_outlast_a_store_that_raises_and_are_renewed_when_it_answers_again() -> None:
    limits = [{"concurrency": 1, "lease": "60s"}, {"concurrency": 9, "lease": "60s", "key": "global"}]
    policy = Policy(*limits)
    ticket, leases, store = policy.begin(), policy.keeper._leases, policy.keeper.store

    class Raising(MemoryStore):
        def ask(self, batch: Any) -> Any:
            raise ZeroDivisionError

    policy.clock.advance(30)
    policy.keeper.use(Raising())
    leases._renew(ticket)
    policy.keeper.use(store)
    policy.clock.advance(25)
    leases._renew(ticket)
    policy.clock.advance(50)
    assert policy.begin().refused == 429
    assert policy.begin(peer="192.0.2.2").verdicts[1].remaining == 7
    policy.end(ticket)
    assert policy.begin().verdicts[1].remaining == 7


def test_what_goes_on_beside_the_requests_outlives_an_exception(caplog: pytest.LogCaptureFixture) -> None:
    looks: list[int] = []
    again = threading.Event()

    class Work:
        def __call__(self) -> float:
            looks.append(1)
            if len(looks) == 1:
                raise ZeroDivisionError
            again.set()
            return 60

    work = Work()
    start_thread("gatekeeper-test", work, 0.001)
    assert again.wait(15)
    assert "gatekeeper-test: a look failed" in caplog.text


# Tiers, exemptions, access, scopes, overrides


def test_each_tier_has_its_rates() -> None:
    tiers = {"free": "1/minute", "pro": ["3/minute", "100/hour"], "staff": "unlimited"}
    policy = Policy({"rate": "2/minute", "tier": "header:X-Plan", "tiers": tiers})
    counts = {
        plan: policy.admitted(9, peer=f"192.0.2.{n}", x_plan=plan) for n, plan in enumerate((*tiers, "other"))
    }
    assert counts == {"free": 1, "pro": 3, "staff": 9, "other": 2}
    assert policy.admitted(9, peer="192.0.2.77") == 2, "without a tier"


def test_a_tier_may_be_what_a_function_says_and_a_better_one_keeps_what_was_used() -> None:
    plans = {"192.0.2.1": "free"}
    policy = Policy(
        {"rate": "9/minute", "tier": lambda request: plans.get(request.peer), "tiers": {"free": "1/minute"}}
    )
    assert policy.admitted(3) == 1
    plans.clear()
    assert policy.admitted(20) == 8


def test_who_is_exempt_is_neither_limited_nor_counted(tmp_path: Path) -> None:
    listed = tmp_path / "networks"
    listed.write_text("# ours\n198.51.100.0/24\n2001:db8::/32  # too\n", encoding="utf-8")
    exempt = [
        "10.0.0.0/8",
        f"file:{listed}",
        "user:root",
        "header:X-Probe=s3cret",
        lambda request: request.path == "/up",
    ]
    policy = Policy(
        {"rate": "1/minute", "exempt": exempt},
        identity={"user": lambda request: request.field("x-who")},
    )
    for free in (
        {"peer": "10.1.2.3"}, {"peer": "198.51.100.7"}, {"peer": "2001:db8:ffff::1"}, {"x_who": "root"},
        {"x_probe": "s3cret"}, {"target": "/up"}, {"peer": "::ffff:10.1.2.3"},
    ):  # fmt: skip
        assert policy.admitted(3, **free) == 3, free
    assert policy.admitted(3, x_probe="guess") == 1
    assert policy.admitted(3, peer="11.0.0.1", x_who="bob") == 1


def test_a_denied_network_is_answered_403_and_an_allowed_one_is_never_limited() -> None:
    policy = Policy(
        {"rate": "1/minute"},
        access={"allow": ["192.0.2.7", "2001:db8:1::/48"], "deny": ["192.0.2.0/24", "2001:db8::1"]},
    )
    refused = policy.begin(peer="192.0.2.1", accept="application/json")
    assert refused.refused == 403
    refusal = policy.keeper.gate.refusal(refused)
    assert refusal.status == 403
    assert b"retry-after" not in dict(refusal.fields)
    assert json.loads(refusal.body)["title"] == "Forbidden"
    assert policy.ask(peer="2001:db8::1") == 403
    assert policy.ask(peer="2001:db8::2") == 200, "a single address, of a network that is one client"
    assert policy.admitted(5, peer="192.0.2.7") == 5
    assert policy.admitted(5, peer="2001:db8:1::9") == 5
    assert policy.admitted(5, peer="203.0.113.1") == 1


def test_a_file_of_networks_is_read_again_when_it_has_changed_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "deny"
    file.write_text("192.0.2.1\n", encoding="utf-8")
    policy = Policy(access={"deny": [f"file:{file}"]})
    assert policy.ask(peer="192.0.2.1") == 403
    for text, denied in (("192.0.2.2\n\n", "192.0.2.2"), ("192.0.2.2\nnonsense hunter2\n", "192.0.2.2")):
        file.write_text(text, encoding="utf-8")
        policy.keeper._files()
        assert [policy.ask(peer=peer) for peer in ("192.0.2.1", denied)] == [200, 403]
    (record,) = caplog.records
    assert "line 2: expected networks" in record.getMessage()
    assert "hunter2" not in record.getMessage()
    file.unlink()
    policy.keeper._files()
    assert policy.ask(peer="192.0.2.2") == 403


def test_a_file_of_networks_that_is_not_there_or_wrong_is_an_error_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("10.0.0.1/8", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"access\.deny: .*No such file"):
        Policy(access={"deny": f"file:{tmp_path}/none"})
    with pytest.raises(SettingsError, match=r"limits\[0\]\.exempt: .*line 1: expected networks"):
        Policy({"rate": "1/minute", "exempt": f"file:{tmp_path}/wrong"})
    os.truncate(tmp_path / "wrong", GREATEST_LIST + 1)
    with pytest.raises(SettingsError, match=f"access.deny: .*expected at most {GREATEST_LIST} bytes"):
        Policy(access={"deny": f"file:{tmp_path}/wrong"})


def test_a_file_of_networks_in_whose_place_a_pipe_comes_holds_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "deny"
    file.write_text("192.0.2.1\n", encoding="utf-8")
    policy = Policy(access={"deny": [f"file:{file}"]})
    file.unlink()
    os.mkfifo(file)
    for _ in range(2):
        policy.keeper._files()
    assert policy.ask(peer="192.0.2.1") == 403
    (record,) = caplog.records
    assert "expected a regular file" in record.getMessage()


def test_rules_of_one_scope_spend_one_quota_and_a_request_under_both_once() -> None:
    policy = Policy(
        {"rate": "3/minute", "match": "/a/*", "scope": "search"},
        {"rate": "3/minute", "match": "/b", "scope": "search"},
        {"rate": "3/minute", "match": "/a/b", "scope": "search"},
    )
    assert [policy.ask(path) for path in ("/a/b", "/b", "/a", "/b")] == [200, 200, 200, 429]


@pytest.mark.parametrize("costs", [(1, 5), (5, 1), (5, 5), (lambda request: 1, lambda request: 5)])
def test_of_different_costs_in_one_scope_the_greatest_is_charged_once_whatever_the_order(costs: Any) -> None:
    limits = [{"rate": ["10/minute", "10/hour"], "scope": "search", "cost": cost} for cost in costs]
    policy = Policy(*limits)
    ticket = policy.begin()
    assert [hit[2] for hit in ticket.hits] == [5, 5]
    assert [verdict.remaining for verdict in ticket.verdicts] == [5, 5]
    assert policy.admitted(9) == 1


@pytest.mark.parametrize("algorithm", ["sliding_window", "sliding_counter", "fixed_window", "gcra"])
def test_rules_of_one_name_let_as_much_in_as_the_least_of_them_and_each_request_counts_once(algorithm: str) -> None:
    for amounts in itertools.permutations((2, 3, 5)):
        policy = Policy({"name": "x", "rate": f"{amounts[0]}/minute", "algorithm": algorithm})
        rules = [
            Guard(f"{amount}/minute", "x", {"algorithm": algorithm}).rule(policy.keeper, "f")
            for amount in amounts[1:]
        ]

        def passes(peer: str, policy: Policy = policy, rules: list[Any] = rules) -> bool:
            ticket = policy.begin(peer=peer)
            gate, ask = policy.keeper.gate, policy.keeper.ask
            return not ticket.refused and all(
                gate.extend_at_once(ticket, rule, ask) or not run(gate.extend(ticket, (rule,)), ask)
                for rule in rules
            )

        for peer in ("192.0.2.1", "192.0.2.2"):
            passed = sum(passes(peer) for _ in range(9))
            # Tokens of rates that differ weigh differently: each is charged, so that it may be less.
            assert passed == 2 or (algorithm == "gcra" and passed < 2), amounts


def test_a_function_in_a_scope_charges_what_its_cost_is_above_what_the_request_was_charged() -> None:
    policy = Policy({"rate": "10/minute", "scope": "search", "cost": 2})
    guard = Guard("10/minute", None, {"scope": "search", "cost": 6})
    rule, ticket = guard.rule(policy.keeper, "module.function"), policy.begin()
    for _ in range(2):  # a request is charged once, however often the function is called
        assert run(guard.charge(ticket, rule), policy.keeper.ask) == 0
        assert [hit[2] for hit in ticket.hits] == [2, 4]
    assert ticket.verdicts[1].remaining == 4


def test_what_a_scope_has_refused_is_not_taken_for_charged_when_it_is_called_again() -> None:
    policy = Policy({"rate": "9/minute"})
    guard = Guard("1/minute", None, {"scope": "search"})
    rule = guard.rule(policy.keeper, "module.function")
    for first in (0, 429):
        ticket = policy.begin()
        assert run(guard.charge(ticket, rule), policy.keeper.ask) == first
        assert run(guard.charge(ticket, rule), policy.keeper.ask) == first


def test_a_rule_overrides_those_it_names_and_no_others() -> None:
    policy = Policy(
        {"rate": "2/minute"},
        {"rate": "4/minute", "match": "/upload", "overrides": ["rule0"]},
        {"rate": "3/minute", "key": "global"},
    )
    assert policy.admitted(9, "/upload") == 3
    policy.clock.advance(61)
    assert policy.admitted(9, "/") == 2
    assert policy.admitted(9, "/upload", peer="192.0.2.2") == 1


# Penalties, shadow


PENALTY = {"strikes": 3, "within": "1m", "ban": "10s", "at_most": "30s"}


def test_who_is_refused_again_and_again_is_banned_for_longer_each_time() -> None:
    policy = Policy({"rate": "1/second", "penalty": PENALTY})
    for banned in (10, 20, 30, 30):
        assert policy.admitted(4) == 1  # three strikes
        policy.clock.advance(2)
        refused = policy.begin(accept="application/json")
        assert refused.refused == 429, "its quota is whole, and yet"
        document = json.loads(policy.keeper.gate.refusal(refused).body)
        assert document["type"].endswith("#abnormal-usage-detected")
        assert document["violated-policies"] == ["rule0"]
        assert policy.ask(peer="192.0.2.2") == 200
        policy.clock.advance(banned - 3)
        assert policy.ask() == 429
        policy.clock.advance(1)


def test_bans_are_listed_and_lifted() -> None:
    policy = Policy({"rate": "1/minute", "penalty": PENALTY}, {"rate": "100/minute"})
    for peer in ("192.0.2.1", "192.0.2.2"):
        policy.admitted(9, peer=peer)
    policy.admitted(2, peer="192.0.2.3")
    bans = policy.keeper.bans()
    assert sorted((ban.rule, ban.key, ban.seconds) for ban in bans) == [
        ("rule0", "192.0.2.1", 10.0), ("rule0", "192.0.2.2", 10.0),
    ]  # fmt: skip
    policy.keeper.lift("rule0", "192.0.2.1")
    assert [ban.key for ban in policy.keeper.bans()] == ["192.0.2.2"]
    policy.clock.advance(9)
    refused = policy.begin()
    assert json.loads(policy.keeper.gate.refusal(refused).body)["type"].endswith("#quota-exceeded")
    with pytest.raises(KeyError, match="expected the name of a rule with a penalty: rule0"):
        policy.keeper.lift("rule1", "192.0.2.1")


def test_the_penalty_is_not_told_as_a_quota() -> None:
    policy = Policy({"rate": "5/minute", "penalty": PENALTY})
    fields = dict(policy.keeper.gate.respond(policy.begin()))
    assert fields == {b"ratelimit-policy": b'"rule0";q=5;w=60', b"ratelimit": b'"rule0";r=4;t=61'}


def test_a_rule_in_shadow_decides_and_counts_and_never_refuses() -> None:
    policy = Policy({"rate": "1/minute", "shadow": True, "penalty": PENALTY}, {"rate": "5/minute"})
    tickets = [policy.begin() for _ in range(7)]
    assert [ticket.refused for ticket in tickets] == [0] * 5 + [429] * 2
    assert policy.keeper.gate.shadowed == {"rule0": 6}
    fields = dict(policy.keeper.gate.respond(tickets[0]))
    assert fields[b"ratelimit-policy"] == b'"rule1";q=5;w=60', "clients are not told"
    assert json.loads(policy.keeper.gate.refusal(tickets[-1]).body)["violated-policies"] == ["rule1"]


# A store that does not answer


class Dead(MemoryStore):
    def ask(self, batch: Any) -> Any:
        return [StoreError("it does not answer") for _ in batch]


@pytest.mark.parametrize(
    ("on_error", "expected"), [("local", [0, 0, 429]), ("allow", [0] * 3), ("deny", [503] * 3)]
)
def test_each_rule_says_what_it_does_without_its_store_and_that_is_counted(
    on_error: str, expected: list[int]
) -> None:
    policy = Policy({"rate": "2/minute", "on_error": on_error, "penalty": PENALTY, "settle": "app"})
    policy.keeper.use(Dead())
    assert [policy.begin().refused for _ in range(3)] == expected
    assert policy.keeper.gate.failures.total() == 6  # the rate and the penalty, each time


def test_the_stand_in_counts_its_share_among_the_known_workers() -> None:
    keeper = Gatekeeper({"limits": [{"name": "a", "rate": "9/minute"}]}, workers=4)
    assert [
        limit.standin.algorithm.limit for rule in keeper.gate.rules for limit in rule.limits if limit.standin
    ] == [2]


# Responses


def test_the_older_fields_are_told_on_demand() -> None:
    policy = Policy({"rate": "5/minute"}, response={"fields": False, "x_ratelimit": "seconds"})
    ticket = policy.begin()
    assert policy.keeper.gate.respond(ticket) == [
        (b"x-ratelimit-limit", b"5"), (b"x-ratelimit-remaining", b"4"), (b"x-ratelimit-reset", b"61"),
    ]  # fmt: skip
    policy = Policy({"rate": "5/minute"}, response={"x_ratelimit": "epoch"})
    fields = dict(policy.keeper.gate.respond(policy.begin()))
    assert int(fields[b"x-ratelimit-reset"]) > 1_700_000_000
    assert b"ratelimit" in fields


def test_refusals_may_have_a_body_of_ones_own() -> None:
    body = '{"error": "slow down", "seconds": {retry_after}, "status": {status}, "rules": "{rules}"}'
    policy = Policy({"rate": "1/minute"}, response={"body": body, "content_type": "application/json"})
    policy.ask()
    refusal = policy.keeper.gate.refusal(policy.begin())
    assert json.loads(refusal.body) == {"error": "slow down", "seconds": 61, "status": 429, "rules": "rule0"}
    fields = dict(refusal.fields)
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"content-length"] == b"%d" % len(refusal.body)


def test_refusals_may_be_answered_by_a_function() -> None:
    def handler(ticket: Ticket, refusal: Refusal) -> Refusal:
        assert refusal.status == 429
        return Refusal(503, [(b"x-was", ticket.path.encode())], b"no")

    policy = Policy({"rate": "1/minute"}, response={"handler": handler})
    policy.ask("/a")
    assert policy.keeper.gate.refusal(policy.begin("/a")) == (503, [(b"x-was", b"/a")], b"no")
    policy = Policy({"rate": "1/minute"}, response={"handler": lambda ticket, refusal: None})
    policy.ask()
    with pytest.raises(TypeError, match="expected a Refusal"):
        policy.keeper.gate.refusal(policy.begin())


def test_the_wait_that_is_told_is_spread_by_the_jitter_and_never_shorter() -> None:
    policy = Policy({"rate": "1/minute"}, response={"retry_jitter": "100s"})
    policy.ask()
    waits = {int(dict(policy.keeper.gate.refusal(policy.begin()).fields)[b"retry-after"]) for _ in range(100)}
    assert min(waits) >= 61
    assert max(waits) <= 161
    assert len(waits) > 20


def test_switched_off_nothing_is_limited() -> None:
    policy = Policy({"rate": "1/minute"}, access={"deny": ["192.0.2.0/24"]}, enabled=False)
    assert policy.admitted(5) == 5
    policy.keeper.enabled = True
    assert policy.admitted(5, peer="203.0.113.1") == 1
    assert policy.admitted(1) == 0


# What an attentive reader found


def test_switched_off_a_gateway_still_knows_its_routes() -> None:
    pools = {"one": {"upstreams": "http://127.0.0.1:9"}}
    policy = Policy(pools=pools, routes=[{"match": "/*", "pool": "one"}], enabled=False)
    assert policy.keeper.gate.route(policy.begin()) is not None


@pytest.mark.parametrize(
    ("request_", "more"),
    [
        ({"x_plan": "staff"}, {}),
        ({"x_spare": "me"}, {}),
        ({"peer": "10.0.0.1"}, {"access": {"allow": ["10.0.0.0/8"]}}),
        ({"target": "/other"}, {}),
        ({}, {"enabled": False}),
    ],
)
def test_the_real_cost_may_be_told_of_a_request_that_was_not_charged(request_: Any, more: Any) -> None:
    rule = {
        "rate": "9/minute", "match": "/", "settle": "app", "tier": "header:X-Plan", "tiers": {"staff": "unlimited"},
        "exempt": [lambda request: request.field("x-spare") == "me"],
    }  # fmt: skip
    policy = Policy(rule, **more)
    ticket = policy.begin(**request_)
    ticket.settle(5)
    ticket.settle(5, "rule0")
    policy.end(ticket)
    if policy.keeper.enabled:
        with pytest.raises(ValueError, match="rule: expected"):
            ticket.settle(5, "rule1")


def test_an_allowed_network_is_not_limited_by_guards_and_messages_either() -> None:
    policy = Policy({"rate": "1/minute", "per": "message"}, access={"allow": ["10.0.0.0/8"]})
    gate = policy.keeper.gate
    for peer, free in (("10.0.0.1", True), ("192.0.2.1", False)):
        ticket = policy.begin(peer=peer)
        rules = gate.message_rules(ticket)
        assert bool(rules) is not free
        guard = Guard("1/minute", "guarded", {})
        rule = guard.rule(policy.keeper, "module.function")
        assert [run(guard.charge(ticket, rule), policy.keeper.ask) for _ in range(2)] == [0, 0 if free else 429]


def test_bans_of_guards_are_listed_and_lifted() -> None:
    policy = Policy()
    guard = Guard("1/minute", "guarded", {"penalty": PENALTY})
    rule = guard.rule(policy.keeper, "module.function")
    for _ in range(5):
        run(guard.charge(policy.begin(), rule), policy.keeper.ask)
    assert [ban[:2] for ban in policy.keeper.bans()] == [("guarded", "192.0.2.1")]
    policy.keeper.lift("guarded", "192.0.2.1")
    assert policy.keeper.bans() == []


def test_networks_of_files_are_watched_by_one_thread_and_in_a_forked_process_by_one_of_its_own(
    tmp_path: Path,
) -> None:
    file = tmp_path / "allow"
    file.write_text("10.0.0.0/8", encoding="utf-8")
    policy = Policy(access={"allow": f"file:{file}"})
    for number in range(3):
        policy.keeper.limit("1/minute", name=f"f{number}", exempt=f"file:{file}")(lambda: None)
    before = [thread.name for thread in threading.enumerate()].count("gatekeeper-files")
    Policy()
    assert [thread.name for thread in threading.enumerate()].count("gatekeeper-files") == before
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, as servers do it
        child = os.fork()
    if not child:
        names = [thread.name for thread in threading.enumerate()]
        os.write(write, b"1" if "gatekeeper-files" in names else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (
            [{"overrides": "rule1"}, {"overrides": "rule2"}, {"overrides": "rule0"}],
            "expected no rule that overrides this",
        ),
        ([{"overrides": "rule0"}], "expected no rule that overrides this"),
        ([{"per": "message", "key": "json:a"}], "a field of the body goes with requests"),
        ([{"per": "message", "overrides": "rule0"}], "goes with requests, and not with messages"),
        ([{"overrides": "ruleO"}, {}], 'expected names of other rules; did you mean "rule1"'),
        ([{"tier": "user"}], "tiers: expected a value"),
        ([{"tiers": {"a": "1/minute"}}], "tier: expected a value"),
        ([{"key": "param:id", "match": "/{name}"}], "expected the name of a {name} in match: name"),
        ([{"scope": "a"}, {"scope": "a", "rate": "2/minute"}], "expected the rate and algorithm of limits[0]"),
        ([{"penalty": {"ban": "2d"}}], "penalty: expected ban within at_most"),
        ([{"concurrency": 3}], "rate: does not go with concurrency"),
        ([{"lease": "5m"}], "lease: goes with concurrency alone"),
        ([{"rate": "1/10 years", "burst": 10**9}], "expected a burst that is refilled within 100 years"),
        ([{"tier": "user", "tiers": {"a": "none"}}], "expected a rate: an amount"),
        ([{"settle": "bits"}], 'settle: expected "app", "bytes" or "header:NAME"'),
        ([{"exempt": "10.0.0.1/8"}], "exempt: expected networks"),
        ([{"key": "param:"}], "expected the name of a {name}"),
    ],
)
def test_rules_that_cannot_be_are_refused(limits: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(SettingsError) as error:
        Policy(*({"rate": "1/minute", **limit} for limit in limits))
    assert any(problem in line for line in error.value.problems), error.value.problems


def test_a_handler_that_must_be_awaited_is_refused() -> None:
    async def handler(ticket: Ticket, refusal: Refusal) -> Refusal:
        return refusal

    with pytest.raises(SettingsError, match=r"response\.handler: .* not asynchronous"):
        Policy(response={"handler": handler})


def test_a_lifted_ban_leaves_a_whole_quota_and_it_is_told_whether_there_was_one() -> None:
    policy = Policy({"rate": "1/minute", "penalty": {**PENALTY, "strikes": 1}})
    assert [policy.ask(), policy.ask(), policy.ask()] == [200, 429, 429]
    assert policy.keeper.lift("rule0", "192.0.2.1")
    assert not policy.keeper.lift("rule0", "192.0.2.1")
    assert policy.ask() == 200


def test_a_store_that_fails_is_told_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy({"rate": "9/minute", "on_error": "deny", "penalty": PENALTY})
    store = policy.keeper.store
    policy.keeper.use(Dead())
    refused = policy.begin(accept="application/json")
    assert policy.begin().refused == 503
    assert json.loads(policy.keeper.gate.refusal(refused).body)["type"].endswith("#temporary-reduced-capacity")
    policy.keeper.use(store)
    policy.keeper.ask = policy.keeper._ask  # as with a store that may fail
    assert [policy.begin().refused for _ in range(2)] == [0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "the store fails, so that on_error decides: it does not answer", "the store answers again",
    ]  # fmt: skip


# What an attack found


HIDDEN = (
    b'--x\r\nContent-Disposition: form-data; name="name"\r\nContent-Type: message/rfc822\r\n\r\nbob\r\n--x--\r\n'
)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ('multipart/form-data; boundary="x"', HIDDEN),
        ("multipart/form-data; boundary=x; boundary=y", PARTS % b"bob"),
        ("multipart/form-data; boundary=x; charset=utf-7", PARTS % b"bob"),
        ("multipart/form-data", PARTS % b"bob"),
        ("multipart/form-data; boundary*", PARTS % b"bob"),
        ("multipart/form-data; boundary=x", PARTS % b"bob" + PARTS % b"alice"),
        ("multipart/form-data; boundary=x", b"preamble\r\n" + PARTS % b"bob"),
        ("multipart/form-data; boundary=x", (PARTS % b"bob").replace(b'name="name"', b'name="a"; name="name"')),
        ("multipart/form-data; boundary=x", (PARTS % b"bob").replace(b"\r\n\r\nbob", b"\r\nContent-Disposition: form-data; name=\"b\"\r\n\r\nbob")),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data" + b";" * 60_000 + b"\r\n\r\n\r\n--x--"),
        ("application/x-www-form-urlencoded; charset=cp037", b"name=bob"),
        ("application/x-www-form-urlencoded", b"&".join([b"a=1"] * 2000)),
    ],
)  # fmt: skip
def test_a_form_that_may_be_read_in_several_ways_is_refused(kind: str, body: bytes) -> None:
    policy = Policy({"rate": "1/minute", "key": "form:name"})
    assert policy.ask(body=body, content_type=kind, method="POST") == 400


def test_spellings_of_a_name_that_applications_take_for_the_same_share_a_quota() -> None:
    policy = Policy({"rate": "1/minute", "key": "form:name"})
    bodies = ["name=bob", "name=%EF%BC%A2ob", "name=BOB+", "n%61me=b%6Fb"]
    outcomes = [
        policy.ask(body=body.encode(), content_type=FORM, peer=f"192.0.2.{n}") for n, body in enumerate(bodies)
    ]
    assert outcomes == [200, 429, 429, 429]


@pytest.mark.parametrize("key", ["api_key", "header:X-API-Key"])
def test_a_field_that_stands_twice_is_no_key(key: str) -> None:
    policy = Policy({"rate": "2/minute", "key": key})

    def ask(*values: str) -> int:
        headers = [(b"x-api-key", value.encode()) for value in values]
        ticket = Asked(
            {"type": "http", "method": "GET", "path": "/", "client": ("192.0.2.1", 1), "headers": headers}
        )
        return policy.keeper.gate.admit_at_once(ticket, policy.keeper.ask)

    assert [ask("real", f"decoy{n}") for n in range(4)] == [0, 0, 429, 429]


def test_a_cookie_that_is_sent_twice_is_no_key() -> None:
    policy = Policy({"rate": "2/minute", "key": "cookie:sid"})
    assert [policy.ask(cookie=f"sid=real; sid=decoy{n}") for n in range(3)] == [200, 200, 429]


def test_one_limit_above_another_on_a_function_has_counters_of_its_own() -> None:
    policy = Policy()

    @policy.keeper.limit("3/minute")
    @policy.keeper.limit("3/minute")
    def work() -> str:
        return "done"

    assert [work() for _ in range(3)] == ["done"] * 3
    with pytest.raises(Limited):
        work()


def test_bans_beyond_one_portion_are_all_listed() -> None:
    policy = Policy({"rate": "1/minute", "key": "query:q", "penalty": {**PENALTY, "strikes": 1}})
    for number in range(600):
        policy.admitted(2, f"/?q={number}")
    assert len(policy.keeper.bans()) == 600
