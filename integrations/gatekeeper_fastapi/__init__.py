"""Gatekeeper for FastAPI and Starlette."""

from gatekeeper.errors import MissingExtra

try:
    import starlette  # noqa: F401
except ImportError:
    raise MissingExtra("FastAPI's and Starlette's plugin", "fastapi") from None

from gatekeeper.asgi import GatekeeperMiddleware
from gatekeeper_fastapi.dependency import RateLimit
from gatekeeper_fastapi.endpoints import limit
from gatekeeper_fastapi.openapi import PROBLEM_RESPONSES, RESPONSES, document
from gatekeeper_fastapi.report import Report, check, uncovered
from gatekeeper_fastapi.sessions import Session, SessionMiddleware
from gatekeeper_fastapi.tickets import RateLimited, WebSocketLimited, limited_handler

__all__ = [
    "PROBLEM_RESPONSES",
    "RESPONSES",
    "GatekeeperMiddleware",
    "RateLimit",
    "RateLimited",
    "Report",
    "Session",
    "SessionMiddleware",
    "WebSocketLimited",
    "check",
    "document",
    "limit",
    "limited_handler",
    "uncovered",
]
