"""Affinity in the gateway: who is pinned to whom, what clients, upstreams and caches see of it, and what ends it."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from gatekeeper import Gatekeeper
from gatekeeper.affinity import Pins
from gatekeeper.upstreams.hashing import Ring
from tests.gateway import (
    Answer,
    Client,
    Gateway,
    Refusing,
    Stage,
    Talk,
    Upstream,
    answering,
    closing,
    request,
    response,
    says,
    staged,
)

SECRETS: Final = [secrets.token_urlsafe(32) for _ in range(2)]
PIN: Final = re.compile(
    r"gk_api=([A-Za-z0-9_-]{32}\.[A-Za-z0-9_-]{43}); Path=/; Max-Age=3600; Secure; HttpOnly; SameSite=Lax"
)


def keys(directory: Path, *numbers: int) -> list[str]:
    """Files of the secrets of these numbers, as settings name them."""
    for number in numbers:
        (directory / f"key{number}").write_text(SECRETS[number], encoding="ascii")
    return [f"file:{directory}/key{number}" for number in numbers]


def pool(urls: Mapping[str, str], **settings: Any) -> dict[str, Any]:
    """A pool of these, each known by its name."""
    upstreams = [{"id": name, "url": url} for name, url in urls.items()]
    return {"upstreams": upstreams, "policy": "round_robin", "affinity": {}, **settings}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("gateway")
    refusing = Refusing()

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        abc, many = {name: urls[name] for name in "abc"}, {"health": {"failures": 10_000}}
        return {
            "keys": keys(directory, 0),
            "limits": [{"name": "front", "rate": "1/hour", "match": "/limited"}],
            "pools": {
                "api": pool(abc, **many, affinity={"cookie": "gk_api", "header": "X-Pin"}),
                "carts": pool({"up": urls["up"]}, **many),
                "half": pool({"none": refusing.url, "a": urls["a"]}, **many),
                "plain": {"upstreams": urls["up"], **many},
            },
            "routes": [
                {"match": "/*", "pool": "api"},
                {"match": "/carts/*", "pool": "carts"},
                {"match": "/half/*", "pool": "half"},
                {"match": "/plain/*", "pool": "plain"},
            ],
        }

    with staged(directory, settings, ["up", "a", "b", "c"], [refusing]) as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    shared.clear()
    for name, upstream in shared.upstreams.items():
        upstream.script = answering(says(name.encode()))
    yield shared
    shared.check()


def pin_of(answer: Answer) -> str:
    """The pin that an answer sets, with all that belongs to it."""
    found = [PIN.fullmatch(value.decode()) for value in answer.all("set-cookie") if value.startswith(b"gk_api=")]
    assert len(found) == 1, answer.fields
    assert found[0] is not None, answer.fields
    assert answer.all("cache-control")[-1].startswith(b"private")
    return found[0][1]


def get(pin: str | None = None, target: str = "/", *fields: str) -> bytes:
    return request(f"GET {target}", *([f"Cookie: gk_api={pin}"] if pin is not None else []), *fields)


def pins(directory: Path, *, ids: str = "abc", name: str = "api", number: int = 0) -> Pins:
    """What writes pins as the gateways do."""
    keeper = Gatekeeper({"keys": keys(directory, number)})
    assert keeper.keys is not None
    return Pins(keeper.keys.ring, name, ids, 3600)


class TestPinning:
    def test_each_new_client_goes_by_the_policy_and_comes_back_to_who_answered(self, stage: Stage) -> None:
        """Three clients, three upstreams; and each finds its own again, on any connection, without being told again."""
        answers = [stage.ask(get()) for _ in range(6)]
        assert sorted(answer.body for answer in answers) == sorted([b"a", b"b", b"c"] * 2)
        for answer in answers:
            for _ in range(4):
                again = stage.ask(get(pin_of(answer)))
                assert again.body == answer.body
                assert again.all("set-cookie") == again.all("cache-control") == []

    def test_a_pin_shows_nothing_of_whom_it_is_for(self, stage: Stage, tmp_path: Path) -> None:
        """No id, no port, no pool's name is in the head of an answer, but in the name of the cookie."""
        answer = stage.ask(get())
        for upstream in stage.upstreams.values():
            assert str(upstream.port).encode() not in answer.head
        found = pins(tmp_path).open(pin_of(answer), int(time.time()))
        assert getattr(found, "id", found) == answer.body.decode()

    def test_who_sends_a_field_is_told_in_a_field(self, stage: Stage) -> None:
        """A client without cookies sends back what it got; the first answer has it both ways."""
        first = stage.ask(get())
        pin = first.get("x-pin")
        assert pin is not None
        assert pin.decode() == pin_of(first)
        for _ in range(4):
            again = stage.ask(request("GET /", b"X-Pin: " + pin))
            assert again.body == first.body
            assert (again.get("x-pin"), again.get("set-cookie")) == (None, None)
        wrong = stage.ask(request("GET /", "X-Pin: end"))
        assert wrong.get("x-pin") is not None
        assert wrong.get("set-cookie") is None
        assert wrong.get("cache-control") == b"private"

    def test_pools_have_cookies_of_their_own(self, stage: Stage) -> None:
        """The pin of one says nothing in another, under whatever name it comes."""
        pin = pin_of(stage.ask(get()))
        answer = stage.ask(request("GET /carts", f"Cookie: gk_carts={pin}; gk_api={pin}"))
        (value,) = answer.all("set-cookie")
        assert value.startswith(b"gk_carts=")
        carts = value.partition(b"=")[2].partition(b";")[0].decode()
        assert pin_of(stage.ask(get(carts))) != carts

    @pytest.mark.parametrize(
        "answer",
        [
            response("500 Oops", "Content-Length: 0"),
            response("401 No", "Content-Length: 0"),
            response("204 None"),
            response("304 Same"),
            response("302 There", "Location: /", "Content-Length: 0"),
            response("200 OK", "Transfer-Encoding: chunked", body=b"2\r\nok\r\n0\r\n\r\n"),
            response("103 Hints", "Link: </a>") + response("200 OK", "Content-Length: 0"),
        ],
    )
    @pytest.mark.parametrize("line", ["GET /", "HEAD /", "GET / HTTP/1.0"])
    def test_any_answer_pins(self, stage: Stage, answer: bytes, line: str) -> None:
        """Whatever the upstream says, it is who remembers; interim answers say nothing."""
        if line.startswith("HEAD"):
            answer = answer.partition(b"\r\n\r\n2\r\n")[0] + b"\r\n\r\n" if b"chunked" in answer else answer
        for name in "abc":
            stage.upstreams[name].script = closing(answer)
        with stage.client() as client:
            client.send(request(line))
            found = client.answer(line.split(" ")[0])
            if found.status == 103:
                assert (found.get("set-cookie"), found.get("x-pin")) == (None, None)
                found = client.answer(line.split(" ")[0])
            pin_of(found)

    def test_answers_of_the_gateways_own_pin_nobody(self, stage: Stage) -> None:
        """Nobody has answered: 404, 405, 429."""
        stage.ask(get(None, "/limited"))
        for raw, status in ((get(None, "/limited"), 429), (request("TRACE /"), 405)):
            answer = stage.ask(raw)
            assert answer.status == status
            assert answer.all("set-cookie") == answer.all("x-pin") == []

    def test_a_request_that_was_tried_elsewhere_is_pinned_to_who_answered(self, stage: Stage) -> None:
        """Half of the pool refuses connections: no pin is ever for it."""
        for _ in range(6):
            answer = stage.ask(get(None, "/half"))
            assert answer.body == b"a"
            (value,) = answer.all("set-cookie")
            cookie = value.partition(b";")[0].decode()
            assert stage.ask(request("GET /half", f"Cookie: {cookie}")).all("set-cookie") == []

    def test_a_pinned_request_that_breaks_is_sent_to_another_and_pinned_there(self, stage: Stage) -> None:
        """Its own took the request and closed: the answer is another's, and so is the pin."""
        first = stage.ask(get())
        own = stage.upstreams[first.body.decode()]
        stage.clear()
        for name in "abc":
            stage.upstreams[name].script = answering(says(name.encode()))
        own.script = closing(b"")
        moved = stage.ask(get(pin_of(first)))
        assert moved.body != first.body
        assert len(own.requests) == 1
        assert stage.ask(get(pin_of(moved))).body == moved.body


