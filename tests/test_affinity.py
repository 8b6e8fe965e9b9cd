"""Pins: who may have written one, what it says and hides, how long, and what becomes of it on the wire."""

from __future__ import annotations

import hashlib
import hmac
import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itsdangerous import Signer

from gatekeeper.affinity import NOTHING, REMEMBERED, Affinity, Fault, Held, Pin, Pins
from gatekeeper.gate import Destination, Gate
from gatekeeper.http.fields import private
from gatekeeper.http.message import ScopeRequest
from gatekeeper.http.parts import part
from gatekeeper.identity import Identity
from gatekeeper.keys import Key, KeyState, Ring
from gatekeeper.proxy.pinning import heard, told, unpinned
from gatekeeper.ticket import Ticket
from gatekeeper.upstreams.hashing import Ring as HashRing
from gatekeeper.upstreams.health import EJECTION
from gatekeeper.upstreams.policies import RingOrder, RoundRobin
from gatekeeper.upstreams.pool import Pool, Upstream

NOW: Final = 1_800_000_000
TTL: Final = 3600
IDS: Final = ("a", "b", "http://10.0.0.7:9001")

ids = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=8, unique=True)  # fmt: skip
BASE64: Final = string.ascii_letters + string.digits + "-_"


def secret(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def key(name: str, state: KeyState = KeyState.ACTIVE) -> Key:
    return Key(name, "HS256", secret(name), state)


def pins(pool: str = "api", ids: Iterable[str] = IDS, ttl: int = TTL, ring: Ring | None = None) -> Pins:
    return Pins(ring or Ring([key("k1")]), pool, ids, ttl)


def opened(text: str, now: int = NOW, made: Pins | None = None) -> str | Fault | None:
    """The id that a pin says, or what is wrong with it."""
    found = (made or pins()).open(text, now)
    return found if isinstance(found, Fault) else found.id


class TestPins:
    @settings(max_examples=60)
    @given(data=st.data(), ids=ids, ttl=st.integers(1, 365 * 86_400), name=st.sampled_from(["api", "carts"]))
    def test_what_was_sealed_is_opened_by_whoever_has_the_keys_and_the_ids_in_any_order(
        self, data: st.DataObject, ids: list[str], ttl: int, name: str
    ) -> None:
        """Two gateways that never met, with the upstreams in another order, read each other's pins."""
        ours = pins(name, ids, ttl)
        theirs = pins(name, data.draw(st.permutations(ids)), ttl, Ring([key("k1")]))
        for id in ids:
            text = ours.seal(id, NOW)
            assert theirs.open(text, NOW) == Pin(id, NOW + ttl, NOW + ttl - -(-ttl // 2))
            assert theirs.open(text, NOW) == ours.open(text, NOW)

    def test_its_form_is_fixed(self) -> None:
        """Of a pin each byte follows from key, pool, id and time, worked out here by hand: versions understand each other."""
        text = pins().seal("b", NOW)
        names = key("k1").derive("affinity-names")
        said = hmac.digest(names, b"pool\0api", "sha256")[:6]
        said += hmac.digest(names, b"upstream\0api\0b", "sha256")[:12] + (NOW + TTL).to_bytes(6, "big")
        signing = hashlib.sha256(b"gatekeeper" + b"signer" + key("k1").derive("affinity")).digest()
        written = urlsafe_b64encode(said)
        signature = urlsafe_b64encode(hmac.digest(signing, written, "sha256")).rstrip(b"=")
        assert text == f"{written.decode()}.{signature.decode()}"
        assert len(text) == 76

    def test_it_shows_neither_pool_nor_upstream_nor_address(self) -> None:
        """Nothing that a pin is named by stands in it, in any encoding of it, and all are as long."""
        named = {"carts-internal": "10.0.0.7", "x": "http://10.0.0.7:9001", "service.internal": "y" * 64}
        for pool, id in named.items():
            text = pins(pool, [id]).seal(id, NOW)
            raw = urlsafe_b64decode(text.partition(".")[0])
            assert len(text) == 76
            for name in (pool, id):
                if len(name) > 1:
                    assert name not in text
                    assert name.encode() not in raw
                assert hashlib.sha256(name.encode()).digest()[:6] not in raw

    def test_one_upstream_has_other_names_in_other_pools_and_under_other_keys(self) -> None:
        """Who holds pins of two pools cannot tell that one server stands behind both."""
        texts = [pins().seal("a", NOW), pins("carts").seal("a", NOW), pins(ring=Ring([key("k2")])).seal("a", NOW)]
        assert len({text[8:24] for text in texts}) == 3

    def test_any_other_character_anywhere_is_a_forgery(self) -> None:
        """Each of the 76 characters counts, its unused bits too: a pin has one text."""
        text = pins().seal("a", NOW)
        made = pins()
        assert opened(text, made=made) == "a"
        for place in range(len(text)):
            for other in BASE64 + "=.~ ":
                if other != text[place]:
                    assert opened(text[:place] + other + text[place + 1 :], made=made) is Fault.FORGED

    @given(st.text(max_size=200) | st.text(BASE64 + ".", max_size=80) | st.from_regex(r"[A-Za-z0-9_-]{32}\.[A-Za-z0-9_-]{43}", fullmatch=True))  # fmt: skip
    def test_no_text_raises_or_is_believed(self, text: str) -> None:
        """Whatever a client writes is a forgery, and nothing worse."""
        assert opened(text) is Fault.FORGED

    @pytest.mark.parametrize(
        "text",
        ["", ".", "end", "\0" * 76, "é" * 76, "\ud800", "A" * 10**6, "." * 76, f"{'A' * 32}.{'A' * 43}", "A" * 32],
    )
    def test_what_is_malformed_is_a_forgery(self, text: str) -> None:
        """No length and no byte of it matters."""
        assert opened(text) is Fault.FORGED

    def test_what_the_ring_signs_for_something_else_is_a_forgery(self) -> None:
        """A key of its own signs pins: what was signed for sessions passes for none, and the other way round."""
        ring = Ring([key("k1")])
        said = pins().seal("a", NOW).partition(".")[0]
        other = Signer(ring.secrets("session-id"), salt=b"gatekeeper", digest_method=hashlib.sha256)
        assert opened(other.sign(said).decode()) is Fault.FORGED
        assert not other.validate(pins().seal("a", NOW))

    @given(st.integers(-(10**6), 10**6))
    def test_it_ends_in_its_second(self, offset: int) -> None:
        """Up to the last second it holds, then not; whether it was seen before or not."""
        made = pins()
        text = made.seal("a", NOW)
        expected = "a" if offset < TTL else Fault.EXPIRED
        assert opened(text, NOW + offset) == expected
        made.open(text, NOW)
        assert opened(text, NOW + offset, made) == expected

    def test_another_pools_is_foreign(self) -> None:
        """Though the keys and the ids are the same, a pin is for one pool alone."""
        assert opened(pins("carts").seal("a", NOW)) is Fault.FOREIGN

    def test_of_an_upstream_that_is_gone_it_is_known_that_it_is_gone(self) -> None:
        """The pin was right, so its client is one that must move, and no forger; it is right again with the upstream."""
        text = pins(ids=["a", "gone"]).seal("gone", NOW)
        assert opened(text) is None
        assert opened(text, made=pins(ids=["gone"])) == "gone"

    @given(st.integers(2, 10**6), st.floats(0, 1, exclude_max=True))
    def test_it_is_worth_a_new_one_when_half_of_it_is_over(self, ttl: int, part: float) -> None:
        """Not before: an answer that repeats what the client has is one that caches cannot keep."""
        made = pins(ttl=ttl)
        text, now = made.seal("a", NOW), NOW + int(part * ttl)
        found = made.open(text, now)
        assert isinstance(found, Pin)
        assert (now >= found.renews) is (2 * (now - NOW) >= ttl - ttl % 2)

    def test_one_that_lasts_longer_than_it_should_by_now_is_replaced(self) -> None:
        """Where `ttl` was shortened nobody is pinned for the time of before; a minute is left for clocks that differ."""
        text = pins(ttl=30 * 86_400).seal("a", NOW)
        assert pins().open(text, NOW) == Pin("a", NOW + 30 * 86_400, 0)
        ahead = pins().open(pins().seal("a", NOW + 60), NOW)
        assert isinstance(ahead, Pin)
        assert ahead.renews > NOW

    def test_thousands_are_remembered_and_no_more(self) -> None:
        """The memory is bounded, forgeries have no part in it, and what was forgotten is still right."""
        made = pins()
        texts = [made.seal("a", NOW + number % 600) for number in range(600)]
        for number in range(3 * REMEMBERED):
            made.open(made.seal(IDS[number % 3], NOW + number), NOW)
            made.open(f"{number:076}", NOW)
            assert len(made._known.fresh) + len(made._known.stale) <= 2 * REMEMBERED
        assert not [text for text in made._known.fresh if text.isdigit()]
        assert {opened(text, made=made) for text in texts} == {"a"}

    def test_one_in_use_is_not_forgotten(self) -> None:
        """What is asked for again and again outlasts any number of others, and is never verified again."""
        made = pins()
        text = made.seal("a", NOW)
        first = made.open(text, NOW)
        for number in range(3 * REMEMBERED):
            made.open(made.seal("b", NOW + number), NOW)
            if number % 1000 == 0:
                assert made.open(text, NOW) is first


class TestRotation:
    def ring(self, **states: KeyState) -> Ring:
        return Ring([key(name, state) for name, state in states.items()])

    def test_a_retiring_keys_pins_hold_and_are_replaced(self) -> None:
        """Nobody moves for a rotation; and once it is over no pin hangs on the old key."""
        text = pins().seal("a", NOW)
        after = pins(ring=self.ring(k1=KeyState.RETIRING, k2=KeyState.ACTIVE))
        assert after.open(text, NOW) == Pin("a", NOW + TTL, 0)
        new = after.open(after.seal("a", NOW), NOW)
        assert isinstance(new, Pin)
        assert new.renews > NOW

    def test_a_pending_keys_pins_hold_and_stay(self) -> None:
        """Of two gateways a deployment apart neither replaces the other's pins for ever."""
        ahead = pins(ring=self.ring(k1=KeyState.RETIRING, k2=KeyState.ACTIVE))
        behind = pins(ring=self.ring(k1=KeyState.ACTIVE, k2=KeyState.PENDING))
        found = behind.open(ahead.seal("b", NOW), NOW)
        assert found == Pin("b", NOW + TTL, NOW + TTL // 2)
        assert opened(behind.seal("b", NOW), made=ahead) == "b"

    def test_pins_are_written_while_the_keys_are_being_replaced(self) -> None:
        """A thread that finds the new keys, and not yet which of them signs, is given a pin that holds."""
        ring, new = Ring([key("k1")]), key("k2")
        ring.keys = (new, key("k1", KeyState.RETIRING))  # as far as `replace` has come
        made = pins(ring=ring)
        text = made.seal("a", NOW)
        ring.replace(ring.keys)
        assert opened(text, made=made) == "a"

    def test_a_revoked_keys_pins_are_forged_though_they_were_seen(self) -> None:
        """What was verified is forgotten with the key that verified it; a ring that changes back is believed again."""
        ring = Ring([key("k1")])
        made = pins(ring=ring)
        text = made.seal("a", NOW)
        assert opened(text, made=made) == "a"
        ring.replace([key("k2"), key("k1", KeyState.REVOKED)])
        assert opened(text, made=made) is Fault.FORGED
        assert opened(made.seal("a", NOW), made=made) == "a"
        ring.replace([key("k2"), key("k1", KeyState.RETIRING)])
        assert opened(text, made=made) == "a"

    def test_a_retiring_keys_pins_of_other_pools_are_foreign_and_of_the_gone_gone(self) -> None:
        """The bounds of a pin are its key's, too."""
        ring = self.ring(k1=KeyState.RETIRING, k2=KeyState.ACTIVE)
        assert opened(pins("carts").seal("a", NOW), made=pins(ring=ring)) is Fault.FOREIGN
        assert pins(ids=["b"], ring=ring).open(pins().seal("a", NOW), NOW) == Pin(None, NOW + TTL, 0)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class Asked(ScopeRequest, Ticket):
    """A ticket of a request with these fields."""

    def __init__(self, *fields: tuple[str, str], address: str = "192.0.2.7") -> None:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]
        super().__init__({"type": "http", "method": "GET", "path": "/", "headers": raw, "client": (address, 1)})
        self.address = address


def affinity(**other: Any) -> Affinity:
    return Affinity(pins(), **{"cookie": "gk", "clock": Clock(), **other})


def cookie(text: str) -> tuple[str, str]:
    return "Cookie", f"gk={text}"


class TestAffinity:
    def test_who_was_never_here_holds_nothing(self) -> None:
        """Other cookies are nobody's pin, whatever they are called."""
        for fields in ([], [("Cookie", "a=1; xgk=2; GK=3; gk2=4; gk")], [("X-Pin", "x")]):
            assert affinity(field=None).read(Asked(*fields)) is NOTHING

    def test_it_is_found_among_other_cookies_in_any_of_the_fields(self) -> None:
        """HTTP/2 may split the Cookie field."""
        text = pins().seal("b", NOW)
        held = affinity().read(Asked(("Cookie", "a=1;b=2"), ("Cookie", f" c=3;  gk={text} ;d=4")))
        assert held == Held(Pin("b", NOW + TTL, NOW + TTL // 2), None, True, False)

    @pytest.mark.parametrize(
        "fields",
        [
            [("Cookie", "gk={0}; gk={1}")],
            [("Cookie", "gk={0}; gk={0}")],
            [("Cookie", "gk={0}; gk=")],
            [("Cookie", "gk={0}"), ("Cookie", "a=1; gk={1}")],
            [("X-Pin", "{0}"), ("X-Pin", "{1}")],
        ],
    )
    def test_one_that_stands_twice_is_not_followed(self, fields: list[tuple[str, str]]) -> None:
        """Which of two is the client's own cannot be told, so neither is."""
        texts = [pins().seal(id, NOW) for id in "ab"]
        held = affinity(field="x-pin").read(Asked(*((name, value.format(*texts)) for name, value in fields)))
        assert (held.pin, held.fault) == (None, Fault.REPEATED)

    def test_thousands_of_cookies_are_not_all_read(self) -> None:
        """A bomb of cookies is one fault, whatever its size."""
        held = affinity().read(Asked(("Cookie", "; ".join(["gk=x"] * 5000))))
        assert held.fault is Fault.REPEATED

    @given(st.lists(st.tuples(st.sampled_from(["Cookie", "X-Pin"]), st.text(st.characters(max_codepoint=255)) | st.from_regex(r"gk=[^;]*(; ?gk=.*)?")), max_size=4))  # fmt: skip
    def test_no_bytes_in_either_raise_or_are_believed(self, fields: list[tuple[str, str]]) -> None:
        """Whatever a client sends, it is nothing or a fault; and the answer to it is a pin in the way that it came."""
        fields = [(name, value.encode("latin-1", "replace").decode("latin-1")) for name, value in fields]
        made = affinity(field="x-pin")
        held = made.read(Asked(*fields))
        assert held.pin is None
        assert (held.fault is not None) is (held.in_cookie or held.in_field)
        assert made.kept(held, "a")

    def test_where_both_come_the_field_is_meant(self) -> None:
        """A client that sends the field has chosen to; its library may keep cookies unasked."""
        both = [cookie(pins().seal("a", NOW)), ("X-Pin", pins().seal("b", NOW))]
        held = affinity(field="x-pin").read(Asked(*both))
        assert (held.pin and held.pin.id, held.in_cookie, held.in_field) == ("b", True, True)

    def test_a_cookie_is_written_with_all_that_keeps_it(self) -> None:
        """HttpOnly, Secure, SameSite, for the whole host and no other, and it ends with the pin."""
        ((name, value),) = affinity().kept(NOTHING, "a")
        assert (name, value.decode()) == (
            b"set-cookie",
            f"gk={pins().seal('a', NOW)}; Path=/; Max-Age=3600; Secure; HttpOnly; SameSite=Lax",
        )
        ((_, bare),) = affinity(secure=False, samesite="strict").kept(NOTHING, "a")
        assert bare.endswith(b"; Path=/; Max-Age=3600; HttpOnly; SameSite=Strict")

    def test_nothing_is_written_where_it_is_no_news(self) -> None:
        """The same upstream, and half of the time left: no field. Another upstream, or half over: one."""
        clock = Clock()
        made = affinity(clock=clock)
        held = made.read(Asked(cookie(pins().seal("a", NOW))))
        assert made.kept(held, "a") == []
        assert len(made.kept(held, "b")) == 1
        clock.now += TTL // 2 - 1
        assert made.kept(held, "a") == []
        clock.now += 1
        ((_, value),) = made.kept(held, "a")
        assert value.decode().startswith(f"gk={pins().seal('a', NOW + TTL // 2)};")

    @pytest.mark.parametrize(
        ("fields", "answered"),
        [
            ([], ["set-cookie", "x-pin"]),
            ([cookie("x")], ["set-cookie"]),
            ([("X-Pin", "x")], ["x-pin"]),
            ([cookie("x"), ("X-Pin", "x")], ["set-cookie", "x-pin"]),
        ],
    )
    def test_who_sends_it_one_way_is_answered_that_way(
        self, fields: list[tuple[str, str]], answered: list[str]
    ) -> None:
        """Who holds none yet may choose: it is told in both."""
        made = affinity(field="x-pin")
        held = made.read(Asked(*fields))
        assert [name.decode() for name, _ in made.kept(held, "a")] == answered
        assert [name.decode() for name, _ in made.ended(held)] == (answered if fields else [])

    def test_an_ended_one_is_expired_in_a_cookie_and_said_in_a_field(self) -> None:
        """Whatever came, right or wrong: the client drops it."""
        made = affinity(field="x-pin")
        held = made.read(Asked(cookie("x"), ("X-Pin", "x")))
        assert made.ended(held) == [
            (b"set-cookie", b"gk=; Path=/; Max-Age=0; Secure; HttpOnly; SameSite=Lax"),
            (b"x-pin", b"end"),
        ]
        assert made.read(Asked(("X-Pin", "end"))).fault is Fault.FORGED  # who keeps the word is pinned to nobody


class Stage:
    """A gate before one pool of a, b, c (and what else is given), with affinity."""

    def __init__(self, *upstreams: Upstream, strict: bool = False, ring: bool = False, key: str = "ip") -> None:
        self.upstreams = {one.id: one for one in upstreams or tuple(map(Upstream, "abc"))}
        self.affinity = Affinity(pins(ids=self.upstreams), cookie="gk", strict=strict, clock=Clock())
        self.pool = Pool("api", self.upstreams.values(), RingOrder if ring else RoundRobin, RingOrder)
        self.destination = Destination(self.pool, part(key), False, 1, 1, 1, 1, affinity=self.affinity)
        self.gate = Gate([], Identity(trusted=[]), routes=[])
        self.ticket = Asked()

    def chosen(self, pin: str | None = None, now: int = 0, address: str = "192.0.2.7") -> str:
        """Who is turned to by a client with a pin, in order."""
        self.ticket = Asked(*([cookie(pin)] if pin is not None else []), address=address)
        return "".join(one.id for one in self.gate.choose(self.ticket, self.destination, now, 0.5))

    def answers(self, id: str, *, ends: bool = False) -> str | None:
        """What the client is pinned to by an answer of an upstream; "" if its pin is ended; None if it is told nothing."""
        fields = self.gate.pin(self.ticket, self.destination, self.upstreams[id], ends=ends)
        for _, value in fields:
            text = value.decode().partition(";")[0].removeprefix("gk=")
            return text and str(opened(text, made=self.affinity.pins))
        return None

    def eject(self, id: str, now: int = 0) -> None:
        health = self.upstreams[id].health
        while health.is_healthy:
            health.observe(False, now, health.term)


def pinned(id: str) -> str:
    return pins(ids=["a", "b", "c", "d"]).seal(id, NOW)


class TestGate:
    def test_who_holds_nothing_goes_by_the_policy_and_is_pinned_to_who_answers(self) -> None:
        """Round robin: each new client the next; and each answer says where to come back to."""
        stage = Stage()
        assert [stage.chosen()[0] for _ in range(6)] == list("abcabc")
        assert stage.answers("b") == "b"  # not the first, if that did not answer

    @pytest.mark.parametrize("id", "abc")
    def test_who_is_pinned_comes_first_whatever_weight_and_policy_say(self, id: str) -> None:
        """Persistence outranks them; all others stand behind, each once."""
        upstreams = [Upstream("a", weight=1000), Upstream("b"), Upstream("c")]
        upstreams[1].in_flight = 50
        stage = Stage(*upstreams)
        for _ in range(20):
            assert stage.chosen(pinned(id))[0] == id
            assert sorted(stage.chosen(pinned(id))) == ["a", "b", "c"]
            assert stage.answers(id) is None

    def test_an_ejected_ones_clients_fall_to_the_owners_on_the_ring_whatever_the_policy(self) -> None:
        """Gateways that never met send the same client to the same upstream, by its key, though their turns differ."""
        ring = HashRing("abc")
        one, other = Stage(), Stage()
        one.chosen()
        for stage in (one, other):
            stage.eject("b")
        for number in range(200):
            address = f"192.0.2.{number}"
            expected = [id for id in ring.owners(address) if id != "b"]
            assert list(one.chosen(pinned("b"), address=address)) == expected
            assert list(other.chosen(pinned("b"), address=address)) == expected
            assert one.answers(expected[0]) == expected[0]
        assert one.gate.unpinned == {"api:moved": 200}

    def test_one_that_is_gone_from_the_settings_moves_its_clients_to_the_owner(self) -> None:
        """The pin was right, so it is counted as moved and not as forged, and a new one is written."""
        stage = Stage()
        owner = HashRing("abc").owner("192.0.2.7")
        assert stage.chosen(pins(ids="d").seal("d", NOW))[0] == owner
        assert stage.answers(owner) == owner
        assert stage.gate.unpinned == {"api:moved": 1}

    def test_when_its_ejection_is_over_a_pinned_client_is_its_trial(self) -> None:
        """Then it is its clients' again."""
        stage = Stage()
        stage.eject("b")
        assert stage.chosen(pinned("b"), EJECTION.eject_for_ns - 1)[0] != "b"
        assert stage.chosen(pinned("b"), EJECTION.eject_for_ns)[0] == "b"

    def test_when_none_is_healthy_its_own_is_tried_first(self) -> None:
        """To fail without trying would be worse, and to try elsewhere first would lose what is there."""
        stage = Stage()
        for id in "abc":
            stage.eject(id)
        assert stage.chosen(pinned("c"))[0] == "c"

    def test_a_full_ones_client_is_served_elsewhere_once_and_keeps_its_pin(self) -> None:
        """Fullness passes within moments: who was elsewhere for one request comes back."""
        stage = Stage(Upstream("a"), Upstream("b", max_in_flight=1), Upstream("c"))
        stage.pool.take(stage.upstreams["b"], 0)
        elsewhere = stage.chosen(pinned("b"))
        assert sorted(elsewhere) == ["a", "c"]
        assert stage.answers(elsewhere[0]) is None
        assert stage.gate.unpinned == {"api:full": 1}
        stage.pool.release(stage.upstreams["b"])
        assert stage.chosen(pinned("b"))[0] == "b"

    def test_one_that_is_full_and_ejected_moves_its_clients(self) -> None:
        """What is ejected may not come back, full or not."""
        stage = Stage(Upstream("a"), Upstream("b", max_in_flight=1), Upstream("c"))
        stage.pool.take(stage.upstreams["b"], 0)
        stage.eject("b")
        elsewhere = stage.chosen(pinned("b"))[0]
        assert stage.answers(elsewhere) == elsewhere

    def test_strict_means_its_own_or_nobody(self) -> None:
        """Ejected, full or gone: nobody. Due for its trial: its own. Without a pin: as ever."""
        stage = Stage(Upstream("a"), Upstream("b", max_in_flight=1), Upstream("c"), strict=True)
        assert stage.chosen(pinned("b")) == "b"
        stage.pool.take(stage.upstreams["b"], 0)
        assert stage.chosen(pinned("b")) == ""
        stage.pool.release(stage.upstreams["b"])
        stage.eject("b")
        assert stage.chosen(pinned("b")) == ""
        assert stage.chosen(pinned("b"), EJECTION.eject_for_ns) == "b"
        assert stage.chosen(pinned("d")) == ""
        assert len(stage.chosen("forged")) == 2
        assert len(stage.chosen()) == 2

    @pytest.mark.parametrize("ring", [False, True])
    def test_one_that_drains_keeps_its_clients_and_gets_no_others(self, ring: bool) -> None:
        """No new ones, and none that fall from others; its own stay until it ceases to answer."""
        stage = Stage(Upstream("a"), Upstream("b", drains=True), Upstream("c"), ring=ring)
        assert {stage.chosen(address=f"192.0.2.{number}") for number in range(99)} == {"ac", "ca"}
        assert stage.chosen(pinned("b"))[0] == "b"
        assert stage.answers("b") is None
        stage.eject("a")
        assert stage.chosen(pinned("a")) == "c"
        stage.eject("b")
        assert stage.chosen(pinned("b")) == "c"

    @pytest.mark.parametrize(
        ("pin", "fault"),
        [
            ("forged", "forged"),
            (pins().seal("a", NOW - TTL), "expired"),
            (pins("carts").seal("a", NOW), "foreign"),
            (f"{pinned('b')}; gk={pinned('b')}", "repeated"),
            (pins(ring=Ring([key("other")])).seal("b", NOW), "forged"),
        ],
        ids=["no pin", "expired", "another pool's", "twice", "another key's"],
    )
    def test_a_wrong_one_is_no_pin_and_is_counted(self, pin: str, fault: str) -> None:
        """Its client is a new one, and is told a pin of its own; strict or not."""
        for strict in (False, True):
            stage = Stage(strict=strict)
            assert [stage.chosen(pin)[0] for _ in range(6)] == list("abcabc")
            assert stage.gate.unpinned == {f"api:{fault}": 6}
            assert stage.answers("c") == "c"

    def test_the_application_can_end_it(self) -> None:
        """The pin that came is ended, also where it would have been renewed or moved; who holds none is told nothing."""
        stage = Stage()
        stage.chosen(pinned("a"))
        assert stage.answers("a", ends=True) == ""
        assert stage.answers("b", ends=True) == ""
        stage.chosen("forged")
        assert stage.answers("a", ends=True) == ""
        stage.chosen()
        assert stage.answers("a", ends=True) is None

    def test_a_pin_is_kept_through_a_change_of_order_and_of_address(self) -> None:
        """It goes by the id: nothing else of the settings need stay."""
        before = Stage(Upstream("a", "10.0.0.1"), Upstream("b", "10.0.0.2"), Upstream("c", "10.0.0.3"))
        before.chosen()
        assert before.answers("b") == "b"
        text = before.affinity.pins.seal("b", NOW)
        after = Stage(Upstream("c", "10.9.9.3"), Upstream("b", "10.9.9.2", 81, weight=7), Upstream("a", path="/a"))
        assert after.chosen(text)[0] == "b"
        assert after.answers("b") is None

    def test_the_key_of_the_pool_decides_where_who_must_move_goes(self) -> None:
        """By a field, for instance; who lacks it goes by the address."""
        stage = Stage(key="header:x-tenant")
        stage.eject("a")
        for number in range(50):
            tenant = f"tenant{number}"
            ticket = Asked(cookie(pinned("a")), ("X-Tenant", tenant))
            first = next(stage.gate.choose(ticket, stage.destination, 0, 0.5))
            assert first.id == next(id for id in HashRing("abc").owners(tenant) if id != "a")

    def test_without_affinity_nothing_is_read_or_written(self) -> None:
        """A pool without it goes by its policy, pin or not."""
        stage = Stage()
        plain = stage.destination._replace(affinity=None)
        ticket = Asked(cookie(pinned("b")))
        assert next(stage.gate.choose(ticket, plain, 0, 0.5)).id == "a"
        assert ticket.held is None
        assert stage.gate.pin(ticket, plain, stage.upstreams["a"], ends=True) == []


names = st.sampled_from(["gk", "gk_api", "a", "b", "GK", " gk", "gk ", "", "xgk"])
values = st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters=";\x7f"), max_size=6)
pairs = st.builds(
    lambda name, equals, value: f"{name}{equals}{value}", names, st.sampled_from(["=", "", "=="]), values
)


def expected(pairs: list[str]) -> Iterator[str]:
    for pair in pairs:
        if pair.split("=")[0].strip(" \t") not in ("gk", "gk_api"):
            yield pair


class TestOnTheWire:
    @given(st.lists(pairs, min_size=1, max_size=6), st.sampled_from(["Cookie", "cookie", "COOKIE"]))
    def test_pins_are_taken_out_and_all_else_stays_byte_for_byte(self, pairs: list[str], name: str) -> None:
        """A field that held no pin is as it came; of another what is left is as it came; of one of pins nothing is left."""
        line = f"{name}: {';'.join(pairs)}".encode("latin-1")
        found = unpinned([b"Accept: gk=1", line, b"X-Cookie: gk=2"], {"gk", "gk_api"}, set())
        left = list(expected(pairs))
        assert found[0] == b"Accept: gk=1"
        assert found[-1] == b"X-Cookie: gk=2"
        if left == pairs:
            assert found[1:-1] == [line]
        elif not "".join(left).strip(" \t"):
            assert found[1:-1] == []
        else:
            (kept,) = found[1:-1]
            assert kept.startswith(name.encode() + b": ")
            assert kept.partition(b": ")[2] == ";".join(left).lstrip(" \t").encode("latin-1")

    def test_fields_that_hold_pins_are_taken_out(self) -> None:
        """However they are written; others that begin alike stay."""
        lines = [b"X-Pin: 1", b"x-pin:2", b"X-Pin-Not: 3", b"X-PIN: 4"]
        assert unpinned(lines, set(), {"x-pin"}) == [b"X-Pin-Not: 3"]

    @pytest.mark.parametrize(
        ("lines", "ends"),
        [
            ([b"X-Gatekeeper-Affinity: end"], True),
            ([b"x-gatekeeper-affinity:END\t"], True),
            ([b"X-Gatekeeper-Affinity: no", b"X-Gatekeeper-Affinity: end"], True),
            ([b"X-Gatekeeper-Affinity: ending"], False),
            ([b"X-Gatekeeper-Affinity:"], False),
            ([b"X-Pin: end"], False),
            ([], False),
        ],
    )
    def test_what_the_application_says_of_a_pin_goes_no_further(self, lines: list[bytes], ends: bool) -> None:
        """Heard or not; nor does a field of it that only the gateway writes."""
        assert heard([b"A: 1", *lines, b"B: end"], "x-pin") == ([b"A: 1", b"B: end"], ends)

    @pytest.mark.parametrize(
        ("came", "goes"),
        [
            ([], "private"),
            (["max-age=60"], "private, max-age=60"),
            (["public, max-age=60"], "private, max-age=60"),
            (["PUBLIC", "s-maxage=600, must-revalidate"], "private, must-revalidate"),
            (["private"], "private"),
            (['private="set-cookie, x", no-cache="a, public"'], 'private, no-cache="a, public"'),
            (["no-store"], "private, no-store"),
            (["no-store, must-understand"], "private, no-store, must-understand"),
            ([" , ,max-age = 3,,"], "private, max-age = 3"),
            (['max-age="60, public'], 'private, max-age="60'),
            ([""], "private"),
        ],
    )
    def test_an_answer_with_a_pin_is_for_one_client_alone(self, came: list[str], goes: str) -> None:
        """What speaks to shared caches is taken out, and what the client's own cache is told stays."""
        assert private(came) == goes
        lines = [b"Cache-Control: " + value.encode() for value in came]
        found = told([b"A: 1", *lines], [(b"set-cookie", b"gk=1")])
        assert found == [b"A: 1", b"Cache-Control: " + goes.encode(), b"set-cookie: gk=1"]

    def test_fields_for_some_shared_cache_would_override_that_and_are_left_out(self) -> None:
        """RFC 9213: a cache that is addressed by one does not look at Cache-Control."""
        lines = [b"CDN-Cache-Control: max-age=600", b"Surrogate-Control: max-age=9", b"X-CDN-Cache-Control: public"]
        found = told([*lines, b"Cache-Control-Not: 1", b"Expires: x"], [])
        assert found == [b"Cache-Control-Not: 1", b"Expires: x", b"Cache-Control: private"]
