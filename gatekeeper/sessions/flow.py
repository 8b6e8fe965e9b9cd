"""The way of a session through a request, as generators that ask its store and return: load, save, list, revoke."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Final

from itsdangerous import BadSignature, Signer

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionStore, Steps
from gatekeeper.errors import SessionError, StoreError
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import Request
from gatekeeper.keys import Ring
from gatekeeper.sessions.cookies import Cookie, dropped, joined, written
from gatekeeper.sessions.state import LONGEST_LABEL, Entry, Session, Text, copied, read_text, write_text
from gatekeeper.sessions.tokens import TokenError, Tokens, is_canonical

_ATTEMPTS: Final = 16
"""So often a session is written again that others keep changing."""

_LONGEST_OWNER: Final = 256
_ID_BYTES: Final = 32
_MOST_TRIED: Final = 4  # cookies of the same name
_VARY: Final = {"cookie": (b"vary", b"Cookie"), "bearer": (b"vary", b"Authorization")}


class Sessions:
    """What sessions of both kinds have in common.

    - `cookie`: what carries them
    - `idle`, `absolute`: seconds that they live after they were last written, and in all
    - `user`: the name of the member that says whose a session is
    - `store`: where they live; of tokens, where it is kept which are revoked; None if nowhere
    - `empties`: whether a session is empty while its store does not answer, in place of an error
    - `early`: whether they are loaded before the application asks, where that has to be awaited
    - `clock`: tells the seconds since the epoch
    - `draw`: makes so many random bytes, fit for secrets
    - `warn`: is told what an operator should know
    """

    def __init__(
        self,
        *,
        cookie: Cookie,
        idle: int,
        absolute: int,
        user: str = "sub",
        store: SessionStore | None,
        empties: bool = False,
        early: bool = False,
        clock: Callable[[], float],
        draw: Callable[[int], bytes],
        warn: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.cookie = cookie
        self.idle = idle
        self.absolute = absolute
        self.user = user
        self.store = store
        self.counts: Counter[str] = Counter()
        """How often a session that came was none, by the reason: "forged", "unknown", "expired" …"""
        self.empties = empties
        self.early = early
        self.is_local = store is None or store.local
        """Whether loading and saving never wait for another machine."""
        self.session_class = Session
        """What `open` makes; a framework's own has more to it."""
        self.lives: Callable[[Mapping[str, Any], int], int] | None = None
        """For how many seconds a session lives that holds this and was last written then; None: `idle`, each."""
        self._clock = clock
        self._draw = draw
        self.warn = warn
        self._fails = False

    def open(self, request: Request, *, blocking: bool) -> Session:
        """The session of a request, not loaded yet. `blocking`: whether its home may wait for a store."""
        came = request.fields("cookie")
        if came and self.cookie.name not in "".join(came):
            came = []
        return self.session_class(self, came, blocking=blocking)

    def owner(self, data: Mapping[str, Any]) -> str | None:
        """Whose a session with this is."""
        user = data.get(self.user)
        if isinstance(user, bool) or not isinstance(user, str | int):
            return None
        return str(user)[:_LONGEST_OWNER] or None

    def load(self, session: Session) -> Steps[None]:
        """Read a session. What came and is none leaves it empty, and is counted."""
        if not session.is_loaded:
            session.is_coming = True
            yield from self._read(session)

    def _read(self, session: Session) -> Steps[None]:
        # Two may wait for it at the same time: the later one leaves alone what the first has made of it since.
        raise NotImplementedError

    def save(self, session: Session) -> Steps[Fields]:
        """Write a session if it changed, or is worth renewing: the fields to add to the response.

        Once; what is changed later is lost. Raises SessionError for what cannot be stored; and StoreError where the
        store does not answer, unless sessions may be empty then.
        """
        session.is_written = True
        if not session.is_loaded:
            return []
        changed = session.is_changed
        fields: Fields = [_VARY[session.source]] if session.accessed else []
        if session.failure is not None:
            return fields
        if session.is_cut:
            if changed:
                self.warn("a session was changed while its store did not answer: the change is lost")
            return fields
        if changed or session.is_ended or session.is_rotated or session.renews:
            try:
                fields += yield from self._write(session, changed)
            except StoreError as error:
                self._heed(error)
                if not self.empties:
                    session.failure = error
                    raise
                self.warn(f"a session was not written: {error}")
        return fields

    def revoke(self, owner: str, id: str | None = None, but: Session | None = None) -> Steps[int]:
        """End the sessions of a user: the one of that id, or all but one. How many there were, as far as is known.

        Raises StoreError, and SessionError where that cannot be.
        """
        raise NotImplementedError

    def keep(self, session: Session) -> Steps[None]:
        """Write what was changed since the head was sent, as in a WebSocket, where the client need not be told."""
        if not session.is_written or not session.is_changed:
            return
        if session.version is None or session.is_ended or session.is_rotated:
            self.warn("a session was changed when its client could not be told any more: the change is lost")
            return
        session.is_written = False
        try:
            yield from self.save(session)
        except StoreError as error:
            self.warn(f"a session was not written: {error}")

    def _write(self, session: Session, changed: bool) -> Steps[Fields]:
        raise NotImplementedError

    def _carried(self, session: Session) -> list[str]:
        """What came of it in cookies. Those that a client repeats are not all put together."""
        return list(islice(joined(self.cookie, session.came), _MOST_TRIED))

    def _cookie_of(self, session: Session) -> Cookie:
        persistent = session.persistent
        return self.cookie if persistent is None else self.cookie._replace(persistent=persistent)

    def _now(self) -> int:
        return int(self._clock())

    def _life(self, data: Mapping[str, Any], seen: int) -> int:
        return self.idle if self.lives is None else self.lives(data, seen)

    def _is_over(self, data: Mapping[str, Any], born: int, seen: int, now: int) -> bool:
        return now >= seen + self._life(data, seen) or now >= born + self.absolute

    def _is_worth_renewing(self, data: Mapping[str, Any], seen: int, now: int) -> bool:
        """A write for each request would be one too many; a session seen lately lives nearly as long."""
        return (now - seen) * 10 >= self._life(data, seen)

    def _left(self, data: Mapping[str, Any], born: int, now: int) -> int:
        return max(1, min(self._life(data, now), born + self.absolute - now))

    def _changes_hands(self, session: Session) -> bool:
        """Whether it has another user, and somebody may know its id from before."""
        return not session.is_fresh and self.owner(session.held) != self.owner(session.before())

    def _is_login(self, session: Session, data: Mapping[str, Any]) -> bool:
        """Whether somebody has just logged in: then the session begins anew, as far as its age goes."""
        return self.owner(data) not in (None, self.owner(session.before()))

    def _heed(self, error: StoreError | None) -> None:
        """Tell when the store ceases to do as it is asked, and when it does again: a line each."""
        if error is not None:
            self.counts["store"] += 1
            if not self._fails:
                self._fails = True
                self.warn(f"the store of sessions fails: {error}")
        elif self._fails:
            self._fails = False
            self.warn("the store of sessions answers again")

    def _fail(self, session: Session, error: StoreError) -> None:
        """The store did not answer."""
        self._heed(error)
        session.fill({})
        if self.empties:
            session.is_cut = True
        else:
            session.failure = error

    def _reject(self, session: Session, reason: str) -> None:
        self.counts[reason] += 1
        session.fill({})

    def _lose(self, session: Session) -> None:
        """It was ended elsewhere, or has expired, since it was read."""
        self.counts["gone"] += 1
        session.is_gone = True