class TestWhatUpstreamsSee:
    @pytest.mark.parametrize(
        ("sent", "seen"),
        [
            (["Cookie: gk_api={0}"], []),
            (["Cookie: a=1; gk_api={0}; b=2"], [b"a=1; b=2"]),
            (['Cookie: gk_api={0};a=1;;  b="x y" ;gk_carts=z'], [b'a=1;;  b="x y"']),
            (["cookie: gk_half={0}", "COOKIE: a=1", "Cookie: gk_api"], [b"a=1"]),
            (["Cookie:a=\xe9\xff;gk_api=\xff; b"], [b"a=\xe9\xff; b"]),
            (["Cookie: gk_api={0}; gk_api={0}; c=gk_api={0}"], [b"c=gk_api={0}"]),
            (["Cookie:  a=1;gk_plain=2;GK_API=3 "], [b"a=1;gk_plain=2;GK_API=3"]),
        ],
    )
    @pytest.mark.parametrize("path", ["/", "/carts", "/plain"])
    def test_no_pin_of_any_pool_and_all_other_cookies_as_they_came(
        self, stage: Stage, tmp_path: Path, sent: list[str], seen: list[bytes], path: str
    ) -> None:
        """In a pool with affinity of its own, of another, or of none."""
        pin = pins(tmp_path).seal("a", int(time.time()))
        stage.ask(request(f"GET {path}", *(line.replace("{0}", pin) for line in sent), "X-Pin: x", "X-Pin2: y"))
        (came,) = [one for upstream in stage.upstreams.values() for one in upstream.requests]
        assert came.all("cookie") == [value.replace(b"{0}", pin.encode()) for value in seen]
        assert (came.all("x-pin"), came.all("x-pin2")) == ([], [b"y"])

    def test_a_repeated_request_is_without_it_too(self, stage: Stage) -> None:
        """What is sent once more is what was sent first."""
        pin = pin_of(stage.ask(get()))
        stage.clear()
        for name in "abc":
            stage.upstreams[name].script = closing(b"")
        stage.ask(request("GET /", f"Cookie: a=1; gk_api={pin}"))
        came = [one for upstream in stage.upstreams.values() for one in upstream.requests]
        assert len(came) == 3
        assert {one.get("cookie") for one in came} == {b"a=1"}


