"""The settings of affinity."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from gatekeeper.http.cookies import wrong_prefix
from gatekeeper.http.fields import NAME
from gatekeeper.settings.base import Boolean, Model, Text, default
from gatekeeper.settings.values import Duration

_TAKEN: Final = re.compile(
    r"accept(-.*)?|authorization|cache-control|connection|content-.*|cookie|date|expect|forwarded|x-forwarded-.*|"
    r"gatekeeper-identity|host|if-.*|keep-alive|origin|proxy(-.*)?|range|set-cookie|te|trailer|transfer-encoding|"
    r"upgrade|user-agent|vary|via"
)


def _header(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text) or _TAKEN.fullmatch(text.lower()):
        raise ValueError('expected the name of a field of its own, such as "X-Gatekeeper-Affinity"')
    return text


class AffinitySettings(Model):
    """How the clients of a pool keep to the upstream that has answered them."""

    cookie: Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$")] | None = Field(
        None,
        description='The cookie that holds the pin. By default "gk_" and the name of the pool; none where a header '
        "alone is given.",
    )
    header: Annotated[Text, AfterValidator(_header)] | None = Field(
        None, description="A field that holds it, for clients without cookies; they send back what they got."
    )
    ttl: Annotated[int, Duration()] = default(
        "1h", "How long a pin lasts. Who comes back when half of that is over gets a new one."
    )
    strict: Boolean = Field(
        False, description="Whether a client is answered 503 rather than by another upstream than its own."
    )
    secure: Boolean = Field(True, description="Whether browsers send the cookie over HTTPS alone.")
    samesite: Literal["lax", "strict", "none"] = Field(
        "lax", description="Whether the cookie goes along with requests that other sites begin."
    )

    def cookie_of(self, pool: str) -> str | None:
        """The name of the cookie, None if there is none."""
        return cookie_of(pool, self.cookie, self.header)


def cookie_of(pool: str, cookie: str | None, header: str | None) -> str | None:
    return f"gk_{pool}" if cookie is None and header is None else cookie


def misfit_affinity(pools: Mapping[Any, Any], session: str | None) -> Iterator[tuple[str, str]]:
    """What is wrong between the values of affinity: the pool, and a line that begins with the path in it.

    `session`: the name of the cookie of sessions, if there are any.
    """
    told: dict[str, str] = {}
    for name, pool in pools.items():
        affinity = pool.get("affinity") if isinstance(pool, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(affinity, Mapping):
            continue
        cookie = cookie_of(name, affinity.get("cookie"), affinity.get("header"))
        secure, samesite = affinity.get("secure", True), affinity.get("samesite")
        if cookie is None:
            for key in ("secure", "samesite"):
                if key in affinity:
                    yield name, f".affinity.{key}: goes with a cookie"
        if not isinstance(cookie, str):
            continue
        if problem := wrong_prefix(cookie, secure=secure is not False, path="/", domain=None):
            yield name, f".affinity.cookie: {problem}"
        if samesite == "none" and secure is False:
            yield name, '.affinity.samesite: expected secure = true beside "none"'
        if session is not None and re.fullmatch(rf"{re.escape(session)}(\.[1-7])?", cookie):
            yield name, ".affinity.cookie: expected another name than that of the session"
        other = told.setdefault(cookie, name)
        if other != name:  # one would overwrite the pin of the other
            yield name, f".affinity.cookie: expected a name of its own; pools.{other} has the same"
