"""Settings out of an application's config: `GATEKEEPER`, and `GATEKEEPER_*` over it."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from flask import Config

from gatekeeper import Gatekeeper as Keeper
from gatekeeper.errors import SettingsError
from gatekeeper.settings import Settings, load_settings

Given: TypeAlias = Keeper | Settings | Mapping[str, Any] | str | Path | None
"""Settings as they are given: a mapping, the path of a TOML file, Settings, or a Gatekeeper that others share."""

PREFIX: Final = "GATEKEEPER_"

_OWN: Final = ("EXEMPT_STATIC", "WORKERS")
"""What is of the extension, and no setting."""

_CALLED: Final = ("key", "cost", "tier", "exempt")


def settings_of(config: Config, given: Given) -> Keeper | Settings | Mapping[str, Any] | Path:
    """What `GATEKEEPER` says, or else what was given; and over it, key by key, what `GATEKEEPER_*` say.

    `GATEKEEPER_LIMITS` is the key `limits`, `GATEKEEPER_STORE_URL` the key `url` of `store`. What is None counts as
    not there. A path is relative to the application, as that of `config.from_file`. Raises SettingsError.
    """
    workers = config.get(f"{PREFIX}WORKERS")
    if workers is not None and (type(workers) is not int or workers < 1):  # true is no number
        raise SettingsError([f"{PREFIX}WORKERS: expected a whole number from 1 upwards"])
    base = config.get("GATEKEEPER")
    base = given if base is None else base
    over = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in config.items()
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in _OWN and value is not None
    }
    if isinstance(base, Keeper | Settings):
        if over:
            raise SettingsError([f"{PREFIX}{name.upper()}: goes with a mapping or a file" for name in sorted(over)])
        return base
    if isinstance(base, str | Path):
        path = Path(config.root_path) / base
        if not over:
            return path
        load_settings(path)  # what is wrong with the file is told with its name
        base = tomllib.loads(path.read_text(encoding="utf-8"))
    if base is not None and not isinstance(base, Mapping):
        raise SettingsError(
            [f"GATEKEEPER: expected a mapping, or the path of a file, and not {type(base).__name__}"]
        )
    return _called(_over(dict(base or {}), over))


def own(config: Config, name: str, default: Any) -> Any:
    """A key of the extension's own, such as `GATEKEEPER_WORKERS`."""
    value = config.get(PREFIX + name)
    return default if value is None else value


def _over(settings: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Whole keys first: `store` before `store_url`."""
    for name in sorted(over, key=lambda name: (name not in Settings.model_fields, name)):
        table, _, key = name.partition("_")
        within = settings.get(table, {})
        if (
            key
            and name not in Settings.model_fields
            and table in Settings.model_fields
            and isinstance(within, Mapping)
        ):
            settings[table] = {**within, key: over[name]}
        else:
            settings[name] = over[name]
    return settings


def _called(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, their functions such as Gatekeeper calls them."""
    identity, limits = settings.get("identity"), settings.get("limits")
    if isinstance(identity, Mapping) and "user" in identity:
        settings["identity"] = {**identity, "user": of_request(identity["user"])}
    if isinstance(limits, list | tuple):
        settings["limits"] = [called(limit) if isinstance(limit, Mapping) else limit for limit in limits]
    return settings


def called(limit: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rule, its functions such as Gatekeeper calls them: with the request's ticket."""
    written = dict(limit)
    for name in _CALLED:
        value = written.get(name)
        if isinstance(value, list | tuple):
            written[name] = [of_request(one) for one in value]
        elif value is not None:
            written[name] = of_request(value)
    return written


def of_request(value: Any) -> Any:
    """A function without parameters, as Flask's users write them (`lambda: g.user.id`), as one of a ticket."""
    if not callable(value) or isinstance(value, type):
        return value
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return value
    if parameters:
        return value
    function: Callable[[], Any] = value
    if inspect.iscoroutinefunction(function):

        async def asked_async(ticket: object) -> Any:
            return await function()

        return asked_async

    def asked(ticket: object) -> Any:
        return function()

    return asked
