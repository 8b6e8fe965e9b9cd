"""Django's session engine: the contract of SessionBase, over every kind of session and store."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

import tests.django_home  # noqa: F401  # first: Django wants its settings

# isort: split
import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.sessions.backends.base import CreateError, UpdateError
from django.core.management import call_command
from django.test import override_settings
from django.utils import timezone

import gatekeeper_django
from gatekeeper.errors import SessionError
from gatekeeper.user_sessions import UserSessions
from gatekeeper_django.sessions import SessionStore
from tests.redis_servers import PATIENT, shared_server

KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: {"kind": "store"},
    "redis": lambda path: {"kind": "store", "store": shared_server().unix_url},
    "shared": lambda path: {"kind": "store", "store": f"shared://{path}/shared"},
    "sqlite": lambda path: {"kind": "store", "store": f"sqlite:///{path}/sessions", "create_table": True},
    "token": lambda path: {"kind": "token"},
    "encrypted token": lambda path: {"kind": "token", "encrypt": True},
    "revocable token": lambda path: {"kind": "token", "store": "memory://"},
}
STORED = {"memory", "redis", "shared", "sqlite"}
OWN_TIME = {"redis"}
ENGINE = "gatekeeper_django.sessions"


class Clock:
    """Seconds since the epoch that pass when told."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    def __call__(self) -> float:
        return self.now


