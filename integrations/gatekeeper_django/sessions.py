"""Sessions for Django: `SESSION_ENGINE = "gatekeeper_django.sessions"`."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Final

from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError
from django.contrib.sessions.exceptions import SessionInterrupted
from django.core.exceptions import ImproperlyConfigured
from django.utils.asyncio import async_unsafe
from django.utils.crypto import get_random_string

from gatekeeper.commands import Steps, anobody, arun, nobody, run
from gatekeeper.errors import SessionError, StoreError
from gatekeeper.http.fields import Fields
from gatekeeper.sessions.cookies import joined
from gatekeeper.sessions.flow import Sessions, TokenSessions
from gatekeeper.sessions.state import Entry, Session
from gatekeeper.user_sessions import UserSessions
from gatekeeper_django.conf import SETTING, policy

_KEY: Final = re.compile(r"[A-Za-z0-9._-]{8,32768}")
"""What a cookie of ours can hold."""


class SessionStore(SessionBase):  # type: ignore[misc]  # Django has no hints of its own
    """Django's session over one of Gatekeeper's.

    `session_key` is the text that the cookie carries: the signed id, or the token. What was put into a list or a
    dictionary within the session counts as a change, without `modified = True`. Changes of requests that run at the
    same time are merged by name. The data is JSON, whatever SESSION_SERIALIZER is.

    Raises ImproperlyConfigured unless GATEKEEPER has a `session`. Using it raises StoreError while the store does
    not answer, unless `session.on_error` is "empty"; SessionError for what JSON cannot hold.
    """

    _session_key: str | None

    failure: StoreError | None = None
    """Why the store could not be used."""

    takes_parts = False
    """Whether what writes the cookie writes several for a token that is longer than one."""

    def __init__(self, session_key: str | None = None) -> None:
        _sessions()  # what is wrong with the settings is told at once
        self._core: Session | None = None
        super().__init__(session_key)

    # Whether it changed

    @property
    def modified(self) -> bool:
        """Whether it is to be saved. May be set, as of Django's own sessions."""
        held = self.__dict__.get("_session_cache")
        if self._modified or held is None:
            return self._modified
        core = self._core
        return bool(held) if core is None else core.held is not held or core.now() is not None

    @modified.setter
    def modified(self, value: bool) -> None:
        self._modified = value

    @property
    def label(self) -> str | None:
        """A text by which its user knows it again in a list, such as the browser's name. May be set."""
        self._session  # noqa: B018  # loads it
        return self._opened().label

    @label.setter
    def label(self, value: str | None) -> None:
        self._session  # noqa: B018
        self._opened().label = value
        self.modified = True

    @property
    def is_moved(self) -> bool:
        """Whether the client was told another key meanwhile, and this one is good for a while (`session.grace`)."""
        return self._core is not None and self._core.is_moved

    def adopt(self, core: Session) -> None:
        """Take a session of the same request that was loaded already."""
        if core.is_loaded and core.came:
            core.stays = True
            self._core = core

    async def preload(self) -> None:
        """Read it, if `session.load` is "early", so that it can be used without `await`.

        What is wrong with its store is told when it is used.
        """
        flow = _sessions().flow
        if flow.early and self.session_key is not None:
            await arun(flow.load(self._opened()), anobody)

    # The contract of SessionBase: each method, and its awaiting twin, is a driver of the same steps.

    def load(self) -> dict[str, Any]:
        return self._run(self._load(), waits=not self._opened().is_loaded)  # type: ignore[no-any-return]

    async def aload(self) -> dict[str, Any]:
        return await self._arun(self._load())  # type: ignore[no-any-return]

    def exists(self, session_key: str | None) -> bool:
        return self._run(self._find(session_key))  # type: ignore[no-any-return]

    async def aexists(self, session_key: str | None) -> bool:
        return await self._arun(self._find(session_key))  # type: ignore[no-any-return]

    def create(self) -> None:
        self._run(self._create())

    async def acreate(self) -> None:
        await self._arun(self._create())

    def save(self, must_create: bool = False) -> None:
        self._run(self._save(must_create))

    async def asave(self, must_create: bool = False) -> None:
        await self._arun(self._save(must_create))

    def delete(self, session_key: str | None = None) -> None:
        self._run(self._delete(session_key))

    async def adelete(self, session_key: str | None = None) -> None:
        await self._arun(self._delete(session_key))

    def cycle_key(self) -> None:
        self._run(self._cycle())

    async def acycle_key(self) -> None:
        await self._arun(self._cycle())

    @classmethod
    def clear_expired(cls) -> None:
        _sessions().sweep()

    @classmethod
    async def aclear_expired(cls) -> None:
        await _sessions().asweep()

    def get_session_cookie_age(self) -> int:
        age: int = super().get_session_cookie_age()
        return min(age, _sessions().flow.idle) if policy().slides else age

    def _validate_session_key(self, key: object) -> bool:
        return isinstance(key, str) and _KEY.fullmatch(key) is not None

    # The steps

    def _load(self) -> Steps[dict[str, Any]]:
        flow, core = _sessions().flow, self._opened()
        yield from flow.load(core)
        if core.failure is not None:
            raise core.failure
        if core.id is None and not core.is_cut:
            self._session_key = None  # a key that we did not give is never taken on
        if core.renews and policy().slides:
            self.modified = True
        return core.held

    def _find(self, key: str | None) -> Steps[bool]:
        if not self._validate_session_key(key):
            return False
        core = _session_of(key)
        yield from _sessions().flow.load(core)
        if core.failure is not None:
            raise core.failure
        return core.id is not None

    def _create(self) -> Steps[None]:
        self._core, self._session_key = None, None
        yield from self._save(must_create=True)
        self.modified = True

    def _save(self, must_create: bool) -> Steps[None]:
        if must_create:
            if (yield from self._find(self.session_key)):
                raise CreateError
            self._core, self._session_key = None, None
        yield from self._fetch()
        yield from self._write()

    def _fetch(self) -> Steps[None]:
        """Have the session loaded, below what was put in its place."""
        core = self._opened()
        if not core.is_loaded:
            had = self.session_key
            yield from self._load()
            if self.session_key != had:
                raise UpdateError
        elif core.failure is not None:
            raise core.failure
        held = self.__dict__.setdefault("_session_cache", core.held)
        if held is not core.held:
            core.held.clear()
            core.held.update(held)

    def _write(self) -> Steps[None]:
        flow, core = _sessions().flow, self._opened()
        core.renews = True  # Django asks for a save once it wants one, to move the end of the session as well
        value = self._carried(flow, (yield from flow.save(core)))
        if core.is_gone:
            raise UpdateError
        if value:
            self._session_key = value
        elif self.session_key is None and not self.takes_parts:
            # It passes for empty, for its store does not answer. Django's middleware writes a key all the same.
            self._session_key = get_random_string(32)
        self._session_cache = core.held

    def _delete(self, key: str | None) -> Steps[None]:
        is_own = key is None or key == self.session_key
        key = self.session_key if key is None else key
        if not self._validate_session_key(key):
            return
        core = self._core if is_own else None
        if core is None or not core.is_loaded:
            core = _session_of(key)
        elif core.failure is None:
            self._session_cache = dict(self.__dict__.get("_session_cache", core.held))  # what it held is read still
        flow = _sessions().flow
        yield from flow.load(core)
        if core.failure is not None:
            raise core.failure
        if core.id is not None:
            core.stays = False
            core.end()
            yield from flow.save(core)
        if is_own:
            self._core = None
            if isinstance(flow, TokenSessions):  # the key would be as good as before
                self._session_key = None
                self._session_cache = {}
                self.modified = True

    def _cycle(self) -> Steps[None]:
        self.accessed = True
        if self.session_key is not None:
            with suppress(UpdateError):  # it is none: there is nothing to be rotated
                yield from self._fetch()
        if self.session_key is None:
            yield from self._create()
            return
        flow, core = _sessions().flow, self._opened()
        core.is_rotated = True
        try:
            yield from self._write()
        except UpdateError:
            # Somebody else has logged in with it, or out. What nobody's user was known for may begin anew.
            if flow.owner(core.held) is not None:
                raise SessionInterrupted(
                    "The request's session was deleted before the request completed."
                ) from None
            self._session_cache = core.held
            yield from self._create()
        self.modified = True

    def _carried(self, flow: Sessions, fields: Fields) -> str | None:
        """What the fields of a response have the client send from now on, if they say so."""
        pairs = [value.partition(b";")[0].decode("ascii") for name, value in fields if name == b"set-cookie"]
        if len(pairs) > 1 and not self.takes_parts:
            raise SessionError(
                "session: expected a token that one cookie can hold, for Django's SessionMiddleware sets one; let "
                "gatekeeper_django.SessionMiddleware stand in its place, keep less in the session, or let a store "
                'hold it (session.kind = "store")'
            )
        return next(joined(flow.cookie, pairs), None)

    # How they are driven

    def _run(self, steps: Steps[Any], *, waits: bool = True) -> Any:
        drive = _run_waiting if waits and not _sessions().flow.is_local else run
        try:
            return drive(steps, nobody)
        except StoreError as error:
            self.failure = error
            raise

    async def _arun(self, steps: Steps[Any]) -> Any:
        try:
            return await arun(steps, anobody)
        except StoreError as error:
            self.failure = error
            raise

    def _opened(self) -> Session:
        if self._core is None:
            self._core = _session_of(self.session_key)
        return self._core