class TestWhatClientsSee:
    def test_the_fields_of_the_answer_stay_and_no_cache_keeps_the_pin(self, stage: Stage) -> None:
        """What the upstream set stays, apart; what it allowed shared caches is taken back, while a pin is set alone."""
        fields = [
            "Set-Cookie: a=1; Path=/",
            "Cache-Control: public, max-age=60",
            "Set-Cookie: b=2",
            "CDN-Cache-Control: max-age=600",
            "cache-control: s-maxage=600",
            "ETag: x",
        ]
        for name in "abc":
            stage.upstreams[name].script = answering(response("200 OK", *fields, "Content-Length: 0"))
        first = stage.ask(get())
        assert first.all("cache-control") == [b"private, max-age=60"]
        assert first.all("cdn-cache-control") == []
        assert first.all("set-cookie")[:2] == [b"a=1; Path=/", b"b=2"]
        assert first.get("etag") == b"x"
        again = stage.ask(get(pin_of(first)))
        assert again.all("cache-control") == [b"public, max-age=60", b"s-maxage=600"]
        assert again.all("cdn-cache-control") == [b"max-age=600"]
        assert again.all("set-cookie") == [b"a=1; Path=/", b"b=2"]

    def test_the_application_ends_a_pin(self, stage: Stage) -> None:
        """Its field goes no further, the cookie is expired; who holds none is told nothing."""
        pin = pin_of(stage.ask(get()))
        for name in "abc":
            ends = response("200 OK", "X-Gatekeeper-Affinity: end", "X-Pin: forged", "Content-Length: 0")
            stage.upstreams[name].script = answering(ends)
        by_cookie = stage.ask(get(pin))
        assert by_cookie.all("set-cookie") == [b"gk_api=; Path=/; Max-Age=0; Secure; HttpOnly; SameSite=Lax"]
        assert (by_cookie.all("x-pin"), by_cookie.get("cache-control")) == ([], b"private")
        by_field = stage.ask(request("GET /", f"X-Pin: {pin}"))
        assert (by_field.all("set-cookie"), by_field.all("x-pin")) == ([], [b"end"])
        never = stage.ask(get())
        assert never.all("set-cookie") == never.all("x-pin") == never.all("cache-control") == []
        for answer in (by_cookie, by_field, never):
            assert answer.all("x-gatekeeper-affinity") == []

    def test_without_affinity_an_answer_is_as_it_was(self, stage: Stage) -> None:
        """Neither pinned nor heeded: the field is the application's own there."""
        stage.up.script = answering(response("200 OK", "X-Gatekeeper-Affinity: end", "Content-Length: 0"))
        answer = stage.ask(get(None, "/plain"))
        assert answer.all("x-gatekeeper-affinity") == [b"end"]
        assert answer.all("set-cookie") == answer.all("cache-control") == []


