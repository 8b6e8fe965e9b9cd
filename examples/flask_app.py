"""A Flask application behind the gate: `flask --app examples/flask_app.py run`."""

from flask import Flask, request

from gatekeeper import Gatekeeper
from gatekeeper.wsgi import GatekeeperMiddleware

gk = Gatekeeper({"limits": [{"name": "default", "rate": "60/minute"}]})
app = Flask(__name__)
app.wsgi_app = GatekeeperMiddleware(app.wsgi_app, gk)  # type: ignore[method-assign]


@app.get("/")
def index() -> dict[str, int]:
    return {"remaining": request.environ["gatekeeper.ticket"].tightest.verdict.remaining}


@app.get("/report")
@gk.limit("2/minute")
def report() -> str:
    return "A report that costs much to make: two a minute for each client.\n"
