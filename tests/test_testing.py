"""The test kit: assertions through each kind of client, switches, and the plugin of pytest."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import django.conf
import django.test
import flask
import httpx
import pytest
import starlette.testclient
import werkzeug.test
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route

import gatekeeper.asgi
import gatekeeper.testing as kit
import gatekeeper.wsgi
from gatekeeper import Gatekeeper, Limiter
from gatekeeper.commands import Batch, Hits, Replies
from gatekeeper.testing import (
    VirtualClock,
    aassert_limited,
    aassert_not_limited,
    assert_limited,
    assert_not_limited,
    disabled,
    enabled,
    virtual,
    virtual_store,
)

# Where the package is installed with its entry point, pytest has loaded the plugin by itself.
IS_INSTALLED = any(point.value == "gatekeeper.testing.plugin" for point in entry_points(group="pytest11"))
PLUGIN = "gatekeeper.testing.plugin"
pytest_plugins = ["pytester", *([] if IS_INSTALLED else [PLUGIN])]

SETTINGS: dict[str, Any] = {
    "limits": [
        {"name": "login", "rate": "5/minute", "match": "POST /login"},
        {"name": "default", "rate": "50/minute", "match": "GET /"},
    ]
}

Keeper = Gatekeeper


class Elsewhere:
    """A store that stands for a server that is not there in tests."""

    local = False

    def ask(self, batch: Hits) -> Replies:
        raise AssertionError("the server was asked")

    async def aask(self, batch: Hits) -> Replies:
        return self.ask(batch)

    def keys(self, limit: object) -> list[str]:
        return []

    async def akeys(self, limit: object) -> list[str]:
        return []

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


# Applications, as they are made at import time, with a policy they do not hand out.


def starlette_app(settings: Any) -> Any:
    async def home(request: Request) -> PlainTextResponse:
        return PlainTextResponse("home")

    async def login(request: Request) -> RedirectResponse:
        return RedirectResponse("/", 303)

    app = Starlette(routes=[Route("/", home), Route("/login", login, methods=["POST"])])
    app.add_middleware(gatekeeper.asgi.GatekeeperMiddleware, settings=settings)
    return app


def flask_app(settings: Any) -> flask.Flask:
    app = flask.Flask("tested")
    app.add_url_rule("/", "home", lambda: "home")
    app.add_url_rule("/login", "login", lambda: flask.redirect("/"), methods=["POST"])
    app.wsgi_app = gatekeeper.wsgi.GatekeeperMiddleware(app.wsgi_app, settings)  # type: ignore[method-assign]
    return app


class DjangoMiddleware:
    """Our WSGI middleware around a view: enough of an integration for a client to be tested with."""

    settings: Any = None

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        from django.http import HttpResponse

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            response = self.get_response(request)
            start_response(f"{response.status_code} Answer", list(response.items()))
            return [response.content]

        heads: list[Any] = []

        def start_response(status: str, fields: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
            heads.append((status, fields))
            return lambda data: None

        middleware = gatekeeper.wsgi.GatekeeperMiddleware(app, type(self).settings)
        environ = {
            "REMOTE_ADDR": "127.0.0.1",
            **request.META,
            "REQUEST_METHOD": request.method,
            "PATH_INFO": request.path,
        }
        body = middleware(environ, start_response)
        content = b"".join(body)
        if hasattr(body, "close"):
            body.close()
        ((status, fields),) = heads
        return HttpResponse(content, status=int(status[:3]), headers=dict(fields))


def urlpatterns() -> list[Any]:
    from django.http import HttpResponse, HttpResponseRedirect
    from django.urls import path

    def home(request: Any) -> Any:
        return HttpResponse("home")

    def login(request: Any) -> Any:
        assert request.POST.get("name", "ada") == "ada"
        return HttpResponseRedirect("/")

    return [path("", home), path("login", login)]


@pytest.fixture(autouse=True)
def django_settings() -> Iterator[None]:
    """Settings of Django for one test, whatever other tests have configured."""
    urls = types.ModuleType("urls_of_the_test_kit")
    urls.__dict__["urlpatterns"] = urlpatterns()
    sys.modules[urls.__name__] = urls
    if not django.conf.settings.configured:
        django.conf.settings.configure(SECRET_KEY="of no use")
    middleware = [f"{DjangoMiddleware.__module__}.DjangoMiddleware"]
    with django.test.override_settings(
        ROOT_URLCONF=urls.__name__, MIDDLEWARE=middleware, ALLOWED_HOSTS=["testserver"]
    ):
        yield


def django_client(keeper: Gatekeeper, kind: str = "Client") -> Any:
    DjangoMiddleware.settings = keeper
    return getattr(django.test, kind)()


def wsgi_transport(app: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.WSGITransport(app=app), base_url="http://testserver")


CLIENTS: dict[str, Callable[[Gatekeeper], Any]] = {
    "starlette": lambda keeper: starlette.testclient.TestClient(starlette_app(keeper)),
    "flask": lambda keeper: flask_app(keeper).test_client(),
    "werkzeug": lambda keeper: werkzeug.test.Client(flask_app(keeper)),
    "httpx over WSGI": lambda keeper: wsgi_transport(flask_app(keeper)),
    "django": django_client,
}

ACLIENTS: dict[str, Callable[[Gatekeeper], Any]] = {
    "httpx over ASGI": lambda keeper: httpx.AsyncClient(
        transport=httpx.ASGITransport(app=starlette_app(keeper)), base_url="http://testserver"
    ),
    "django": lambda keeper: django_client(keeper, "AsyncClient"),
}


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def keeper(clock: VirtualClock) -> Gatekeeper:
    return Gatekeeper(SETTINGS, store=virtual_store(clock))


@pytest.fixture(params=list(CLIENTS.values()), ids=list(CLIENTS))
def client(request: pytest.FixtureRequest, keeper: Gatekeeper) -> Iterator[Any]:
    client = request.param(keeper)
    yield client
    close = getattr(client, "close", None)
    if close is not None:
        close()


class TestAsserting:
    def test_a_limit_is_found_where_it_is(self, client: Any, clock: VirtualClock) -> None:
        refused = assert_limited(client, "POST /login", after=5, clock=clock)
        assert int(refused.status_code) == 429
        assert_not_limited(client, "GET /", times=50)
        assert_limited(client, "/", after=0)

    def test_a_limit_that_is_not_reached_is_told_with_all_that_came(self, client: Any) -> None:
        with pytest.raises(AssertionError) as raised:
            assert_limited(client, "POST /login", after=4)
        told = str(raised.value)
        assert told.startswith("POST /login: request 5 passed; expected it to be refused with 429, after 4.\n")
        status = "302" if "303" not in told else "303"
        assert f"4 passed before, answered {', '.join([status] * 4)}; this one was answered {status}" in told
        assert 'RateLimit: "login";r=0;t=' in told
        assert 'RateLimit-Policy: "login";q=5;w=60' in told
        assert "Retry-After: absent" in told

    def test_a_limit_that_comes_too_early_is_told_with_all_that_came(self, client: Any) -> None:
        with pytest.raises(AssertionError) as raised:
            assert_limited(client, "POST /login", after=9)
        told = str(raised.value)
        assert told.startswith(
            "POST /login: request 6 was refused; expected 9 to pass.\n  5 passed before, answered 30"
        )
        assert re.search(r"this one was answered 429\n    Retry-After: \d+\n    RateLimit: \"login\";r=0;t=", told)

    def test_no_limit_at_all_is_told_as_that(self, client: Any) -> None:
        with pytest.raises(AssertionError, match="RateLimit: absent\n    RateLimit-Policy: absent"):
            assert_limited(client, "GET /nowhere", after=3)

    def test_what_should_not_be_limited_and_is_says_when_it_was(self, client: Any) -> None:
        with pytest.raises(
            AssertionError, match=r"GET /: request 51 was refused; expected 100 to pass\.\n  50 passed"
        ):
            assert_not_limited(client, "GET /")

    def test_a_clock_that_is_not_the_applications_is_noticed(self, client: Any) -> None:
        with pytest.raises(
            AssertionError, match=r"still refused 6[01] seconds after request 6, (.|\n)*another clock"
        ):
            assert_limited(client, "POST /login", after=5, clock=VirtualClock())

    def test_another_status_can_be_what_refuses(self, client: Any) -> None:
        with pytest.raises(AssertionError, match=r"expected it to be refused with 503"):
            assert_limited(client, "POST /login", after=5, status=503)

    def test_arguments_are_handed_to_the_client(self, client: Any) -> None:
        assert_limited(client, "POST /login", 5, data={"name": "ada"})

    @pytest.mark.parametrize("make", ACLIENTS.values(), ids=ACLIENTS.keys())
    def test_clients_that_are_awaited_have_their_own(
        self, make: Callable[[Gatekeeper], Any], keeper: Gatekeeper, clock: VirtualClock
    ) -> None:
        async def main() -> None:
            client = make(keeper)
            refused = await aassert_limited(client, "POST /login", after=5, clock=clock)
            assert refused.status_code == 429
            await aassert_not_limited(client, "GET /", times=50)
            with pytest.raises(AssertionError, match="request 1 was refused"):
                await aassert_not_limited(client, "GET /", times=2)
            with pytest.raises(TypeError, match="await aassert_limited"):
                assert_limited(client, "POST /login", after=5)
            if hasattr(client, "aclose"):
                await client.aclose()

        asyncio.run(main())

    def test_the_awaiting_one_takes_a_client_that_is_not_awaited(self, client: Any, clock: VirtualClock) -> None:
        if isinstance(client, starlette.testclient.TestClient):
            pytest.skip("it has an event loop of its own, on which none can be in use")
        asyncio.run(aassert_limited(client, "POST /login", after=5, clock=clock))


class Answers:
    """A client that answers what it was told to, one after the other."""

    def __init__(self, *answers: tuple[Any, dict[str, str]]) -> None:
        self.answers = list(answers)

    def request(self, method: str, path: str) -> Any:
        status, headers = self.answers.pop(0)
        return type("Answer", (), {"status": status, "headers": headers})


class TestOtherClients:
    def test_a_status_may_be_a_number_or_a_line(self) -> None:
        assert_limited(Answers(("200 OK", {}), ("429 TOO MANY REQUESTS", {"retry-after": "3"})), "/", after=1)
        assert_limited(Answers((200, {}), (429, {"RETRY-AFTER": "3"})), "/", after=1)

    @pytest.mark.parametrize("told", [None, "0", "-1", "1.5", "soon", "²"])
    def test_a_refusal_must_say_when_to_return(self, told: str | None) -> None:
        refusal = (429, {} if told is None else {"Retry-After": told})
        with pytest.raises(AssertionError, match=r"request 1 was refused without saying when to return"):
            assert_limited(Answers(refusal), "/", after=0)

    def test_many_answers_are_told_in_short(self) -> None:
        with pytest.raises(AssertionError, match=r"40 passed before, answered (200, ){8}…; this one"):
            assert_limited(Answers(*[(200, {})] * 41), "/", after=40)

    @pytest.mark.parametrize("target", ["", " ", "POST ", "POST  /", "POST /a b"])
    def test_a_target_that_is_no_method_and_path_is_refused(self, target: str) -> None:
        with pytest.raises(ValueError, match='expected a method and a path, as in "POST /login"'):
            assert_not_limited(Answers(), target)

    @pytest.mark.parametrize("after", [-1, 1.5, True, "5"])
    def test_an_after_that_counts_nothing_is_refused(self, after: Any) -> None:
        with pytest.raises(ValueError, match="after: expected an integer from 0"):
            assert_limited(Answers(), "/", after=after)

    def test_what_is_no_client_is_refused(self) -> None:
        with pytest.raises(TypeError, match="expected a test client, not int"):
            assert_limited(7, "/", after=1)
        with pytest.raises(TypeError, match="expected a response with a status_code or a status"):
            assert_limited(Answers((None, {})), "/", after=1)


class TestVirtual:
    def test_an_application_that_made_its_own_policy_counts_in_memory_on_a_virtual_clock(self) -> None:
        app = starlette_app(Gatekeeper(SETTINGS, store=Elsewhere()))
        with starlette.testclient.TestClient(app) as client, virtual() as clock:
            for _ in range(2):
                assert_limited(client, "POST /login", after=5, clock=clock)
                clock.advance(61)

    def test_each_time_counts_from_nought(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        for _ in range(3):
            with virtual():
                assert_limited(client, "POST /login", after=5)

    def test_afterwards_each_has_its_own_store_again_as_it_was(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        before = keeper.store
        assert_not_limited(client, "POST /login", 3)
        with virtual(keeper):
            assert_limited(client, "POST /login", after=5)
        assert keeper.store is before
        with pytest.raises(ZeroDivisionError), virtual(keeper):
            raise ZeroDivisionError
        assert keeper.store is before
        assert_limited(client, "POST /login", after=2)

    def test_what_is_made_meanwhile_is_reached_too_and_let_go_afterwards(self) -> None:
        made = Gatekeeper.__init__
        with virtual() as clock:
            inside = Gatekeeper(SETTINGS, store=Elsewhere())
            assert_limited(flask_app(inside).test_client(), "POST /login", after=5, clock=clock)
        assert isinstance(inside.store, Elsewhere)
        assert Gatekeeper.__init__ is made

    def test_targets_alone_are_reached_if_there_are_any(self) -> None:
        one, other = (Gatekeeper(SETTINGS, store=Elsewhere()) for _ in range(2))
        with virtual(one):
            assert_limited(flask_app(one).test_client(), "POST /login", after=5)
            assert isinstance(other.store, Elsewhere)
            assert isinstance(Gatekeeper(SETTINGS, store=Elsewhere()).store, Elsewhere)

    def test_a_middleware_and_a_limiter_are_targets(self) -> None:
        app = gatekeeper.wsgi.GatekeeperMiddleware(flask_app({}), Gatekeeper(SETTINGS, store=Elsewhere()))
        limiter = Limiter(Elsewhere())
        with virtual(app, limiter) as clock:
            assert_limited(werkzeug.test.Client(app), "POST /login", after=5, clock=clock)
            assert [limiter.hit("1/minute", "key").allowed for _ in range(2)] == [True, False]
            clock.advance(61)
            assert limiter.hit("1/minute", "key")
        assert isinstance(limiter.store, Elsewhere)
        assert isinstance(app.keeper.store, Elsewhere)

    @pytest.mark.parametrize("switch", [virtual, disabled, enabled])
    def test_what_has_no_gatekeeper_is_refused_before_anything_is_switched(
        self, switch: Any, keeper: Gatekeeper
    ) -> None:
        before = keeper.store
        with (
            pytest.raises(TypeError, match="expected a Gatekeeper, our middleware or a Limiter, not dict"),
            switch(keeper, {}),
        ):
            pass
        assert keeper.store is before
        assert keeper.enabled

    def test_policies_of_one_server_share_their_counters_and_those_in_memory_do_not(self) -> None:
        class Named(Gatekeeper):
            """A Gatekeeper whose settings name a store that is not opened."""

            def __init__(self, url: str) -> None:
                super().__init__(SETTINGS, store=Elsewhere())
                self.settings = self.settings.model_copy(
                    update={"store": self.settings.store.model_copy(update={"url": url})}
                )

        for url, left in (("memory://", 5), ("redis://host", 2)):
            one, other = Named(url), Named(url)
            with virtual():
                assert_not_limited(flask_app(one).test_client(), "POST /login", 3)
                assert_limited(flask_app(other).test_client(), "POST /login", after=left)

    def test_it_nests_and_the_inner_one_counts_by_itself(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        with virtual() as outer:
            assert_not_limited(client, "POST /login", 3)
            with virtual() as inner:
                assert_limited(client, "POST /login", after=5, clock=inner)
            assert_limited(client, "POST /login", after=2, clock=outer)

    def test_a_decorated_function_is_reached(self) -> None:
        keeper = Gatekeeper({}, store=Elsewhere())
        limited = keeper.limit("1/minute")(lambda: "done")
        with virtual() as clock:
            assert limited() == "done"
            with pytest.raises(gatekeeper.Limited) as raised:
                limited()
            clock.advance(raised.value.verdict.retry_after)
            assert limited() == "done"

    def test_it_is_a_decorator_too(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()

        @virtual()
        def test() -> None:
            assert_limited(client, "POST /login", after=5)

        test()
        test()


class TestTheSwitch:
    def test_while_it_is_off_nothing_is_limited_or_counted(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        with disabled():
            assert_not_limited(client, "POST /login", 20)
            made = flask_app(Gatekeeper(SETTINGS, store=Elsewhere())).test_client()
            assert_not_limited(made, "POST /login", 20)
        assert_limited(client, "POST /login", after=5)

    def test_targets_alone_are_switched_if_there_are_any(self, keeper: Gatekeeper, clock: VirtualClock) -> None:
        other = Gatekeeper(SETTINGS, store=virtual_store(clock))
        with disabled(other):
            assert_limited(flask_app(keeper).test_client(), "POST /login", after=5)
            assert_not_limited(flask_app(other).test_client(), "POST /login", 20)

    def test_it_is_switched_on_again_within(self, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        with disabled(), virtual() as clock:
            assert_not_limited(client, "POST /login", 20)
            with enabled():
                assert_limited(client, "POST /login", after=5, clock=clock)
            assert_not_limited(client, "POST /login", 20)
        assert keeper.enabled

    def test_a_limiter_has_none(self) -> None:
        with pytest.raises(TypeError, match="a Limiter has no switch"), disabled(Limiter()):
            pass


class TestFixtures:
    """The plugin, in this very run."""

    def test_the_store_lives_by_the_clock(self, gatekeeper_store: Any, gatekeeper_clock: VirtualClock) -> None:
        limiter = Limiter(gatekeeper_store)
        assert [limiter.hit("1/minute", "key").allowed for _ in range(2)] == [True, False]
        gatekeeper_clock.advance(61)
        assert limiter.hit("1/minute", "key")

    def test_a_gatekeeper_with_that_store_keeps_it(
        self, gatekeeper_fresh: VirtualClock, gatekeeper_store: Any
    ) -> None:
        keeper = Gatekeeper(SETTINGS, store=gatekeeper_store)
        assert keeper.store is gatekeeper_store
        assert_limited(flask_app(keeper).test_client(), "POST /login", after=5, clock=gatekeeper_fresh)

    @pytest.mark.parametrize("turn", range(2))
    def test_each_test_counts_from_nought(self, gatekeeper_fresh: VirtualClock, turn: int) -> None:
        client = flask_app(SHARED).test_client()
        assert_limited(client, "POST /login", after=5, clock=gatekeeper_fresh)

    def test_off_is_off_and_on_is_on_again(self, request: pytest.FixtureRequest, keeper: Gatekeeper) -> None:
        client = flask_app(keeper).test_client()
        request.getfixturevalue("gatekeeper_off")
        assert_not_limited(client, "POST /login", 20)
        request.getfixturevalue("gatekeeper_on")
        assert_limited(client, "POST /login", after=5)

    def test_on_has_the_last_word_in_whatever_order_they_are_named(
        self, gatekeeper_on: None, gatekeeper_off: None, keeper: Gatekeeper
    ) -> None:
        assert_limited(flask_app(keeper).test_client(), "POST /login", after=5)


SHARED = Gatekeeper(SETTINGS, store=Elsewhere())
"""As an application has it: made at import time, for a server that is not there."""

APP = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from gatekeeper.asgi import GatekeeperMiddleware

app = Starlette(routes=[Route("/login", lambda request: PlainTextResponse("in"), methods=["POST"])])
app.add_middleware(GatekeeperMiddleware, settings="gatekeeper.toml")
"""

