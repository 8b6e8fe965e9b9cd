"""Django's sessions in real requests: cookies, logins, messages, the admin, races, and a store that is down."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE, Urls, database  # first: Django wants its settings

# isort: split
import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.conf import settings as django_settings
from django.contrib import admin, messages
from django.contrib.auth import alogin, alogout, get_user_model, login, logout, update_session_auth_hash
from django.contrib.sessions.exceptions import SessionInterrupted
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.handlers.wsgi import WSGIHandler
from django.db import connections
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import get_token
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from hypothesis import given
from hypothesis import strategies as st

import gatekeeper_django
from gatekeeper import Gatekeeper
from gatekeeper.commands import SessionCommand
from gatekeeper.errors import SessionError, StoreError
from gatekeeper.wsgi import GatekeeperMiddleware
from gatekeeper_django.sessions import SessionStore, aof, arevoke, of, revoke
from tests.redis_servers import PATIENT
from tests.scenarios import Ask
from tests.servers import ask_wsgi
from tests.test_django_sessions import ENGINE, KINDS, STORED, Clock, policy, sessions

STACK = [
    MIDDLEWARE,
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]

OURS = [STACK[0], "gatekeeper_django.SessionMiddleware", *STACK[2:]]
STACKS = pytest.mark.parametrize("stack", [STACK, OURS], ids=["Django's middleware", "ours"])


def put(request: HttpRequest) -> HttpResponse:
    request.session.update(request.GET.dict())
    return HttpResponse()


def show(request: HttpRequest) -> HttpResponse:
    return JsonResponse(dict(request.session.items()))


def silent(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def nested(request: HttpRequest) -> HttpResponse:
    request.session.setdefault("cart", [])
    request.session["cart"].append(request.GET["item"])
    return HttpResponse()


def append(request: HttpRequest) -> HttpResponse:
    request.session["cart"].append(request.GET["item"])
    return HttpResponse()


def enter(request: HttpRequest) -> HttpResponse:
    login(request, get_user_model().objects.get(username=request.GET["name"]))
    return HttpResponse(request.session.session_key)


def leave(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse()


def me(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.user.get_username())


async def aput(request: HttpRequest) -> HttpResponse:
    await request.session.aupdate(request.GET.dict())
    return HttpResponse()


async def ashow(request: HttpRequest) -> HttpResponse:
    return JsonResponse(dict(await request.session.aitems()))


async def aenter(request: HttpRequest) -> HttpResponse:
    await alogin(request, await get_user_model().objects.aget(username=request.GET["name"]))
    return HttpResponse(request.session.session_key)


async def aleave(request: HttpRequest) -> HttpResponse:
    await alogout(request)
    return HttpResponse()


async def ame(request: HttpRequest) -> HttpResponse:
    return HttpResponse((await request.auser()).get_username())


URLS = [
    path("put", put),
    path("show", show),
    path("silent", silent),
    path("nested", nested),
    path("append", append),
    path("enter", enter),
    path("leave", leave),
    path("me", me),
]
ASYNC_URLS = [path("put", aput), path("show", ashow), path("enter", aenter), path("leave", aleave), path("me", ame)]


class Site:
    """A Django of a test's own, and a browser for it; asynchronous on demand."""

    def __init__(self, kind: str, runner: asyncio.Runner | None, clock: Clock) -> None:
        self.kind = kind
        self.is_stored = kind in STORED
        self.clock = clock
        self._runner = runner
        self.browser = self.new_browser()

    def new_browser(self) -> Any:
        return Client() if self._runner is None else AsyncClient()

    def get(self, url: str, browser: Any = None) -> Any:
        found = (browser or self.browser).get(url)
        return found if self._runner is None else self._runner.run(found)

    def close(self) -> None:
        """Let go of the connections that the event loop has opened."""
        if self._runner is not None:
            self._runner.run(gatekeeper_django.keeper().aclose())

    @property
    def cookie(self) -> str:
        return str(self.browser.cookies["sessionid"].value)


@pytest.fixture(scope="module")
def users() -> None:
    database()
    for name in ("iris", "jack"):
        get_user_model().objects.get_or_create(username=name)


@pytest.fixture(
    params=[f"{kind}, {way}, Django's" for kind in KINDS for way in ("blocking", "awaiting")]
    + [f"{kind}, {way}, ours" for kind in ("redis", "sqlite", "token") for way in ("blocking", "awaiting")]
)
def site(request: pytest.FixtureRequest, tmp_path: Path, users: None) -> Iterator[Site]:
    kind, way, whose = request.param.split(", ")
    urls = Urls(URLS if way == "blocking" else ASYNC_URLS)
    with policy(kind, tmp_path, MIDDLEWARE=OURS if whose == "ours" else STACK, ROOT_URLCONF=urls) as clock:
        if way == "blocking":
            yield Site(kind, None, clock)
        else:
            with asyncio.Runner() as runner:
                site = Site(kind, runner, clock)
                yield site
                site.close()
    connections.close_all()


