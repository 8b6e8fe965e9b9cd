"""What a request's body says: the fields of forms and of JSON documents, for keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from gatekeeper.http.parts import as_text

_MOST_FIELDS: Final = 1000
_LONGEST_HEAD: Final = 1024
_MOST_DIGITS: Final = 18

_CONTENT_TYPE: Final = re.compile(
    r"[A-Za-z/-]+\s*(?:;\s*(?:charset=\"?[Uu][Tt][Ff]-8\"?|"
    r"boundary=(?P<boundary>[0-9A-Za-z'()+_,./:=?-]{1,70}|\"[0-9A-Za-z'()+_,./:=? -]{1,70}\"))\s*)*"
)
_DISPOSITION: Final = re.compile(
    rb'Content-Disposition: form-data; name="(?P<name>[^"\\\r\n]*)"(?P<file>; filename="[^"\r\n]*")?', re.IGNORECASE
)
_OTHER: Final = re.compile(
    rb"(?:Content-Length: [0-9]+|Content-Type: (?!multipart/|message/)[!-~]+(?:; charset=\"?utf-8\"?)?)",
    re.IGNORECASE,
)
"""What stands in the head of a part: as browsers write it, and nothing that is read in several ways."""


class AmbiguousField(ValueError):
    """A field stands in a body more than once, or the body can be read in several ways.

    What the application believes cannot be known.
    """


def is_longer(length: str, most: int) -> bool:
    """Whether a Content-Length tells of more than `most` bytes. What is no number tells nothing."""
    if not (length.isascii() and length.isdigit()):
        return False
    digits = length.lstrip("0")
    return len(digits) > _MOST_DIGITS or int(digits or "0") > most  # of some thousand Python would make an error


def form_field(content_types: list[str], body: bytes, name: str) -> str | None:
    """The value of a field of a form, `application/x-www-form-urlencoded` or `multipart/form-data` (RFC 7578).

    `content_types`: the values of the Content-Type fields. None if it is no form, or has no such field. Raises
    AmbiguousField where applications may read the form in ways that differ.
    """
    kinds = {value.partition(";")[0].strip().lower() for value in content_types}
    if not kinds & {"application/x-www-form-urlencoded", "multipart/form-data"}:
        return None
    parameters = _CONTENT_TYPE.fullmatch(content_types[0]) if len(content_types) == 1 else None
    if parameters is None:
        raise AmbiguousField
    if kinds == {"multipart/form-data"}:
        return as_text(_only(_parts(parameters["boundary"], body, name)))
    pairs = body.split(b"&")
    if parameters["boundary"] is not None or len(pairs) > _MOST_FIELDS:
        raise AmbiguousField
    wanted = name.encode("utf-8", "surrogatepass")
    found = [value for key, _, value in (pair.partition(b"=") for pair in pairs) if _unquoted(key) == wanted]
    return as_text(_only([_unquoted(value).decode("utf-8", "replace") for value in found]))


def _unquoted(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))


def parsed_field(form: Mapping[str, Sequence[str]], name: str) -> str | None:
    """The value of a field of a form that a framework has parsed. Raises AmbiguousField if it has several."""
    return as_text(_only(list(form.get(name, ()))))


def json_field(body: bytes, path: str) -> str | None:
    """The text, number or truth at a path ("user.name") of a JSON document, whatever its content type says.

    None if the body is no object, or nothing of the kind is there. Raises AmbiguousField for a member that is
    repeated on the way or spelled in another case (RFC 8259, 4: what is made of the first differs, and some parsers
    take the second), and for an object that cannot be read: parsers more lenient or deeper than ours may read it.
    """
    text = body.decode(json.detect_encoding(body), "replace")
    try:
        value: Any = json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise AmbiguousField from None
    except ValueError:  # among them that of a number with more digits than Python reads
        if text.lstrip().startswith("{"):
            raise AmbiguousField from None
        return None
    for name in path.split("."):
        if not isinstance(value, _Object):
            return None
        value = _named(value, name)
    if isinstance(value, float) and value.is_integer():  # 7.0 is 7
        value = int(value)
    return as_text(value)


class _Object(list[tuple[str, Any]]):
    """The members of a JSON object, as they came."""


def _named(members: _Object, name: str) -> Any:
    folded = name.casefold()
    found = [(key, value) for key, value in members if key.casefold() == folded]
    if any(key != name for key, _ in found):
        raise AmbiguousField
    return _only([value for _, value in found])


def _only(values: list[Any]) -> Any:
    if len(values) > 1:
        raise AmbiguousField
    return values[0] if values else None


def _parts(boundary: str | None, body: bytes, name: str) -> list[str]:
    """The values of a name in a multipart body; files have none.

    Raises AmbiguousField for what is not as browsers write it.
    """
    if boundary is None:
        raise AmbiguousField
    first, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.strip('"').encode("latin-1"))
    if first or not parts or parts.pop() not in (b"--", b"--\r\n") or len(parts) > _MOST_FIELDS:
        raise AmbiguousField
    found = []
    for part in parts:
        head, end, value = part.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        if not end or lines.pop(0) or len(head) > _LONGEST_HEAD:
            raise AmbiguousField
        named = [match for line in lines if (match := _DISPOSITION.fullmatch(line)) is not None]
        if len(named) != 1 or not all(_OTHER.fullmatch(line) for line in lines if not _DISPOSITION.fullmatch(line)):
            raise AmbiguousField
        if named[0]["name"] == name.encode() and named[0]["file"] is None:
            found.append(value.decode("utf-8", "replace"))
    return found
