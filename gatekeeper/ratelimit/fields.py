"""What a response says of limits.

Fields by draft-ietf-httpapi-ratelimit-headers-10, bodies by RFC 9457 with the problem types of that draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from gatekeeper.commands import NEVER, Verdict
from gatekeeper.http.fields import Fields
from gatekeeper.ratelimit.rules import Rule

QUOTA_EXCEEDED: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY: Final = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"

_SECOND: Final = 1_000_000_000
_ALMOST: Final = _SECOND - 1  # added before a division, it rounds up


def policy_field(rules: Sequence[Rule]) -> tuple[bytes, bytes]:
    """`RateLimit-Policy` for a response to which these rules applied."""
    policies = ", ".join(limit.policy for rule in rules for limit in rule.limits)
    return b"ratelimit-policy", policies.encode("ascii")


def retry_seconds(verdicts: Sequence[Verdict]) -> int | None:
    """`Retry-After` for refusals: the longest wait, rounded up; None where waiting does not help."""
    wait = max((verdict.retry_ns for verdict in verdicts), default=0)
    return None if wait >= NEVER else max(1, (wait + _ALMOST) // _SECOND)


def refusal_body(violated: Sequence[str], retry: int | None, *, status: int, problem: bool) -> tuple[bytes, bytes]:
    """(content type, body) of a refusal: `application/problem+json` (RFC 9457), or a line of plain text."""
    if status == 429:
        kind, title = QUOTA_EXCEEDED, "Too Many Requests"
        detail = "The request would exceed a quota."
    else:
        kind, title = REDUCED_CAPACITY, "Service Unavailable"
        detail = "Whether the request is within its quota cannot be told at the moment."
    if retry is not None:
        detail += f" Try again in {retry} {'second' if retry == 1 else 'seconds'}."
    if not problem:
        return b"text/plain; charset=utf-8", f"{status} {title}. {detail}\n".encode()
    document = {
        "type": kind, "title": title, "status": status, "detail": detail, "violated-policies": list(violated),
    }  # fmt: skip
    return b"application/problem+json", json.dumps(document).encode()


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
