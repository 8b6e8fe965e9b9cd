"""One session, as the application sees it, and the text that all frameworks write and read of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Self

from gatekeeper.commands import anobody, arun, nobody, run
from gatekeeper.errors import SessionError, StoreError

if TYPE_CHECKING:
    from gatekeeper.sessions.flow import Sessions

LONGEST_LABEL: Final = 200
"""The characters that a session's label may have."""

_FORMAT: Final = 1


class Session(MutableMapping[str, Any]):
    """The state of a client between its requests: a mapping of names to what JSON can hold.

    What was put into a list or a dictionary within it counts as a change, too. All changes are written once, before
    the head of the response is sent; what is changed later is not kept (and is logged).

    It is loaded when it is first used. Where that has to be awaited, since the store is on another machine, await
    `aload` before; else using it raises SessionError.

    - `user`: whose it is: the member that `identity.user = "session:NAME"` names; None if nobody has logged in
    - `is_new`: whether the client has none yet
    - `born`, `seen`: when it was begun, and last written (seconds since the epoch; 0 of a new one)
    - `label`: a text by which its user knows it again in a list, such as the browser's name

    Using it raises StoreError while its store does not answer, unless `session.on_error = "empty"`.
    """

    __slots__ = (
        "_before", "_data", "_flow", "_label", "accessed", "blocking", "born", "came", "failure", "id", "is_coming",
        "is_cut", "is_ended", "is_fresh", "is_gone", "is_labelled", "is_moved", "is_rotated", "is_written", "key",
        "not_before", "persistent", "renews", "seen", "source", "stays", "version",
    )  # fmt: skip

    def __init__(self, flow: Sessions, came: Sequence[str], *, blocking: bool, source: str = "cookie") -> None:
        # What came of the client, not yet read: the cookie's value, or those of its parts.
        self.came = came
        self.source = source
        self.blocking = blocking
        self.accessed = False
        """Whether the application has looked at it."""
        self.id: str | None = None
        """The secret that the client holds; None of a new one."""
        self.key: str | None = None
        """By what the store knows it: it is no secret, and tells nothing."""
        self.version: int | None = None
        self.born = self.seen = 0
        self._label: str | None = None
        self.is_labelled = False
        """Whether its label was set since it was read."""
        self.is_ended = self.is_rotated = self.is_written = False
        self.is_coming = False
        """Whether it was asked for."""
        self.is_moved = False
        """Whether the client's id is an old one that leads to it for a while."""
        self.is_fresh = False
        """Whether its id was drawn since it was opened: nobody knew it before."""
        self.stays = False
        """Whether it is kept though it holds nothing, as some frameworks have it."""
        self.is_gone = False
        """Whether it turned out, when it was saved, that it was ended elsewhere."""
        self.renews = False
        """Whether it is worth writing, though nothing changed."""
        self.persistent: bool | None = None
        """Whether its cookie outlives the browser; None: as all of them."""
        self.not_before = 0
        """A token of it is not to be older (seconds since the epoch)."""
        self.is_cut = False
        """Whether its store did not answer, and it passes for empty: it is not to be written."""
        self.failure: StoreError | None = None
        """What is wrong with the store, where that is to be told."""
        self._flow = flow
        self._data: dict[str, Any] | None = None
        self._before = b"{}"
        if not came:
            self._data = {}

    # What the application does.

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise SessionError(f"session: expected a name that is a string, and not {type(name).__name__}")
        self.data[name] = value

    def __delitem__(self, name: str) -> None:
        del self.data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __contains__(self, name: object) -> bool:
        return name in self.data

    def clear(self) -> None:
        self.data.clear()

    def copy(self) -> dict[str, Any]:
        return self.data.copy()

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.data, **other}

    def __ior__(self, other: Mapping[str, Any]) -> Self:
        self.update(other)
        return self

    @property
    def data(self) -> dict[str, Any]:
        """What it holds. Loads it, if need be."""
        if self._data is None:
            if not self.blocking and not self._flow.is_local:
                raise SessionError("session: its store is on another machine; await session.aload() first")
            run(self._flow.load(self), nobody)
        if self.failure is not None:
            raise self.failure
        self.accessed = True
        assert self._data is not None
        return self._data

    def load(self) -> Session:
        """Load it now, if it was not. Raises StoreError."""
        if self._data is None:
            run(self._flow.load(self), nobody)
        return self._checked()

    async def aload(self) -> Session:
        """As `load`, awaiting the store."""
        if self._data is None:
            await arun(self._flow.load(self), anobody)
        return self._checked()

    def _checked(self) -> Session:
        if self.failure is not None:
            raise self.failure
        return self

    def rotate(self) -> None:
        """Give it a new id, so that the old one is dead: when the client's privileges change, as on login.

        Whoever planted or stole the old id before has nothing then. (A token that was stolen stays what it is until
        it expires, unless there is a store for revocation.)
        """
        self.data  # noqa: B018  # loads it
        self.is_rotated = True

    def end(self) -> None:
        """End it, as on logout: it is deleted, and the cookie expired. What is put into it later is a new one's."""
        self.data.clear()
        self.is_ended = True

    @property
    def user(self) -> str | None:
        return self._flow.owner(self.data)

    @property
    def label(self) -> str | None:
        self.data  # noqa: B018
        return self._label

    @label.setter
    def label(self, value: str | None) -> None:
        self.data  # noqa: B018  # else what is read later would take its place
        self._label, self.is_labelled = value, True

    @property
    def is_new(self) -> bool:
        self.data  # noqa: B018
        return self.id is None

    # What the flow does.

    @property
    def is_loaded(self) -> bool:
        return self._data is not None

    def fill(self, data: dict[str, Any], label: str | None = None) -> None:
        """It was read: this is what it holds."""
        self._data = data
        self._label, self.is_labelled = label, False
        self._before = encoded(data)

    @property
    def named(self) -> str | None:
        """Its label, without a mark that the application has seen it."""
        return self._label

    @property
    def is_changed(self) -> bool:
        """Whether there is something to write. Raises SessionError for what is no JSON."""
        return self.now() is not None or self.is_labelled

    @property
    def held(self) -> dict[str, Any]:
        """What it holds, without a mark that the application has seen it; empty if it is not loaded."""
        return {} if self._data is None else self._data

    @property
    def is_kept(self) -> bool:
        return self.stays or bool(self.held)

    def before(self) -> dict[str, Any]:
        """What it held when it was read."""
        before: dict[str, Any] = json.loads(self._before)
        return before

    def now(self) -> bytes | None:
        """What it holds as text, if that has changed; None if not. Raises SessionError for what is no JSON."""
        if self._data is None:
            return None
        text = encoded(self._data)
        return None if text == self._before else text

    def written(self, data: dict[str, Any], version: int | None) -> None:
        """It was saved so."""
        self.fill(data, self._label)
        self.version = version
        self.is_ended = self.is_rotated = self.renews = False

    def forget(self) -> None:
        """It is a new one: what the client has leads nowhere."""
        self.id = self.key = self.version = None
        self.born = self.seen = 0
        self.is_ended = self.is_rotated = self.is_moved = self.is_fresh = False

    def merged(self, theirs: Text) -> dict[str, Any]:
        """What another request has written, with what was changed here since: by name, and the later save wins."""
        if not self.is_labelled:
            self._label = theirs.label
        before, mine = self.before(), self.held
        merged = dict(theirs.data)
        for name in before.keys() | mine.keys():
            if name not in mine:
                merged.pop(name, None)
            elif name not in before or encoded(before[name]) != encoded(mine[name]):
                merged[name] = mine[name]
        return merged

    def __repr__(self) -> str:
        if self._data is None:
            return "<Session, not loaded>"
        return f"<Session {'new' if self.id is None else (self.key or '')[:8]}, {len(self._data)} names>"


