"""A shop in Flask: limits on logins, views, a blueprint, a class-based view, a stream.

gunicorn --threads 8 --chdir examples flask_shop:app
flask --app examples/flask_shop.py gatekeeper check
"""

from collections.abc import Iterator
from typing import ClassVar

from flask import Blueprint, Flask, Response, jsonify, request, session
from flask.views import MethodView
from werkzeug.exceptions import TooManyRequests

from gatekeeper_flask import Gatekeeper

gk = Gatekeeper()
api = Blueprint("api", __name__, url_prefix="/api")
items = Blueprint("items", __name__, url_prefix="/items")

gk.limit("30/minute")(api)  # for each of its routes, and of those nested in it

QUOTAS = [
    # Every request, also for what is not there; static files have none.
    {"name": "default", "rate": "300/minute"},
    # Failed logins alone: by address and name, and a user who gets in has the whole quota again.
    {
        "name": "login",
        "match": "POST /login",
        "rate": ["5/minute", "20/hour"],
        "key": ["ip", "form:name"],
        "give_back": ["2xx", "3xx"],
        "reset_on": ["2xx", "3xx"],
        "on_error": "deny",
    },
    # Whoever is logged in, wherever he comes from; an address stands in for who is not.
    {"name": "user", "rate": "60/minute", "key": "user", "match": "/api/*"},
]


def create_app() -> Flask:
    app = Flask(__name__)
    app.secret_key = "choose-a-long-secret"  # noqa: S105  # an example's
    app.config["GATEKEEPER"] = {
        "identity": {"user": lambda: session.get("name")},
        "limits": QUOTAS,
    }
    app.config.from_prefixed_env()  # FLASK_GATEKEEPER_STORE_URL=redis://… in production
    gk.init_app(app)
    app.register_error_handler(429, too_many)
    app.add_url_rule("/", view_func=index)
    app.add_url_rule("/login", view_func=login, methods=["POST"])
    app.add_url_rule("/report/<int:year>", view_func=report)
    app.add_url_rule("/export", view_func=export)
    app.add_url_rule("/health", view_func=health)
    app.register_blueprint(api)
    return app


def too_many(error: TooManyRequests) -> Response | TooManyRequests:
    """Browsers get a page of the shop; programs the problem document that the error brings."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) != "text/html":
        return error
    return Response(f"<h1>Too fast</h1><p>Come again in {error.retry_after} seconds.</p>", 429)


def index() -> str:
    return "Welcome to the shop.\n"


def login() -> tuple[str, int]:
    if request.form.get("password") != "correct":
        return "Wrong password.\n", 401
    session["name"] = request.form.get("name", "somebody")
    return "Welcome.\n", 200


@gk.limit("2/minute")
async def report(year: int) -> str:
    return f"A report of {year} that costs much to make: two a minute for each client, whatever the year.\n"


@gk.limit(concurrency=1)
def export() -> Response:
    def rows() -> Iterator[str]:
        for number in range(int(request_rows)):
            yield f"row {number}\n"

    request_rows = request.args.get("rows", "3")
    return Response(rows(), mimetype="text/plain")


@gk.exempt
def health() -> str:
    return "ok\n"


class Item(MethodView):
    decorators: ClassVar = [gk.limit("20/minute", methods=["PUT"])]

    def get(self, number: int) -> Response:
        return jsonify(item=number, left=gk.ticket.tightest.verdict.remaining if gk.ticket.tightest else None)

    def put(self, number: int) -> Response:
        return jsonify(item=number)


@items.get("/")
def listing() -> list[int]:
    return [1, 2, 3]


items.add_url_rule("/<int:number>", view_func=Item.as_view("item"))
api.register_blueprint(items)

app = create_app()
