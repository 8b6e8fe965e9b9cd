"""What a request's body says: the fields of forms and of JSON documents, for keys."""

from __future__ import annotations

import json
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, Final
from urllib.parse import unquote_plus

from gatekeeper.http.parts import as_text

_MOST_FIELDS: Final = 1000


class AmbiguousField(ValueError):
    """A field stands in a body more than once: which of them the application believes cannot be known."""


def form_field(content_type: str | None, body: bytes, name: str) -> str | None:
    """The value of a field of a form, `application/x-www-form-urlencoded` or `multipart/form-data` (RFC 7578).

    None if it is no form, or has no such field. Raises AmbiguousField.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        values = [
            unquote_plus(value)
            for key, _, value in (pair.partition("=") for pair in body.decode("latin-1").split("&"))
            if unquote_plus(key) == name
        ]
    elif kind == "multipart/form-data":
        values = _parts(content_type or "", body, name)
    else:
        return None
    return as_text(_only(values))


def json_field(body: bytes, path: str) -> str | None:
    """The text, number or truth at a path ("user.name") of a JSON document, whatever its content type says.

    None if the body is none, or nothing of the kind is there. Raises AmbiguousField for a member that is repeated
    on the way (RFC 8259, 4: what is made of it differs).
    """
    try:
        value: Any = json.loads(body, object_pairs_hook=_Object)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    for name in path.split("."):
        if not isinstance(value, _Object):
            return None
        value = _only([held for key, held in value if key == name])
    return as_text(value)


class _Object(list[tuple[str, Any]]):
    """The members of a JSON object, as they came."""


def _only(values: list[Any]) -> Any:
    if len(values) > 1:
        raise AmbiguousField
    return values[0] if values else None


def _parts(content_type: str, body: bytes, name: str) -> list[str]:
    """The values of a name in a multipart body; files have none."""
    head = b"Content-Type: " + content_type.encode("latin-1", "replace").replace(b"\n", b" ") + b"\r\n\r\n"
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    found = []
    for part in message.get_payload() if message.is_multipart() else ():
        disposition = part.get("content-disposition") if not isinstance(part, str) else None
        if disposition is None or isinstance(part, str) or part.is_multipart():
            continue
        parameters = getattr(disposition, "params", {})
        if parameters.get("name") == name and "filename" not in parameters:
            payload = part.get_payload(decode=True)
            found.append(payload.decode("utf-8", "replace") if isinstance(payload, bytes) else "")
    return found
