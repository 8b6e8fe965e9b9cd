"""The settings of identity tokens that a provider issues."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from gatekeeper.settings.base import Model, default
from gatekeeper.settings.values import Duration

_URL_EXPECTED: Final = (
    "expected an address of https, such as https://id.example.com/keys; of http only on this machine (127.0.0.1)"
)


def _jwks_url(text: str) -> str:
    """The address, if what is behind it cannot be another's. Raises ValueError."""
    if not re.fullmatch(r"https?://[!-~]{1,2000}", text):
        raise ValueError(_URL_EXPECTED)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(_URL_EXPECTED) from None
    if not host or port == 0 or "@" in parts.netloc or parts.fragment:
        raise ValueError(_URL_EXPECTED)
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(_URL_EXPECTED)
    return text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(text: str) -> str:
    if not 0 < len(text) <= 2000:
        raise ValueError("expected 1 to 2000 characters, exactly as tokens have them")
    return text


def _algorithms(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one algorithm")
    return texts


Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"
]  # fmt: skip


class BearerSettings(Model):
    """Whose tokens in `Authorization: Bearer` say who is asking."""

    issuer: Annotated[str, AfterValidator(_named)] = Field(
        description="The provider, exactly as iss of its tokens has it."
    )
    audience: Annotated[str, AfterValidator(_named)] = Field(
        description="What aud of its tokens has to be, or hold: those for other services are refused."
    )
    jwks_url: Annotated[str, AfterValidator(_jwks_url)] = Field(
        repr=False,  # its query may hold a secret
        description="Where the provider publishes its keys. No other address is ever turned to.",
    )
    algorithms: Annotated[list[Algorithm], AfterValidator(_algorithms)] = Field(
        ["RS256", "PS256", "ES256", "EdDSA", "Ed25519"], description="Those that are taken."
    )
    timeout: Annotated[int, Duration()] = default("2s", "How long reading the keys may take.")
    refresh: Annotated[int, Duration()] = default(
        "1h", "How often they are read again. For a key that is not among them, at most once a minute."
    )


def misfit_bearer(identity: object) -> Iterator[str]:
    """What is wrong between `user` and `bearer` of `[identity]`. Each line begins with the path below it."""
    if not isinstance(identity, Mapping):
        return
    user = identity.get("user")
    by_token = isinstance(user, str) and user.startswith("bearer:")
    if by_token and identity.get("bearer") is None:
        yield '.bearer: expected a table with issuer, audience and jwks_url beside user = "bearer:…"'
    if not by_token and identity.get("bearer") is not None:
        yield '.bearer: goes with user = "bearer:CLAIM", such as "bearer:sub"'