class TestAttacks:
    @pytest.mark.parametrize(
        "value",
        [
            b"", b"=", b"end", b"\xff" * 76, b"A" * 76, b"." * 76, b"A" * 32 + b"." + b"A" * 43, b"A" * 20_000,
            b"\t", b"a\x80\xfe", b'"' + b"A" * 76 + b'"', b"%00" * 30, b"x; gk_api=" * 1500, b"none.9001",
        ],
        ids=repr,
    )  # fmt: skip
    def test_what_is_no_pin_is_a_new_client(self, stage: Stage, value: bytes) -> None:
        """No byte string as a cookie or field gives anything but an answer with a pin of its own."""
        pin_of(stage.ask(request("GET /", b"Cookie: gk_api=" + value)))
        if b"\xff" * 2 not in value:
            answer = stage.ask(request("GET /", b"X-Pin: " + value))
            assert answer.status == 200
            assert answer.get("x-pin") is not None

    def test_one_of_another_key_another_pool_or_another_time_is_a_new_client(
        self, stage: Stage, tmp_path: Path
    ) -> None:
        """Who guesses, steals from a neighbour or keeps for too long is not sent where it wants to go."""
        now = int(time.time())
        wrong = {
            "forged": pins(tmp_path, number=1).seal("a", now),
            "foreign": pins(tmp_path, name="carts").seal("a", now),
            "expired": pins(tmp_path).seal("a", now - 3600),
        }
        for pin in wrong.values():
            answers = [stage.ask(get(pin)) for _ in range(3)]
            assert sorted(answer.body for answer in answers) == [b"a", b"b", b"c"]
            assert all(pin_of(answer) != pin for answer in answers)
        right = pins(tmp_path).seal("a", now)
        assert {stage.ask(get(right)).body for _ in range(3)} == {b"a"}
        twice = [stage.ask(get(f"{right}; gk_api={right}")) for _ in range(3)]
        assert sorted(answer.body for answer in twice) == [b"a", b"b", b"c"]
        assert all(pin_of(answer) for answer in twice)

    def test_one_that_is_half_over_is_replaced_and_followed(self, stage: Stage, tmp_path: Path) -> None:
        """The client stays where it was, for the whole time again."""
        old = pins(tmp_path).seal("b", int(time.time()) - 1900)
        answer = stage.ask(get(old))
        assert answer.body == b"b"
        assert pin_of(answer) != old

    def test_thousands_of_pins_are_each_followed(self, stage: Stage, tmp_path: Path) -> None:
        """More than are remembered: who was forgotten is read once more."""
        made, now = pins(tmp_path), int(time.time())
        with stage.client() as client:
            for number in range(5000):
                id = "abc"[number % 3]
                answer = client.ask(get(made.seal(id, now - number % 1700)))
                assert answer.body == id.encode()
                assert not answer.all("set-cookie")


