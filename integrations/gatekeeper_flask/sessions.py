"""Sessions in Flask: `flask.session`, held in a token or in a store."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from datetime import timedelta
from typing import Any, Final
from weakref import WeakKeyDictionary

from flask import Flask, Request, Response
from flask.sessions import SessionInterface as FlaskSessionInterface
from flask.sessions import SessionMixin
from werkzeug.exceptions import ServiceUnavailable

from gatekeeper import Gatekeeper as Keeper
from gatekeeper.commands import nobody, run
from gatekeeper.errors import SettingsError, StoreError
from gatekeeper.http.message import EnvironRequest
from gatekeeper.sessions.cookies import Cookie
from gatekeeper.sessions.flow import Sessions
from gatekeeper.sessions.state import Session as State
from gatekeeper.settings import Settings, load_settings
from gatekeeper.settings.keys import KeySettings

_LIFETIME: Final = timedelta(days=31)  # of PERMANENT_SESSION_LIFETIME, unless the application says something else

_DEFAULTS: Final = {
    "SESSION_COOKIE_NAME": "session",
    "SESSION_COOKIE_DOMAIN": None,
    "SESSION_COOKIE_PATH": None,
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_SECURE": False,
    "SESSION_COOKIE_SAMESITE": None,
    "SESSION_COOKIE_PARTITIONED": False,
}
"""What Flask's config says of the cookie before anybody has said anything."""


class SessionUnavailable(StoreError, ServiceUnavailable):
    """The store of sessions does not answer. To Werkzeug it is a 503, which `errorhandler(503)` may answer."""

    def __init__(self, error: StoreError) -> None:
        Exception.__init__(self, *error.args)
        self.description = "What is remembered of you cannot be read at the moment."
        self.response = None
        self.retry_after = 1


class Session(State, SessionMixin):
    """`flask.session`: beside what Flask's own has, `rotate`, `end`, `user`, `label`.

    What changes within a list or a dictionary is kept without `modified = True`. Values are those of JSON: a tuple
    comes back as a list, and what is none (a datetime, bytes) is refused with SessionError.
    """

    @property
    def data(self) -> dict[str, Any]:
        try:
            return super().data
        except StoreError as error:
            raise SessionUnavailable(error) from None

    @property
    def new(self) -> bool:  # type: ignore[override]
        return self.is_new

    @property
    def modified(self) -> bool:
        return self.renews or self.is_changed

    @modified.setter
    def modified(self, value: bool) -> None:
        # Who sets it wants a write, though nothing changed; that something did is noticed anyway.
        self.renews = value


class SessionInterface(FlaskSessionInterface):
    """Sessions as Gatekeeper's settings say, for `app.session_interface`.

    - `keeper`: a `gatekeeper.Gatekeeper` whose settings have a `[session]`, or such settings. By default the
      session is a signed token under the application's SECRET_KEY (and SECRET_KEY_FALLBACKS).

    The extension sets it by itself where its settings have a `[session]`. What the application's config says of the
    cookie (`SESSION_COOKIE_*`) and of the lifetime (`PERMANENT_SESSION_LIFETIME`, which is `session.idle`) stands
    above the settings, unless it says no more than Flask's defaults. (Of a Gatekeeper the lifetimes are its own.)
    """

    def __init__(self, keeper: Keeper | Settings | Mapping[str, Any] | None = None) -> None:
        self._given = keeper
        self._flows: WeakKeyDictionary[Flask, Sessions] = WeakKeyDictionary()
        self._keepers: WeakKeyDictionary[Flask, Keeper] = WeakKeyDictionary()

    def flow(self, app: Flask) -> Sessions:
        """What loads and saves the sessions of an application. Raises SettingsError, KeyRingError."""
        flow = self._flows.get(app)
        if flow is None:
            given = self._given
            if not isinstance(given, Keeper):
                settings = load_settings({"session": {"kind": "token"}} if given is None else given)
                given = Keeper(adapted(app, settings))
            if given.sessions is None:
                raise SettingsError(["session: expected a [session] in the settings"])
            flow = self._flows[app] = _fitted(given.sessions.flow, app)
            self._keepers[app] = given
        return flow

    def open_session(self, app: Flask, request: Request) -> Session:
        flow = self.flow(app)
        ticket = request.environ.get("gatekeeper.ticket")
        if ticket is not None and isinstance(ticket.session, Session) and ticket.gate.sessions is flow:
            return ticket.session
        session = flow.open(EnvironRequest(request.environ), blocking=True)
        assert isinstance(session, Session)
        return session

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        assert isinstance(session, Session)
        if session.is_loaded and session.failure is None:
            # As Flask has it: until the browser ends, unless it is permanent; or as the policy says, if it does.
            said = session.held.get("_permanent")
            session.persistent = bool(said) if said is not None or not self._says_persistent(app) else None
            if not app.config["SESSION_REFRESH_EACH_REQUEST"] and not session.is_changed:
                session.renews = False
        try:
            fields = run(self.flow(app).save(session), nobody)
        except StoreError as error:
            unavailable = SessionUnavailable(error)
            response.status_code = 503
            response.headers.clear()
            for name, value in unavailable.get_headers():
                response.headers[name] = value
            response.headers["Cache-Control"] = "no-store"
            response.set_data(unavailable.get_body())
            return
        for field, text in fields:
            if field == b"vary":
                response.vary.add(text.decode("ascii"))
            else:
                response.headers.add("Set-Cookie", text.decode("ascii"))

    def _says_persistent(self, app: Flask) -> bool:
        keeper = self._keepers.get(app)
        session = None if keeper is None else keeper.settings.session
        return session is not None and "persistent" in session.cookie.model_fields_set


def adapted(app: Flask, settings: Settings) -> Settings:
    """Settings with what an application's config says of keys, cookie and lifetime. Raises SettingsError."""
    session = settings.session
    if session is None:
        return settings
    keys = settings.keys
    if not keys and app.secret_key is not None:
        secrets = [app.secret_key, *(app.config.get("SECRET_KEY_FALLBACKS") or ())]
        texts = [secret.decode("latin-1") if isinstance(secret, bytes) else secret for secret in secrets]
        keys = [KeySettings(key=text) for text in texts]
    said: dict[str, Any] = {}
    if app.permanent_session_lifetime != _LIFETIME:
        idle = max(1, int(app.permanent_session_lifetime.total_seconds())) * 10**9
        said = {"idle": idle, "absolute": max(idle, session.absolute)}
    return settings.model_copy(update={"keys": keys, "session": session.model_copy(update=said)})


def fit(keeper: Keeper, app: Flask) -> SessionInterface:
    """The interface for an application whose own policy `keeper` is: rules see the session that its views see."""
    interface = SessionInterface(keeper)
    keeper.use_sessions(interface.flow(app))
    return interface


def _fitted(flow: Sessions, app: Flask) -> Sessions:
    """The sessions of settings with the cookie of an application."""
    fitted = copy(flow)
    fitted.session_class = Session
    said = {
        name.removeprefix("SESSION_COOKIE_").lower(): app.config[name]
        for name, default in _DEFAULTS.items()
        if app.config.get(name, default) != default
    }
    if said.get("samesite") is not None:
        said["samesite"] = said["samesite"].lower()
    cookie = flow.cookie._replace(**said)
    if cookie.name == Cookie().name and "name" not in said and cookie.misfit is not None:
        cookie = cookie._replace(name="session")  # as the settings have it where nobody names the cookie
    if cookie.misfit is not None:
        raise SettingsError([f"SESSION_COOKIE_*: {cookie.misfit}; else browsers drop the cookie"])
    fitted.cookie = cookie
    return fitted
