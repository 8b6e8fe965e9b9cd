"""One table of requests and the answers that must come, for every home of the policy.

A home is a function `(settings, store)` that gives a context with `answer`, where `answer(request)` gives a
Response. A new shell joins by being one; tests/test_scenarios.py lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gatekeeper.commands import Store

A, B = "192.0.2.1", "198.51.100.2"
"""Two clients."""


@dataclass(frozen=True)
class Ask:
    """A request: from whom, for what. `raw` is the target as a client would write it."""

    method: str = "GET"
    raw: str = "/"
    peer: str | None = A
    headers: Sequence[tuple[str, str]] = ()
    after: float = 0
    """Seconds that pass before it."""
    body: bytes = b""
    """The application answers 418 unless all of it, as `X-Length` says, has reached it."""


@dataclass(frozen=True)
class Response:
    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) < 2, f"{name} stands twice"
        return values[0] if values else None


Answer: TypeAlias = Callable[[Ask], Response]
Home: TypeAlias = Callable[[Mapping[str, Any], Store], AbstractContextManager[Answer]]


@dataclass(frozen=True)
class Then:
    """What must come: the status, these fields (None: absent), this text in the body.

    `refused`: a status other than 429 that is ours, and not the application's.
    """

    status: int
    fields: Mapping[str, str | None] = field(default_factory=dict)
    contains: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Scenario:
    says: str
    settings: Mapping[str, Any]
    steps: Sequence[tuple[Ask, Then]]


def rule(name: str = "default", rate: str | list[str] = "2/minute", **more: Any) -> dict[str, Any]:
    return {"name": name, "rate": rate, **more}


OK, LIMITED = Then(200), Then(429)

PREFLIGHT = [("Origin", "https://x"), ("Access-Control-Request-Method", "PUT")]

LOGIN = rule("login", "1/minute", match="POST /login")
ADMIN = rule("admin", "1/minute", match="/admin/*")


def spelled(*targets: str, match: str) -> Scenario:
    """All of these are one path to the rule: after the first the others are refused."""
    steps = [(Ask(raw=target), LIMITED if place else OK) for place, target in enumerate(targets)]
    return Scenario(
        f"{match} is not walked round by a spelling", {"limits": [rule(rate="1/minute", match=match)]}, steps
    )


def posted(raw: str, body: bytes, *, kind: str = "application/x-www-form-urlencoded", peer: str = A) -> Ask:
    length = str(len(body))
    headers = [("Content-Type", kind), ("Content-Length", length), ("X-Length", length)]
    return Ask("POST", raw, peer, headers, body=body)


SCENARIOS: list[Scenario] = [
    Scenario(
        "each client has a quota of its own, and is told what is left of it",
        {"limits": [rule(rate="2/minute")]},
        [
            (Ask(), Then(200, {"ratelimit": '"default";r=1;t=61', "ratelimit-policy": '"default";q=2;w=60'})),
            (Ask(), Then(200, {"ratelimit": '"default";r=0;t=61', "retry-after": None})),
            (
                Ask(),
                Then(429, {"ratelimit": '"default";r=0;t=61', "retry-after": "61", "cache-control": "no-store"}),
            ),
            (Ask(peer=B), Then(200, {"ratelimit": '"default";r=1;t=61'})),
            (Ask(after=61), OK),
            (Ask(peer=B), OK),
        ],
    ),
    Scenario(
        "a program is answered with a problem document, a browser with plain text",
        {"limits": [rule(rate="1/minute")]},
        [
            (Ask(), OK),
            (Ask(), Then(429, {"content-type": "application/problem+json"}, '"violated-policies": ["default"]')),
            (
                Ask(headers=[("Accept", "application/json, text/plain")]),
                Then(429, {"content-type": "application/problem+json"}),
            ),
            (
                Ask(headers=[("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")]),
                Then(429, {"content-type": "text/plain; charset=utf-8"}, "Try again in 61 seconds"),
            ),
        ],
    ),
    Scenario(
        "a refused HEAD has the fields and no body",
        {"limits": [rule(rate="1/minute")]},
        [(Ask(), OK), (Ask("HEAD"), Then(429, {"retry-after": "61"}))],
    ),
    Scenario(
        "a rule is for its method and path; GET covers HEAD; case does not hide a method",
        {"limits": [LOGIN, rule("page", "1/minute", match="GET /page")]},
        [
            (Ask("POST", "/login"), OK),
            (Ask("POST", "/login"), LIMITED),
            (Ask("post", "/login"), LIMITED),
            (Ask("GET", "/login"), Then(200, {"ratelimit": None, "ratelimit-policy": None})),
            (Ask("POST", "/other"), OK),
            (Ask("POST", "/login", B), OK),
            (Ask("HEAD", "/page"), OK),
            (Ask("GET", "/page"), LIMITED),
        ],
    ),
    Scenario(
        "a request that one rule refuses spends nothing of another",
        {"limits": [rule("all", "4/minute"), LOGIN]},
        [
            (Ask("POST", "/login"), Then(200, {"ratelimit": '"login";r=0;t=61'})),
            *[(Ask("POST", "/login"), Then(429, {"ratelimit": '"login";r=0;t=61'}))] * 9,
            (Ask(), Then(200, {"ratelimit": '"all";r=2;t=61', "ratelimit-policy": '"all";q=4;w=60'})),
            (Ask(), OK),
            (Ask(), OK),
            (Ask(), LIMITED),
        ],
    ),
    Scenario(
        "several rates of a rule hold together",
        {"limits": [rule(rate=["2/minute", "3/hour"])]},
        [
            (
                Ask(),
                Then(200, {"ratelimit-policy": '"default-60s";q=2;w=60, "default-3600s";q=3;w=3600'}),
            ),
            (Ask(), OK),
            (Ask(), Then(429, {"retry-after": "61"})),
            (Ask(after=61), OK),
            (Ask(), Then(429, contains="default-3600s")),
        ],
    ),
    Scenario(
        "gcra with a burst lets in the burst, then one at a time",
        {"limits": [rule(rate="60/minute", burst=2)]},
        [(Ask(), Then(200, {"ratelimit-policy": '"default";q=2;w=2'})), (Ask(), OK), (Ask(), Then(429, {"retry-after": "1"})), (Ask(after=1), OK), (Ask(), LIMITED)],
    ),
    Scenario(
        "a cost spends more than one",
        {"limits": [rule(rate="5/minute", cost=2)]},
        [(Ask(), Then(200, {"ratelimit": '"default";r=3;t=61'})), (Ask(), OK), (Ask(), LIMITED)],
    ),
    spelled("/admin/x", "/admin/y", "/admin", "/admin/", "//admin//z", "/./admin/x", "/admin/../admin/x", "/%61dmin/x", "/x/%2e%2e/admin/q", "/admin%2Fx", match="/admin/*"),
    spelled("/login", "/login/", "//login", "/login/.", "/a/../login", "/login%0A", "/%6cogin", "/login?x=/other", match="/login"),
    spelled("/x/b/y", "/x/../y%0A", "/x/./y/", "/x/./y%0A", match="/x/{a}/y"),
    spelled("/users/1", "/users/2/", "/users//3", "/users/a%20b", match="/users/{id}"),
    spelled("/files/a/b", "/files/../x", "/files/%2e%2e", match="/files/{rest:path}"),
    Scenario(
        "CORS preflights are free unless the rule says otherwise; a bare OPTIONS is not",
        {"limits": [rule("a", "1/minute", match="/a"), rule("b", "1/minute", match="/b", preflights=True)]},
        [
            *[(Ask("OPTIONS", "/a", headers=PREFLIGHT), OK)] * 3,
            (Ask("OPTIONS", "/a"), OK),
            (Ask("OPTIONS", "/a"), LIMITED),
            (Ask("OPTIONS", "/b", headers=PREFLIGHT), OK),
            (Ask("OPTIONS", "/b", headers=PREFLIGHT), LIMITED),
        ],
    ),
    Scenario(
        "a request with a body or with credentials is no preflight, whatever it says",
        {"limits": [rule(rate="1/minute")]},
        [
            (Ask("OPTIONS", "/", headers=PREFLIGHT), OK),
            (Ask("OPTIONS", "/", headers=[*PREFLIGHT, ("Cookie", "a=1")]), OK),
            *[
                (Ask("OPTIONS", "/", headers=[*PREFLIGHT, *more], body=body), LIMITED)
                for more, body in (
                    ([("Cookie", "a=1")], b""),
                    ([("Authorization", "Basic YTpi")], b""),
                    ([("Content-Length", "2"), ("X-Length", "2")], b"{}"),
                )
            ],
            (Ask("OPTIONS", "/", headers=PREFLIGHT), OK),
        ],
    ),
    Scenario(
        "a rule can be for a host, whatever its spelling",
        {"limits": [rule(rate="1/minute", match="api.example.com/x"), rule("sub", "1/minute", match="*.example.org/*")]},
        [
            (Ask(raw="/x", headers=[("Host", "api.example.com")]), OK),
            (Ask(raw="/x", headers=[("Host", "API.Example.Com.:8080")]), LIMITED),
            (Ask(raw="/x", headers=[("Host", "www.example.com")]), OK),
            (Ask(raw="/x", headers=[("Host", "a.example.org")]), OK),
            (Ask(raw="/y", headers=[("Host", "a.b.example.org")]), LIMITED),
            (Ask(raw="/y", headers=[("Host", "example.org")]), OK),
        ],
    ),
    Scenario(
        "a host that is named twice is limited as each of the two",
        {"limits": [rule(rate="1/minute", match="api.example.com/*")]},
        [
            (Ask(headers=[("Host", "api.example.com")]), OK),
            (Ask(headers=[("Host", "api.example.com,other.example.com")]), LIMITED),
            (Ask(headers=[("Host", "other.example.com,api.example.com")]), LIMITED),
            (Ask(headers=[("Host", "other.example.com")]), OK),
        ],
    ),
    Scenario(
        "no forwarding field is believed unless its sender is trusted",
        {"limits": [rule(rate="1/minute")]},
        [(Ask(headers=[("X-Forwarded-For", B)]), OK), (Ask(headers=[("X-Forwarded-For", "203.0.113.9")]), LIMITED), (Ask(peer=B), OK)],
    ),
    Scenario(
        "behind a trusted proxy the client is the nearest address that is no proxy",
        {"identity": {"trusted_proxies": ["10.0.0.0/8"]}, "limits": [rule(rate="1/minute")]},
        [
            (Ask(peer="10.0.0.1", headers=[("X-Forwarded-For", A)]), OK),
            (Ask(peer="10.0.0.2", headers=[("X-Forwarded-For", f"203.0.113.9, {A}, 10.9.9.9")]), LIMITED),
            (Ask(peer="10.0.0.1", headers=[("X-Forwarded-For", f"{A}, {B}")]), OK),
            (Ask(peer=A, headers=[("X-Forwarded-For", "203.0.113.77")]), LIMITED),
        ],
    ),
    Scenario(
        "an IPv6 network is one client, and mapped IPv4 is IPv4",
        {"limits": [rule(rate="1/minute")]},
        [
            (Ask(peer="2001:db8::1"), OK),
            (Ask(peer="2001:db8::ffff"), LIMITED),
            (Ask(peer="2001:db8:0:1::1"), OK),
            (Ask(peer="::ffff:192.0.2.1"), OK),
            (Ask(peer=A), LIMITED),
            (Ask(peer="::ffff:192.0.2.2"), OK),
        ],
    ),
    Scenario(
        "clients without an address share one quota",
        {"limits": [rule(rate="1/minute")]},
        [(Ask(peer=None), OK), (Ask(peer=None), LIMITED), (Ask(), OK)],
    ),
    Scenario(
        "a user named by a trusted peer is counted wherever he comes from; others by their address",
        {
            "identity": {"trusted_proxies": [A, B], "user": "header:X-User"},
            "limits": [rule(rate="1/minute", key="user")],
        },
        [
            (Ask(headers=[("X-User", "ada")]), OK),
            (Ask(peer=B, headers=[("X-User", "ada")]), LIMITED),
            (Ask(peer=B, headers=[("X-User", "bob")]), OK),
            (Ask(), OK),
            (Ask(), LIMITED),
            (Ask(peer="203.0.113.3", headers=[("X-User", "eve")]), OK),
            (Ask(peer="203.0.113.3", headers=[("X-User", "eve2")]), LIMITED),
            (Ask(headers=[("X-User", "203.0.113.3")]), OK),
        ],
    ),
    Scenario(
        "a key of several parts keeps them apart; a part that is missing is the address",
        {"limits": [rule(rate="1/minute", key=["header:X-Api-Key", "method"])]},
        [
            (Ask(headers=[("X-Api-Key", "k1")]), OK),
            (Ask(peer=B, headers=[("X-Api-Key", "k1")]), LIMITED),
            (Ask("POST", headers=[("X-Api-Key", "k1")]), OK),
            (Ask(headers=[("X-Api-Key", "k" * 5000)]), OK),
            (Ask(headers=[("X-Api-Key", "k" * 5000)]), LIMITED),
            (Ask(headers=[("X-Api-Key", "k" * 5001)]), OK),
            (Ask(), OK),
            (Ask(), LIMITED),
            (Ask(peer=B), OK),
        ],
    ),
    Scenario(
        "a global key is everybody's",
        {"limits": [rule(rate="1/minute", key="global")]},
        [(Ask(), OK), (Ask(peer=B), LIMITED)],
    ),
    Scenario(
        "an outcome that does not count is given back: only failed logins are charged",
        {"limits": [rule(rate="2/minute", match="/login*".removesuffix("*"), give_back=["2xx"]), rule("up", "1/minute", match="/fail", give_back="5xx")]},
        [
            *[(Ask(raw="/login"), Then(200, {"ratelimit": '"default";r=1;t=61'}))] * 5,
            (Ask(raw="/login", headers=[("X-Answer", "401")]), Then(401)),
            (Ask(raw="/login", headers=[("X-Answer", "401")]), Then(401)),
            (Ask(raw="/login"), LIMITED),
            *[(Ask(raw="/fail", headers=[("X-Answer", "503")]), Then(503))] * 3,
            (Ask(raw="/fail"), OK),
            (Ask(raw="/fail"), LIMITED),
        ],
    ),
    Scenario(
        "fields can be switched off",
        {"response": {"fields": False}, "limits": [rule(rate="1/minute")]},
        [(Ask(), Then(200, {"ratelimit": None, "ratelimit-policy": None})), (Ask(), Then(429, {"ratelimit": None, "retry-after": "61"}))],
    ),
    Scenario("without rules nothing is limited", {}, [(Ask(), Then(200, {"ratelimit": None}))] * 5),
    Scenario(
        "repeated fields of the application's answer all arrive",
        {"limits": [rule(rate="9/minute")]},
        [(Ask(headers=[("X-Answer", "200")]), Then(200, {"ratelimit": '"default";r=8;t=61'}, "ok"))],
    ),
    Scenario(
        "a login name in a form has a quota of its own, and the form still reaches the application",
        {"limits": [rule("name", "1/minute", match="POST /login", key="form:name")]},
        [
            (posted("/login", b"name=bob&password=1"), OK),
            (posted("/login", b"password=2&name=BOB%20", peer=B), LIMITED),
            (posted("/login", b"name=alice&x=" + b"x" * 30_000), OK),
            (posted("/login", b"name=carol&name=bob"), Then(400, {"ratelimit": None}, refused=True)),
            (posted("/login", b"name=carol&x=" + b"x" * 70_000), Then(413, {"retry-after": None}, refused=True)),
            (posted("/other", b"name=bob&x=" + b"x" * 70_000), OK),
        ],
    ),
    Scenario(
        "a member of a JSON document is a key, whatever the content type says",
        {"limits": [rule("team", "1/minute", key=["json:team.id", "method"])]},
        [
            (posted("/", b'{"team": {"id": 7}}', kind="application/json"), OK),
            (posted("/", b'{"team": {"id": "7"}, "x": [1]}', kind="text/plain", peer=B), LIMITED),
            (posted("/", b'{"team": {"id": 8}}'), OK),
            (Ask(), OK),
            (Ask(), LIMITED),
        ],
    ),
    Scenario(
        "a JSON document that can be read in several ways is refused, and spends nothing",
        {"limits": [rule("login", "1/minute", match="POST /login", key="json:login")]},
        [
            *[
                (posted("/login", body, kind="application/json"), Then(400, {"ratelimit": None}, refused=True))
                for body in (
                    b'{"login": "bob", "Login": "eve"}',
                    b'{"login": "bob", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
                    b'{"login": ' + b"7" * 5000 + b"}",
                )
            ],
            (posted("/login", b"{}", kind="application/json"), OK),
        ],
    ),
    Scenario(
        "the response tells what a request has cost, and clients do not see that",
        {"limits": [rule("rows", "10/minute", cost=5, settle="header:X-Cost")]},
        [
            (Ask(headers=[("X-Say-Cost", "1")]), Then(200, {"ratelimit": '"rows";r=5;t=61', "x-cost": None})),
            (Ask(headers=[("X-Say-Cost", "9")]), Then(200, {"ratelimit": '"rows";r=4;t=61', "x-cost": None})),
            (Ask(), Then(429, {"ratelimit": '"rows";r=0;t=61'})),
            (Ask(after=61, headers=[("X-Say-Cost", "none")]), Then(200, {"x-cost": None})),
            (Ask(), Then(200, {"ratelimit": '"rows";r=0;t=61', "x-cost": None})),
        ],
    ),
    Scenario(
        "the bytes of the response are what a request costs",
        {"limits": [rule("bytes", "4/minute", settle="bytes")]},
        [(Ask(), OK), (Ask(), OK), (Ask(), LIMITED), (Ask(peer=B), OK)],
    ),
    Scenario(
        "a request that is in progress no more is counted no more",
        {"limits": [{"name": "busy", "concurrency": 1}]},
        [
            (Ask(), Then(200, {"ratelimit": '"busy";r=0;t=1'})),
            (Ask(headers=[("X-Answer", "500")]), Then(500)),
            (Ask(), OK),
        ],
    ),
    Scenario(
        "a denied network is not answered, and an allowed one is not limited",
        {"limits": [rule(rate="1/minute")], "access": {"allow": A, "deny": ["192.0.2.0/24", "198.51.100.0/24"]}},
        [(Ask(), OK), (Ask(), OK), (Ask(peer=B), Then(403, {"retry-after": None}, refused=True))],
    ),
    Scenario(
        "who is refused again and again is banned",
        {"limits": [rule(rate="1/second", penalty={"strikes": 2, "within": "1m", "ban": "30s"})]},
        [
            (Ask(), OK),
            (Ask(), Then(429, {}, "quota-exceeded")),
            (Ask(), Then(429, {}, "quota-exceeded")),
            (Ask(after=2), Then(429, {"retry-after": "28"}, "abnormal-usage-detected")),
            (Ask(peer=B), OK),
            (Ask(after=28), OK),
        ],
    ),
    Scenario(
        "tiers, exemptions, overrides and shadows are the same everywhere",
        {
            "limits": [
                rule("all", "1/minute"),
                rule(
                    "plan",
                    "2/minute",
                    match="/plan",
                    overrides="all",
                    tier="header:X-Plan",
                    tiers={"pro": "3/minute"},
                ),
                rule("try", "1/minute", match="/try", overrides="all", shadow=True),
                rule("free", "1/minute", match="/free", overrides="all", exempt=["header:X-Key=s3cret"]),
            ]
        },
        [
            *[(Ask(raw="/plan"), answer) for answer in (OK, OK, LIMITED)],
            *[(Ask(raw="/plan", peer=B, headers=[("X-Plan", "pro")]), answer) for answer in (OK, OK, OK, LIMITED)],
            *[(Ask(raw="/try"), Then(200, {"ratelimit": None})) for _ in range(3)],
            *[(Ask(raw="/free", headers=[("X-Key", "s3cret")]), OK) for _ in range(3)],
            *[(Ask(raw="/free", headers=[("X-Key", "guess")]), answer) for answer in (OK, LIMITED)],
            *[(Ask(), answer) for answer in (OK, LIMITED)],
        ],
    ),
    Scenario(
        "the older fields and a body of one's own",
        {"limits": [rule()], "response": {"x_ratelimit": "seconds", "fields": False, "body": "wait {retry_after}"}},
        [
            (Ask(), Then(200, {"x-ratelimit-limit": "2", "x-ratelimit-remaining": "1", "x-ratelimit-reset": "61"})),
            (Ask(), Then(200, {"x-ratelimit-remaining": "0", "ratelimit": None})),
            (Ask(), Then(429, {"x-ratelimit-remaining": "0"}, "wait 61")),
        ],
    ),
]  # fmt: skip