class Home:
    """Where sessions are used: by the methods of SessionBase, or by their awaiting twins, whose names begin with a."""

    def __init__(self, kind: str, runner: asyncio.Runner | None, clock: Clock) -> None:
        self.kind = kind
        self.is_stored = kind in STORED
        self.clock = clock
        self._runner = runner

    def do(self, session: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
        if self._runner is None:
            return getattr(session, name)(*arguments, **keywords)
        twin = {"__setitem__": "aset", "__getitem__": "aget", "__contains__": "ahas_key"}.get(name, f"a{name}")
        return self._runner.run(getattr(session, twin)(*arguments, **keywords))

    def put(self, session: Any, **members: Any) -> Any:
        for name, value in members.items():
            self.do(session, "__setitem__", name, value)
        return session

    def saved(self, **members: Any) -> Any:
        """A session that was saved with these."""
        session = self.put(SessionStore(), **members)
        self.do(session, "save")
        return session

    def read(self, key: str | None) -> dict[str, Any]:
        """What another request finds under a key."""
        return dict(self.do(SessionStore(key), "items"))


def sessions() -> UserSessions:
    """Those in force."""
    found = gatekeeper_django.keeper().sessions
    assert found is not None
    return found


@contextmanager
def policy(kind: str, path: Path, **settings: Any) -> Iterator[Clock]:
    """The engine in force, on a clock that stands still."""
    session = {**KINDS[kind](path), **settings.pop("session", {})}
    written = {"session": session, "store": {"timeout": f"{PATIENT:.0f}s"}, **settings.pop("policy", {})}
    clock = Clock()
    with override_settings(GATEKEEPER=written, SESSION_ENGINE=ENGINE, **settings):
        flow = sessions().flow
        flow._clock = clock
        if flow.store is not None and hasattr(flow.store, "_clock"):
            flow.store._clock = clock
        yield clock


def among(kinds: Iterable[str]) -> list[str]:
    """The homes of these kinds."""
    return [f"{kind}, {way}" for kind in KINDS if kind in kinds for way in ("blocking", "awaiting")]


IN_A_STORE = pytest.mark.parametrize("home", among(STORED), indirect=True)
ON_OUR_CLOCK = pytest.mark.parametrize("home", among(KINDS.keys() - OWN_TIME), indirect=True)


@pytest.fixture(params=among(KINDS))
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    kind, way = request.param.split(", ")
    with policy(kind, tmp_path) as clock:
        if way == "blocking":
            yield Home(kind, None, clock)
            return
        with asyncio.Runner() as runner:
            yield Home(kind, runner, clock)
            runner.run(gatekeeper_django.keeper().aclose())


class TestContract:
    """What Django promises of each session engine."""

    def test_a_new_session_is_empty_and_unchanged(self, home: Home) -> None:
        """It has no key, nothing in it, and need not be saved."""
        session = SessionStore()
        assert (session.accessed, session.modified, session.is_empty(), session.session_key) == (
            False,
            False,
            True,
            None,
        )
        assert home.do(session, "get", "cart") is None
        assert home.do(session, "get", "cart", "none") == "none"
        assert (session.accessed, session.modified, session.is_empty()) == (True, False, True)

    def test_what_was_saved_is_loaded_by_its_key(self, home: Home) -> None:
        """A request with the same key reads what another has saved, and the key stays."""
        one = home.saved(cart=["apple"], name="Zoë", none=None, deep={"a": [1, {"b": 2.5}]})
        two = SessionStore(one.session_key)
        assert dict(home.do(two, "items")) == {
            "cart": ["apple"],
            "name": "Zoë",
            "none": None,
            "deep": {"a": [1, {"b": 2.5}]},
        }
        assert two.session_key == one.session_key
        assert not two.modified

    def test_it_is_a_mapping(self, home: Home) -> None:
        """The methods of dictionaries do what they do there, and tell whether something changed."""
        session = home.saved(a=1, b=2)
        key = session.session_key

        def seen(name: str, *arguments: Any) -> tuple[Any, bool]:
            one = SessionStore(key)
            found = home.do(one, name, *arguments)
            return found, one.modified

        assert seen("__contains__", "a") == (True, False)
        assert seen("has_key", "c") == (False, False)
        assert seen("pop", "a") == (1, True)
        assert seen("pop", "c", "none") == ("none", False)
        assert seen("setdefault", "a", 3) == (1, False)
        assert seen("setdefault", "c", 3) == (3, True)
        assert seen("update", {"a": 3}) == (None, True)
        assert (sorted(seen("keys")[0]), sorted(seen("values")[0])) == (["a", "b"], [1, 2])
        with pytest.raises(KeyError):
            seen("pop", "c")

    def test_the_test_cookie_works(self, home: Home) -> None:
        """What `set_test_cookie` leaves is found by the next request, until it is deleted."""
        session = SessionStore()
        home.do(session, "set_test_cookie")
        home.do(session, "save")
        again = SessionStore(session.session_key)
        assert home.do(again, "test_cookie_worked")
        home.do(again, "delete_test_cookie")
        assert not home.do(again, "test_cookie_worked")

    def test_clear_empties_it_and_keeps_its_key(self, home: Home) -> None:
        """A session that was cleared and saved holds nothing, and is still one."""
        session = home.saved(cart=1)
        again = SessionStore(session.session_key)
        again.clear()
        assert (again.accessed, again.modified, again.is_empty()) == (True, True, False)
        home.do(again, "save")
        assert home.read(again.session_key) == {}
        assert home.do(SessionStore(), "exists", again.session_key)

    def test_a_session_is_saved_though_it_is_empty(self, home: Home) -> None:
        """As Django's test client does, to have a key before there is anything to keep."""
        session = SessionStore()
        home.do(session, "save")
        key = session.session_key
        assert home.do(SessionStore(), "exists", key)
        home.put(session, cart=1)
        home.do(session, "save")
        assert home.read(session.session_key) == {"cart": 1}
        if home.is_stored:
            assert session.session_key == key

    def test_create_makes_one_with_a_key_of_its_own(self, home: Home) -> None:
        """It is there before the method returns."""
        one, two = SessionStore(), SessionStore()
        home.do(one, "create")
        home.do(two, "create")
        assert one.session_key != two.session_key
        assert one.modified
        assert home.do(SessionStore(), "exists", one.session_key)
        assert home.read(two.session_key) == {}

    def test_must_create_refuses_a_key_that_is_taken(self, home: Home) -> None:
        """What is there is never overwritten."""
        session = home.saved(cart=1)
        other = SessionStore(session.session_key)
        with pytest.raises(CreateError):
            home.do(other, "save", must_create=True)
        assert home.read(session.session_key) == {"cart": 1}

    def test_flush_ends_it(self, home: Home) -> None:
        """The data is gone, and so is the key; what is put into it later is a new session's."""
        session = home.saved(cart=1)
        key = session.session_key
        home.do(session, "flush")
        assert (session.session_key, session.modified, session.accessed, session.is_empty()) == (
            None,
            True,
            True,
            True,
        )
        if home.kind in STORED | {"revocable token"}:
            assert home.read(key) == {}
            assert not home.do(SessionStore(), "exists", key)
        home.put(session, cart=2)
        home.do(session, "save")
        assert session.session_key != key
        assert home.read(session.session_key) == {"cart": 2}

    def test_delete_ends_the_session_of_a_key(self, home: Home) -> None:
        """Its own, or another's; what does not exist is no error."""
        one, two = home.saved(cart=1), home.saved(cart=2)
        keys = one.session_key, two.session_key
        home.do(one, "delete", two.session_key)
        home.do(one, "delete")
        home.do(one, "delete", "unknown-key.signed")
        home.do(SessionStore(), "delete")
        if home.kind in STORED | {"revocable token"}:
            assert [home.do(SessionStore(), "exists", key) for key in keys] == [False, False]

    @pytest.mark.parametrize("home", among(KINDS.keys() - STORED), indirect=True)
    def test_a_token_that_was_deleted_is_dropped(self, home: Home) -> None:
        """It would be as good as before: so nothing of it is left, and Django's middleware expires the cookie."""
        session = home.saved(cart=1)
        home.do(session, "delete")
        assert (session.session_key, session.modified, session.is_empty()) == (None, True, True)
        assert dict(home.do(session, "items")) == {}

    def test_cycle_key_gives_it_another_key_at_once(self, home: Home) -> None:
        """The data stays, and the old key is dead."""
        session = home.saved(cart=[1])
        old = session.session_key
        again = SessionStore(old)
        home.do(again, "cycle_key")
        new = again.session_key
        assert new not in (None, old)
        assert again.modified
        assert home.read(new) == {"cart": [1]}
        if home.kind in STORED | {"revocable token"}:
            assert home.read(old) == {}

    def test_cycle_key_gives_a_new_session_a_key(self, home: Home) -> None:
        """Applications keep the key that they see after a login."""
        session = home.put(SessionStore(), cart=1)
        home.do(session, "cycle_key")
        assert session.session_key is not None
        assert home.read(session.session_key) == {"cart": 1}
        empty = SessionStore()
        home.do(empty, "cycle_key")
        assert home.do(SessionStore(), "exists", empty.session_key)

    @IN_A_STORE
    def test_the_key_after_cycle_key_is_the_one_that_stays_when_the_user_logs_in(self, home: Home) -> None:
        """Though the user changes behind it; an id from before that was known would not stay."""
        session = home.saved(cart=1)
        home.do(session, "cycle_key")
        key = session.session_key
        home.put(session, _auth_user_id="7")
        home.do(session, "save")
        assert session.session_key == key
        planted = home.saved(cart=1)
        again = home.put(SessionStore(planted.session_key), _auth_user_id="7")
        home.do(again, "save")
        assert again.session_key != planted.session_key
        assert home.read(planted.session_key) == {}

    @pytest.mark.parametrize(
        "key", ["unknown-key", "1", "", "a" * 9000, "a; sessionid=b", "ä" * 20, "..", "2~abcdefgh"]
    )
    def test_a_key_that_we_did_not_give_is_never_taken_on(self, home: Home, key: str) -> None:
        """Reading finds nothing; what is saved gets a key of ours."""
        session = SessionStore(key)
        assert dict(home.do(session, "items")) == {}
        assert session.session_key is None
        assert not home.do(session, "exists", key)
        home.put(session, cart=1)
        home.do(session, "save")
        assert session.session_key != key
        assert home.read(key) == {}
        assert home.read(session.session_key) == {"cart": 1}

    @IN_A_STORE
    def test_a_session_that_was_deleted_is_not_saved_again(self, home: Home) -> None:
        """Django turns the error into a 400."""
        session = home.saved(cart=1)
        loaded, unloaded = SessionStore(session.session_key), SessionStore(session.session_key)
        home.put(loaded, cart=2)
        home.do(session, "delete")
        for late in (loaded, unloaded, session):
            with pytest.raises(UpdateError):
                home.do(late, "save")
        assert home.read(session.session_key) == {}

    def test_a_nested_change_is_noticed(self, home: Home) -> None:
        """Without `modified = True`, which Django's own engines need."""
        session = SessionStore(home.saved(cart=["apple"], deep={"a": {"b": 1}}).session_key)
        home.do(session, "get", "cart").append("pear")
        assert session.modified
        home.do(session, "save")
        again = SessionStore(session.session_key)
        home.do(again, "get", "deep")["a"]["b"] = 2
        assert again.modified
        home.do(again, "save")
        assert home.read(again.session_key) == {"cart": ["apple", "pear"], "deep": {"a": {"b": 2}}}

    @IN_A_STORE
    def test_requests_at_the_same_time_do_not_undo_each_other(self, home: Home) -> None:
        """Changes of different names are merged; of the same name the later save holds."""
        key = home.saved(cart=[1], name="a", gone=True).session_key
        one, two = SessionStore(key), SessionStore(key)
        home.put(one, cart=[1, 2], name="b")
        home.do(two, "get", "cart")
        home.do(two, "pop", "gone")
        home.put(two, name="c", more=1)
        home.do(one, "save")
        home.do(two, "save")
        merged = {"cart": [1, 2], "name": "c", "more": 1}
        assert home.read(key) == merged
        assert dict(home.do(two, "items")) == merged

    @pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), "\ud800"])
    def test_what_json_cannot_hold_is_told_by_its_name(self, home: Home, value: object) -> None:
        """And nothing is stored."""
        session = home.put(home.saved(cart=1), odd=value)
        with pytest.raises(SessionError, match="odd"):
            home.do(session, "save")
        assert home.read(session.session_key) == {"cart": 1}

    def test_names_are_texts_in_json(self, home: Home) -> None:
        """As with Django's own JSONSerializer: a number that is a name comes back as text."""
        session = SessionStore()
        home.do(session, "__setitem__", 1, "one")
        home.do(session, "save")
        assert home.read(session.session_key) == {"1": "one"}

    def test_a_key_is_a_text_that_a_cookie_holds_as_it_is(self, home: Home) -> None:
        """No quotes, no commas: every framework reads it the same."""
        assert re.fullmatch(r"[A-Za-z0-9._-]{60,}", home.saved(cart='ä;,"').session_key)

    def test_encode_and_decode_agree(self, home: Home) -> None:
        """Some packages call them, though nothing here does."""
        session = SessionStore()
        assert session.decode(session.encode({"cart": 1})) == {"cart": 1}
        assert session.decode("nothing of the kind") == {}


