"""What the gateway answers itself. No answer names an upstream, a pool, or anything else within."""

from __future__ import annotations

import json
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from gatekeeper.http.fields import Fields, wants_problem

DETAILS: Final = {
    400: "The request could not be understood.",
    404: "Nothing is served at this address.",
    405: "This method is not served.",
    408: "The request did not arrive in time.",
    413: "The body of the request is too large.",
    414: "The target of the request is too long.",
    417: "The expectation of the request cannot be met.",
    431: "The fields of the request are too large.",
    500: "The request could not be decided.",
    501: "The transfer coding of the request is not known.",
    502: "The service behind this gateway gave no valid answer.",
    503: "No service behind this gateway can be reached at the moment.",
    504: "The service behind this gateway did not answer in time.",
    505: "This version of HTTP is not served.",
    508: "The request has come through this gateway before.",
}

PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


def own_answer(
    status: int, accept: str | None, *, error: str | None = None, retry: int | None = None
) -> tuple[Fields, bytes]:
    """Fields and body. `error` is a proxy error type (RFC 9209, 2.3), for `Proxy-Status`."""
    title, detail = PHRASES[status].decode(), DETAILS[status]
    if wants_problem(accept):
        kind = b"application/problem+json"
        body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail}).encode()
    else:
        kind, body = b"text/plain; charset=utf-8", f"{status} {title}. {detail}\n".encode()
    fields = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
    if error is not None:
        fields.append((b"proxy-status", b"gatekeeper; error=" + error.encode()))
    if retry is not None:
        fields.append((b"retry-after", b"%d" % retry))
    if status == 405:
        fields.append((b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))
    return fields, body


def own_head(status: int, fields: Fields, *, closes: bool, is_old: bool = False) -> bytes:
    """The head of an answer of ours, with the empty line."""
    lines = [b"HTTP/1.1 %d %b" % (status, PHRASES[status]), *(b"%b: %b" % field for field in fields)]
    lines.append(b"date: " + formatdate(usegmt=True).encode())
    if closes:
        lines.append(b"connection: close")
    elif is_old:
        lines.append(b"connection: keep-alive")
    return b"\r\n".join(lines) + b"\r\n\r\n"
