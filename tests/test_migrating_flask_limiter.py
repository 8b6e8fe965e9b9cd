"""The table of docs/migrating/from-flask-limiter.md: both sides of each row, asked the same, answer the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask import Blueprint, Flask, Response, current_app, jsonify, request
from flask.views import MethodView

from gatekeeper_flask import Gatekeeper

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it says of its own imports is not about us
    flask_limiter = pytest.importorskip("flask_limiter")
    from flask_limiter.util import get_remote_address

PAGE = Path(__file__).resolve().parent.parent / "docs/migrating/from-flask-limiter.md"
A, B = "192.0.2.1", "198.51.100.2"


def limiter(app: Flask | None = None, **more: Any) -> Any:
    """Flask-Limiter, as its users make it."""
    return flask_limiter.Limiter(get_remote_address, app=app, **{"storage_uri": "memory://", **more})


class Ask(NamedTuple):
    path: str
    who: str = A
    method: str = "GET"
    headers: Mapping[str, str] = {}  # nobody changes it


class Row(NamedTuple):
    """One row of the table: the texts of its cells, an application by each, what is asked, what both answer."""

    old: str
    new: str
    by_old: Callable[[Flask], None]
    by_new: Callable[[Flask], None]
    asked: Sequence[Ask]
    answered: Sequence[int]


ROWS: list[Row] = []


def row(
    old: str, new: str, asked: Sequence[Ask], answered: Sequence[int]
) -> Callable[[Callable[[], Iterator[Callable[[Flask], None]]]], None]:
    """A row whose function yields what makes the old application, then what makes the new one."""

    def keep(function: Callable[[], Iterator[Callable[[Flask], None]]]) -> None:
        by_old, by_new = function()
        ROWS.append(Row(old, new, by_old, by_new, asked, answered))

    return keep


def view(**_: object) -> str:
    return "x"


def named(name: str, function: Callable[..., Any] = view) -> Callable[..., Any]:
    """A view of its own: Flask-Limiter knows views by their names."""

    def own(**values: Any) -> Any:
        return function(**values)

    own.__name__ = own.__qualname__ = name
    return own


def times(count: int, path: str, who: str = A, **more: Any) -> list[Ask]:
    return [Ask(path, who, **more)] * count


@row(
    'Limiter(get_remote_address, app=app, default_limits=["2/hour"])',
    'gk = Gatekeeper(app)` and `gk.default_limit("2/hour")',
    [*times(3, "/a"), *times(3, "/b"), Ask("/a", B), *times(3, "/none")],
    [200, 200, 429, 200, 200, 429, 200, 404, 404, 404],
)
def defaults() -> Iterator[Callable[[Flask], None]]:
    def routes(app: Flask) -> None:
        app.add_url_rule("/a", "a", named("a"))
        app.add_url_rule("/b", "b", named("b"))

    def old(app: Flask) -> None:
        limiter(app, default_limits=["2/hour"])
        routes(app)

    def new(app: Flask) -> None:
        Gatekeeper(app).default_limit("2/hour")
        routes(app)

    yield old
    yield new


@row(
    'Limiter(…, application_limits=["3/hour"])',
    'GATEKEEPER_LIMITS = [{"name": "all", "rate": "3/hour"}]',
    [Ask("/a"), Ask("/b"), Ask("/a"), Ask("/b"), Ask("/b", B)],
    [200, 200, 200, 429, 200],
)
def application() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        limiter(app, application_limits=["3/hour"])
        app.add_url_rule("/a", "a", named("a"))
        app.add_url_rule("/b", "b", named("b"))

    def new(app: Flask) -> None:
        app.config["GATEKEEPER_LIMITS"] = [{"name": "all", "rate": "3/hour"}]
        Gatekeeper(app)
        app.add_url_rule("/a", "a", named("a"))
        app.add_url_rule("/b", "b", named("b"))

    yield old
    yield new


def decorated(
    old: Callable[[Any, Any], Any], new: Callable[[Gatekeeper, Any], Any], *, path: str = "/x", **more: Any
) -> Iterator[Callable[[Flask], None]]:
    """One view, decorated the one way and the other."""
    function, methods = more.pop("function", view), ["GET", "POST"]

    def by_old(app: Flask) -> None:
        made = limiter(app, **more)
        app.add_url_rule(path, "x", old(made, named("x", function)), methods=methods)

    def by_new(app: Flask) -> None:
        app.add_url_rule(path, "x", new(Gatekeeper(app), named("x", function)), methods=methods)

    yield by_old
    yield by_new


@row(
    '@limiter.limit("2/hour")',
    '@gk.limit("2/hour")',
    [Ask("/x/1"), Ask("/x/2"), Ask("/x/3"), Ask("/x/3", B)],
    [200, 200, 429, 200],
)
def one() -> Iterator[Callable[[Flask], None]]:
    return decorated(lambda old, x: old.limit("2/hour")(x), lambda gk, x: gk.limit("2/hour")(x), path="/x/<n>")


@row(
    '@limiter.limit("2/minute;3/hour")',
    '@gk.limit("2/minute;3/hour")',
    times(3, "/x"),
    [200, 200, 429],
)
def several() -> Iterator[Callable[[Flask], None]]:
    rates = "2/minute;3/hour"
    return decorated(lambda old, x: old.limit(rates)(x), lambda gk, x: gk.limit(rates)(x))


@row(
    '@limiter.limit(…, key_func=lambda: request.headers["X-Team"])',
    '@gk.limit(…, key=lambda: request.headers["X-Team"])',
    [*(Ask("/x", A, headers={"X-Team": team}) for team in ("red", "red", "blue")), Ask("/x", B, headers={"X-Team": "red"})],
    [200, 429, 200, 429],
)  # fmt: skip
def keyed() -> Iterator[Callable[[Flask], None]]:
    def team() -> str:
        return request.headers["X-Team"]

    return decorated(
        lambda old, x: old.limit("1/hour", key_func=team)(x), lambda gk, x: gk.limit("1/hour", key=team)(x)
    )


@row(
    '@limiter.limit(…, methods=["POST"])',
    '@gk.limit(…, methods=["POST"])',
    [*times(2, "/x", method="POST"), *times(2, "/x")],
    [200, 429, 200, 200],
)
def by_method() -> Iterator[Callable[[Flask], None]]:
    return decorated(
        lambda old, x: old.limit("1/hour", methods=["POST"])(x),
        lambda gk, x: gk.limit("1/hour", methods=["POST"])(x),
    )


@row(
    "@limiter.limit(…, per_method=True)",
    '@gk.limit(…, key=["ip", "method"])',
    [*times(2, "/x", method="POST"), *times(2, "/x")],
    [200, 429, 200, 429],
)
def per_method() -> Iterator[Callable[[Flask], None]]:
    return decorated(
        lambda old, x: old.limit("1/hour", per_method=True)(x),
        lambda gk, x: gk.limit("1/hour", key=["ip", "method"])(x),
    )


@row(
    '@limiter.limit(…, exempt_when=lambda: "X-Free" in request.headers)',
    '@gk.limit(…, exempt=lambda: "X-Free" in request.headers)',
    [*times(2, "/x"), Ask("/x", headers={"X-Free": "1"})],
    [200, 429, 200],
)
def exempt_when() -> Iterator[Callable[[Flask], None]]:
    def free() -> bool:
        return "X-Free" in request.headers

    return decorated(
        lambda old, x: old.limit("1/hour", exempt_when=free)(x),
        lambda gk, x: gk.limit("1/hour", exempt=free)(x),
    )


@row(
    '@limiter.limit(…, cost=lambda: int(request.args["cost"]))',
    '@gk.limit(…, cost=lambda: int(request.args["cost"]))',
    [Ask("/x?cost=3"), Ask("/x?cost=1"), Ask("/x?cost=1"), Ask("/x?cost=4", B)],
    [200, 200, 429, 200],
)
def costs() -> Iterator[Callable[[Flask], None]]:
    def cost() -> int:
        return int(request.args["cost"])

    return decorated(
        lambda old, x: old.limit("4/hour", cost=cost)(x), lambda gk, x: gk.limit("4/hour", cost=cost)(x)
    )


@row(
    "@limiter.limit(…, deduct_when=lambda response: response.status_code == 401)",
    '@gk.limit(…, give_back=["1xx", "2xx", "3xx", …])',
    [*times(3, "/x?status=200"), *times(3, "/x?status=401"), Ask("/x?status=200", B)],
    [200, 200, 200, 401, 401, 429, 200],
)
def failures() -> Iterator[Callable[[Flask], None]]:
    def answers(**_: object) -> Response:
        return Response("x", int(request.args["status"]))

    return decorated(
        lambda old, x: old.limit("2/hour", deduct_when=lambda response: response.status_code == 401)(x),
        lambda gk, x: gk.limit("2/hour", give_back=["1xx", "2xx", "3xx", "400", "5xx"])(x),
        function=answers,
    )


@row(
    '@limiter.limit(…, error_message="slowly")',
    "@app.errorhandler(429)",
    times(2, "/x"),
    [200, 429],
)
def message() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        app.add_url_rule("/x", "x", limiter(app).limit("1/hour", error_message="slowly")(named("x")))
        app.register_error_handler(429, lambda error: (jsonify(error=error.description), 429))

    def new(app: Flask) -> None:
        app.add_url_rule("/x", "x", Gatekeeper(app).limit("1/hour")(named("x")))
        app.register_error_handler(429, lambda error: (jsonify(error="slowly"), 429))

    yield old
    yield new


@row(
    "@limiter.limit(…, on_breach=…)`, or `Limiter(…, on_breach=…)",
    "@app.errorhandler(429)`, whose error has `ticket` and `verdict",
    times(2, "/x"),
    [200, 418],
)
def breach() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        made = limiter(app, on_breach=lambda limit: Response("teapot", 418))
        app.add_url_rule("/x", "x", made.limit("1/hour")(named("x")))

    def new(app: Flask) -> None:
        app.add_url_rule("/x", "x", Gatekeeper(app).limit("1/hour")(named("x")))
        app.register_error_handler(429, lambda error: ("teapot", 418))

    yield old
    yield new


@row(
    '@limiter.shared_limit("3/hour", scope="database")',
    '@gk.shared_limit("3/hour", scope="database")',
    [Ask("/a"), Ask("/b"), Ask("/a"), Ask("/b"), Ask("/b", B)],
    [200, 200, 200, 429, 200],
)
def shared() -> Iterator[Callable[[Flask], None]]:
    def made(shared_limit: Callable[..., Any], app: Flask) -> None:
        shared = shared_limit("3/hour", scope="database")
        app.add_url_rule("/a", "a", shared(named("a")))
        app.add_url_rule("/b", "b", shared(named("b")))

    yield lambda app: made(limiter(app).shared_limit, app)
    yield lambda app: made(Gatekeeper(app).shared_limit, app)


@row(
    "@limiter.exempt",
    "@gk.exempt",
    [*times(3, "/free"), *times(2, "/x")],
    [200, 200, 200, 200, 429],
)
def exempted() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        made = limiter(app, default_limits=["1/hour"])
        app.add_url_rule("/free", "free", made.exempt(named("free")))
        app.add_url_rule("/x", "x", named("x"))

    def new(app: Flask) -> None:
        gk = Gatekeeper(app)
        gk.default_limit("1/hour")
        app.add_url_rule("/free", "free", gk.exempt(named("free")))
        app.add_url_rule("/x", "x", named("x"))

    yield old
    yield new


@row(
    'limiter.limit("2/hour")(blueprint)',
    'gk.limit("2/hour")(blueprint)',
    [*times(3, "/api/a"), *times(3, "/api/b"), *times(3, "/x"), Ask("/api/a", B)],
    [200, 200, 429, 200, 200, 429, 200, 200, 200, 200],
)
def blueprint() -> Iterator[Callable[[Flask], None]]:
    def made(limit: Callable[..., Any], app: Flask) -> None:
        api = Blueprint("api", __name__, url_prefix="/api")
        api.add_url_rule("/a", "a", named("a"))
        api.add_url_rule("/b", "b", named("b"))
        limit("2/hour")(api)
        app.register_blueprint(api)
        app.add_url_rule("/x", "x", named("x"))

    yield lambda app: made(limiter(app).limit, app)
    yield lambda app: made(Gatekeeper(app).limit, app)


@row(
    "limiter.exempt(blueprint)",
    "gk.exempt(blueprint)",
    [*times(3, "/api/a"), *times(2, "/x")],
    [200, 200, 200, 200, 429],
)
def exempt_blueprint() -> Iterator[Callable[[Flask], None]]:
    def made(exempt: Callable[..., Any], app: Flask) -> None:
        api = Blueprint("api", __name__, url_prefix="/api")
        api.add_url_rule("/a", "a", named("a"))
        exempt(api)
        app.register_blueprint(api)
        app.add_url_rule("/x", "x", named("x"))

    def new(app: Flask) -> None:
        gk = Gatekeeper(app)
        gk.default_limit("1/hour")
        made(gk.exempt, app)

    yield lambda app: made(limiter(app, default_limits=["1/hour"]).exempt, app)
    yield new


@row(
    'decorators = [limiter.limit("2/hour")]` of a `MethodView',
    'decorators = [gk.limit("2/hour")]',
    [*times(3, "/x"), Ask("/x", B)],
    [200, 200, 429, 200],
)
def method_view() -> Iterator[Callable[[Flask], None]]:
    def made(limit: Callable[..., Any], app: Flask) -> None:
        class Items(MethodView):
            decorators = [limit("2/hour")]  # noqa: RUF012

            def get(self) -> str:
                return "items"

        app.add_url_rule("/x", view_func=Items.as_view("items"))

    yield lambda app: made(limiter(app).limit, app)
    yield lambda app: made(Gatekeeper(app).limit, app)


@row(
    "@limiter.request_filter",
    'exempt` of a rule, or `access = {"allow": […]}',
    [*times(2, "/x"), Ask("/x", headers={"X-Free": "1"}), Ask("/x", B)],
    [200, 429, 200, 200],
)
def request_filter() -> Iterator[Callable[[Flask], None]]:
    def free() -> bool:
        return "X-Free" in request.headers

    def old(app: Flask) -> None:
        limiter(app, application_limits=["1/hour"]).request_filter(free)
        app.add_url_rule("/x", "x", named("x"))

    def new(app: Flask) -> None:
        Gatekeeper(app, {"limits": [{"name": "all", "rate": "1/hour", "exempt": free}]})
        app.add_url_rule("/x", "x", named("x"))

    yield old
    yield new


@row(
    "RATELIMIT_ENABLED = False",
    "GATEKEEPER_ENABLED = False",
    times(3, "/x"),
    [200, 200, 200],
)
def enabled() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        app.config["RATELIMIT_ENABLED"] = False
        made = app.extensions["kept"] = limiter(app)  # switched off, it is held by nothing else
        app.add_url_rule("/x", "x", made.limit("1/hour")(named("x")))

    def new(app: Flask) -> None:
        app.config["GATEKEEPER_ENABLED"] = False
        app.add_url_rule("/x", "x", Gatekeeper(app).limit("1/hour")(named("x")))

    yield old
    yield new


@row(
    'RATELIMIT_STORAGE_URI = "memory://"',
    'GATEKEEPER_STORE_URL = "memory://"',
    times(2, "/x"),
    [200, 429],
)
def storage() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        app.config["RATELIMIT_STORAGE_URI"] = "memory://"
        made = flask_limiter.Limiter(get_remote_address, app=app)
        app.add_url_rule("/x", "x", made.limit("1/hour")(named("x")))

    def new(app: Flask) -> None:
        app.config["GATEKEEPER_STORE_URL"] = "memory://"
        app.add_url_rule("/x", "x", Gatekeeper(app).limit("1/hour")(named("x")))

    yield old
    yield new


@row(
    'RATELIMIT_STRATEGY = "fixed-window"',
    '@gk.limit(…, algorithm="fixed_window")',
    times(3, "/x"),
    [200, 200, 429],
)
def strategy() -> Iterator[Callable[[Flask], None]]:
    return decorated(
        lambda old, x: old.limit("2/hour")(x),
        lambda gk, x: gk.limit("2/hour", algorithm="fixed_window")(x),
        strategy="fixed-window",
    )


@row(
    "a limit at `app.config[…]`, by `@limiter.limit(lambda: current_app.config[…])",
    "@gk.limit(…, tier=…, tiers={…})",
    times(3, "/x"),
    [200, 200, 429],
)
def dynamic() -> Iterator[Callable[[Flask], None]]:
    def old(app: Flask) -> None:
        app.config["RATE"] = "2/hour"
        app.add_url_rule("/x", "x", limiter(app).limit(lambda: current_app.config["RATE"])(named("x")))

    def new(app: Flask) -> None:
        app.config["PLAN"] = "small"
        view = Gatekeeper(app).limit(
            "1/hour", tier=lambda: current_app.config["PLAN"], tiers={"small": "2/hour", "large": "unlimited"}
        )(named("x"))
        app.add_url_rule("/x", "x", view)

    yield old
    yield new


def answers(make: Callable[[Flask], None], asked: Sequence[Ask]) -> list[int]:
    app = Flask("moving")
    make(app)
    client = app.test_client()
    return [
        client.open(
            one.path, method=one.method, headers=dict(one.headers), environ_overrides={"REMOTE_ADDR": one.who},
            buffered=True,
        ).status_code
        for one in asked
    ]  # fmt: skip


@pytest.mark.parametrize("one", ROWS, ids=lambda one: one.old)
def test_both_sides_of_a_row_answer_the_same(one: Row) -> None:
    assert answers(one.by_old, one.asked) == list(one.answered)
    assert answers(one.by_new, one.asked) == list(one.answered)


def test_the_rows_that_are_run_are_those_of_the_page() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("| `") or line.startswith("| a limit")]
    for one in ROWS:
        old = one.old if one.old.startswith("a limit") else f"`{one.old}"
        assert f"| {old}` | `{one.new}` |" in told
    assert len(told) == len(ROWS)


FIELDS = ("X-RateLimit-Limit", "X-RateLimit-Remaining")


def test_the_older_fields_are_the_same_where_they_are_wanted() -> None:
    apps = [Flask("old"), Flask("new")]
    limiter(apps[0], application_limits=["3/hour"], headers_enabled=True)
    Gatekeeper(
        apps[1],
        {"limits": [{"name": "all", "rate": "3/hour"}], "response": {"x_ratelimit": "epoch", "fields": False}},
    )
    for app in apps:
        app.add_url_rule("/x", "x", named("x"))
    for _ in range(4):
        old, new = (app.test_client().get("/x", environ_overrides={"REMOTE_ADDR": A}).headers for app in apps)
        assert [old[name] for name in FIELDS] == [new[name] for name in FIELDS]
        assert ("RateLimit" in new, abs(int(old["X-RateLimit-Reset"]) - int(new["X-RateLimit-Reset"])) < 120) == (
            False,
            True,
        )
