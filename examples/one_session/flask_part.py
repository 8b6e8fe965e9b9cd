"""The same in Flask: `gunicorn -b 127.0.0.1:9103 flask_part:app`."""

import os
from pathlib import Path
from typing import Any

from flask import Flask, session

from gatekeeper_flask import Gatekeeper

app = Flask(__name__)
gk = Gatekeeper(app, os.environ.get("POLICY", str(Path(__file__).with_name("policy.toml"))))


@app.get("/flask/me")
def me() -> dict[str, Any]:
    return {"user": session.get("_auth_user_id"), "cart": session.get("cart", [])}


@app.post("/flask/cart/<item>")
def add(item: str) -> dict[str, Any]:
    session.setdefault("cart", []).append(item)
    return {"cart": session["cart"]}
