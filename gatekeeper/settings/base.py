"""What all models of settings have in common."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Model(BaseModel):
    """Frozen, without unknown keys, and silent on values in errors: they may be secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def as_list(value: object) -> object:
    """A list with the text, or what else it is."""
    return [value] if isinstance(value, str) else value


Integer: TypeAlias = Annotated[int, Strict()]  # true is no number
Boolean: TypeAlias = Annotated[bool, Strict()]  # nor is 1 a truth
Text: TypeAlias = Annotated[str, Strict()]  # nor are bytes a text: what is compared between values has seen none
Strings: TypeAlias = Annotated[list[Text], BeforeValidator(as_list, json_schema_input_type=str | list[str])]


def default(written: object, description: str) -> Any:
    """A field whose default is written as in a file."""
    return Field(written, validate_default=True, description=description)