class TestEachKind:
    def test_what_one_request_puts_in_the_next_one_finds(self, site: Site) -> None:
        """The cookie is Django's, by its settings."""
        answer = site.get("/put?cart=apple")
        cookie = answer.cookies["sessionid"]
        assert (cookie["max-age"], cookie["httponly"], cookie["samesite"]) == (1_209_600, True, "Lax")
        assert answer["Vary"] == "Cookie"
        answer = site.get("/show")
        assert answer.json() == {"cart": "apple"}
        assert "sessionid" not in answer.cookies
        assert answer["Vary"] == "Cookie"

    def test_a_login_changes_the_key_and_a_logout_ends_it(self, site: Site) -> None:
        """What was in the anonymous session stays; the keys from before are dead."""
        site.get("/put?cart=apple")
        before = site.cookie
        told = site.get("/enter?name=iris").content.decode()
        during = site.cookie
        assert during != before
        if site.is_stored:
            assert told == during
        assert site.get("/me").content == b"iris"
        assert site.get("/show").json()["cart"] == "apple"
        site.browser.cookies["sessionid"] = before
        assert site.get("/me").content == b""
        site.browser.cookies["sessionid"] = during
        answer = site.get("/leave")
        assert answer.cookies["sessionid"]["max-age"] == 0
        if site.kind in STORED | {"revocable token"}:
            site.browser.cookies["sessionid"] = during
            assert site.get("/me").content == b""
            assert site.get("/show").json() == {}

    def test_another_user_gets_nothing_of_the_one_before(self, site: Site) -> None:
        """Django flushes the session of another user."""
        site.get("/put?cart=apple")
        site.get("/enter?name=iris")
        first = site.cookie
        site.get("/enter?name=jack")
        assert site.get("/me").content == b"jack"
        assert "cart" not in site.get("/show").json()
        assert site.cookie != first

    @pytest.mark.parametrize("planted", ["abcdefghijklmnop", "x" * 64 + ".sig", "", '"quoted"'])
    def test_a_planted_cookie_is_not_taken_on(self, site: Site, planted: str) -> None:
        """It is expired, or replaced by a key of ours."""
        site.browser.cookies["sessionid"] = planted
        answer = site.get("/show")
        assert answer.json() == {}
        if planted:
            assert answer.cookies["sessionid"]["max-age"] == 0
        site.browser.cookies["sessionid"] = planted
        site.get("/put?cart=1")
        assert site.cookie != planted
        assert site.get("/show").json() == {"cart": "1"}


@contextmanager
def at(tmp_path: Path, kind: str = "memory", urls: Sequence[Any] = (), **settings: Any) -> Iterator[Any]:
    """A browser at a site of one kind."""
    with policy(kind, tmp_path, **{"MIDDLEWARE": STACK, "ROOT_URLCONF": Urls([*urls, *URLS]), **settings}):
        yield Client()


