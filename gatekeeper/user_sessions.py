"""The sessions of a policy: made of its settings, listed and revoked by user."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from gatekeeper.commands import SessionStore, anobody, arun, nobody, run
from gatekeeper.errors import SessionError, SettingsError
from gatekeeper.http.message import Request
from gatekeeper.keys import KeyRingError, Ring
from gatekeeper.sessions.cookies import Cookie
from gatekeeper.sessions.flow import Sessions, StoredSessions, TokenSessions
from gatekeeper.sessions.state import Entry, Session
from gatekeeper.sessions.tokens import Tokens
from gatekeeper.sessions.vouchers import LIFE, PURPOSE, TYPE, Vouchers
from gatekeeper.settings.session import SessionSettings

ISSUER: Final = "gatekeeper"


class UserSessions:
    """The sessions of a policy, by their users: `Gatekeeper.sessions`.

    Each method has an awaiting twin, whose name begins with an a. They raise StoreError while the store does not
    answer, and SessionError for what tokens cannot do: nobody knows how many there are.

    - `flow`: what loads and saves them
    """

    def __init__(self, flow: Sessions) -> None:
        self.flow = flow

    def of(self, user: str) -> list[Entry]:
        """The sessions of a user, the ones seen last first."""
        return run(self._stored().listed(str(user)), nobody)

    async def aof(self, user: str) -> list[Entry]:
        return await arun(self._stored().listed(str(user)), anobody)

    def revoke(self, user: str, id: str | None = None, *, but: Session | None = None) -> int:
        """End sessions of a user: the one of that `id` (as `of` lists it), or all, or all but one.

        How many there were. Of tokens, which need a store for it, that is not known: 0.
        """
        return run(self.flow.revoke(str(user), id, but), nobody)

    async def arevoke(self, user: str, id: str | None = None, *, but: Session | None = None) -> int:
        return await arun(self.flow.revoke(str(user), id, but), anobody)

    def token(self, session: Session) -> str:
        """A session as it is now as a token, for a client that sends it in `Authorization: Bearer`.

        Raises SessionError unless `session.kind = "token"`.
        """
        if not isinstance(self.flow, TokenSessions):
            raise SessionError('session: expected session.kind = "token"')
        return self.flow.token(session)

    def open(self, request: Request, *, blocking: bool) -> Session:
        """The session of a request that no middleware has opened; for frameworks."""
        return self.flow.open(request, blocking=blocking)

    def sweep(self) -> int:
        """Drop what has expired from the store; how many sessions that were."""
        return 0 if self.flow.store is None else self.flow.store.sweep()

    async def asweep(self) -> int:
        return 0 if self.flow.store is None else await self.flow.store.asweep()

    def _stored(self) -> StoredSessions:
        if not isinstance(self.flow, StoredSessions):
            raise SessionError(
                'session: tokens are with their clients, and cannot be listed; see session.kind = "store"'
            )
        return self.flow


def session_tokens(ring: Ring, *, longest: int, encrypt: bool = False) -> Tokens:
    """What writes and reads sessions as tokens, each for `longest` seconds at most. Raises MissingExtra."""
    return Tokens(ring, issuer=ISSUER, audience="session", longest=longest, encrypt=encrypt)


def vouchers_of(ring: Ring, clock: Callable[[], float] = time.time) -> Vouchers:
    """What a gateway writes, and the applications behind it read. Raises MissingExtra."""
    tokens = Tokens(ring, issuer=ISSUER, audience=PURPOSE, longest=LIFE, purpose=PURPOSE, typ=TYPE)
    return Vouchers(tokens, clock)


def sessions_of(
    settings: SessionSettings,
    ring: Ring,
    store: SessionStore | None,
    *,
    user: str,
    warn: Callable[[str], object],
    clock: Callable[[], float] = time.time,
) -> UserSessions:
    """The sessions that settings describe. `user` is the member that says whose one is. Raises SettingsError."""
    written = settings.cookie
    common: dict[str, Any] = {
        "cookie": Cookie(
            written.called,
            written.path,
            written.domain,
            written.secure,
            written.httponly,
            written.samesite,
            written.partitioned,
            written.persistent,
        ),
        "idle": -(-settings.idle // 10**9),
        "absolute": -(-settings.absolute // 10**9),
        "user": user,
        "store": store,
        "empties": settings.on_error == "empty",
        "early": settings.load == "early",
        "clock": clock,
        "draw": os.urandom,
        "warn": warn,
    }
    if settings.kind == "store":
        if store is None:
            raise SettingsError(["session.store: expected a store"])
        grace = -(-settings.grace // 10**9)
        return UserSessions(StoredSessions(ring, most=settings.most_per_user, grace=grace, **common))
    try:
        tokens = session_tokens(ring, longest=common["absolute"], encrypt=settings.encrypt)
    except KeyRingError as error:
        raise SettingsError([f"keys: {error}"]) from None
    return UserSessions(TokenSessions(tokens, bearer=settings.bearer, **common))
