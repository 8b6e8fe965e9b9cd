"""What a refusal looks like, for OpenAPI documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from gatekeeper.errors import Limited
from gatekeeper_fastapi.dependency import limits_of
from gatekeeper_fastapi.places import leaves
from gatekeeper_fastapi.tickets import RateLimited, limited_handler

A = TypeVar("A", bound=Any)

_HEADERS: Final[dict[str, Any]] = {
    "Retry-After": {
        "description": "Whole seconds after which a request will be let in again.",
        "schema": {"type": "integer", "minimum": 1},
        "example": 42,
    },
    "RateLimit": {
        "description": "The quota closest to exhaustion: `r` is left of it, for `t` seconds nothing is added.",
        "schema": {"type": "string"},
        "example": '"default";r=0;t=42',
    },
    "RateLimit-Policy": {
        "description": "The quotas that applied: `q` requests in any `w` seconds.",
        "schema": {"type": "string"},
        "example": '"default";q=10;w=60',
    },
}

_DETAIL: Final[dict[str, Any]] = {
    "application/json": {
        "schema": {"type": "object", "properties": {"detail": {"type": "string"}}},
        "example": {"detail": "Too Many Requests"},
    }
}

_PROBLEM: Final[dict[str, Any]] = {
    "application/problem+json": {
        "schema": {
            "type": "object",
            "description": "A problem document (RFC 9457).",
            "properties": {
                "type": {"type": "string", "format": "uri"},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "violated-policies": {"type": "array", "items": {"type": "string"}},
            },
        }
    }
}

_DESCRIPTION: Final = "Too many requests."

RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    429: {"description": _DESCRIPTION, "headers": _HEADERS, "content": _DETAIL}
}
"""For `responses=` of an application, a router or a route: a refusal as FastAPI's own handler gives it."""

PROBLEM_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    429: {"description": _DESCRIPTION, "headers": _HEADERS, "content": _PROBLEM}
}
"""The same where `limited_handler` gives it."""


def document(app: A) -> A:
    """Have the OpenAPI document of a FastAPI application say 429 of each route that depends on a RateLimit.

    What a route says of 429 itself stands. To be called once, at any time. Returns the application.
    """
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        handlers = app.exception_handlers
        is_problem = limited_handler in (handlers.get(RateLimited), handlers.get(Limited))
        refusal = (PROBLEM_RESPONSES if is_problem else RESPONSES)[429]
        paths = schema.get("paths", {})
        for leaf in leaves(app):
            if leaf.host or not limits_of(leaf.dependant):
                continue
            operations = paths.get(getattr(leaf.route, "path_format", leaf.path), {})
            for method in leaf.methods or ():
                operation = operations.get(method.lower())
                if operation is not None:
                    operation.setdefault("responses", {}).setdefault("429", refusal)
        return schema

    app.openapi = openapi
    return app
