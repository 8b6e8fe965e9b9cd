"""The schema of settings: one for TOML files, mappings and keyword arguments.

All errors are reported together, a line each: the path, what was expected, a near match for a misspelt key. The
value is never shown, for it may be a secret.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
)

from gatekeeper.errors import SettingsError
from gatekeeper.http.fields import NAME
from gatekeeper.http.routes import Pattern
from gatekeeper.ratelimit.rates import RateError, parse_rates
from gatekeeper.ratelimit.rules import key_part

MOST_PROBLEMS: Final = 1000
"""So many are reported by a line each; of more only the number is."""

GREATEST_FILE: Final = 4 * 1024 * 1024
"""The greatest settings file, in bytes."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _rates(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one rate")
    parse_rates(";".join(texts))
    return texts


def _pattern(text: str) -> str:
    Pattern(text)
    return text


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return text


def _keys(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one part")
    for text in texts:
        key_part(text)
    return texts


def nth(place: int) -> str:
    """Which of a list, counted as people do."""
    return f"{place + 1}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(place + 1, 'th') }"


def _outcomes(texts: list[str]) -> list[str]:
    for place, text in enumerate(texts):
        if text != "disconnect" and not re.fullmatch(r"[1-5](xx|[0-9]{2})", text):
            raise ValueError(f'expected statuses such as "404" or "5xx", or "disconnect" (see the {nth(place)})')
    return texts


def _field_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
        raise ValueError('expected the name of one field, such as "X-Forwarded-For" or "Forwarded"')
    return text


_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


def _networks(texts: list[str]) -> list[str]:
    for place, text in enumerate(texts):
        if text != "unix":
            try:
                network = ipaddress.ip_network(text)
                if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
                    raise ValueError  # the addresses are unmapped before they are compared
            except ValueError:
                raise ValueError(
                    'expected networks such as "10.0.0.0/8" (IPv4 as IPv4, no bit set behind the prefix), '
                    f'addresses, or "unix" (see the {nth(place)})'
                ) from None
    return texts


_USER_EXPECTED: Final = 'expected "header:NAME", "package.module:function" or a function'


def _user(value: object) -> object:
    if isinstance(value, str):
        kind, colon, name = value.partition(":")
        if kind == "header" and colon:
            if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", name):
                raise ValueError(_USER_EXPECTED)
            return value
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
            raise ValueError(_USER_EXPECTED)
        value = load_object(value)
    if not callable(value):
        raise ValueError(_USER_EXPECTED)
    return value


def load_object(text: str) -> Any:
    """The object that "package.module:Name" names. Raises ValueError that says which step failed."""
    module, _, name = text.partition(":")
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"expected a module that can be imported; importing it raised {type(error).__name__}"
        ) from None
    for attribute in name.split("."):
        try:
            found = getattr(found, attribute)
        except Exception:  # a module may have a __getattr__ of its own
            raise ValueError("expected a name that the module has") from None
    return found


def is_asynchronous(function: object) -> bool:
    """Whether calls of it must be awaited."""
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


Integer: TypeAlias = Annotated[int, Strict()]  # true is no number
Boolean: TypeAlias = Annotated[bool, Strict()]  # nor is 1 a truth
Strings: TypeAlias = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class StoreSettings(_Model):
    """Where counters live."""

    url: Literal["memory://"] = Field("memory://", description="memory:// is this process's memory.")
    max_keys: Integer = Field(
        1_000_000, ge=1, description="Keys held at most. New ones beyond it share one bucket a rule."
    )
    on_error: Literal["local", "allow", "deny"] = Field(
        "local",
        description="What rules do while the store does not answer: count in the process, let pass, or refuse.",
    )


class IdentitySettings(_Model):
    """Who is asking."""

    trusted_proxies: Annotated[Strings, AfterValidator(_networks)] = Field(
        [],
        description='Networks whose forwarding header is believed; "unix" for peers on a Unix socket.',
    )
    header: Annotated[str, AfterValidator(_field_name)] = Field(
        "X-Forwarded-For",
        description='The one header those proxies write: X-Forwarded-For, "Forwarded", or one with an address.',
    )
    ipv6_prefix: Integer = Field(64, ge=1, le=128, description="IPv6 clients of a network this long are one.")
    user: Annotated[
        str | Callable[..., Any] | None,
        BeforeValidator(lambda value: value if value is None else _user(value), json_schema_input_type=str | None),
    ] = Field(
        None,
        description='"header:NAME" (believed from trusted proxies) or "package.module:function" of the request.',
    )


class LimitSettings(_Model):
    """A rule: which requests, whose quota, how much."""

    name: Annotated[str, AfterValidator(_name)] = Field(description="Told to clients; one of its own a rule.")
    rate: Annotated[Strings, AfterValidator(_rates)] = Field(
        description='"5/minute", or several: at most so many in any window of that length.'
    )
    match: Annotated[str, AfterValidator(_pattern)] | None = Field(
        None,
        description='"[METHOD|METHOD] [host]/path" with {name}, {name:path} and a final *; none: all requests.',
    )
    key: Annotated[Strings, AfterValidator(_keys)] = Field(
        ["ip"], description="What a quota is counted by: ip, user, route, method, host, global, header:NAME."
    )
    algorithm: Literal["sliding_window", "gcra", "sliding_counter", "fixed_window"] | None = Field(
        None, description="sliding_window, unless a burst is given: then gcra."
    )
    burst: Integer | None = Field(
        None, ge=1, le=10**9, description="The capacity of gcra's bucket; by default the rate's amount."
    )
    cost: Integer = Field(1, ge=1, le=10**9, description="Units that a request costs.")
    on_error: Literal["local", "allow", "deny"] | None = Field(None, description="As the store's, for this rule.")
    give_back: Annotated[Strings, AfterValidator(_outcomes)] = Field(
        [], description='Outcomes that do not count: "404", "5xx", "disconnect". The charge is undone.'
    )
    preflights: Boolean = Field(False, description="Whether CORS preflights are charged.")

    @property
    def counted_by(self) -> str:
        return self.algorithm or ("gcra" if self.burst is not None else "sliding_window")


