"""What affinity does to the fields on the wire: pins go no further than here, nor does what is said of them."""

from __future__ import annotations

from collections.abc import Container, Set

from gatekeeper.affinity import END, END_FIELD
from gatekeeper.http import cookies
from gatekeeper.http.fields import Fields, private


def unpinned(lines: list[bytes], names: Container[str], fields: Set[str]) -> list[bytes]:
    """The lines of a request without the cookies and fields that hold pins; the rest as it came, byte for byte."""
    kept = []
    for line in lines:
        if line[:7].lower() == b"cookie:":
            text = line[7:].decode("latin-1")
            if any(pair.partition("=")[0].strip(" \t") in names for pair in text.split(";")):
                left = cookies.without([text], names)
                if not left:
                    continue
                line = line[:7] + b" " + left[0].encode("latin-1")
        elif fields and line.partition(b":")[0].lower().decode("latin-1") in fields:
            continue
        kept.append(line)
    return kept


def heard(lines: list[bytes], field: str | None) -> tuple[list[bytes], bool]:
    """The lines of a response without what the application says of the pin, and whether it ends it.

    `field`: the one that holds pins, which is ours to write.
    """
    kept, ends = [], False
    for line in lines:
        written, _, value = line.partition(b":")
        name = written.lower().decode("latin-1")
        if name == END_FIELD:
            ends = ends or value.strip(b" \t").lower() == END.encode()
        elif name != field:
            kept.append(line)
    return kept, ends


def told(lines: list[bytes], fields: Fields) -> list[bytes]:
    """The lines of a response with those that tell a client its pin: no cache may hand it to another one.

    So a field that is addressed to some shared cache, and would override `Cache-Control` there, is left out
    (RFC 9213).
    """
    kept, values = [], []
    for line in lines:
        written, _, value = line.partition(b":")
        name = written.lower()
        if name == b"cache-control":
            values.append(value.decode("latin-1"))
        elif not name.endswith(b"-cache-control") and name != b"surrogate-control":
            kept.append(line)
    kept.append(b"Cache-Control: " + private(values).encode("latin-1"))
    return kept + [name + b": " + value for name, value in fields]
