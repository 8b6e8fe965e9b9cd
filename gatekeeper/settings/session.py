"""The settings of sessions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema

from gatekeeper.http.cookies import wrong_prefix
from gatekeeper.settings.base import Boolean, Integer, Model, default
from gatekeeper.settings.values import Duration, Size, resolved

_SCHEMES: Final = (
    "memory|shared|rediss?|valkeys?|unix|(redis|valkey)s?\\+(cluster|sentinel)|sqlite|postgresql|mysql|mariadb"
)
_SQL: Final = re.compile(r"(sqlite|postgresql|mysql|mariadb)(\+[a-z0-9_]+)?://")
_URL: Final = rf"^(env:[A-Za-z_][A-Za-z0-9_]*|({_SCHEMES})(\+[a-z0-9_]+)?://.*)$"
_URL_EXPECTED: Final = (
    "expected memory://, shared:///PATH, redis://…, or a URL of SQLAlchemy such as sqlite:////PATH, "
    "postgresql+psycopg://… or mysql+pymysql://…; or env:NAME of a variable that holds it"
)


def is_sql(url: str) -> bool:
    """Whether a URL is that of a database."""
    return _SQL.match(url) is not None


def _store_url(text: str) -> str:
    text = resolved(text)
    if not re.match(_URL, text) or text.startswith("env:"):
        raise ValueError(_URL_EXPECTED)
    return text


class CookieSettings(Model):
    """How the cookie of a session is written."""

    name: Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$")] | None = Field(
        None,
        description='By default "__Host-session", or "session" where secure, path or domain forbid the prefix.',
    )
    path: Annotated[str, Field(pattern=r"^/[!-:<-~]*$", max_length=128)] = Field(
        "/", description="The paths it is sent for."
    )
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]{1,128}$")] | None = Field(
        None, description="The domain whose hosts it is sent to, too. None: only the host that set it."
    )
    secure: Boolean = Field(True, description="Whether browsers send it over HTTPS alone.")
    httponly: Boolean = Field(True, description="Whether it is kept from scripts.")
    samesite: Literal["lax", "strict", "none"] = Field(
        "lax", description="Whether it goes along with requests that other sites begin."
    )
    partitioned: Boolean = Field(
        False, description="Whether it is kept apart by the site that embeds ours (CHIPS)."
    )
    persistent: Boolean = Field(True, description="Whether it outlives the browser, as long as the session does.")

    @property
    def called(self) -> str:
        """Its name."""
        if self.name is not None:
            return self.name
        return "__Host-session" if self.secure and self.path == "/" and self.domain is None else "session"


class SessionSettings(Model):
    """What is remembered of a client between its requests."""

    kind: Literal["token", "store"] = Field(
        description="token: the client holds it all, signed or encrypted; store: it holds an id, a store the rest."
    )
    store: (
        Annotated[str, AfterValidator(_store_url), WithJsonSchema({"type": "string", "pattern": _URL})] | None
    ) = Field(
        None,
        repr=False,  # it may hold a password
        description="Where sessions live: memory://, shared:///PATH, redis://…, or a URL of SQLAlchemy; or "
        "env:NAME. By default the [store]. With tokens: where it is kept which are revoked; by default nowhere.",
    )
    size: Annotated[int, Size(1 << 20)] = default("64MiB", "The bytes that a shared store of sessions reserves.")
    create_table: Boolean = Field(
        False, description="Of a database: whether the table gatekeeper_sessions is made if it is not there."
    )
    durable: Boolean = Field(
        False, description="Of a shared store: whether it outlives a crash of the machine, at the price of a sync."
    )
    idle: Annotated[int, Duration()] = default("30m", "How long a session lives that is not used.")
    absolute: Annotated[int, Duration()] = default("12h", "How long a session lives, however often it is used.")
    encrypt: Boolean = Field(False, description="Whether a token is encrypted, so that the client cannot read it.")
    bearer: Boolean = Field(False, description="Whether a token may come in Authorization: Bearer, too.")
    load: Literal["lazy", "early"] = Field(
        "lazy",
        description="When it is loaded: as it is first used; or, in asynchronous applications, before a request.",
    )
    on_error: Literal["deny", "empty"] = Field(
        "deny",
        description="What using it does while its store does not answer: 503, or it is empty and is not written.",
    )
    most_per_user: Integer | None = Field(
        None, ge=1, le=10_000, description="Sessions a user may have; the ones not used for longest make room."
    )
    grace: Annotated[int, Duration(zero=True)] = default(
        "0s", "How long an id that was replaced is still good, for requests that are on their way with it."
    )
    cookie: CookieSettings = Field(default_factory=CookieSettings)


def session_cookie(session: object) -> str | None:
    """The name of the cookie of `[session]`, as it is before it is checked; None if there is none."""
    if not isinstance(session, Mapping):
        return None
    cookie = session.get("cookie", {})
    try:
        return CookieSettings.model_validate(cookie).called
    except ValidationError:
        return None


_LIVES: Final = {key: SessionSettings.model_fields[key].default for key in ("idle", "absolute")}


def misfit_session(session: object) -> Iterator[str]:
    """What is wrong between the values of `[session]`. Each line begins with the path below it."""
    if not isinstance(session, Mapping):
        return
    kind = session.get("kind")
    try:
        idle, absolute = (Duration().read(session.get(key, default)) for key, default in _LIVES.items())
    except ValueError:
        idle = absolute = 0
    if idle > absolute:
        yield f".idle: expected at most absolute ({_LIVES['absolute']} unless given)"
    for key, wanted in (("encrypt", "token"), ("bearer", "token"), ("most_per_user", "store"), ("grace", "store")):
        if key in session and kind in ("token", "store") and kind != wanted:
            yield f'.{key}: goes with kind = "{wanted}"'
    cookie = session.get("cookie")
    if isinstance(cookie, Mapping):
        yield from _misfit_cookie(cookie)


def _misfit_cookie(cookie: Mapping[str, Any]) -> Iterator[str]:
    """The rules of prefixes and attributes that browsers enforce by dropping the cookie (RFC 6265bis)."""
    secure, path, domain = cookie.get("secure", True), cookie.get("path", "/"), cookie.get("domain")
    name = cookie.get("name")
    if isinstance(name, str) and (problem := wrong_prefix(name, secure=bool(secure), path=path, domain=domain)):
        yield f".cookie.name: {problem}"
    if cookie.get("samesite") == "none" and secure is False:
        yield '.cookie.samesite: expected secure = true beside "none"'
    if cookie.get("partitioned") is True and secure is False:
        yield ".cookie.partitioned: expected secure = true beside it"