class Counting:
    """What stands before a store, counts what it is asked, and fails on demand."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.local = store.local
        self.asked: list[str] = []
        self.fails: frozenset[str] = frozenset()

    def ask(self, command: SessionCommand) -> Any:
        name = type(command).__name__
        self.asked.append(name)
        return StoreError("it does not answer") if name in self.fails else self.store.ask(command)

    async def aask(self, command: SessionCommand) -> Any:
        return self.ask(command)

    def close(self) -> None:
        self.store.close()


def counting() -> Counting:
    """Stand before the store of sessions in force."""
    flow = sessions().flow
    store = Counting(flow.store)
    flow.store = store  # type: ignore[assignment]  # it need not sweep
    return store


class TestCookie:
    """Django's SessionMiddleware writes the cookie: its settings hold."""

    @STACKS
    def test_each_setting_of_the_cookie_holds(self, tmp_path: Path, stack: list[str]) -> None:
        """Name, age, domain, path, Secure, HttpOnly, SameSite."""
        with at(
            tmp_path,
            MIDDLEWARE=stack,
            SESSION_COOKIE_NAME="__Secure-s",
            SESSION_COOKIE_AGE=77,
            SESSION_COOKIE_DOMAIN="shop.example",
            SESSION_COOKIE_PATH="/shop",
            SESSION_COOKIE_SECURE=True,
            SESSION_COOKIE_HTTPONLY=False,
            SESSION_COOKIE_SAMESITE="Strict",
        ) as browser:
            cookie = browser.get("/put?cart=1").cookies["__Secure-s"]
            told = {name: value for name, value in cookie.items() if value and name != "expires"}
            assert told == {
                "max-age": 77,
                "domain": "shop.example",
                "path": "/shop",
                "secure": True,
                "samesite": "Strict",
            }
            assert browser.get("/show").json() == {"cart": "1"}

    @STACKS
    def test_it_ends_with_the_browser_on_demand(self, tmp_path: Path, stack: list[str]) -> None:
        """By the setting, or for one session by `set_expiry(0)`."""
        with at(tmp_path, MIDDLEWARE=stack, SESSION_EXPIRE_AT_BROWSER_CLOSE=True) as browser:
            assert browser.get("/put?cart=1").cookies["sessionid"]["max-age"] == ""

    @STACKS
    def test_it_is_saved_with_every_request_on_demand(self, tmp_path: Path, stack: list[str]) -> None:
        """SESSION_SAVE_EVERY_REQUEST moves its end each time."""
        with at(tmp_path, MIDDLEWARE=stack, SESSION_SAVE_EVERY_REQUEST=True) as browser:
            browser.get("/put?cart=1")
            store = counting()
            assert "sessionid" in browser.get("/silent").cookies
            assert store.asked == ["Load", "Save"]

    @STACKS
    def test_a_session_that_nobody_looks_at_costs_nothing(self, tmp_path: Path, stack: list[str]) -> None:
        """The store is not asked, and nothing varies by the cookie."""
        with at(tmp_path, MIDDLEWARE=stack) as browser:
            browser.get("/put?cart=1")
            store = counting()
            answer = browser.get("/silent")
            assert (store.asked, answer.has_header("Vary"), len(answer.cookies)) == ([], False, 0)
            browser.get("/show")
            assert store.asked == ["Load"]

    @STACKS
    def test_an_idle_life_that_the_policy_names_is_renewed_by_reading(
        self, tmp_path: Path, stack: list[str]
    ) -> None:
        """Not with each request: when a tenth of it has passed. The cookie is then renewed as well."""
        with policy(
            "memory", tmp_path, session={"idle": "100s"}, MIDDLEWARE=stack, ROOT_URLCONF=Urls(URLS)
        ) as clock:
            browser = Client()
            assert browser.get("/put?cart=1").cookies["sessionid"]["max-age"] == 100
            clock.now += 9
            assert "sessionid" not in browser.get("/show").cookies
            clock.now += 1
            assert "sessionid" in browser.get("/show").cookies
            for _ in range(5):
                clock.now += 99
                assert browser.get("/show").json() == {"cart": "1"}
            clock.now += 100
            assert browser.get("/show").json() == {}

    @STACKS
    def test_no_age_of_djangos_exceeds_what_the_policy_names(self, tmp_path: Path, stack: list[str]) -> None:
        """The shorter of both holds."""

        def remember(request: HttpRequest) -> HttpResponse:
            request.session.set_expiry(10_000)
            return HttpResponse()

        settings = {"MIDDLEWARE": stack, "ROOT_URLCONF": Urls([*URLS, path("remember", remember)])}
        with policy("memory", tmp_path, session={"idle": "100s", "absolute": "150s"}, **settings) as clock:
            browser = Client()
            browser.get("/remember")
            clock.now += 99
            assert browser.get("/show").json() == {"_session_expiry": 10_000}
            clock.now += 51
            assert browser.get("/show").json() == {}

    def test_a_token_that_one_cookie_cannot_hold_is_an_error(self, tmp_path: Path) -> None:
        """Browsers would drop the cookie without a word."""
        with at(tmp_path, "token") as browser, pytest.raises(SessionError, match="one cookie"):
            browser.get("/put?cart=" + "x" * 5000)