class ResponseSettings(_Model):
    """What responses tell."""

    fields: Boolean = Field(True, description="RateLimit and RateLimit-Policy on each response a rule applied to.")


class Settings(_Model):
    """All settings."""

    store: StoreSettings = Field(default_factory=StoreSettings)
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    response: ResponseSettings = Field(default_factory=ResponseSettings)
    limits: list[LimitSettings] = Field([], description="The rules. All that match a request apply to it.")


def _misfits(limits: object) -> list[str]:
    """What is wrong between the values of rules, each of which may be right by itself. They are not yet checked."""
    problems: list[str] = []
    told: dict[str, int] = {}
    for place, limit in enumerate(limits if isinstance(limits, list | tuple) else ()):
        if not isinstance(limit, Mapping):
            continue
        name, burst, cost = limit.get("name"), limit.get("burst"), limit.get("cost", 1)
        texts = _as_list(limit.get("rate"))
        try:
            rates = parse_rates(";".join(texts))  # type: ignore[arg-type]  # what is none of strings is a TypeError
        except (TypeError, RateError):
            rates = ()
        path = f"limits[{place}]"
        if burst is not None and limit.get("algorithm") not in (None, "gcra"):
            problems.append(f"{path}: a burst goes with gcra alone")
        if burst is not None and len(rates) > 1:
            problems.append(f"{path}: expected one rate beside a burst: it is the capacity of one bucket")
        rooms = [rate.amount for rate in rates] if burst is None else [burst or cost]
        if type(cost) is int and any(type(room) is int and cost > room for room in rooms):
            problems.append(
                f"{path}: expected a cost within the rate (or the burst): else no request could ever pass"
            )
        if isinstance(name, str):
            # As clients are told them: a rule of several rates has a name for each.
            for shown in [name] if len(rates) < 2 else [f"{name}-{rate.period}s" for rate in rates]:
                other = told.setdefault(shown, place)
                if other != place:
                    problems.append(f"{path}.name: expected a name of its own; limits[{other}] is told by the same")
    return problems


def load_settings(source: Settings | Mapping[str, Any] | str | Path) -> Settings:
    """Settings from a mapping or from the path of a TOML file. Raises SettingsError with all that is wrong."""
    if isinstance(source, Settings):
        return source
    if isinstance(source, str | Path):
        return _load_file(Path(source))
    if not isinstance(source, Mapping):
        raise SettingsError([f"expected a mapping, or the path of a TOML file, and not {type(source).__name__}"])
    return _validate(source, "")


def _load_file(path: Path) -> Settings:
    try:
        with path.open("rb") as file:
            raw = file.read(GREATEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise SettingsError([f"{path}: {reason}"]) from None
    if len(raw) > GREATEST_FILE:
        raise SettingsError([f"{path}: expected at most {GREATEST_FILE} bytes"])
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SettingsError([f"{path}: expected UTF-8 (line {line})"]) from None
    except tomllib.TOMLDecodeError as error:
        # The message quotes at most one character of the text.
        raise SettingsError([f"{path}: expected TOML: {error}"]) from None
    except RecursionError:
        raise SettingsError([f"{path}: expected TOML that is not nested so deep"]) from None
    except ValueError:
        raise SettingsError([f"{path}: expected TOML with smaller numbers"]) from None
    return _validate(document, f"{path}: ")


def _validate(document: Mapping[str, Any], prefix: str) -> Settings:
    settings, problems = None, []
    try:
        settings = Settings.model_validate(dict(document))
    except ValidationError as error:
        problems = [_line(found) for found in error.errors(include_url=False, include_input=False)]
    except RecursionError:
        problems = ["expected settings that are not nested so deep"]
    problems += _misfits(document.get("limits"))
    if settings is not None and not problems:
        return settings
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    raise SettingsError([prefix + problem for problem in problems])


def _line(error: Any) -> str:
    parts = [
        part for part in error["loc"] if isinstance(part, int) or not part.startswith(("function-", "constrained-"))
    ]
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if path else _shown(part)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _keys_at(parts[:-1])
        near = difflib.get_close_matches(str(parts[-1]), known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f"; expected {', '.join(known)}" if known else ""
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: expected a value, there is none"
    if kind == "list_type":
        if path == "limits":
            return "limits: expected rules, each under a [[limits]] of its own (two brackets)"
        return f"{path}: expected a string, or a list of strings"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be", "expected", message)
    return f"{path}: {message}" if path else message


def _shown(key: object) -> str:
    text = str(key)
    return text if re.fullmatch(r"[\w-]{1,64}", text) else json.dumps(text[:64])


def _keys_at(path: list[int | str]) -> list[str]:
    """The keys that the schema knows at a path."""
    model: type[BaseModel] = Settings
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
        else:
            return []
    return list(model.model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a settings file, for editors to complete it by."""
    return Settings.model_json_schema(mode="validation")