class Fleet:
    """Upstreams a, b and c, and gateways before them with settings of their own."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self.upstreams: dict[str, Upstream] = {}
        for name in "abc":
            self.start(name)

    def start(self, name: str) -> None:
        """An upstream of that name, at an address of its own."""
        self.upstreams[name] = upstream = Upstream()
        upstream.script = answering(says(name.encode()))
        self._stack.callback(upstream.close)

    @property
    def urls(self) -> dict[str, str]:
        return {name: upstream.url for name, upstream in self.upstreams.items()}

    def gateway(
        self, settings: Mapping[str, Any] | None = None, numbers: tuple[int, ...] = (0,), **more: Any
    ) -> Gateway:
        document = {
            "keys": keys(self.directory, *numbers),
            "pools": {"api": settings or pool(self.urls)},
            "routes": [{"match": "/*", "pool": "api"}],
            **more,
        }
        gateway = Gateway(document, self.directory)
        self._stack.callback(gateway.stop)
        return gateway

    def pin(self, id: str) -> str:
        return pins(self.directory).seal(id, int(time.time()))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        fleet = Fleet(tmp_path, stack)
        yield fleet
        for upstream in fleet.upstreams.values():
            assert not upstream.errors


def ask(gateway: Gateway, pin: str | None = None, source: str = "127.0.0.1") -> Answer:
    with Client(gateway.port, source=source) as client:
        return client.ask(get(pin))


ONCE: Final = {"health": {"failures": 1, "eject_for": "1h", "eject_at_most": "1h"}}


class TestGateways:
    def test_two_that_never_met_follow_each_others_pins_and_agree_on_where_the_lost_go(self, fleet: Fleet) -> None:
        """They share keys and ids alone: order, weights and policy differ, and so do their turns."""
        one = fleet.gateway(pool(fleet.urls, **ONCE))
        reordered = dict(reversed(fleet.urls.items()))
        other = fleet.gateway(pool(reordered, policy="random", **ONCE))
        pinned = {name: fleet.pin(name) for name in "abc"}
        for name, pin in pinned.items():
            for gateway in (one, other):
                answer = ask(gateway, pin)
                assert (answer.body.decode(), answer.all("set-cookie")) == (name, [])
        fleet.upstreams["b"].close()
        for number in range(1, 25):
            source = f"127.0.0.{number}"
            expected = next(id for id in Ring("abc").owners(source) if id != "b")
            answers = [ask(gateway, pinned["b"], source) for gateway in (one, other)]
            assert [answer.body.decode() for answer in answers] == [expected] * 2
            assert {ask(gateway, pin_of(answers[0]), source).body.decode() for gateway in (one, other)} == {
                expected
            }
        assert ask(one, pinned["a"]).body == b"a"

    def test_a_pin_outlives_the_gateway_the_order_and_the_address(self, fleet: Fleet) -> None:
        """A new process, with several workers, the upstream elsewhere: its client finds it."""
        first = fleet.gateway()
        answer = ask(first)
        pin, own = pin_of(answer), answer.body.decode()
        first.stop()
        fleet.start(own)
        after = fleet.gateway(pool(dict(reversed(fleet.urls.items()))), listen={"workers": 2}, enabled=False)
        for _ in range(12):
            again = ask(after, pin)
            assert (again.body.decode(), again.all("set-cookie")) == (own, [])
        assert all(b"gk_api" not in one.head for one in fleet.upstreams[own].requests)

    def test_one_that_drains_keeps_its_own_until_it_goes(self, fleet: Fleet) -> None:
        """Its pinned clients stay, no new one comes; when it stops they move, and are pinned elsewhere."""
        settings = pool(fleet.urls, **ONCE)
        settings["upstreams"][1]["drain"] = True
        gateway = fleet.gateway(settings)
        pin = fleet.pin("b")
        assert {ask(gateway).body for _ in range(9)} == {b"a", b"c"}
        assert {ask(gateway, pin).body for _ in range(9)} == {b"b"}
        fleet.upstreams["b"].close()
        moved = ask(gateway, pin)
        assert moved.body in (b"a", b"c")
        assert ask(gateway, pin_of(moved)).body == moved.body

    def test_strict_refuses_rather_than_to_send_elsewhere(self, fleet: Fleet) -> None:
        """Not there, ejected since, or unknown to the settings: 503 with Retry-After, the pin untouched. Others are served."""
        gateway = fleet.gateway(pool(fleet.urls, affinity={"strict": True}, **ONCE))
        lost = pins(fleet.directory, ids="d").seal("d", int(time.time()))
        fleet.upstreams["b"].close()
        for pin in (fleet.pin("b"), fleet.pin("b"), lost):
            answer = ask(gateway, pin)
            assert answer.status == 503
            assert answer.get("retry-after") == b"1"
            assert answer.all("set-cookie") == []
        assert ask(gateway, fleet.pin("a")).body == b"a"
        assert {ask(gateway).body for _ in range(6)} == {b"a", b"c"}

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_full_ones_client_is_elsewhere_for_one_request_or_refused(self, fleet: Fleet, strict: bool) -> None:
        """It keeps its pin; and when there is room again it is where it was."""
        settings = pool(fleet.urls, affinity={"strict": strict})
        settings["upstreams"][1]["max_in_flight"] = 1
        gateway = fleet.gateway(settings)
        own, pin = fleet.upstreams["b"], fleet.pin("b")
        held: list[Talk] = []

        def hold(talk: Talk) -> None:
            talk.take()
            held.append(talk)
            own.until(lambda: not held)
            talk.send(says(b"b"))

        own.script = hold
        with Client(gateway.port) as client:
            client.send(get(pin))
            own.until(lambda: held)
            answer = ask(gateway, pin)
            assert answer.all("set-cookie") == []
            assert answer.status == (503 if strict else 200)
            assert strict or answer.body in (b"a", b"c")
            own.script = answering(says(b"b"))
            held.clear()
            own.told()
            assert client.answer().body == b"b"
        assert ask(gateway, pin).body == b"b"

    def test_through_a_rotation_of_keys_nobody_moves_and_after_it_no_old_pin_is_believed(
        self, fleet: Fleet
    ) -> None:
        """Under a key that retires a pin is followed and replaced; without that key it is a forgery."""
        old = fleet.pin("b")
        during = fleet.gateway(numbers=(1, 0))
        answer = ask(during, old)
        assert answer.body == b"b"
        new = pin_of(answer)
        during.stop()
        after = fleet.gateway(numbers=(1,))
        assert ask(after, new).all("set-cookie") == []
        assert ask(after, new).body == b"b"
        assert {ask(after, old).body for _ in range(6)} == {b"a", b"b", b"c"}


@contextmanager
def plain(directory: Path) -> Iterator[Gateway]:
    """A gateway whose cookie is for plain HTTP, and of another name."""
    upstream = Upstream()
    affinity = {"cookie": "stick", "secure": False, "samesite": "strict", "ttl": "90s"}
    document = {
        "keys": keys(directory, 0),
        "pools": {"api": pool({"a": upstream.url}, affinity=affinity)},
        "routes": [{"match": "/*", "pool": "api"}],
    }
    gateway = Gateway(document, directory)
    try:
        yield gateway
    finally:
        gateway.stop()
        upstream.close()


def test_the_cookie_is_as_the_settings_say(tmp_path: Path) -> None:
    """Its name, age and attributes; without a header no field is told."""
    with plain(tmp_path) as gateway:
        answer = ask(gateway)
    (value,) = answer.all("set-cookie")
    assert re.fullmatch(rb"stick=[\w.-]{76}; Path=/; Max-Age=90; HttpOnly; SameSite=Strict", value)
    assert [name for name, _ in answer.fields if b"affinity" in name.lower()] == []
