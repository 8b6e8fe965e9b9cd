"""Sessions through their requests: what is kept, merged, renewed, rotated, ended; of both kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.commands import Load, SessionCommand, nobody, run
from gatekeeper.errors import SessionError, StoreError
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keys import Key, KeyState, Ring
from gatekeeper.sessions.cookies import Cookie
from gatekeeper.sessions.flow import Sessions, StoredSessions, TokenSessions
from gatekeeper.sessions.state import Session
from gatekeeper.sessions.tokens import Tokens
from gatekeeper.stores.sessions.memory import MemorySessions
from tests.session_stores import Seconds as Clock

IDLE, ABSOLUTE = 1800, 43_200


class Browser:
    """A client that keeps cookies and sends them back."""

    def __init__(self, flow: Sessions) -> None:
        self.flow = flow
        self.jar: dict[str, str] = {}
        self.fields: list[tuple[str, str]] = []

    def begin(self, fields: list[tuple[bytes, bytes]] | None = None) -> Session:
        text = "; ".join(f"{name}={value}" for name, value in self.jar.items())
        headers = [(b"cookie", text.encode())] if text else []
        scope = {"type": "http", "path": "/", "headers": headers + (fields or [])}
        return self.flow.open(ScopeRequest(scope), blocking=True)

    def end(self, session: Session) -> list[str]:
        """The response is sent. The names of the fields it has for the session."""
        found = run(self.flow.save(session), nobody)
        self.fields = [(name.decode(), value.decode()) for name, value in found]
        for name, value in self.fields:
            if name == "set-cookie":
                pair, *attributes = value.split("; ")
                cookie, _, content = pair.partition("=")
                if "Max-Age=0" in attributes:
                    self.jar.pop(cookie, None)
                else:
                    self.jar[cookie] = content
        return [name for name, _ in self.fields]

    def request(self, do: Callable[[Session], Any] = lambda session: None) -> Any:
        session = self.begin()
        found = do(session)
        self.end(session)
        return found

    def read(self) -> dict[str, Any]:
        return self.request(dict)  # type: ignore[no-any-return]

    def write(self, **members: Any) -> None:
        self.request(lambda session: session.update(members))


class Counting:
    """A session store that counts what it is asked, and can be made to fail."""

    def __init__(self, store: MemorySessions) -> None:
        self.store = store
        self.asked: list[str] = []
        self.fails = False
        self.local = True

    def ask(self, command: SessionCommand) -> Any:
        self.asked.append(type(command).__name__)
        return StoreError("it does not answer") if self.fails else self.store.ask(command)

    async def aask(self, command: SessionCommand) -> Any:
        return self.ask(command)

    def sweep(self) -> int:
        return self.store.sweep()

    async def asweep(self) -> int:
        return self.sweep()

    def close(self) -> None:
        self.store.close()

    async def aclose(self) -> None:
        self.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ring() -> Ring:
    return Ring([Key("k1", "HS256", os.urandom(32), KeyState.ACTIVE)])


@pytest.fixture
def store(clock: Clock) -> Iterator[Counting]:
    store = Counting(MemorySessions(clock=clock))
    yield store
    store.close()


Make = Callable[..., Sessions]


@pytest.fixture(params=["store", "token", "encrypted token"])
def make(request: pytest.FixtureRequest, clock: Clock, ring: Ring, store: Counting) -> Make:
    def made(**settings: Any) -> Sessions:
        common: dict[str, Any] = {
            "cookie": Cookie(),
            "idle": IDLE,
            "absolute": ABSOLUTE,
            "clock": clock,
            "draw": os.urandom,
            **settings,
        }
        if request.param == "store":
            return StoredSessions(ring, store=store, **common)
        tokens = Tokens(
            ring, issuer="gatekeeper", audience="session", longest=ABSOLUTE, encrypt=request.param != "token"
        )
        return TokenSessions(tokens, **{"store": None, **common})

    return made


@pytest.fixture
def flow(make: Make) -> Sessions:
    return make()


@pytest.fixture
def stored(ring: Ring, store: Counting, clock: Clock) -> Callable[..., StoredSessions]:
    def made(**settings: Any) -> StoredSessions:
        common: dict[str, Any] = {
            "cookie": Cookie(),
            "idle": IDLE,
            "absolute": ABSOLUTE,
            "clock": clock,
            "draw": os.urandom,
            "store": store,
        }
        return StoredSessions(ring, **{**common, **settings})

    return made


class TestEachKind:
    def test_what_one_request_writes_the_next_one_reads(self, flow: Sessions) -> None:
        browser = Browser(flow)
        assert browser.read() == {}
        browser.write(cart=["apple"], sum=1.5, name="Zoë", none=None)
        assert browser.read() == {"cart": ["apple"], "sum": 1.5, "name": "Zoë", "none": None}

    def test_a_session_that_nobody_looks_at_costs_nothing(self, flow: Sessions, store: Counting) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        store.asked.clear()
        session = browser.begin()
        assert browser.end(session) == []
        assert store.asked == []

    def test_a_session_that_is_read_varies_by_cookie_and_is_not_written(
        self, flow: Sessions, store: Counting
    ) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        store.asked.clear()
        session = browser.begin()
        assert session["cart"] == 1
        assert browser.end(session) == ["vary"]
        assert "Save" not in store.asked

    def test_what_changes_within_a_list_or_a_dictionary_is_kept(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart={"items": [1]})
        browser.request(lambda session: session["cart"]["items"].append(2))
        assert browser.read() == {"cart": {"items": [1, 2]}}

    def test_a_cookie_is_secure_for_this_host_alone_and_out_of_reach_of_scripts(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        (field,) = [value for name, value in browser.fields if name == "set-cookie"]
        pair, *attributes = field.split("; ")
        assert pair.startswith("__Host-session=")
        assert {"Path=/", "Secure", "HttpOnly", "SameSite=Lax", f"Max-Age={IDLE}"} <= set(attributes)
        assert not any(attribute.startswith("Domain") for attribute in attributes)

    def test_a_session_ends_when_it_was_idle_too_long(self, flow: Sessions, clock: Clock) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        clock.advance(IDLE - 61)
        other = Browser(flow)
        other.jar = dict(browser.jar)
        assert other.read() == {"cart": 1}, "and that renews it"
        clock.advance(IDLE - 61)
        assert other.read() == {"cart": 1}
        clock.advance(IDLE + 61)
        assert other.read() == {}

    def test_a_session_ends_after_its_absolute_life_however_much_it_is_used(
        self, flow: Sessions, clock: Clock
    ) -> None:
        browser = Browser(flow)
        browser.write(cart=0)
        for _ in range(ABSOLUTE // 600 - 1):
            clock.advance(600)
            assert browser.request(lambda session: session.get("cart")) is not None
            browser.request(lambda session: session.update(cart=session["cart"] + 1))
        clock.advance(600)
        assert browser.read() == {}
        assert flow.counts["expired"] + flow.counts["unknown"] == 1

    def test_it_is_renewed_only_when_a_tenth_of_its_idle_time_is_over(
        self, flow: Sessions, clock: Clock, store: Counting
    ) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        clock.advance(IDLE // 10 - 1)
        browser.read()
        assert [name for name, _ in browser.fields] == ["vary"]
        clock.advance(1)
        browser.read()
        assert [name for name, _ in browser.fields] == ["vary", "set-cookie"]

    def test_what_was_ended_is_gone_and_its_cookie_expired(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        browser.request(lambda session: session.end())
        assert browser.jar == {}
        assert browser.read() == {}

    def test_a_session_that_is_emptied_is_ended(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        browser.request(lambda session: session.pop("cart"))
        assert browser.jar == {}

    def test_after_it_was_ended_a_new_one_can_begin_in_the_same_request(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        before = dict(browser.jar)

        def swap(session: Session) -> None:
            session.end()
            session["fresh"] = True

        browser.request(swap)
        assert browser.jar != before
        assert browser.read() == {"fresh": True}

    @pytest.mark.parametrize(
        "value",
        [object(), {1, 2}, b"bytes", float("nan"), float("inf"), "\ud800"],
        ids=lambda value: type(value).__name__,
    )
    def test_what_json_cannot_hold_is_refused_with_its_name(self, flow: Sessions, value: Any) -> None:
        browser = Browser(flow)
        session = browser.begin()
        session["good"], session["bad"] = 1, value
        with pytest.raises(SessionError, match=r"session\['bad'\]"):
            browser.end(session)

    def test_what_is_nested_without_end_is_refused(self, flow: Sessions) -> None:
        browser, loop = Browser(flow), []  # type: ignore[var-annotated]
        loop.append(loop)
        session = browser.begin()
        session["bad"] = loop
        with pytest.raises(SessionError):
            browser.end(session)

    def test_a_name_that_is_no_string_is_refused(self, flow: Sessions) -> None:
        with pytest.raises(SessionError, match="int"):
            Browser(flow).begin()[1] = 1  # type: ignore[index]

    def test_no_cookie_whatever_is_in_it_is_a_session_or_raises(self, flow: Sessions) -> None:
        browser = Browser(flow)
        browser.write(cart=1)
        (cookie,) = browser.jar.values()

        @settings(max_examples=300, deadline=None)
        @given(
            st.one_of(
                st.binary(max_size=300),
                st.tuples(st.integers(0, len(cookie) - 1), st.characters(min_codepoint=33, max_codepoint=126)).map(
                    lambda change: (cookie[: change[0]] + change[1] + cookie[change[0] + 1 :]).encode("latin-1")
                ),
                st.sampled_from(
                    [b"2~", b"8~" + cookie.encode(), b"9~x", cookie.encode() * 100, b".", b"..", b"...."]
                ),
            )
        )
        def holds(value: bytes) -> None:
            scope = {"type": "http", "path": "/", "headers": [(b"cookie", b"__Host-session=" + value)]}
            session = flow.open(ScopeRequest(scope), blocking=True)
            found = dict(session)
            assert found == {} or value.decode("latin-1").split(";")[0].strip('" \t') == cookie
            assert run(flow.save(session), nobody) in ([(b"vary", b"Cookie")], [])

        holds()

    def test_a_login_gives_a_session_a_new_id(self, flow: Sessions) -> None:
        browser, thief = Browser(flow), Browser(flow)
        browser.write(cart=1)
        thief.jar = dict(browser.jar)
        browser.write(sub="7")
        assert browser.jar != thief.jar
        assert browser.read() == {"cart": 1, "sub": "7"}
        assert "sub" not in thief.read()

    def test_a_label_is_kept_whenever_it_is_set(self, flow: Sessions) -> None:
        """Before anything of the session is used, and though nothing else changes."""
        browser = Browser(flow)
        browser.write(sub="7")
        session = browser.begin()
        session.label = "Firefox"
        session["more"] = True
        browser.end(session)
        assert browser.begin().label == "Firefox"
        session = browser.begin()
        assert session["sub"] == "7"
        session.label = "Chrome"
        browser.end(session)
        browser.write(more=False)
        assert browser.begin().label == "Chrome"

    def test_cookies_that_are_repeated_are_not_looked_through_for_each(self, flow: Sessions) -> None:
        """A client could keep a server busy for seconds with 32 KB of them."""

        class Counted(list[str]):
            looks = 0

            def __iter__(self) -> Iterator[str]:
                self.looks += 1
                return super().__iter__()

        parts = [f"__Host-session.{place}=x" for place in range(1, 8)]
        came = Counted(["; ".join(["__Host-session=8~"] * 1000 + parts)])
        session = Session(flow, came, blocking=True)
        assert dict(session) == {}
        assert came.looks <= 1 + len(parts)


class TestStored:
    def test_a_store_that_fails_and_comes_back_is_told_once_each(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        said: list[str] = []
        browser = Browser(stored(warn=said.append))
        browser.write(a=1)
        store.fails = True
        for _ in range(3):
            with pytest.raises(StoreError):
                browser.read()
        store.fails = False
        browser.read()
        browser.read()
        assert [text.partition(":")[0] for text in said] == [
            "the store of sessions fails", "the store of sessions answers again",
        ]  # fmt: skip

    def test_it_can_be_copied_and_joined_as_a_dictionary(self, stored: Callable[..., StoredSessions]) -> None:
        session = Browser(stored()).begin()
        session["a"] = 1
        assert session | {"b": 2} == {"a": 1, "b": 2}
        copy = session.copy()
        session |= {"c": 3}
        assert (copy, dict(session)) == ({"a": 1}, {"a": 1, "c": 3})

    def test_changes_of_parallel_requests_are_merged_by_name(self, stored: Callable[..., StoredSessions]) -> None:
        browser = Browser(stored())
        browser.write(a=1, b=1, c=1)
        first, second = browser.begin(), browser.begin()
        first["a"], second["b"] = 2, 2
        del first["c"]
        second["d"] = 2
        browser.end(first)
        browser.end(second)
        assert browser.read() == {"a": 2, "b": 2, "d": 2}

    def test_of_two_that_change_one_name_the_later_save_wins(self, stored: Callable[..., StoredSessions]) -> None:
        browser = Browser(stored())
        browser.write(a=1)
        first, second = browser.begin(), browser.begin()
        first["a"], second["a"] = "first", "second"
        browser.end(second)
        browser.end(first)
        assert browser.read() == {"a": "first"}

    def test_a_late_save_never_brings_back_what_was_ended(self, stored: Callable[..., StoredSessions]) -> None:
        browser = Browser(stored())
        browser.write(sub="7", a=1)
        late = browser.begin()
        late["a"] = 2
        jar = dict(browser.jar)
        browser.request(lambda session: session.end())
        browser.end(late)
        assert late.is_gone
        browser.jar = jar
        assert browser.read() == {}

    def test_an_id_that_was_planted_is_not_adopted(self, stored: Callable[..., StoredSessions]) -> None:
        flow = stored()
        browser, planter = Browser(flow), Browser(flow)
        planter.write(x=1)
        planted = dict(planter.jar)
        planter.request(lambda session: session.end())
        browser.jar = dict(planted)
        browser.write(sub="7")
        assert browser.jar != planted
        planter.jar = planted
        assert planter.read() == {}

    def test_the_old_id_is_dead_at_once_when_it_was_rotated(self, stored: Callable[..., StoredSessions]) -> None:
        flow = stored()
        browser, thief = Browser(flow), Browser(flow)
        browser.write(a=1)
        thief.jar = dict(browser.jar)
        browser.request(lambda session: session.rotate())
        assert browser.read() == {"a": 1}
        assert thief.read() == {}

    def test_with_a_grace_the_old_id_leads_to_the_session_for_a_while(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        flow = stored(grace=10)
        browser, late = Browser(flow), Browser(flow)
        browser.write(a=1)
        late.jar = dict(browser.jar)
        browser.request(lambda session: session.rotate())
        late.write(b=2)
        assert "set-cookie" not in dict(late.fields), "its browser may have been told the new id by now"
        assert late.read() == {"a": 1, "b": 2}
        assert browser.read() == {"a": 1, "b": 2}
        clock.advance(11)
        assert late.read() == {}
        assert browser.read() == {"a": 1, "b": 2}

    @pytest.mark.parametrize("grace", [0, 10])
    def test_what_others_wrote_before_a_rotation_is_brought_along(
        self, stored: Callable[..., StoredSessions], grace: int
    ) -> None:
        browser = Browser(stored(grace=grace))
        browser.write(a=1)
        login, other = browser.begin(), browser.begin()
        login["sub"], other["b"] = "7", 2
        browser.end(other)
        browser.end(login)
        assert browser.read() == {"a": 1, "b": 2, "sub": "7"}

    @pytest.mark.parametrize("grace", [0, 10])
    def test_a_session_that_was_ended_is_not_brought_back_by_a_rotation(
        self, stored: Callable[..., StoredSessions], grace: int, store: Counting
    ) -> None:
        browser = Browser(stored(grace=grace))
        browser.write(a=1)
        late = browser.begin()
        late.rotate()
        browser.request(lambda session: session.end())
        browser.end(late)
        assert late.is_gone
        assert browser.read() == {}
        assert len(store.store) == 0

    @pytest.mark.parametrize("grace", [0, 10])
    def test_a_login_form_that_is_sent_twice_logs_in(
        self, stored: Callable[..., StoredSessions], grace: int
    ) -> None:
        browser = Browser(stored(grace=grace))
        browser.write(cart=["apple"])
        first, second = browser.begin(), browser.begin()
        for session in (first, second):
            session["sub"] = "7"
        browser.end(first)
        browser.end(second)
        assert browser.read()["sub"] == "7"

    def test_a_save_during_the_grace_finds_where_the_session_went(
        self, stored: Callable[..., StoredSessions]
    ) -> None:
        flow = stored(grace=10)
        browser = Browser(flow)
        browser.write(a=1)
        late = browser.begin()
        late["late"] = True
        browser.request(lambda session: session.rotate())
        jar = dict(browser.jar)
        browser.end(late)
        assert browser.jar == jar, "it is told nothing of an id that it does not know"
        assert browser.read() == {"a": 1, "late": True}

    @pytest.mark.parametrize("at_once", [True, False], ids=["as it is rotated", "after it"])
    def test_a_grace_leads_nobody_to_who_has_logged_in_since(
        self, stored: Callable[..., StoredSessions], at_once: bool
    ) -> None:
        """An id that was planted is worth nothing, though requests with it may be on their way."""
        flow = stored(grace=10)
        browser, thief = Browser(flow), Browser(flow)
        thief.write(a=1)
        browser.jar = dict(thief.jar)
        session = browser.begin()
        if not at_once:  # as Django does
            session.rotate()
            browser.end(session)
        session["sub"] = "7"
        browser.end(session)
        assert thief.read() == {}
        assert browser.read() == {"a": 1, "sub": "7"}

    def test_an_old_id_is_traded_for_no_new_one_during_the_grace(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        """Who stole an id that was rotated has it for as long as the grace is, and its owner keeps the session."""
        flow = stored(grace=10)
        browser, thief = Browser(flow), Browser(flow)
        browser.write(sub="7")
        thief.jar = dict(browser.jar)
        browser.request(lambda session: session.rotate())
        thief.request(lambda session: session.rotate())
        assert browser.read() == {"sub": "7"}
        clock.advance(11)
        assert thief.read() == {}
        assert browser.read() == {"sub": "7"}

    def test_a_renewal_during_the_grace_does_not_bring_the_old_id_back(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        """A request that changed nothing has nothing to tell a client that was given a new id meanwhile."""
        browser = Browser(stored(grace=10))
        browser.write(a=1)
        clock.advance(IDLE / 2)
        late = browser.begin()
        assert late["a"] == 1
        browser.request(lambda session: session.rotate())
        assert browser.end(late) == ["vary"]
        clock.advance(11)
        assert browser.read() == {"a": 1}

    @pytest.mark.parametrize("grace", [0, 10])
    def test_no_session_survives_that_is_rotated_as_its_user_s_are_revoked(
        self, stored: Callable[..., StoredSessions], grace: int
    ) -> None:
        """Whichever step of one comes between any two of the other."""
        for before, between in [(one, two) for one in range(5) for two in range(5)]:
            flow = stored(grace=grace)
            browser = Browser(flow)
            browser.write(sub="7")
            session = browser.begin()
            session.rotate()
            rotation, revocation = flow.save(session), flow.revoke("7")
            replies: dict[Any, Any] = {}
            for steps, most in [(rotation, before), (revocation, between), (rotation, 99), (revocation, 99)]:
                with suppress(StopIteration):
                    for _ in range(most):
                        command: Any = cast(Any, steps).send(replies.pop(steps, None))
                        replies[steps] = flow.store.ask(command)
            assert run(flow.listed("7"), nobody) == [], (before, between)

    def test_a_label_that_another_request_has_set_holds(self, stored: Callable[..., StoredSessions]) -> None:
        """A request that changes something else leaves it alone."""
        browser = Browser(stored())
        browser.write(a=1)
        late = browser.begin()
        late["late"] = True
        session = browser.begin()
        session.label = "Firefox"
        browser.end(session)
        browser.end(late)
        assert browser.begin().label == "Firefox"
        assert browser.read() == {"a": 1, "late": True}

    def test_a_user_s_sessions_are_listed_with_when_they_were_seen_and_their_label(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        flow = stored()
        for number in range(3):
            browser = Browser(flow)

            def login(session: Session, number: int = number) -> None:
                session["sub"] = "7"
                session.label = f"browser {number}"

            browser.request(login)
            clock.advance(10)
        Browser(flow).write(sub="8")
        found = run(flow.listed("7"), nobody)
        assert [entry.label for entry in found] == ["browser 2", "browser 1", "browser 0"]
        assert [entry.seen for entry in found] == sorted((entry.seen for entry in found), reverse=True)

    def test_one_session_the_others_or_all_can_be_revoked(self, stored: Callable[..., StoredSessions]) -> None:
        flow = stored()
        browsers = [Browser(flow) for _ in range(4)]
        for browser in browsers:
            browser.write(sub="7")
        first = browsers[0].begin()
        assert first["sub"] == "7"
        assert first.key is not None
        assert run(flow.revoke("7", browsers[1].begin().load().key), nobody) == 1
        assert browsers[1].read() == {}
        assert run(flow.revoke("7", but=first), nobody) == 2
        assert [browser.read() for browser in browsers] == [{"sub": "7"}, {}, {}, {}]
        assert run(flow.revoke("7"), nobody) == 1
        assert browsers[0].read() == {}

    def test_one_user_cannot_revoke_the_session_of_another(self, stored: Callable[..., StoredSessions]) -> None:
        flow = stored()
        victim = Browser(flow)
        victim.write(sub="8")
        assert run(flow.revoke("7", victim.begin().load().key), nobody) == 0
        assert victim.read() == {"sub": "8"}

    def test_a_user_has_no_more_sessions_than_the_cap_and_the_oldest_go(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        flow = stored(most=2)
        browsers = [Browser(flow) for _ in range(4)]
        for browser in browsers:
            browser.write(sub="7")
            clock.advance(1)
        assert [browser.read() for browser in browsers] == [{}, {}, {"sub": "7"}, {"sub": "7"}]

    def test_the_store_holds_neither_the_id_nor_the_cookie(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        browser = Browser(stored())
        seen: list[str] = []
        ask = store.ask

        def spy(command: SessionCommand) -> Any:
            seen.append(f"{getattr(command, 'key', '')} {getattr(command, 'data', b'')!r}")
            return ask(command)

        store.ask = spy  # type: ignore[method-assign]
        browser.write(a=1)
        (cookie,) = browser.jar.values()
        assert seen
        assert not any(cookie[:43] in text for text in seen)

    def test_what_the_store_holds_is_one_json_document(
        self, stored: Callable[..., StoredSessions], store: Counting, clock: Clock
    ) -> None:
        browser = Browser(stored())
        browser.write(sub="7")
        (found,) = run(stored().listed("7"), nobody)
        assert (found.born, found.seen) == (int(clock.now), int(clock.now))
        session = browser.begin().load()
        assert session.key == found.id
        from gatekeeper.commands import Load

        document = json.loads(store.store.ask(Load(store.store, found.id)).data)
        assert document == {"v": 1, "born": int(clock.now), "seen": int(clock.now), "data": {"sub": "7"}}

    @pytest.mark.parametrize("later", ["what is there", StoreError("it does not answer"), None])
    def test_of_two_that_load_it_at_once_the_later_leaves_alone_what_was_done_since(
        self, stored: Callable[..., StoredSessions], store: Counting, later: Any
    ) -> None:
        """Whatever the store answers to the later one."""
        flow = stored()
        browser = Browser(flow)
        browser.write(a=1)
        session = browser.begin()
        first, second = flow.load(session), flow.load(session)
        one, two = next(first), next(second)
        with pytest.raises(StopIteration):
            first.send(store.ask(cast(SessionCommand, one)))
        session["b"] = 2
        with pytest.raises(StopIteration):
            second.send(store.ask(cast(SessionCommand, two)) if later == "what is there" else later)
        browser.end(session)
        assert browser.read() == {"a": 1, "b": 2}

    def test_while_the_store_does_not_answer_using_a_session_raises(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        browser = Browser(stored())
        browser.write(a=1)
        store.fails = True
        session = browser.begin()
        with pytest.raises(StoreError):
            session["a"]
        untouched = browser.begin()
        assert browser.end(untouched) == []

    def test_where_it_may_be_empty_then_it_is_never_written_over(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        said: list[str] = []
        browser = Browser(stored(empties=True, warn=said.append))
        browser.write(a=1)
        store.fails = True
        session = browser.begin()
        assert dict(session) == {}
        session["b"] = 2
        store.fails = False
        browser.end(session)
        assert said
        assert browser.read() == {"a": 1}

    def test_a_write_that_the_store_does_not_answer_raises(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        browser = Browser(stored())
        session = browser.begin()
        session["a"] = 1
        store.fails = True
        with pytest.raises(StoreError):
            browser.end(session)

    def test_what_is_changed_after_the_head_was_sent_is_not_kept(
        self, stored: Callable[..., StoredSessions]
    ) -> None:
        browser = Browser(stored())
        session = browser.begin()
        session["a"] = 1
        browser.end(session)
        session["a"] = 2
        assert browser.read() == {"a": 1}

    def test_without_a_blocking_home_a_remote_session_has_to_be_awaited(
        self, stored: Callable[..., StoredSessions], store: Counting
    ) -> None:
        store.local = False
        flow = stored()
        scope = {"type": "http", "path": "/", "headers": [(b"cookie", b"__Host-session=x.y")]}
        session = flow.open(ScopeRequest(scope), blocking=False)
        with pytest.raises(SessionError, match="aload"):
            session.get("a")
        new = flow.open(ScopeRequest({"type": "http", "path": "/", "headers": []}), blocking=False)
        new["a"] = 1  # of a client without a cookie nothing has to be loaded

    def test_keys_that_retire_still_open_sessions_and_revoked_ones_do_not(
        self, stored: Callable[..., StoredSessions], ring: Ring
    ) -> None:
        browser = Browser(stored())
        browser.write(a=1)
        (old,) = ring.keys
        new = Key("k2", "HS256", os.urandom(32), KeyState.ACTIVE)
        ring.replace([new, Key(old.id, old.algorithm, old.secret, KeyState.RETIRING)])
        assert browser.read() == {"a": 1}
        ring.replace([new])
        assert browser.read() == {}


class TestTokens:
    @pytest.fixture(params=[False, True], ids=["signed", "encrypted"])
    def tokens(self, request: pytest.FixtureRequest, ring: Ring, clock: Clock) -> Callable[..., TokenSessions]:
        def made(**settings: Any) -> TokenSessions:
            common: dict[str, Any] = {
                "cookie": Cookie(),
                "idle": IDLE,
                "absolute": ABSOLUTE,
                "clock": clock,
                "draw": os.urandom,
                "store": None,
            }
            tokens = Tokens(ring, issuer="gatekeeper", audience="session", longest=ABSOLUTE, encrypt=request.param)
            return TokenSessions(tokens, **{**common, **settings})

        return made

    def test_a_long_one_is_several_cookies_and_those_no_longer_needed_are_expired(
        self, tokens: Callable[..., TokenSessions]
    ) -> None:
        browser = Browser(tokens())
        browser.write(text="x" * 9000)
        assert sorted(browser.jar) == [
            "__Host-session",
            *(f"__Host-session.{n}" for n in range(1, len(browser.jar))),
        ]
        assert len(browser.jar) >= 3
        fields = [value for name, value in browser.fields if name == "set-cookie"]
        assert all(len(field) <= 4096 for field in fields)
        assert browser.read() == {"text": "x" * 9000}
        browser.write(text="short")
        assert sorted(browser.jar) == ["__Host-session"]
        assert browser.read() == {"text": "short"}

    def test_a_part_that_is_missing_or_there_twice_makes_it_none(
        self, tokens: Callable[..., TokenSessions]
    ) -> None:
        flow = tokens()
        browser = Browser(flow)
        browser.write(text="x" * 9000)
        whole = dict(browser.jar)
        del browser.jar["__Host-session.1"]
        assert browser.read() == {}
        browser.jar = whole
        text = "; ".join(f"{name}={value}" for name, value in whole.items())
        twice = f"{text}; __Host-session.1={whole['__Host-session.1']}"
        scope = {"type": "http", "path": "/", "headers": [(b"cookie", twice.encode())]}
        assert dict(flow.open(ScopeRequest(scope), blocking=True)) == {}

    def test_one_that_is_too_long_for_cookies_is_a_clear_error(self, tokens: Callable[..., TokenSessions]) -> None:
        browser = Browser(tokens())
        session = browser.begin()
        session["text"] = "x" * 40_000
        with pytest.raises(SessionError, match="store"):
            browser.end(session)

    def test_without_a_store_an_ended_one_is_good_again_for_who_kept_it(
        self, tokens: Callable[..., TokenSessions]
    ) -> None:
        browser = Browser(tokens())
        browser.write(sub="7")
        kept = dict(browser.jar)
        browser.request(lambda session: session.end())
        browser.jar = kept
        assert browser.read() == {"sub": "7"}, "as the documentation says plainly"

    def test_with_a_store_an_ended_one_is_dead(self, tokens: Callable[..., TokenSessions], store: Counting) -> None:
        browser = Browser(tokens(store=store))
        browser.write(sub="7")
        kept = dict(browser.jar)
        browser.request(lambda session: session.end())
        browser.jar = kept
        assert browser.read() == {}

    def test_with_a_store_all_sessions_of_a_user_but_one_can_be_revoked(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        flow = tokens(store=store)
        browsers = [Browser(flow) for _ in range(3)]
        for browser in browsers:
            browser.write(sub="7")
        other = Browser(flow)
        other.write(sub="8")
        clock.advance(5)
        mine = browsers[0].begin()
        assert mine["sub"] == "7"
        run(flow.revoke("7", but=mine), nobody)
        browsers[0].end(mine)
        assert [browser.read() for browser in (*browsers, other)] == [{"sub": "7"}, {}, {}, {"sub": "8"}]
        clock.advance(5)
        browsers[1].write(sub="7")
        assert browsers[1].read() == {"sub": "7"}, "who logs in again is in again"

    def test_a_late_write_brings_back_no_session_that_was_revoked(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """A request that was on its way as all sessions of its user were revoked is told of none."""
        flow = tokens(store=store)
        browser = Browser(flow)
        browser.write(sub="7")
        clock.advance(5)
        late = browser.begin()
        late["late"] = True
        clock.advance(5)
        run(flow.revoke("7"), nobody)
        clock.advance(5)
        browser.end(late)
        assert late.is_gone
        assert browser.jar == {}
        browser.write(sub="7")
        assert browser.read() == {"sub": "7"}, "who logs in again is in again"

    def test_a_session_that_is_revoked_while_it_is_written_is_revoked(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """A write that has asked a moment before makes no token that is younger than the revocation."""
        flow = tokens(store=store)
        browser = Browser(flow)
        browser.write(sub="7")
        clock.advance(5)
        late = browser.begin()
        late["late"] = True
        steps = flow.save(late)
        assert isinstance(next(steps), Load)
        assert isinstance(steps.send(None), Load)
        clock.advance(5)
        run(flow.revoke("7"), nobody)
        with pytest.raises(StopIteration) as written:
            steps.send(None)
        field = dict(written.value.value)[b"set-cookie"].decode()
        browser.jar["__Host-session"] = field.partition(";")[0].partition("=")[2]
        assert browser.read() == {}

    def test_one_that_was_ended_stays_so_though_another_request_made_it_live_longer(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """What says that it is revoked lasts as long as any token of it can."""
        flow = tokens(store=store)
        flow.lives = lambda data, seen: data.get("life", IDLE)
        browser = Browser(flow)
        browser.write(sub="7")
        ending = browser.begin()
        ending.end()
        browser.write(life=ABSOLUTE)
        kept = dict(browser.jar)
        browser.end(ending)
        clock.advance(IDLE + 1)
        browser.jar = kept
        assert browser.read() == {}

    def test_a_session_may_be_written_twice_though_its_user_s_were_revoked_before(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """Some frameworks save it as somebody logs in, and again with the response."""
        flow = tokens(store=store)
        run(flow.revoke("7"), nobody)
        clock.advance(5)
        browser = Browser(flow)
        session = browser.begin()
        session["sub"] = "7"
        browser.end(session)
        session["more"] = True
        browser.end(session)
        assert browser.read() == {"sub": "7", "more": True}

    def test_who_logs_in_as_all_sessions_are_revoked_is_in(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """As with a new password: all others are out, and the one who gave it is let in at once."""
        flow = tokens(store=store)
        before, browser = Browser(flow), Browser(flow)
        before.write(sub="7")
        session = browser.begin()
        run(flow.revoke("7"), nobody)
        session["sub"] = "7"
        browser.end(session)
        assert before.read() == {}
        assert browser.read() == {"sub": "7"}
        clock.advance(2)
        run(flow.revoke("7"), nobody)
        assert browser.read() == {}

    def test_who_revokes_all_others_stays_though_a_clock_was_ahead(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """Its token is younger than any revocation there was."""
        flow = tokens(store=store)
        clock.advance(30)
        run(flow.revoke("7"), nobody)
        browser = Browser(flow)
        browser.write(sub="7")
        clock.advance(-20)
        session = browser.begin()
        assert session["sub"] == "7"
        run(flow.revoke("7", but=session), nobody)
        browser.end(session)
        assert browser.read() == {"sub": "7"}

    def test_a_clock_that_is_behind_takes_back_no_revocation(
        self, tokens: Callable[..., TokenSessions], store: Counting, clock: Clock
    ) -> None:
        """Of two servers that revoke a user's sessions the later time holds."""
        flow = tokens(store=store)
        browser = Browser(flow)
        browser.write(sub="7")
        run(flow.revoke("7"), nobody)
        clock.advance(-30)
        run(flow.revoke("7"), nobody)
        clock.advance(30)
        assert browser.read() == {}

    def test_without_a_store_revoking_says_what_is_missing(self, tokens: Callable[..., TokenSessions]) -> None:
        with pytest.raises(SessionError, match=r"session\.store"):
            run(tokens().revoke("7"), nobody)

    def test_while_the_store_of_revocations_does_not_answer_using_a_session_raises(
        self, tokens: Callable[..., TokenSessions], store: Counting
    ) -> None:
        browser = Browser(tokens(store=store))
        browser.write(a=1)
        store.fails = True
        with pytest.raises(StoreError):
            browser.read()

    def test_it_may_come_as_a_bearer_token_where_the_settings_allow_it(
        self, tokens: Callable[..., TokenSessions]
    ) -> None:
        flow = tokens(bearer=True)
        browser = Browser(flow)
        session = browser.begin()
        session["sub"] = "7"
        field = (b"authorization", b"Bearer " + flow.token(session).encode())
        found = browser.begin([field])
        assert found["sub"] == "7"
        assert browser.end(found) == ["vary"]
        assert dict(Browser(tokens()).begin([field])) == {}

    def test_one_under_a_key_that_retires_is_issued_anew(
        self, tokens: Callable[..., TokenSessions], ring: Ring
    ) -> None:
        browser = Browser(tokens())
        browser.write(a=1)
        (old,) = ring.keys
        new = Key("k2", "HS256", os.urandom(32), KeyState.ACTIVE)
        ring.replace([new, Key(old.id, old.algorithm, old.secret, KeyState.RETIRING)])
        assert browser.read() == {"a": 1}
        ring.replace([new])
        assert browser.read() == {"a": 1}


