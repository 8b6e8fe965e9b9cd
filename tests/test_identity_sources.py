"""Who asks, as the session, an identity provider or a gateway in front says: in whole requests, under both shells."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from gatekeeper import Gatekeeper
from gatekeeper.asgi import GatekeeperMiddleware as Asgi
from gatekeeper.commands import nobody, run
from gatekeeper.http.message import ScopeRequest
from gatekeeper.ticket import Ticket
from gatekeeper.wsgi import GatekeeperMiddleware as Wsgi
from tests.scenarios import Ask, Response
from tests.servers import ask_asgi, ask_wsgi
from tests.test_jwks import Issuer, serving

SECRET = os.urandom(32).hex()
GATEWAY = "10.0.0.5"
CLIENT = "198.51.100.7"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    user = scope["gatekeeper"].user
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(user).encode()})


def wsgi_hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(environ["gatekeeper.ticket"].user).encode()]


Home = Callable[[Ask], Response]


def home(kind: str, keeper: Gatekeeper) -> Home:
    if kind == "asgi":
        app = Asgi(hello, keeper)
        return lambda ask: asyncio.run(ask_asgi(app, ask))
    other = Wsgi(wsgi_hello, keeper)
    return lambda ask: ask_wsgi(other, ask)


kinds = pytest.mark.parametrize("kind", ["asgi", "wsgi"])


class TestProvider:
    @pytest.fixture
    def issuer(self) -> Iterator[Issuer]:
        issuer = Issuer()
        issuer.publish("one")
        with serving(issuer) as server:
            issuer.url = f"http://127.0.0.1:{server.server_port}"
            yield issuer

    def keeper(self, issuer: Issuer, **limit: Any) -> Gatekeeper:
        bearer = {"issuer": issuer.url, "audience": "api", "jwks_url": f"{issuer.url}/keys"}
        rule = {"name": "users", "rate": "2/hour", "key": "user", **limit}
        return Gatekeeper({"identity": {"user": "bearer:sub", "bearer": bearer}, "limits": [rule]})

    def token(self, issuer: Issuer, kid: str = "one", **members: Any) -> list[tuple[str, str]]:
        now = int(time.time())
        told = issuer.token(kid, **{"iat": now, "exp": now + 600, **members})
        return [("Authorization", f"Bearer {told}")]

    @kinds
    def test_each_user_has_a_quota_and_the_provider_is_asked_once(self, issuer: Issuer, kind: str) -> None:
        ask = home(kind, self.keeper(issuer))
        for name in ("ada", "bob"):
            fields = self.token(issuer, sub=name)
            assert [ask(Ask(headers=fields)).status for _ in range(3)] == [200, 200, 429]
        assert issuer.requests == 1

    @kinds
    def test_a_tier_is_a_claim(self, issuer: Issuer, kind: str) -> None:
        ask = home(kind, self.keeper(issuer, tier="claim:plan", tiers={"pro": "5/hour"}))
        fields = self.token(issuer, sub="ada", plan="pro")
        assert [ask(Ask(headers=fields)).status for _ in range(6)] == [200] * 5 + [429]

    @kinds
    @pytest.mark.parametrize(
        "members", [{"aud": "another"}, {"iss": "https://evil.example"}, {"exp": 1}], ids=["aud", "iss", "exp"]
    )
    def test_a_token_that_is_not_for_us_names_nobody_and_is_no_error(
        self, issuer: Issuer, kind: str, members: dict[str, Any]
    ) -> None:
        ask = home(kind, self.keeper(issuer))
        found = ask(Ask(headers=self.token(issuer, **members)))
        assert (found.status, found.body) == (200, b"None")

    @kinds
    def test_no_text_as_a_token_is_an_error(self, issuer: Issuer, kind: str) -> None:
        ask = home(kind, self.keeper(issuer, rate="1000/hour"))
        for text in ("", "x", "a.b.c", "..", "é", "a" * 40_000, "eyJhbGciOiJub25lIn0.e30."):
            assert ask(Ask(headers=[("Authorization", f"Bearer {text}")])).status == 200


def through(gateway: Gatekeeper, request: ScopeRequest) -> str:
    """What a gateway tells the application of a request that it has decided."""
    ticket = type("Both", (ScopeRequest, Ticket), {})(request.native)
    assert run(gateway.gate.admit(ticket), gateway.ask) == 0
    told = gateway.gate.vouch(ticket)
    assert told is not None
    return told.decode()


def scope(path: str = "/page", query: bytes = b"", cookie: str = "") -> dict[str, Any]:
    headers = [(b"cookie", cookie.encode())] if cookie else []
    return {
        "type": "http", "method": "GET", "path": path, "query_string": query, "headers": headers,
        "client": (CLIENT, 1),
    }  # fmt: skip


class TestVouched:
    SETTINGS: ClassVar[dict[str, Any]] = {
        "keys": [SECRET],
        "session": {"kind": "token", "cookie": {"secure": False}},
        "identity": {"user": "session:sub", "trusted_proxies": [GATEWAY], "from_gateway": True},
        "limits": [
            {"name": "users", "rate": "2/hour", "key": "user"},
            {"name": "plans", "rate": "100/hour", "key": "user", "tier": "claim:plan", "tiers": {"pro": "3/hour"}},
        ],
        "pools": {"app": {"upstreams": ["http://127.0.0.1:1"], "pass_identity": True}},
        "routes": [{"match": "/*", "pool": "app"}],
    }

    def gateway(self) -> Gatekeeper:
        return Gatekeeper(self.SETTINGS)

    def cookie(self, gateway: Gatekeeper, **members: Any) -> str:
        assert gateway.sessions is not None
        session = gateway.sessions.open(ScopeRequest(scope()), blocking=True)
        session.update(members)
        ((_, value),) = [field for field in run(gateway.sessions.flow.save(session), nobody) if field[0] != b"vary"]
        return value.decode().partition(";")[0]

    def asked(self, told: str, raw: str = "/page", peer: str = GATEWAY, method: str = "GET") -> Ask:
        fields = [("X-Forwarded-For", CLIENT), ("Gatekeeper-Identity", told)]
        return Ask(method, raw, headers=fields, peer=peer)

    @kinds
    def test_what_the_gateway_charged_the_application_does_not_charge_again(self, kind: str) -> None:
        gateway, ask = self.gateway(), home(kind, Gatekeeper(self.SETTINGS))
        cookie = self.cookie(gateway, sub="7", plan="pro")
        for number in range(2):
            told = through(gateway, ScopeRequest(scope(f"/page/{number}", b"a=1", cookie)))
            found = ask(self.asked(told, f"/page/{number}?a=1"))
            assert (found.status, found.body) == (200, b"7")
            assert not any(name.lower() == "ratelimit" for name, _ in found.headers)
        # It has still all of its own: nothing was charged here.
        direct = Ask(raw="/page", headers=[("Cookie", cookie)], peer=CLIENT)
        assert [ask(direct).status for _ in range(3)] == [200, 200, 429]

    @kinds
    def test_a_question_mark_within_a_path_is_not_where_its_query_begins(self, kind: str) -> None:
        """Else it would be good for two requests."""
        gateway, ask = self.gateway(), home(kind, Gatekeeper(self.SETTINGS))
        told = through(gateway, ScopeRequest(scope("/page?a=1", cookie=self.cookie(gateway, sub="7"))))
        assert ask(self.asked(told, "/page?a=1?")).body == b"None"
        assert ask(self.asked(told, "/page%3Fa=1")).body == b"7"

    @pytest.mark.parametrize("plan", ["x" * 8000, "x" * 40_000, "\ud800"], ids=["long", "longer", "no character"])
    def test_of_claims_that_no_field_can_hold_nothing_is_told(self, plan: str) -> None:
        """The request goes on, and its application asks for itself."""
        gateway = self.gateway()
        ticket = type("Both", (ScopeRequest, Ticket), {})(scope())
        assert run(gateway.gate.admit(ticket), gateway.ask) == 0
        ticket.user, ticket.claims = "7", {"plan": plan}
        assert gateway.gate.vouch(ticket) is None
        assert gateway.gate.failures["identity"] == 1

    @kinds
    def test_a_rule_that_the_gateway_does_not_have_is_charged(self, kind: str) -> None:
        more = {
            **self.SETTINGS,
            "limits": [*self.SETTINGS["limits"], {"name": "own", "rate": "1/hour", "key": "user"}],
        }
        gateway, ask = self.gateway(), home(kind, Gatekeeper(more))
        cookie = self.cookie(gateway, sub="7")
        told = through(gateway, ScopeRequest(scope(cookie=cookie)))
        assert [ask(self.asked(told)).status for _ in range(2)] == [200, 429]

    @kinds
    def test_a_rule_of_the_same_name_and_another_content_is_charged(self, kind: str) -> None:
        other = {**self.SETTINGS, "limits": [{"name": "users", "rate": "1/hour", "key": "user"}]}
        gateway, ask = self.gateway(), home(kind, Gatekeeper(other))
        told = through(gateway, ScopeRequest(scope(cookie=self.cookie(gateway, sub="7"))))
        assert [ask(self.asked(told)).status for _ in range(2)] == [200, 429]

    @kinds
    def test_it_is_good_for_its_request_from_the_gateway_alone(self, kind: str) -> None:
        many = {**self.SETTINGS, "limits": [{"name": "users", "rate": "1000/hour", "key": "user"}]}
        gateway, keeper = Gatekeeper(many), Gatekeeper(many)
        ask = home(kind, keeper)
        told = through(gateway, ScopeRequest(scope(cookie=self.cookie(gateway, sub="7"))))
        wrong = [
            self.asked(told, "/other"),
            self.asked(told, "/page?a=1"),
            self.asked(told, method="POST"),
            self.asked(told[:-2] + "AA"),
            self.asked("x"),
            self.asked(""),
            self.asked("a" * 40_000),
        ]
        for one in wrong:
            assert ask(one).body == b"None", one
        assert keeper.gate.failures["identity"] >= 5
        assert ask(self.asked(told, peer=CLIENT)).body == b"None", "nobody else is believed"
        assert ask(self.asked(told)).body == b"7"

    @kinds
    def test_a_session_s_token_is_no_voucher_and_a_voucher_no_session(self, kind: str) -> None:
        gateway, ask = self.gateway(), home(kind, Gatekeeper(self.SETTINGS))
        cookie = self.cookie(gateway, sub="7")
        told = through(gateway, ScopeRequest(scope(cookie=cookie)))
        name, _, token = cookie.partition("=")
        assert ask(self.asked(token)).body == b"None"
        assert ask(Ask(raw="/page", headers=[("Cookie", f"{name}={told}")], peer=CLIENT)).body == b"None"

    @kinds
    def test_it_ends_after_half_a_minute(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        gateway, keeper = self.gateway(), Gatekeeper(self.SETTINGS)
        told = through(gateway, ScopeRequest(scope(cookie=self.cookie(gateway, sub="7"))))
        ask, now = home(kind, keeper), time.time()
        assert keeper.gate.vouchers is not None
        monkeypatch.setattr(keeper.gate.vouchers, "_clock", lambda: now + 29)
        assert ask(self.asked(told)).body == b"7"
        monkeypatch.setattr(keeper.gate.vouchers, "_clock", lambda: now + 31)
        assert ask(self.asked(told)).body == b"None"


def test_a_ring_goes_by_the_user_of_the_session_wherever_its_client_is() -> None:
    upstreams = [f"http://127.0.0.1:{port}" for port in range(9001, 9006)]
    gateway = Gatekeeper(
        {
            **TestVouched.SETTINGS,
            "pools": {"app": {"policy": "ring", "key": "user", "upstreams": upstreams}},
        }
    )

    def chosen(user: str, address: str) -> str:
        cookie = TestVouched().cookie(gateway, sub=user)
        ticket: Any = type("Both", (ScopeRequest, Ticket), {})({**scope(cookie=cookie), "client": (address, 1)})
        assert run(gateway.gate.admit(ticket), gateway.ask) == 0
        destination = gateway.gate.route(ticket)
        assert destination is not None
        return next(gateway.gate.choose(ticket, destination, 0, 0.5)).id

    users = [str(number) for number in range(20)]
    first = [chosen(user, "192.0.2.1") for user in users]
    assert first == [chosen(user, "192.0.2.2") for user in users]
    assert len(set(first)) > 2
