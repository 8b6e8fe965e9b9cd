"""Reads and writes what Django's session holds: `uvicorn --port 9102 fastapi_part:app`."""

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from gatekeeper_fastapi import GatekeeperMiddleware, Session

app = FastAPI()
app.add_middleware(
    GatekeeperMiddleware, settings=os.environ.get("POLICY", str(Path(__file__).with_name("policy.toml")))
)


@app.get("/fastapi/me")
async def me(session: Session) -> dict[str, Any]:
    return {"user": session.user, "cart": session.get("cart", [])}


@app.post("/fastapi/cart/{item}")
async def add(item: str, session: Session) -> dict[str, Any]:
    session.setdefault("cart", []).append(item)
    return {"cart": session["cart"]}


@app.post("/fastapi/logout")
async def log_out(session: Session) -> dict[str, Any]:
    session.end()
    return {}