class TestForFrameworks:
    """What frameworks need that save a session several times in a request, or have ages of their own."""

    def test_an_id_that_nobody_has_seen_yet_is_kept_when_somebody_logs_in(self, flow: Sessions) -> None:
        """A framework rotates before it names the user: the id that it has told the application then stays."""
        browser = Browser(flow)
        browser.write(cart=1)
        session = browser.begin()
        session.rotate()
        run(flow.save(session), nobody)
        key = session.key
        session["sub"] = "ada"
        browser.end(session)
        assert session.key == key
        assert browser.read() == {"cart": 1, "sub": "ada"}

    def test_an_id_from_before_never_outlives_a_login(self, flow: Sessions) -> None:
        """Though it was saved in between: only an id that was drawn in this request is kept."""
        browser = Browser(flow)
        browser.write(cart=1)
        session = browser.begin()
        session["cart"] = 2
        run(flow.save(session), nobody)
        key = session.key
        session["sub"] = "ada"
        browser.end(session)
        assert session.key != key

    def test_a_user_has_no_more_sessions_than_may_be_when_the_id_was_drawn_before_the_login(
        self, stored: Callable[..., StoredSessions], clock: Clock
    ) -> None:
        """The ones not seen for longest make room, whenever the user became known."""
        flow = stored(most=2)
        for _ in range(3):
            session = Browser(flow).begin()
            session["cart"] = 1
            run(flow.save(session), nobody)
            session["sub"] = "ada"
            clock.advance(1)
            run(flow.save(session), nobody)
            assert session.born == int(clock.now)
        assert [entry.seen for entry in run(flow.listed("ada"), nobody)] == [int(clock.now), int(clock.now) - 1]

    def test_a_session_that_stays_is_kept_though_it_holds_nothing(self, flow: Sessions) -> None:
        """It has an id, which is the same once it holds something."""
        browser = Browser(flow)
        session = browser.begin()
        session.stays = session.renews = True
        browser.end(session)
        assert "__Host-session" in browser.jar
        assert session.id is not None
        again = browser.begin()
        assert not again.is_new
        assert dict(again) == {}
        assert again.id == session.id

    def test_a_session_lives_as_long_as_it_says_within_the_absolute_bound(
        self, flow: Sessions, clock: Clock
    ) -> None:
        """`lives` is asked with what it holds; what it says is in force at the second."""
        flow.lives = lambda data, seen: data.get("life", IDLE)
        for life, lasts in ((60, 60), (IDLE * 3, IDLE * 3), (ABSOLUTE * 2, ABSOLUTE)):
            browser = Browser(flow)
            browser.write(life=life)
            clock.advance(lasts - 1)
            held = browser.begin()
            assert dict(held) == {"life": life}
            clock.advance(1)
            assert browser.read() == {}