TOML = """
[[limits]]
name = "login"
rate = "5/minute"
match = "POST /login"
"""


PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
TESTS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    if re.search(r"^ *def test_", block, re.MULTILINE)
]
"""The blocks of the documentation that are tests."""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    plugin = [] if IS_INSTALLED else ["-p", PLUGIN]
    return pytester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", "-W", "error", *arguments)


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(shop=APP)
    (pytester.path / "gatekeeper.toml").write_text(TOML, encoding="utf-8")
    pytester.syspathinsert()
    return pytester


class TestThePlugin:
    """In runs of its own, for a project as users have them."""

    def test_importing_it_imports_nothing_that_takes_time(self) -> None:
        code = (
            "import sys, pytest; before = set(sys.modules); import gatekeeper.testing.plugin as plugin;"
            "print(*sorted(set(sys.modules) - before))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) <= {
            "gatekeeper", "gatekeeper.testing", "gatekeeper.testing.clock", "gatekeeper.testing.plugin",
        }  # fmt: skip

    def test_its_fixtures_are_told_by_pytest(self, project: pytest.Pytester) -> None:
        told = run(project, "--fixtures").stdout.str()
        for name in ("clock", "store", "fresh", "off", "on"):
            assert re.search(rf"^gatekeeper_{name} -- .*\n +\w", told, re.MULTILINE), name

    def test_a_project_tests_its_limits_without_touching_its_application(self, project: pytest.Pytester) -> None:
        project.makepyfile(
            test_shop="""
            import pytest
            from starlette.testclient import TestClient
            from gatekeeper.testing import assert_limited, assert_not_limited
            from shop import app

            @pytest.fixture
            def client():
                return TestClient(app)

            @pytest.mark.parametrize("turn", range(3))
            def test_login_is_limited(client, gatekeeper_fresh, turn):
                assert_limited(client, "POST /login", after=5, clock=gatekeeper_fresh)

            def test_something_else(client, gatekeeper_off):
                assert_not_limited(client, "POST /login")
            """
        )
        run(project, "-q").assert_outcomes(passed=4)

    def test_a_project_can_have_it_in_all_its_tests(self, project: pytest.Pytester) -> None:
        project.makefile(".ini", pytest="[pytest]\nusefixtures = gatekeeper_off\n")
        project.makepyfile(
            test_shop="""
            from starlette.testclient import TestClient
            from gatekeeper.testing import assert_limited, assert_not_limited
            from shop import app

            def test_something():
                assert_not_limited(TestClient(app), "POST /login")

            def test_limits(gatekeeper_on, gatekeeper_fresh):
                assert_limited(TestClient(app), "POST /login", after=5, clock=gatekeeper_fresh)
            """
        )
        run(project, "-q").assert_outcomes(passed=2)

    def test_a_failure_shows_the_test_and_not_the_insides_of_the_kit(self, project: pytest.Pytester) -> None:
        project.makepyfile(
            test_shop="""
            from starlette.testclient import TestClient
            from gatekeeper.testing import assert_limited
            from shop import app

            def test_login(gatekeeper_fresh):
                assert_limited(TestClient(app), "POST /login", after=6)
            """
        )
        result = run(project, "-q")
        result.assert_outcomes(failed=1)
        told = result.stdout.str()
        assert "AssertionError: POST /login: request 6 was refused; expected 6 to pass." in told
        assert "asserts.py" not in told

    @pytest.mark.parametrize("block", TESTS)
    def test_the_tests_that_the_documentation_shows_pass(self, pytester: pytest.Pytester, block: str) -> None:
        pytester.makepyfile(test_shown=block)
        result = run(pytester, "-q")
        assert result.ret == 0
        assert result.parseoutcomes().keys() == {"passed"}


def test_the_kit_names_what_it_has() -> None:
    assert dir(kit) == sorted(kit.__all__)
    for name in kit.__all__:
        assert callable(getattr(kit, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kit.nothing  # noqa: B018


def test_a_clock_does_not_go_back() -> None:
    clock = VirtualClock(1000.5)
    assert clock() == 1_000_500_000_000
    assert repr(clock) == "<VirtualClock 1000.500>"
    with pytest.raises(ValueError, match="not negative"):
        clock.advance(-1)
    assert Batch() == []