class Entry(NamedTuple):
    """A session in the list of a user's.

    - `id`: names it for `Gatekeeper.revoke`; it is no secret
    - `born`, `seen`: when it was begun, and last written (seconds since the epoch)
    """

    id: str
    born: int
    seen: int
    label: str | None


class Text(NamedTuple):
    """What the text of a session says."""

    data: dict[str, Any]
    born: int
    seen: int
    label: str | None
    moved: str | None
    """The key under which it is to be found now, while its old id is still good."""


_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encoded(value: Any) -> bytes:
    """The JSON of a value. Raises SessionError, which says what is none."""
    try:
        return _encode(value).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise SessionError(_wrong(value)) from None


def copied(data: dict[str, Any]) -> dict[str, Any]:
    """A copy that shares nothing with it."""
    copy: dict[str, Any] = json.loads(_encode(data))
    return copy


def _wrong(value: Any) -> str:
    expected = (
        "expected what JSON can hold: strings, numbers that are finite, lists, dictionaries, true, false, None"
    )
    if isinstance(value, Mapping):
        for name, held in value.items():
            try:
                _encode({name: held}).encode("utf-8")
            except (TypeError, ValueError, RecursionError):
                return f"session[{str(name)[:64]!r}]: {expected}; it is, or holds, something else"
    return f"session: {expected}"


def write_text(text: Text) -> bytes:
    """A session as it is stored."""
    document: dict[str, Any] = {"v": _FORMAT, "born": text.born, "seen": text.seen}
    if text.moved is not None:
        document["moved"] = text.moved
    if text.label is not None:
        document["label"] = text.label[:LONGEST_LABEL]
    document["data"] = text.data
    return encoded(document)


def read_text(stored: bytes) -> Text | None:
    """What is stored of a session; None if it is nothing that we wrote."""
    try:
        document = json.loads(stored, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("v") != _FORMAT:
        return None
    data, born, seen = document.get("data"), document.get("born"), document.get("seen")
    label, moved = document.get("label"), document.get("moved")
    if not isinstance(data, dict) or type(born) is not int or type(seen) is not int:
        return None
    if not isinstance(label, str | None) or not isinstance(moved, str | None):
        return None
    return Text(data, born, seen, label, moved)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
