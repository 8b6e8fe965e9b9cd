"""What a response says of limits.

Fields by draft-ietf-httpapi-ratelimit-headers-10, bodies by RFC 9457 with the problem types of that draft.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any, Final, Literal, NamedTuple

from gatekeeper.commands import NEVER, Verdict
from gatekeeper.http.fields import Fields
from gatekeeper.ratelimit.rules import RateLimit

QUOTA_EXCEEDED: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY: Final = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
ABNORMAL_USAGE: Final = "https://iana.org/assignments/http-problem-types#abnormal-usage-detected"

_SECOND: Final = 1_000_000_000
_ALMOST: Final = _SECOND - 1  # added before a division, it rounds up


class Manner(NamedTuple):
    """How clients are told.

    - `fields`: whether each response has `RateLimit` and `RateLimit-Policy`
    - `x_ratelimit`: whether it has `X-RateLimit-Limit`, `-Remaining` and `-Reset`, too, the last in "seconds" from
      now, or since the "epoch"; None for not
    - `jitter`: up to so many seconds are added to `Retry-After`, so that those refused together do not return so
    - `body`: of refusals, in place of ours: {status}, {retry_after} and {rules} stand for what they say
    - `content_type` of that body
    - `handler`: a function of the ticket and its Refusal, that returns the Refusal to send
    - `close_code` of a WebSocket that a limit ends: 1013 (try again later) or 1008 (policy violation; RFC 6455)
    - `clock` tells the seconds since the epoch; `draw` a number from [0, 1)
    """

    fields: bool = True
    x_ratelimit: Literal["seconds", "epoch"] | None = None
    jitter: float = 0.0
    body: str | None = None
    content_type: str = "text/plain; charset=utf-8"
    handler: Callable[[Any, Any], Any] | None = None
    close_code: int = 1013
    clock: Callable[[], float] = lambda: 0.0
    draw: Callable[[], float] = lambda: 0.0


DEFAULT_MANNER: Final = Manner()


def policy_field(limits: Iterable[RateLimit]) -> tuple[bytes, bytes]:
    """`RateLimit-Policy` for a response to which these limits applied."""
    # Rules of one name, of which one stands in the settings and one at a function, say the same.
    return b"ratelimit-policy", ", ".join(dict.fromkeys(limit.policy for limit in limits)).encode("ascii")


def older_fields(verdict: Verdict, manner: Manner) -> Fields:
    """The fields of a time before there was a draft, which many clients read."""
    seconds = _seconds(verdict.retry_ns if 0 < verdict.retry_ns < NEVER else verdict.reset_ns)
    reset = seconds if manner.x_ratelimit == "seconds" else ceil(manner.clock() + seconds)
    return [
        (b"x-ratelimit-limit", b"%d" % verdict.limit),
        (b"x-ratelimit-remaining", b"%d" % verdict.remaining),
        (b"x-ratelimit-reset", b"%d" % reset),
    ]


def _seconds(ns: int) -> int:
    return (ns + _ALMOST) // _SECOND


def retry_seconds(verdicts: Sequence[Verdict]) -> int | None:
    """`Retry-After` for refusals: the longest wait, rounded up; None where waiting does not help."""
    wait = max((verdict.retry_ns for verdict in verdicts), default=0)
    return None if wait >= NEVER else max(1, _seconds(wait))


_PROBLEMS: Final = {
    400: (None, "Bad Request", "The field of the body that the request is counted by can be read in several ways."),
    403: (None, "Forbidden", "Requests from this address are not answered."),
    413: (None, "Content Too Large", "The body is longer than what is read to count the request by."),
    429: (QUOTA_EXCEEDED, "Too Many Requests", "The request would exceed a quota."),
    503: (
        REDUCED_CAPACITY,
        "Service Unavailable",
        "Whether the request is within its quota cannot be told at the moment.",
    ),
}
"""(type, title, detail) of refusals by their status."""

BANNED: Final = (ABNORMAL_USAGE, "Too Many Requests", "Too many requests were refused before.")

NO_SESSION: Final = (None, "Service Unavailable", "What is remembered of you cannot be read at the moment.")
"""The problem of a request whose session's store does not answer."""


def refusal_body(
    violated: Sequence[str],
    retry: int | None,
    *,
    status: int,
    problem: bool,
    told: tuple[str | None, str, str] | None = None,
) -> tuple[bytes, bytes]:
    """(content type, body) of a refusal: `application/problem+json` (RFC 9457), or a line of plain text.

    `told`: (type, title, detail) of the problem, in place of what is told of the status.
    """
    kind, title, detail = told or _PROBLEMS[status]
    if retry is not None:
        detail += f" Try again in {retry} {'second' if retry == 1 else 'seconds'}."
    if not problem:
        return b"text/plain; charset=utf-8", f"{status} {title}. {detail}\n".encode()
    document: dict[str, object] = {"title": title, "status": status, "detail": detail}
    if kind is not None:
        document = {"type": kind, **document, "violated-policies": list(violated)}
    return b"application/problem+json", json.dumps(document).encode()


def own_body(manner: Manner, violated: Sequence[str], retry: int | None, status: int) -> tuple[bytes, bytes]:
    """(content type, body) of a refusal, as the settings have it."""
    assert manner.body is not None
    body = manner.body.replace("{status}", str(status)).replace("{rules}", ", ".join(violated))
    body = body.replace("{retry_after}", "" if retry is None else str(retry))
    return manner.content_type.encode("latin-1"), body.encode()


def common_fields(retry: int | None, content_type: bytes, body: bytes) -> Fields:
    """The fields that each refusal has, besides those of the limits. A refusal is never cached."""
    fields = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if retry is not None:
        fields.append((b"retry-after", b"%d" % retry))
    return fields