class TestDjango:
    """The parts of Django that stand on sessions."""

    def test_csrf_tokens_may_live_in_the_session(self, tmp_path: Path) -> None:
        """CSRF_USE_SESSIONS: a form with the token passes, one without does not."""

        def form(request: HttpRequest) -> HttpResponse:
            return HttpResponse(get_token(request))

        with at(tmp_path, urls=[path("form", form)], CSRF_USE_SESSIONS=True):
            browser = Client(enforce_csrf_checks=True)
            token = browser.get("/form").content.decode()
            assert browser.post("/form", {"csrfmiddlewaretoken": token}).status_code == 200
            assert browser.post("/form", {}).status_code == 403

    @pytest.mark.parametrize("kind", ["memory", "token"])
    def test_messages_may_live_in_the_session(self, tmp_path: Path, kind: str) -> None:
        """They are shown once."""

        def say(request: HttpRequest) -> HttpResponse:
            messages.info(request, 'Saved: "ä".')
            return HttpResponse()

        def hear(request: HttpRequest) -> HttpResponse:
            return JsonResponse([str(one) for one in messages.get_messages(request)], safe=False)

        storage = "django.contrib.messages.storage.session.SessionStorage"
        with at(tmp_path, kind, urls=[path("say", say), path("hear", hear)], MESSAGE_STORAGE=storage) as browser:
            browser.get("/say")
            assert browser.get("/hear").json() == ['Saved: "ä".']
            assert browser.get("/hear").json() == []

    @pytest.mark.parametrize("kind", ["memory", "token"])
    def test_the_admin_is_entered_and_left(self, tmp_path: Path, users: None, kind: str) -> None:
        """By its own pages, with passwords."""
        grace = get_user_model().objects.create_superuser(f"grace-{uuid4()}", password="a good one")
        with at(tmp_path, kind, urls=[path("admin/", admin.site.urls)]) as browser:
            form = {"username": grace.get_username(), "password": "a good one", "next": "/admin/"}
            assert browser.post("/admin/login/", form).status_code == 302
            assert b"Log out" in browser.get("/admin/").content
            assert browser.post("/admin/logout/").status_code == 200
            assert browser.get("/admin/").status_code == 302

    @pytest.mark.parametrize("kind", KINDS)
    def test_djangos_test_client_writes_sessions_and_logs_in(self, tmp_path: Path, users: None, kind: str) -> None:
        """`client.session` and `force_login`, as the tests of applications use them."""
        with at(tmp_path, kind) as browser:
            session = browser.session
            session["cart"] = 1
            session.save()
            browser.cookies["sessionid"] = session.session_key
            assert browser.get("/show").json() == {"cart": 1}
            browser.force_login(get_user_model().objects.get(username="iris"))
            assert browser.get("/me").content == b"iris"
            browser.logout()
            assert browser.get("/me").content == b""

    def test_a_change_of_the_password_ends_the_other_sessions(self, tmp_path: Path, users: None) -> None:
        """`session_auth_hash`: the session in which it was changed goes on under another key."""
        heidi = get_user_model().objects.create_user(f"heidi-{uuid4()}", password="old")

        def change(request: HttpRequest) -> HttpResponse:
            request.user.set_password("new")
            request.user.save()
            update_session_auth_hash(request, request.user)
            return HttpResponse()

        with at(tmp_path, urls=[path("change", change)]) as browser:
            other = Client()
            for one in (browser, other):
                one.get(f"/enter?name={heidi.get_username()}")
            key = browser.cookies["sessionid"].value
            browser.get("/change")
            assert browser.cookies["sessionid"].value != key
            assert browser.get("/me").content.decode() == heidi.get_username()
            assert other.get("/me").content == b""

    @pytest.mark.parametrize("kind", ["sqlite", "token"])
    def test_sessions_outlive_a_change_of_the_secret_key(self, tmp_path: Path, users: None, kind: str) -> None:
        """What an old one of SECRET_KEY_FALLBACKS signed is good, and signed anew when it is saved."""
        first, second = "a first secret of fifty characters, or so it seems", "a second secret of fifty characters"

        def serve(secret: str, *old: str) -> Any:
            return at(tmp_path, kind, SECRET_KEY=secret, SECRET_KEY_FALLBACKS=list(old))

        with serve(first) as browser:
            browser.get("/enter?name=iris")
            cookies = browser.cookies
        with serve(second, first) as browser:
            browser.cookies = cookies
            assert browser.get("/me").content == b"iris"
            browser.get("/put?cart=1")
        with serve(second) as browser:
            browser.cookies = cookies
            assert browser.get("/show").json()["cart"] == "1"
        with serve("a third secret of fifty characters, or so it seems") as browser:
            browser.cookies = cookies
            assert browser.get("/show").json() == {}

    def test_keys_of_the_policy_go_before_djangos(self, tmp_path: Path) -> None:
        """A session signed by them is good under any SECRET_KEY, and read by whoever shares them."""
        keys = {"keys": ["correct horse battery staple, and then some 4711"]}
        with at(tmp_path, "token", policy=keys) as browser:
            browser.get("/put?cart=1")
            cookies = browser.cookies
        with at(tmp_path, "token", policy=keys, SECRET_KEY="quite another one") as browser:
            browser.cookies = cookies
            assert browser.get("/show").json() == {"cart": "1"}

    def test_a_session_that_was_deleted_meanwhile_is_a_400(self, tmp_path: Path) -> None:
        """Django's SessionInterrupted: a logout in another tab is not undone."""

        def late(request: HttpRequest) -> HttpResponse:
            request.session["late"] = 1
            SessionStore(request.session.session_key).delete()
            return HttpResponse()

        with at(tmp_path, urls=[path("late", late)]) as browser:
            browser.get("/put?cart=1")
            assert browser.get("/late").status_code == 400
            assert browser.get("/show").json() == {}

    def test_a_policy_without_sessions_is_told(self, tmp_path: Path) -> None:
        """The error says what is expected."""
        with (
            at(tmp_path) as browser,
            override_settings(GATEKEEPER={}),
            pytest.raises(ImproperlyConfigured, match="GATEKEEPER: session: expected"),
        ):
            browser.get("/show")


class TestMiddleware:
    @STACKS
    def test_an_answer_of_500_saves_nothing(self, tmp_path: Path, stack: list[str]) -> None:
        """As Django has it."""

        def broken(request: HttpRequest) -> HttpResponse:
            request.session["cart"] = 2
            return HttpResponse(status=500)

        with at(tmp_path, MIDDLEWARE=stack, urls=[path("broken", broken)]) as browser:
            browser.get("/put?cart=1")
            browser.get("/broken")
            assert browser.get("/show").json() == {"cart": "1"}

    @pytest.mark.parametrize("identity", [{}, {"user": "session:_auth_user_id"}], ids=["Django's", "the session's"])
    @STACKS
    def test_a_rule_counts_by_the_user_of_the_session(
        self, site: Site, identity: dict[str, str], stack: list[str]
    ) -> None:
        """Whether Django's user says who it is, or the session itself before Django has looked."""
        rule = {"name": "mine", "rate": "2/minute", "key": "user", "match": "/show"}
        written = {**django_settings.GATEKEEPER, "limits": [rule], "identity": identity}
        with override_settings(GATEKEEPER=written, MIDDLEWARE=stack):
            iris, again, jack = site.new_browser(), site.new_browser(), site.new_browser()
            for browser, name in ((iris, "iris"), (again, "iris"), (jack, "jack")):
                assert site.get(f"/enter?name={name}", browser).status_code == 200
            found = [site.get("/show", browser).status_code for browser in (iris, again, jack, iris, jack, jack)]
            assert found == [200, 200, 200, 429, 200, 429]
            site.close()


