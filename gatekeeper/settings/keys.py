"""The settings of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from gatekeeper.settings.base import Model, as_list


class KeySettings(Model):
    """A key that signs or verifies; or a file of them."""

    key: Annotated[str, Field(min_length=1, max_length=1 << 16)] = Field(
        repr=False,
        description='"env:NAME" or "file:PATH" of a secret (32 bytes or more), of a PEM, or of a JWK Set.',
    )
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="Stands as kid in tokens. By default made of the secret."
    )
    state: Literal["pending", "active", "retiring", "revoked"] | None = Field(
        None, description="By default the first key is active, and the others are retiring."
    )
    algorithm: Literal["HS256", "HS384", "HS512", "RS256", "PS256", "ES256", "EdDSA", "A256GCM"] | None = Field(
        None, description="By default HS256."
    )


def _tables(value: object) -> object:
    """Each as a table, where it was given as a text alone."""
    value = as_list(value)
    if not isinstance(value, list | tuple) or not all(
        isinstance(one, str | Mapping | KeySettings) for one in value
    ):
        raise ValueError('expected a list of "env:NAME", "file:PATH", or tables with a key')
    return [{"key": one} if isinstance(one, str) else one for one in value]


Keys: TypeAlias = Annotated[
    list[KeySettings], BeforeValidator(_tables, json_schema_input_type=str | list[str | KeySettings])
]