class TestAges:
    """How long sessions live: as Django has it, within what the policy says."""

    @ON_OUR_CLOCK
    def test_it_lives_for_session_cookie_age_after_it_was_last_saved(self, home: Home) -> None:
        """Reading it is no activity, as Django's page on sessions says."""
        with override_settings(SESSION_COOKIE_AGE=100):
            session = home.saved(cart=1)
            home.clock.now += 99
            again = SessionStore(session.session_key)
            assert dict(home.do(again, "items")) == {"cart": 1}
            assert not again.modified
            home.do(again, "save")
            home.clock.now += 99
            assert home.read(again.session_key) == {"cart": 1}
            home.clock.now += 1
            assert home.read(again.session_key) == {}

    @pytest.mark.parametrize("how", ["seconds", "timedelta", "datetime"])
    @ON_OUR_CLOCK
    def test_set_expiry_holds_in_the_store(self, home: Home, how: str) -> None:
        """Longer or shorter than SESSION_COOKIE_AGE."""
        slack = 30  # Django looks at the clock itself
        for seconds in (90, 100 * 86_400):
            session = home.put(SessionStore(), cart=1)
            value: Any = seconds
            if how == "timedelta":
                value = timedelta(seconds=seconds)
            elif how == "datetime":
                value = timezone.now() + timedelta(seconds=seconds)
            home.clock.now = float(int(time.time()))
            home.do(session, "set_expiry", value)
            assert seconds - slack <= home.do(session, "get_expiry_age") <= seconds
            home.do(session, "save")
            home.clock.now += seconds - slack
            assert home.read(session.session_key)["cart"] == 1
            home.clock.now += 2 * slack
            assert home.read(session.session_key) == {}

    def test_set_expiry_is_taken_back(self, home: Home) -> None:
        """None is the general age again, and 0 the end of the browser, at the general age in the store."""
        session = home.put(SessionStore(), cart=1)
        assert not home.do(session, "get_expire_at_browser_close")
        home.do(session, "set_expiry", 0)
        assert home.do(session, "get_expire_at_browser_close")
        assert home.do(session, "get_expiry_age") == 1_209_600
        home.do(session, "set_expiry", 10)
        assert home.do(session, "get_expiry_age") == 10
        assert abs(home.do(session, "get_expiry_date") - timezone.now() - timedelta(seconds=10)) < timedelta(
            seconds=30
        )
        home.do(session, "set_expiry", None)
        assert home.do(session, "get_expiry_age") == 1_209_600
        assert not home.do(session, "get_expire_at_browser_close")

    def test_what_has_expired_before_it_is_saved_is_gone(self, home: Home) -> None:
        """As with Django's own engines."""
        session = home.put(SessionStore(), cart=1)
        home.do(session, "set_expiry", -3600)
        home.do(session, "save")
        assert home.read(session.session_key) == {}

    @pytest.mark.parametrize("home", among(STORED - OWN_TIME), indirect=True)
    def test_clear_expired_drops_what_has_expired(self, home: Home) -> None:
        """And leaves what has not."""
        short = home.put(SessionStore(), cart=1)
        home.do(short, "set_expiry", 60)
        home.do(short, "save")
        long = home.saved(cart=2)
        home.clock.now += 61
        home.do(SessionStore, "clear_expired")
        assert sessions().sweep() == 0
        assert home.read(long.session_key) == {"cart": 2}
        home.clock.now += SessionStore().get_expiry_age()
        call_command("clearsessions")
        assert sessions().sweep() == 0


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, (77, 365 * 86_400)),
        ({"absolute": "1h"}, (77, 3600)),
        ({"absolute": "2d"}, (77, 2 * 86_400)),
        ({"idle": "50s"}, (50, 12 * 3600)),
        ({"idle": "90s", "absolute": "200s"}, (77, 200)),
    ],
)
def test_what_the_policy_names_bounds_djangos_ages(named: dict[str, str], expected: tuple[int, int]) -> None:
    """What it does not name is Django's, which has no absolute end: then it is the longest there is."""
    session = {"kind": "store", **named}
    with override_settings(GATEKEEPER={"session": session}, SESSION_ENGINE=ENGINE, SESSION_COOKIE_AGE=77):
        flow = sessions().flow
        assert flow.lives is not None
        assert (flow.lives({}, 0), flow.absolute) == expected


@pytest.mark.parametrize("odd", ["no date", [], {}, True, "9999-99-99T00:00:00", None, 0, ""])
def test_an_expiry_that_is_none_of_djangos_is_the_general_age(odd: object) -> None:
    """Another application may have put anything there."""
    with override_settings(GATEKEEPER={"session": {"kind": "store"}}, SESSION_ENGINE=ENGINE, SESSION_COOKIE_AGE=77):
        flow = sessions().flow
        assert flow.lives is not None
        assert flow.lives({"_session_expiry": odd}, 0) == 77