@STACKS
@pytest.mark.parametrize("kind", ["store", "token"])
@given(
    st.one_of(
        st.text(st.characters(max_codepoint=255), max_size=80),
        st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")),
        st.from_regex(r"([2-8]~)?[A-Za-z0-9._=-]{0,80}(; sessionid\.[1-7]=[A-Za-z0-9.]{0,9}){0,3}", fullmatch=True),
    )
)
def test_no_cookie_is_an_error(stack: list[str], kind: str, text: str) -> None:
    """Whatever a client sends: it has no session, and gets its page."""
    written = {"session": {"kind": kind}}
    with override_settings(GATEKEEPER=written, SESSION_ENGINE=ENGINE, MIDDLEWARE=stack, ROOT_URLCONF=Urls(URLS)):
        handler = WSGIHandler()
        for url in ("/show", "/put?cart=1", "/leave"):
            answer = ask_wsgi(handler, Ask(raw=url, headers=[("Cookie", f"sessionid={text}")]))
            assert answer.status == 200
            if url == "/show":
                assert answer.body == b"{}"


class TestFailure:
    """While the store of sessions does not answer."""

    @STACKS
    @pytest.mark.parametrize("what", ["Load", "Save"])
    def test_the_request_is_answered_503(self, tmp_path: Path, what: str, stack: list[str]) -> None:
        """Whether it happens in the view or behind it; one that does not use its session is answered."""
        with at(tmp_path, MIDDLEWARE=stack) as browser:
            browser.raise_request_exception = False
            browser.get("/put?cart=1")
            store = counting()
            store.fails = frozenset({what})
            url = "/show" if what == "Load" else "/put?cart=2"
            answer = browser.get(url, headers={"accept": "application/json"})
            assert answer.status_code == 503
            assert answer["Content-Type"] == "application/problem+json"
            assert "remembered" in answer.json()["detail"]
            assert "sessionid" not in answer.cookies
            assert browser.get("/silent").status_code == 200
            store.fails = frozenset()
            assert browser.get("/show").json() == {"cart": "1"}

    @STACKS
    @pytest.mark.parametrize("what", ["Load", "Save"])
    def test_an_asynchronous_view_is_answered_503(self, tmp_path: Path, what: str, stack: list[str]) -> None:
        """The same under ASGI."""

        async def main() -> None:
            browser = AsyncClient(raise_request_exception=False)
            await browser.get("/put?cart=1")
            counting().fails = frozenset({what})
            answer = await browser.get("/show" if what == "Load" else "/put?cart=2")
            assert answer.status_code == 503

        with policy("memory", tmp_path, MIDDLEWARE=stack, ROOT_URLCONF=Urls(ASYNC_URLS)):
            asyncio.run(main())

    def test_without_our_middleware_it_is_an_error_of_djangos(self, tmp_path: Path) -> None:
        """It is never swallowed."""
        with at(tmp_path, MIDDLEWARE=STACK[1:]) as browser:
            browser.get("/put?cart=1")
            counting().fails = frozenset({"Load"})
            with pytest.raises(StoreError):
                browser.get("/show")

    def test_a_logout_that_did_not_reach_the_store_is_told(self, tmp_path: Path, users: None) -> None:
        """Else its user believes the session to be over."""
        with at(tmp_path) as browser:
            browser.raise_request_exception = False
            browser.get("/enter?name=iris")
            store = counting()
            store.fails = frozenset({"Delete"})
            assert browser.get("/leave").status_code == 503
            store.fails = frozenset()
            assert browser.get("/me").content == b"iris"

    def test_sessions_may_pass_for_empty(self, tmp_path: Path) -> None:
        """`on_error = "empty"`: the page is answered, nothing is written, and the cookie stays."""
        with policy("memory", tmp_path, session={"on_error": "empty"}, MIDDLEWARE=STACK, ROOT_URLCONF=Urls(URLS)):
            browser = Client()
            browser.get("/put?cart=1")
            key = browser.cookies["sessionid"].value
            store = counting()
            store.fails = frozenset({"Load"})
            assert browser.get("/show").json() == {}
            assert browser.get("/put?cart=2").status_code == 200
            store.fails = frozenset()
            assert browser.cookies["sessionid"].value == key
            assert browser.get("/show").json() == {"cart": "1"}

    @STACKS
    def test_a_new_session_may_be_lost(self, tmp_path: Path, stack: list[str]) -> None:
        """`on_error = "empty"`: the page is answered, and what the client was told leads nowhere."""
        settings = {"MIDDLEWARE": stack, "ROOT_URLCONF": Urls(URLS)}
        with policy("memory", tmp_path, session={"on_error": "empty"}, **settings):
            browser = Client()
            store = counting()
            store.fails = frozenset({"Save"})
            assert browser.get("/put?cart=1").status_code == 200
            store.fails = frozenset()
            assert browser.get("/show").json() == {}
            browser.get("/put?cart=2")
            assert browser.get("/show").json() == {"cart": "2"}

    def test_a_remote_store_is_not_waited_for_on_the_event_loop(self, tmp_path: Path) -> None:
        """Django's own error names the thread, or the awaiting method, as the way."""

        async def blocking(request: HttpRequest) -> HttpResponse:
            return HttpResponse(request.session["cart"])

        async def main() -> None:
            browser = AsyncClient()
            await browser.get("/put?cart=1")
            with pytest.raises(SynchronousOnlyOperation):
                await browser.get("/blocking")
            await gatekeeper_django.keeper().aclose()

        urls = Urls([*ASYNC_URLS, path("blocking", blocking)])
        with policy("redis", tmp_path, MIDDLEWARE=STACK, ROOT_URLCONF=urls):
            asyncio.run(main())


