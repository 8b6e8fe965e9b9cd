"""The throttle for Django REST framework."""

# the frameworks have no hints of their own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE, SESSIONS  # first: Django wants its settings

# isort: split
from typing import Any, ClassVar

import pytest
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.test import RequestFactory
from django.urls import include, path, resolve
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import api_view, throttle_classes
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

import gatekeeper_django
from gatekeeper.testing import disabled
from gatekeeper_django import limit
from gatekeeper_django.decorators import limits_of
from gatekeeper_django.rest import GatekeeperThrottle
from tests.scenarios import A, B
from tests.test_django import BOTH, client, heard, logged, site

pytestmark = pytest.mark.usefixtures("gatekeeper_fresh")  # what is left is told to the second


class Token(BaseAuthentication):
    """Who shows a token is its user."""

    def authenticate(self, request: Request) -> Any:
        name = request.headers.get("X-Token")
        return None if name is None else (get_user_model()(pk=int(name), username=f"u{name}"), None)


class Pair(GatekeeperThrottle):
    rate = "2/minute"


class Shared(GatekeeperThrottle):
    rate = "2/minute"
    name = "shared"
    key = "ip"


class Plain(APIView):
    authentication_classes = (Token,)
    throttle_classes: Any = (Pair,)

    def get(self, request: Request, **parameters: Any) -> Response:
        return Response("ok")


def of(token: str | None, address: str = A) -> Any:
    return client(address, headers={} if token is None else {"X-Token": token})


@BOTH
def test_a_throttle_counts_users_that_the_framework_has_authenticated(middleware: tuple[str, ...]) -> None:
    with site(path("item/<int:pk>", Plain.as_view()), middleware=middleware) as clock:
        assert [of("7", address).get(f"/item/{pk}").status_code for pk, address in enumerate((A, B, A))] == [
            200,
            200,
            429,
        ]
        assert of("8").get("/item/1").status_code == 200
        assert [of(None).get("/item/1").status_code for _ in range(3)] == [200, 200, 429]
        assert of(None, B).get("/item/1").status_code == 200
        refused = of("7").get("/item/1")
        assert refused["Retry-After"] == "61", "rounded up: the framework rounds down"
        assert "Expected available in 61 seconds" in refused.json()["detail"]
        clock.advance(61)
        assert of("7").get("/item/1").status_code == 200


def test_a_rule_by_the_user_knows_of_no_token_but_the_throttle_does() -> None:
    """The middleware has asked Django who it is; the framework knows better, and later."""
    policy = {"limits": [{"name": "user", "rate": "9/minute", "key": "user"}]}
    with site(path("", Plain.as_view()), policy=policy, middleware=(MIDDLEWARE, *SESSIONS)):
        assert [of("7", address).get("/").status_code for address in (A, B, A)] == [200, 200, 429]
        assert of("8", A).get("/").status_code == 200


def test_with_the_middleware_responses_tell_the_quota() -> None:
    with site(path("", Plain.as_view())):
        assert of("7").get("/")["RateLimit"] == '"Plain";r=1;t=61'
        of("7").get("/")
        assert of("7").get("/")["RateLimit"] == '"Plain";r=0;t=61'


def test_each_view_and_each_route_has_a_quota_unless_the_throttle_is_named() -> None:
    class Other(Plain):
        pass

    class One(Plain):
        throttle_classes = (Shared,)

    class Two(Plain):
        throttle_classes = (Shared,)

    with site(
        *(
            path(name, view.as_view())
            for name, view in (("p", Plain), ("q", Plain), ("o", Other), ("1", One), ("2", Two))
        )
    ):
        for url in ("/p", "/q", "/o"):
            assert [of("7").get(url).status_code for _ in range(3)] == [200, 200, 429], url
        assert [of("7").get(url).status_code for url in ("/1", "/2", "/1")] == [200, 200, 429]


def test_function_views_viewsets_and_routers_are_limited() -> None:
    @api_view(["GET", "POST"])
    @throttle_classes([Pair])
    def function(request: Request) -> Response:
        return Response("ok")

    @api_view(["GET"])
    @limit("1/minute")
    def decorated(request: Request) -> Response:
        return Response("ok")

    class Items(ViewSet):
        throttle_classes = (Pair,)

        def list(self, request: Request) -> Response:
            return Response([])

        @limit("1/minute")
        def retrieve(self, request: Request, pk: str) -> Response:
            return Response(pk)

    router = DefaultRouter()
    router.register("items", Items, basename="item")
    with site(path("f", function), path("d", decorated), path("api/", include(router.urls))):
        assert [
            client().get("/f").status_code,
            client().post("/f").status_code,
            client().get("/f").status_code,
        ] == [200, 200, 429]
        assert [client().get("/d").status_code for _ in range(2)] == [200, 429]
        assert [one.limit.guard.settings.rate for one in limits_of(resolve("/d").func)] == [["1/minute"]]
        assert client(B).get("/d").status_code == 200
        assert [client().get("/api/items/").status_code for _ in range(3)] == [200, 200, 429]
        assert [client().get(f"/api/items/{pk}/").status_code for pk in (1, 2)] == [200, 429]


def test_several_throttles_hold_and_the_longest_wait_is_told() -> None:
    class Hourly(GatekeeperThrottle):
        rate = "1/hour"

    class Both(Plain):
        throttle_classes = (Pair, Hourly)

    with site(path("", Both.as_view())):
        assert [of("7").get("/").status_code for _ in range(2)] == [200, 429]
        assert int(of("7").get("/")["Retry-After"]) > 3000


def test_what_no_wait_helps_is_told_no_wait() -> None:
    class Dear(GatekeeperThrottle):
        rate = "2/minute"
        settings: ClassVar = {"cost": lambda ticket: int(ticket.native.GET["cost"])}

    class View(Plain):
        throttle_classes = (Dear,)

    with site(path("", View.as_view())):
        refused = of("7").get("/?cost=3")
    assert (refused.status_code, "Retry-After" in refused.headers) == (429, False)


def test_a_refusal_is_logged_and_signalled_and_the_off_switch_is_for_throttles_too() -> None:
    with site(path("", Plain.as_view())):
        with disabled():
            assert [of("7").get("/").status_code for _ in range(5)] == [200] * 5
        with heard(gatekeeper_django.limited) as events, logged("django.security") as records:
            assert [of("7").get("/").status_code for _ in range(3)] == [200, 200, 429]
    assert [event["rules"] for event in events] == [["Plain"]]
    assert [record.getMessage() for record in records] == [f"Too Many Requests (Plain, {A}): /"]


def test_a_throttle_without_a_rate_and_one_that_cannot_be_settled_say_so() -> None:
    with pytest.raises(ImproperlyConfigured, match="expected a rate"):
        GatekeeperThrottle()

    class Failed(GatekeeperThrottle):
        rate = "2/minute"
        settings: ClassVar = {"give_back": "2xx"}

    class View(Plain):
        throttle_classes = (Failed,)

    with site(path("", View.as_view())):
        assert [of("7").get("/").status_code for _ in range(5)] == [200] * 5
    with site(middleware=()), pytest.raises(ImproperlyConfigured, match="needs GatekeeperMiddleware"):
        Failed().allow_request(RequestFactory().get("/"), View())