_run_waiting = async_unsafe(run)
"""On an event loop it would hold up all other requests: Django refuses that, as it does of its database."""


def _sessions() -> UserSessions:
    found = policy().keeper.sessions
    if found is None:
        raise ImproperlyConfigured(
            f'{SETTING}: session: expected {{"kind": "store"}} or {{"kind": "token"}}, for SESSION_ENGINE names '
            "gatekeeper_django.sessions"
        )
    return found


def _session_of(key: str | None) -> Session:
    flow = _sessions().flow
    core = Session(flow, [] if key is None else [f"{flow.cookie.name}={key}"], blocking=True)
    core.stays = True
    return core


# A user's sessions


def of(user: Any) -> list[Entry]:
    """The sessions of a user (one of Django's, or a primary key), the ones seen last first.

    Raises StoreError, and SessionError for tokens: they are with their clients.
    """
    return _sessions().of(_name(user))


async def aof(user: Any) -> list[Entry]:
    """As `of`, awaiting the store."""
    return await _sessions().aof(_name(user))


def revoke(user: Any, id: str | None = None, *, but: SessionStore | None = None) -> int:
    """End sessions of a user: the one of that `id` (as `of` lists it), or all, or all but one (`request.session`).

    How many there were. Of tokens, which need a store for it, that is not known: 0. Raises StoreError, and
    SessionError.
    """
    if but is None:
        return _sessions().revoke(_name(user), id)
    but._session  # noqa: B018  # loads it
    found = _sessions().revoke(_name(user), id, but=but._opened())
    but.modified = True
    return found


async def arevoke(user: Any, id: str | None = None, *, but: SessionStore | None = None) -> int:
    """As `revoke`, awaiting the store."""
    if but is None:
        return await _sessions().arevoke(_name(user), id)
    await but._aget_session()
    found = await _sessions().arevoke(_name(user), id, but=but._opened())
    but.modified = True
    return found


def _name(user: Any) -> str:
    """A user as sessions name it."""
    meta = getattr(user, "_meta", None)
    return str(user) if meta is None else str(meta.pk.value_to_string(user))