class TestOurMiddleware:
    """What it does beyond Django's, whose place it takes."""

    @pytest.mark.parametrize("way", ["blocking", "awaiting"])
    def test_a_token_may_take_several_cookies(self, tmp_path: Path, way: str) -> None:
        """They are read together, written anew together, and those that are not needed any more expire."""
        with policy(
            "token", tmp_path, MIDDLEWARE=OURS, ROOT_URLCONF=Urls(URLS if way == "blocking" else ASYNC_URLS)
        ):
            browser = Client() if way == "blocking" else AsyncClient()

            def get(url: str) -> Any:
                found = browser.get(url)
                return asyncio.run(found) if way == "awaiting" else found

            answer = get("/put?cart=" + "x" * 7000)
            assert set(answer.cookies) == {"sessionid", "sessionid.1", "sessionid.2"}
            assert {cookie["max-age"] for cookie in answer.cookies.values()} == {1_209_600}
            assert get("/show").json() == {"cart": "x" * 7000}
            answer = get("/put?cart=1")
            assert {name: cookie["max-age"] for name, cookie in answer.cookies.items()} == {
                "sessionid": 1_209_600,
                "sessionid.1": 0,
                "sessionid.2": 0,
            }
            for gone in ("sessionid.1", "sessionid.2"):
                del browser.cookies[gone]
            assert get("/show").json() == {"cart": "1"}

    def test_a_token_that_all_cookies_together_cannot_hold_is_an_error(self, tmp_path: Path) -> None:
        """It says how much there is room for."""
        with at(tmp_path, "token", MIDDLEWARE=OURS) as browser, pytest.raises(SessionError, match="at most"):
            browser.get("/put?cart=" + "x" * 40_000)

    def test_all_parts_expire_with_the_session(self, tmp_path: Path, users: None) -> None:
        """A logout leaves nothing with the client."""
        with at(tmp_path, "token", MIDDLEWARE=OURS) as browser:
            browser.get("/put?cart=" + "x" * 7000)
            answer = browser.get("/leave")
            assert {name: cookie["max-age"] for name, cookie in answer.cookies.items()} == {
                "sessionid": 0,
                "sessionid.1": 0,
                "sessionid.2": 0,
            }

    def test_the_session_that_a_rule_has_loaded_is_not_loaded_again(self, tmp_path: Path, users: None) -> None:
        """One question before the view, one after it if something has changed."""
        rules = {
            "limits": [{"name": "mine", "rate": "90/minute", "key": "user"}],
            "identity": {"user": "session:_auth_user_id"},
        }
        with at(tmp_path, MIDDLEWARE=OURS, policy=rules) as browser:
            browser.get("/enter?name=iris")
            store = counting()
            assert browser.get("/me").content == b"iris"
            assert store.asked == ["Load"]
            browser.get("/put?cart=1")
            assert store.asked == ["Load", "Load", "Save"]
            assert browser.get("/show").json()["cart"] == "1"

    def test_a_request_that_is_late_does_not_bring_the_old_key_back(self, tmp_path: Path) -> None:
        """While `session.grace` lasts its change is kept, and its client is told no key."""
        with policy(
            "memory", tmp_path, session={"grace": "10s"}, MIDDLEWARE=OURS, ROOT_URLCONF=Urls(URLS)
        ) as clock:
            browser, late = Client(), Client()
            browser.get("/put?cart=1")
            late.cookies["sessionid"] = browser.cookies["sessionid"].value
            session = SessionStore(browser.cookies["sessionid"].value)
            session.cycle_key()
            browser.cookies["sessionid"] = session.session_key
            assert len(late.get("/put?late=1").cookies) == 0
            assert browser.get("/show").json() == {"cart": "1", "late": "1"}
            clock.now += 10
            assert late.get("/show").json() == {}

    def test_a_session_that_is_loaded_early_is_used_without_await(self, tmp_path: Path) -> None:
        """In an asynchronous view, though its store is on another machine. It varies only if the view looks."""

        async def blocking(request: HttpRequest) -> HttpResponse:
            return HttpResponse(request.session["cart"])

        async def quiet(request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        async def main() -> None:
            browser = AsyncClient()
            await browser.get("/put?cart=1")
            assert (await browser.get("/blocking")).content == b"1"
            assert not (await browser.get("/quiet")).has_header("Vary")
            await gatekeeper_django.keeper().aclose()

        urls = Urls([*ASYNC_URLS, path("blocking", blocking), path("quiet", quiet)])
        with policy("redis", tmp_path, session={"load": "early"}, MIDDLEWARE=OURS, ROOT_URLCONF=urls):
            asyncio.run(main())

    def test_the_admin_takes_it_for_djangos(self, tmp_path: Path) -> None:
        """Checks of Django's that want a SessionMiddleware are content."""
        with at(tmp_path, MIDDLEWARE=OURS, urls=[path("admin/", admin.site.urls)]):
            assert [one.id for one in run_checks() if str(one.id).startswith("admin.E")] == []

    def test_a_session_is_awaited_on_the_event_loop(self, tmp_path: Path) -> None:
        """No thread stands between: it is loaded and saved where the view runs."""
        threads = set()

        class Seeing(Counting):
            async def aask(self, command: SessionCommand) -> Any:
                threads.add(threading.get_ident())
                return await self.store.aask(command)

            def ask(self, command: SessionCommand) -> Any:
                raise AssertionError("nobody waits")

        async def main() -> None:
            browser = AsyncClient()
            flow = sessions().flow
            flow.store = Seeing(flow.store)  # type: ignore[assignment]  # it need not sweep
            await browser.get("/put?cart=1")
            assert (await browser.get("/show")).json() == {"cart": "1"}
            assert threads == {threading.get_ident()}
            await gatekeeper_django.keeper().sessions.flow.store.store.aclose()  # type: ignore[union-attr]

        stack = [OURS[1]]
        with policy("redis", tmp_path, MIDDLEWARE=stack, ROOT_URLCONF=Urls(ASYNC_URLS)):
            asyncio.run(main())


class TestRaces:
    """Requests at the same time, in threads."""

    @pytest.mark.parametrize("kind", sorted(STORED))
    def test_each_change_of_many_requests_is_kept(self, tmp_path: Path, kind: str) -> None:
        """They change other names of one session, and none is lost."""
        gate = threading.Barrier(4)

        def both(request: HttpRequest) -> HttpResponse:
            len(request.session.keys())
            gate.wait(PATIENT)  # all have read before any writes
            request.session[request.GET["name"]] = 1
            return HttpResponse()

        with at(tmp_path, kind, urls=[path("both", both)]) as browser, ThreadPoolExecutor(4) as pool:
            browser.get("/put?cart=1")

            def one(name: str) -> int:
                other = Client()
                other.cookies["sessionid"] = browser.cookies["sessionid"].value
                return int(other.get(f"/both?name={name}").status_code)

            for turn in range(3):
                names = [f"{turn}{letter}" for letter in "abcd"]
                assert list(pool.map(one, names)) == [200] * 4
                assert set(names) < set(browser.get("/show").json())

    @pytest.mark.parametrize("kind", sorted(STORED))
    def test_a_logout_is_final_for_requests_under_way(self, tmp_path: Path, users: None, kind: str) -> None:
        """One that saves after it is answered 400, and the session is not back."""
        has_read, is_out = threading.Event(), threading.Event()

        def slow(request: HttpRequest) -> HttpResponse:
            request.session["slow"] = 1
            has_read.set()
            is_out.wait(PATIENT)
            return HttpResponse()

        with at(tmp_path, kind, urls=[path("slow", slow)]) as browser, ThreadPoolExecutor(1) as pool:
            browser.get("/enter?name=iris")
            key = browser.cookies["sessionid"].value
            other = Client()
            other.cookies["sessionid"] = key
            pending = pool.submit(other.get, "/slow")
            assert has_read.wait(PATIENT)
            browser.get("/leave")
            is_out.set()
            assert pending.result(PATIENT).status_code == 400
            assert not SessionStore().exists(key)
            pool.submit(connections.close_all).result(PATIENT)

    def test_a_form_that_is_sent_twice_logs_in_twice(self, tmp_path: Path, users: None) -> None:
        """The second finds the anonymous session rotated by the first, and is answered all the same."""
        with at(tmp_path) as browser:
            browser.get("/put?cart=1")
            first, second = (
                SessionStore(browser.cookies["sessionid"].value),
                SessionStore(browser.cookies["sessionid"].value),
            )
            for session in (first, second):
                assert session["cart"] == "1"
            for session in (first, second):
                session.cycle_key()
                session["_auth_user_id"] = "1"
                session.save()
            assert first.session_key != second.session_key
            assert SessionStore(second.session_key)["cart"] == "1"

    def test_a_session_of_somebody_who_has_logged_out_is_not_carried_on(self, tmp_path: Path) -> None:
        """`cycle_key`, as a change of the password calls it, is no way back."""
        with at(tmp_path):
            session = SessionStore()
            session["_auth_user_id"] = "1"
            session.save()
            late = SessionStore(session.session_key)
            assert late["_auth_user_id"] == "1"
            session.flush()
            with pytest.raises(SessionInterrupted):
                late.cycle_key()


class TestUsers:
    """A user's sessions are listed, capped and ended."""

    @pytest.mark.parametrize("kind", sorted(STORED))
    def test_they_are_listed_and_ended(self, tmp_path: Path, users: None, kind: str) -> None:
        """One, all but one, all; those of others go on."""
        iris = get_user_model().objects.get(username="iris")

        def name(request: HttpRequest) -> HttpResponse:
            request.session.label = request.GET["label"]
            return HttpResponse()

        def others(request: HttpRequest) -> HttpResponse:
            return HttpResponse(str(revoke(request.user, but=request.session)))

        urls = [path("name", name), path("others", others)]
        with at(tmp_path, kind, urls=urls):
            revoke(iris)  # what other tests have left on the same server
            browsers = [Client() for _ in range(3)]
            for place, browser in enumerate(browsers):
                browser.get("/enter?name=iris")
                browser.get(f"/name?label=phone {place}")
            jack = Client()
            jack.get("/enter?name=jack")
            entries = of(iris)
            assert sorted(str(entry.label) for entry in entries) == ["phone 0", "phone 1", "phone 2"]
            assert [entry.id for entry in of(iris.pk)] == [entry.id for entry in entries]

            def names() -> list[str]:
                return [one.get("/me").content.decode() for one in browsers]

            (first,) = (entry.id for entry in entries if entry.label == "phone 0")
            assert revoke(iris, first) == 1
            assert names() == ["", "iris", "iris"]
            assert browsers[1].get("/others").content == b"1"
            assert names() == ["", "iris", ""]
            assert revoke(iris) == 1
            assert (names(), of(iris)) == (["", "", ""], [])
            assert jack.get("/me").content == b"jack"

    def test_awaiting_it_is_the_same(self, tmp_path: Path, users: None) -> None:
        """`aof` and `arevoke`."""

        async def others(request: HttpRequest) -> HttpResponse:
            user = await request.auser()
            return JsonResponse(
                [len(await aof(user)), await arevoke(user, but=request.session), len(await aof(user))], safe=False
            )

        async def main() -> None:
            one, two = AsyncClient(), AsyncClient()
            for browser in (one, two):
                await browser.get("/enter?name=iris")
            assert (await one.get("/others")).json() == [2, 1, 1]
            assert [(await browser.get("/me")).content for browser in (one, two)] == [b"iris", b""]
            assert await arevoke((await get_user_model().objects.aget(username="iris")).pk) == 1

        with policy("memory", tmp_path, MIDDLEWARE=STACK, ROOT_URLCONF=Urls([*ASYNC_URLS, path("others", others)])):
            asyncio.run(main())

    def test_all_other_tokens_of_a_user_are_revoked(self, tmp_path: Path, users: None) -> None:
        """With a store for it; the one that is kept is written anew. How many there were nobody knows."""

        def others(request: HttpRequest) -> HttpResponse:
            return HttpResponse(str(revoke(request.user, but=request.session)))

        with at(tmp_path, "revocable token", urls=[path("others", others)]):
            one, two = Client(), Client()
            for browser in (one, two):
                browser.get("/enter?name=iris")
            assert one.get("/others").content == b"0"
            sessions().flow._clock.now += 1  # type: ignore[attr-defined]  # a Clock
            assert [browser.get("/me").content for browser in (one, two)] == [b"iris", b""]

    def test_tokens_cannot_be_listed(self, tmp_path: Path) -> None:
        """The error says so."""
        with at(tmp_path, "token"), pytest.raises(SessionError, match="cannot be listed"):
            of(1)

    def test_a_user_has_no_more_than_may_be(self, tmp_path: Path, users: None) -> None:
        """The session that was not used for longest makes room for the one of a new login."""
        with policy(
            "memory", tmp_path, session={"most_per_user": 2}, MIDDLEWARE=STACK, ROOT_URLCONF=Urls(URLS)
        ) as clock:
            browsers = [Client() for _ in range(3)]
            for browser in browsers:
                browser.get("/enter?name=iris")
                clock.now += 1
            assert [one.get("/me").content for one in browsers] == [b"", b"iris", b"iris"]


class TestOthers:
    @pytest.mark.parametrize("kind", ["sqlite", "token", "encrypted token"])
    def test_an_application_without_django_reads_and_writes_the_same_session(
        self, tmp_path: Path, users: None, kind: str
    ) -> None:
        """By the same cookie, keys and store: here a WSGI application with our middleware alone."""
        keys = ["correct horse battery staple, and then some 4711"]

        def application(environ: Any, start_response: Any) -> list[bytes]:
            session = environ["gatekeeper.session"]
            user = session["_auth_user_id"]
            session["seen"] = True
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{session.user} {user}".encode()]

        with at(tmp_path, kind, policy={"keys": keys}) as browser:
            browser.get("/enter?name=iris")
            iris = str(get_user_model().objects.get(username="iris").pk)
            home = Gatekeeper(
                {
                    "keys": keys,
                    "identity": {"user": "session:_auth_user_id"},
                    "session": {
                        **KINDS[kind](tmp_path),
                        "idle": "14d",
                        "absolute": "365d",
                        "cookie": {"name": "sessionid", "secure": False},
                    },
                }
            )
            cookie = browser.cookies["sessionid"].value
            answer = ask_wsgi(
                GatekeeperMiddleware(application, home), Ask(headers=[("Cookie", f"sessionid={cookie}")])
            )
            assert answer.body.decode() == f"{iris} {iris}"
            for name, value in answer.headers:
                if name.lower() == "set-cookie":
                    browser.cookies["sessionid"] = value.split(";")[0].partition("=")[2]
            assert browser.get("/show").json()["seen"] is True
            assert browser.get("/me").content == b"iris"
            home.close()