class StoredSessions(Sessions):
    """Sessions of which the client has an id, signed, and a store the rest, by the hash of the id.

    - `ring`: signs the ids
    - `most`: how many sessions a user may have; the ones not seen for longest make room
    - `grace`: for so many seconds an id that was rotated still leads to the session; 0: it is dead at once
    """

    store: SessionStore

    def __init__(self, ring: Ring, *, most: int | None = None, grace: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.most = most
        self.grace = grace
        self._ring = ring
        self._signers: tuple[int, Signer] | None = None

    def _read(self, session: Session) -> Steps[None]:
        found = self._known(session)
        if found is None:
            self._reject(session, "forged")
            return
        key = first = _digest(found)
        text: Text | None = None
        version, owner = 0, None
        for _ in range(2):  # it may have moved
            reply = yield Load(self.store, key)
            if session.is_loaded:
                return
            if isinstance(reply, StoreError):
                self._fail(session, reply)
                return
            self._heed(None)
            if reply is not None:
                version = reply.version
                text = read_text(reply.data)
            if reply is None or text is None or text.moved is None:
                break
            key, owner, text = text.moved, self.owner(text.data), None
        if text is not None and key != first and self.owner(text.data) != owner:
            text = None  # who has logged in since is not who had that id: it may have been planted
        if text is None:
            self._reject(session, "unknown")
            return
        now = self._now()
        if self._is_over(text.data, text.born, text.seen, now):
            self._reject(session, "expired")
            return
        session.id, session.key, session.version = found, key, version
        session.born, session.seen = text.born, text.seen
        session.is_moved = key != first
        session.renews = self._is_worth_renewing(text.data, text.seen, now)
        session.fill(text.data, text.label)

    def _write(self, session: Session, changed: bool) -> Steps[Fields]:
        now = self._now()
        if session.is_ended or not session.is_kept:
            if session.key is not None:
                _raised((yield Delete(self.store, session.key)))
            session.forget()
            if not session.is_kept:
                session.written({}, None)
                return dropped(self.cookie) if session.came else []
        if session.key is None:
            session.born = now
            yield from self._begin(session, session.held, (yield from self._put(session, session.held, now)), now)
        elif self._changes_hands(session) or (session.is_rotated and not session.is_moved):
            # (Who has an old id gets no new one by it: the session has one already, and not everybody may know it.)
            if not (yield from self._rotate(session, now)):
                if self.owner(session.before()) is not None or not self._is_login(session, session.held):
                    return dropped(self.cookie)
                # Who has just logged in is in, though a login beside it (a form that was sent twice) has ended what
                # was there: with what this request has put in, and nothing of that.
                data = session.merged(Text({}, now, now, None, None))
                session.forget()
                session.is_gone, session.born = False, now
                yield from self._begin(session, data, (yield from self._put(session, data, now)), now)
        else:
            is_login = self._is_login(session, session.held)
            if is_login:
                session.born = now
            if not (yield from self._update(session, now, changed)):
                return dropped(self.cookie)
            if is_login:
                yield from self._make_room(session)
        if session.is_moved:
            return []  # another request was told the new id
        assert session.id is not None
        value = self._signer().sign(session.id).decode("ascii")
        return written(self._cookie_of(session), value, self._left(session.held, session.born, now))

    def _put(self, session: Session, data: dict[str, Any], now: int) -> Steps[tuple[str, str, int]]:
        """A new record: its id, key and version. The id is ours: who planted one that came would know it."""
        ttl, owner = self._left(data, session.born, now), self.owner(data)
        text = write_text(Text(data, session.born, now, session.named, None))
        while True:
            id = urlsafe_b64encode(self._draw(_ID_BYTES)).rstrip(b"=").decode("ascii")
            key = _digest(id)
            reply = _raised((yield Save(self.store, key, text, version=None, ttl=ttl, owner=owner)))
            if isinstance(reply, int):
                return id, key, reply

    def _begin(self, session: Session, data: dict[str, Any], found: tuple[str, str, int], now: int) -> Steps[None]:
        """It is to be found under a new id."""
        session.id, session.key, version = found
        session.seen, session.is_moved, session.is_fresh = now, False, True
        session.written(data, version)
        yield from self._make_room(session)

    def _make_room(self, session: Session) -> Steps[None]:
        """End what its user has beyond `most`."""
        owner = self.owner(session.held)
        if owner is not None and self.most is not None:
            entries = yield from self.listed(owner)
            others = [entry for entry in entries if entry.id != session.key]
            for entry in others[max(0, self.most - 1) :]:
                _raised((yield Delete(self.store, entry.id)))

    def _update(self, session: Session, now: int, changed: bool) -> Steps[bool]:
        """Write what changed over what is there. False if it is gone: then it stays so."""
        data = session.held
        for _ in range(_ATTEMPTS):
            assert session.key is not None
            text = write_text(Text(data, session.born, now, session.named, None))
            ttl = self._left(data, session.born, now)
            owner = self.owner(data)
            reply = _raised(
                (yield Save(self.store, session.key, text, version=session.version, ttl=ttl, owner=owner))
            )
            if isinstance(reply, int):
                session.seen = now
                session.written(data, reply)
                return True
            if reply is not None:
                found = yield from self._follow(session.key, reply)
                if found is not None:
                    session.is_moved = session.is_moved or found[0] != session.key
                    if not changed:
                        return True  # another request has renewed it, or told the client its new id
                    session.key, session.version, theirs = found
                    data = session.merged(theirs)
                    continue
            self._lose(session)
            return False
        raise StoreError("the session was changed by other requests again and again")

    def _rotate(self, session: Session, now: int) -> Steps[bool]:
        """Give it a new id. False if it is gone.

        The client is told it once the old one is dead; with a grace, that leads there for a while, as long as the
        session belongs to whom it belonged. One of the two is always on its user's list: who ends all that are
        there misses none.
        """
        old, known, data = session.key, session.version, session.held
        assert old is not None
        if self._is_login(session, data):
            session.born = now
        before = session.before()
        whose = {self.user: before[self.user]} if self.user in before else {}
        id, key, version = yield from self._put(session, data, now)
        if not self.grace:
            reply = _raised((yield Delete(self.store, old)))
            theirs = None if reply is None else read_text(reply.data)
            if theirs is not None and theirs.moved is None and reply.version != known:
                data = session.merged(theirs)
                text = write_text(Text(data, session.born, now, session.named, None))
                ttl, owner = self._left(data, session.born, now), self.owner(data)
                version = _raised((yield Save(self.store, key, text, version=version, ttl=ttl, owner=owner)))
            if theirs is None or theirs.moved is not None or not isinstance(version, int):
                _raised((yield Delete(self.store, key)))
                self._lose(session)
                return False
            yield from self._begin(session, data, (id, key, version), now)
            return True
        for _ in range(_ATTEMPTS):
            pointer = write_text(Text(whose, session.born, now, None, key))
            reply = _raised((yield Save(self.store, old, pointer, version=known, ttl=self.grace)))
            if isinstance(reply, int):
                yield from self._begin(session, data, (id, key, version), now)
                return True
            theirs = None if reply is None else read_text(reply.data)
            if theirs is None or theirs.moved is not None:  # ended, or rotated, by another request
                break
            known, data = reply.version, session.merged(theirs)
            text = write_text(Text(data, session.born, now, session.named, None))
            ttl, owner = self._left(data, session.born, now), self.owner(data)
            version = _raised((yield Save(self.store, key, text, version=version, ttl=ttl, owner=owner)))
        _raised((yield Delete(self.store, key)))
        self._lose(session)
        return False

    def listed(self, owner: str) -> Steps[list[Entry]]:
        """The sessions of a user, those seen last first. Raises StoreError."""
        found = _raised((yield Owned(self.store, owner)))
        now = self._now()
        entries = []
        for key, record in found:
            text = read_text(record.data)
            if text is not None and text.moved is None and not self._is_over(text.data, text.born, text.seen, now):
                entries.append(Entry(key, text.born, text.seen, text.label))
        return sorted(entries, key=lambda entry: entry.seen, reverse=True)

    def revoke(self, owner: str, id: str | None = None, but: Session | None = None) -> Steps[int]:
        count = 0
        for _ in range(_ATTEMPTS):
            found = _raised((yield Owned(self.store, owner)))
            is_settled = True
            for key, _ in found:
                if (id is None or key == id) and (but is None or key != but.key):
                    reply = _raised((yield Delete(self.store, key)))
                    count += reply is not None
                    # If it was not there any more, or leads elsewhere, it may have been given a new id meanwhile.
                    text = None if reply is None else read_text(reply.data)
                    is_settled = is_settled and text is not None and text.moved is None
            if is_settled:
                break
        return count

    def _follow(self, key: str, record: Record) -> Steps[tuple[str, int, Text] | None]:
        """Where a session is now, whose record was changed: (key, version, text)."""
        text = read_text(record.data)
        if text is not None and text.moved is not None:
            key = text.moved
            record = _raised((yield Load(self.store, key)))
            text = None if record is None else read_text(record.data)
        return None if text is None or text.moved is not None else (key, record.version, text)

    def _known(self, session: Session) -> str | None:
        """The id that came, if we signed it. Of several the first that is ours: others may have been planted."""
        signer = self._signer()
        for value in self._carried(session):
            if all(map(is_canonical, value.split("."))):
                with suppress(BadSignature, UnicodeError):
                    return signer.unsign(value).decode("ascii")
        return None

    def _signer(self) -> Signer:
        version = self._ring.version
        if self._signers is None or self._signers[0] != version:
            keys = self._ring.secrets("session-id")
            self._signers = version, Signer(keys, salt=b"gatekeeper", digest_method=hashlib.sha256)
        return self._signers[1]


class TokenSessions(Sessions):
    """Sessions that the client holds itself, as a token that nobody can forge.

    No store is asked; so a session that was ended, or an older state of it, is good again for whoever kept a copy,
    until it expires. With a `store` it is kept there which are revoked.

    - `tokens`: signs them, or encrypts
    - `bearer`: whether they may come in `Authorization: Bearer` (RFC 6750), too
    """

    def __init__(self, tokens: Tokens, *, bearer: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.bearer = bearer
        self._tokens = tokens

    def open(self, request: Request, *, blocking: bool) -> Session:
        if self.bearer:
            for value in request.fields("authorization"):
                scheme, _, token = value.partition(" ")
                if scheme.lower() == "bearer":
                    return self.session_class(self, [token.strip()], blocking=blocking, source="bearer")
        return super().open(request, blocking=blocking)

    def _read(self, session: Session) -> Steps[None]:
        values = session.came if session.source == "bearer" else self._carried(session)
        reason, claims = "unknown", None
        for value in values:
            try:
                claims = self._tokens.open(value, self._now())
                break
            except TokenError as error:
                reason = error.reason
        if claims is None:
            if values:
                self._reject(session, reason)
            else:
                session.fill({})
            return
        data, born, seen, id = claims.get("data"), claims.get("born"), claims["iat"], claims.get("sid")
        label = claims.get("label")
        if not (
            isinstance(data, dict) and type(born) is int and isinstance(id, str) and isinstance(label, str | None)
        ):
            self._reject(session, "foreign")
            return
        now = self._now()
        if self._is_over(data, born, seen, now):
            self._reject(session, "expired")
            return
        if self.store is not None and (yield from self._is_revoked(session, id, self.owner(data), seen)):
            return
        session.id, session.key = id, _digest(f"sid:{id}")
        session.born, session.seen = born, seen
        session.renews = self._is_worth_renewing(data, seen, now) or claims.is_old
        session.fill(copied(data), label)

    def _is_revoked(self, session: Session, id: str, owner: str | None, seen: int) -> Steps[bool]:
        """Whether it is, or cannot be told: then the session is settled already."""
        try:
            is_marked = yield from self._is_marked(id, owner, seen)
        except StoreError as error:
            if not session.is_loaded:
                self._fail(session, error)
            return True
        if is_marked and not session.is_loaded:
            self._reject(session, "revoked")
        return session.is_loaded

    def _is_marked(self, id: str, owner: str | None, seen: int) -> Steps[bool]:
        """Whether a token written at `seen` is revoked, by its id or with all of its owner's. Raises StoreError."""
        assert self.store is not None
        keys = [_digest(f"sid:{id}")] + ([_digest(f"user:{owner}")] if owner is not None else [])
        for key in keys:
            reply = _raised((yield Load(self.store, key)))
            text = None if reply is None else read_text(reply.data)
            if text is not None and (key is keys[0] or seen <= text.seen):
                return True
        return False

    def _outlast(self, session: Session) -> Steps[None]:
        """Who has just logged in is in, though all sessions of that user were revoked in the same second."""
        if self.store is not None:
            reply = _raised((yield Load(self.store, _digest(f"user:{self.owner(session.held)}"))))
            text = None if reply is None else read_text(reply.data)
            if text is not None:
                session.not_before = max(session.not_before, text.seen + 1)

    def _write(self, session: Session, changed: bool) -> Steps[Fields]:
        now = self._now()
        if self.store is not None and session.id is not None:
            # What is revoked from here on is not older than the new token, and ends that as well.
            owner, seen = self.owner(session.before()), max(session.seen, session.not_before)
            if (yield from self._is_marked(session.id, owner, seen)):
                self._lose(session)
                return dropped(self.cookie, session.came) if session.source == "cookie" else []
        # Another request may have written it with a longer life; but no token of it outlives `absolute`.
        left = max(1, session.born + self.absolute - now)
        rotates = session.is_rotated or self._changes_hands(session)
        if self._is_login(session, session.held):
            session.born = 0
            yield from self._outlast(session)
        if session.is_ended or not session.is_kept or rotates:
            if session.id is not None and self.store is not None:
                yield from self._mark(_digest(f"sid:{session.id}"), now, left)
            if not rotates:
                session.born = 0
            session.id = session.key = None
            if not session.is_kept:
                session.written({}, None)
                return dropped(self.cookie, session.came) if session.came and session.source == "cookie" else []
        token = self.token(session, now)
        session.written(session.held, None)
        if session.source == "bearer":
            self.warn(
                "a session that came as a bearer token was changed: hand the client Gatekeeper.token(session)"
            )
            return []
        return written(self._cookie_of(session), token, self._left(session.held, session.born, now), session.came)

    def token(self, session: Session, now: int | None = None) -> str:
        """The session as it is now, as a token. Raises SessionError for one that is too long."""
        now = max(self._now() if now is None else now, session.not_before)
        session.seen = now
        session.born = session.born or now
        if session.id is None:
            session.id = urlsafe_b64encode(self._draw(16)).rstrip(b"=").decode("ascii")
            session.key = _digest(f"sid:{session.id}")
            session.is_fresh = True
        claims: dict[str, Any] = {
            "iat": now,
            "exp": min(max(now, now + self._life(session.held, now)), session.born + self.absolute),
            "born": session.born,
            "sid": session.id,
        }
        owner = self.owner(session.held)
        if owner is not None:
            claims["sub"] = owner
        if session.named is not None:
            claims["label"] = session.named[:LONGEST_LABEL]
        try:
            return self._tokens.seal({**claims, "data": session.held}, now)
        except ValueError as error:
            raise SessionError(f'session: {error}; see session.kind = "store"') from None

    def revoke(self, owner: str, id: str | None = None, but: Session | None = None) -> Steps[int]:
        # All those that were written up to now: how many these are nobody knows.
        if self.store is None:
            raise SessionError("session: a token is good until it expires; to revoke some, give session.store")
        now = self._now()
        if id is not None:
            yield from self._mark(id, now, self.absolute)
        else:
            until = yield from self._mark(_digest(f"user:{owner}"), now, self.absolute)
            if but is not None:
                but.not_before = until + 1  # it is written anew, after all those
                but.renews = True
        return 0

    def _mark(self, key: str, now: int, ttl: int) -> Steps[int]:
        """Have it revoked, for `ttl` seconds. Up to which second, of all that are of a user."""
        assert self.store is not None
        version = None
        for _ in range(_ATTEMPTS):
            text = write_text(Text({}, now, now, None, None))
            reply = _raised((yield Save(self.store, key, text, version=version, ttl=ttl)))
            if isinstance(reply, int):
                return now
            version = None if reply is None else reply.version
            theirs = None if reply is None else read_text(reply.data)
            if theirs is not None:  # a clock that is behind takes nothing back
                now = max(now, theirs.seen)
        raise StoreError("the revocation was changed by other requests again and again")


def _digest(id: str) -> str:
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()


def _raised(reply: Any) -> Any:
    """A reply, unless it is an error: then that is raised."""
    if isinstance(reply, StoreError):
        raise reply
    return reply
