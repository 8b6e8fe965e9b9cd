"""Settings from mappings and files.

All errors are reported together, a line each: the path, what was expected, a near match for a misspelt key. The
value is never shown, for it may be a secret.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gatekeeper.errors import SettingsError
from gatekeeper.http.routes import Pattern, PatternError
from gatekeeper.ratelimit.rates import Rate, RateError, parse_rates
from gatekeeper.settings.affinity import misfit_affinity
from gatekeeper.settings.base import as_list
from gatekeeper.settings.bearer import misfit_bearer
from gatekeeper.settings.schema import (
    MOST_VNODES,
    MOST_WEIGHT,
    HealthSettings,
    LimitSettings,
    PenaltySettings,
    Settings,
)
from gatekeeper.settings.session import misfit_session, session_cookie
from gatekeeper.settings.values import Duration, near, parse_upstream, store_scheme, upstream_url
from gatekeeper.upstreams.policies import POLICIES

MOST_PROBLEMS: Final = 1000
"""So many are reported by a line each; of more only the number is."""

MOST_POINTS: Final = 1_000_000
"""The greatest ring of a pool. A point takes some tens of bytes, and about a microsecond at the start."""

LONGEST_FILLING: Final = 100 * 360 * 86_400
"""So many seconds a bucket may take to be full again."""

GREATEST_FILE: Final = 4 * 1024 * 1024
"""The greatest settings file, in bytes."""


def _misfits(document: Mapping[str, Any]) -> list[str]:
    """What is wrong between values, each of which may be right by itself. They are not yet checked."""
    pools = document.get("pools")
    pools = pools if isinstance(pools, Mapping) else {}
    problems = _misfit_limits(document.get("limits"))
    for name, pool in pools.items():
        if isinstance(pool, Mapping):
            problems += [f"pools.{_shown(name)}{problem}" for problem in _misfit_pool(pool)]
    problems += [f"identity{problem}" for problem in misfit_bearer(document.get("identity"))]
    session = document.get("session")
    problems += [f"session{problem}" for problem in misfit_session(session)]
    for name, problem in misfit_affinity(pools, session_cookie(session)):
        problems.append(f"pools.{_shown(name)}{problem}")
    return [*problems, *_misfit_routes(document.get("routes"), pools)]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _tables(value: object) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The tables of what should be a list of them, with their places."""
    for place, table in enumerate(_listed(value)):
        if isinstance(table, Mapping):
            yield place, table


def _misfit_limits(limits: object) -> list[str]:
    """What is wrong between the values of rules."""
    problems: list[str] = []
    told: dict[str, int] = {}
    scopes: dict[str, tuple[int, object]] = {}
    tables = list(_tables(limits))
    names = [limit["name"] for _, limit in tables if isinstance(limit.get("name"), str)]
    for place, limit in tables:
        path = f"limits[{place}]"
        rates = _rates_of(limit.get("rate"))
        problems += [f"{path}{problem}" for problem in _misfit_limit(limit, rates)]
        name = limit.get("name")
        if isinstance(name, str):
            # As clients are told them: a rule of several rates has a name for each.
            for shown in [name] if len(rates) < 2 else [f"{name}-{rate.period}s" for rate in rates]:
                other = told.setdefault(shown, place)
                if other != place:
                    problems.append(f"{path}.name: expected a name of its own; limits[{other}] is told by the same")
        for overridden in _listed(as_list(limit.get("overrides"))):
            if isinstance(overridden, str) and overridden not in names:
                problems.append(f"{path}.overrides: expected names of other rules{near(overridden, names)}")
        if isinstance(name, str) and name in _overridden(name, tables):
            problems.append(f"{path}.overrides: expected no rule that overrides this one in its turn")
        scope = limit.get("scope")
        if isinstance(scope, str):
            quota = rates, limit.get("algorithm"), limit.get("burst"), limit.get("concurrency")
            other, its = scopes.setdefault(scope, (place, quota))
            if quota != its:
                problems.append(
                    f"{path}.scope: expected the rate and algorithm of limits[{other}]: they share a quota"
                )
    return problems


def _overridden(name: str, tables: Sequence[tuple[int, Mapping[str, Any]]]) -> set[object]:
    """The names of the rules that a rule overrides, and of those that these override, and so on."""
    below = {limit.get("name"): _listed(as_list(limit.get("overrides"))) for _, limit in tables if _named(limit)}
    found: set[object] = set()
    new = [name]
    while new:
        others = [other for other in below.get(new.pop(), ()) if isinstance(other, str) and other not in found]
        found.update(others)
        new += others
    return found


def _named(limit: Mapping[str, Any]) -> bool:
    return isinstance(limit.get("name"), str)


def _rates_of(value: object) -> tuple[Rate, ...]:
    """What a value says as rates; none, where it is wrong, for that is told already."""
    try:
        return parse_rates(";".join(as_list(value)))  # type: ignore[arg-type]  # what is no text is a TypeError
    except (TypeError, RateError):
        return ()


def _misfit_limit(limit: Mapping[str, Any], rates: tuple[Rate, ...]) -> Iterator[str]:
    """What is wrong between the values of a rule. Each line begins with the path below the rule."""
    burst, cost, concurrency = limit.get("burst"), limit.get("cost", 1), limit.get("concurrency")
    if concurrency is None and "rate" not in limit:
        yield ".rate: expected a value, there is none"
    if concurrency is None and "lease" in limit:
        yield ".lease: goes with concurrency alone"
    if concurrency is not None:
        for key in ("rate", "algorithm", "burst", "tiers", "settle", "reset_on", "give_back"):
            if key in limit:
                yield f".{key}: does not go with concurrency"
    if burst is not None and limit.get("algorithm") not in (None, "gcra"):
        yield ": a burst goes with gcra alone"
    tiers = limit.get("tiers")
    all_rates = [rates, *(_rates_of(one) for one in (tiers.values() if isinstance(tiers, Mapping) else ()))]
    if (
        type(burst) is int
        and burst <= 10**9
        and any(rate.period * burst > rate.amount * LONGEST_FILLING for one in all_rates for rate in one)
    ):
        yield ": expected a burst that is refilled within 100 years"
    if burst is not None and any(len(one) > 1 for one in all_rates):
        yield ": expected one rate beside a burst: it is the capacity of one bucket"
    rooms = [rate.amount for one in all_rates for rate in one] if burst is None else [burst or cost]
    if type(concurrency) is int:
        rooms = [concurrency]
    if type(cost) is int and any(type(room) is int and cost > room for room in rooms):
        yield ": expected a cost within the rate (or the burst): else no request could ever pass"
    if ("tier" in limit) != ("tiers" in limit):
        missing = "tiers" if "tier" in limit else "tier"
        yield f".{missing}: expected a value: tier says which of the tiers a request is of"
    if limit.get("per") == "message":
        for key in ("concurrency", "settle", "give_back", "reset_on", "preflights", "overrides"):
            if key in limit:
                yield f".{key}: goes with requests, and not with messages"
        if any(str(text).startswith(("form:", "json:")) for text in _listed(as_list(limit.get("key")))):
            yield ".key: a field of the body goes with requests, and not with messages"
    yield from _misfit_parameters(limit)
    penalty = limit.get("penalty")
    if isinstance(penalty, Mapping):
        try:
            first, most = (Duration().read(penalty.get(key, default)) for key, default in _BANS.items())
        except ValueError:
            first = most = 0
        if first > most:
            yield f".penalty: expected ban within at_most ({_BANS['at_most']} unless given)"


_BANS: Final = {key: PenaltySettings.model_fields[key].default for key in ("ban", "at_most")}


def _misfit_parameters(limit: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a key that name a part of the path which the pattern has not."""
    try:
        pattern = Pattern(limit.get("match"))  # type: ignore[arg-type]  # what is no text is a PatternError
    except PatternError:
        pattern = None
    for key in ("key", "tier"):
        for text in _listed(as_list(limit.get(key))):
            if isinstance(text, str) and text.startswith("param:"):
                name = text.removeprefix("param:")
                if pattern is None or name not in pattern.names:
                    known = ", ".join(sorted(pattern.names)) if pattern is not None else ""
                    yield f".{key}: expected the name of a {{name}} in match{': ' * bool(known)}{known}"


_EJECTION: Final = {key: HealthSettings.model_fields[key].default for key in ("eject_for", "eject_at_most")}


def _misfit_pool(pool: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the values of a pool. Each line begins with the path below the pool."""
    policy = pool.get("policy", "least_connections")
    is_keyless = policy in [name for name in POLICIES if name != "ring"]
    has_ring = policy == "ring" or pool.get("affinity") is not None
    if is_keyless and not has_ring and "key" in pool:
        yield ".key: goes with the policy ring (or one of your own), or with affinity"
    is_own = callable(policy) or (isinstance(policy, str) and ":" in policy)
    if (is_keyless or is_own) and not has_ring and "vnodes" in pool:
        yield ".vnodes: goes with the policy ring, or with affinity"
    health = pool.get("health")
    if isinstance(health, Mapping):
        try:
            first, most = (Duration().read(health.get(key, default)) for key, default in _EJECTION.items())
        except ValueError:
            first = most = 0
        if first > most:
            yield f".health: expected eject_for within eject_at_most ({_EJECTION['eject_at_most']} unless given)"
    upstreams = as_list(pool.get("upstreams"))
    if has_ring and _points(upstreams, pool.get("vnodes", 160)) > MOST_POINTS:
        yield f": expected at most {MOST_POINTS} points on the ring, of which each unit of weight has vnodes"
    listed = _listed(upstreams)
    if listed and all(isinstance(one, Mapping) and one.get("drain") is True for one in listed):
        yield ".upstreams: expected at least one that does not drain"
    told: dict[str, tuple[int, bool]] = {}
    for place, upstream in enumerate(listed):
        known, has_id = _known_by(upstream)
        if known is None:
            continue
        other, other_has_id = told.setdefault(known, (place, has_id))
        if other != place:
            path = f".upstreams[{place}]"
            if has_id or other_has_id:
                yield f"{path}.id: expected an id of its own; upstreams[{other}] is known by the same"
            else:
                yield f"{path}: expected each URL once, or with an id of its own; upstreams[{other}] has the same"


def _points(upstreams: object, vnodes: object) -> int:
    """The points of a ring; what is out of its bounds counts for nothing, for it is told already."""
    weights = [one.get("weight", 1) if isinstance(one, Mapping) else 1 for one in _listed(upstreams)]
    total = sum(weight for weight in weights if type(weight) is int and 0 < weight <= MOST_WEIGHT)
    return total * vnodes if type(vnodes) is int and vnodes <= MOST_VNODES else 0


def _known_by(upstream: object) -> tuple[str | None, bool]:
    """The id of an upstream, None if that is wrong, and whether it was given."""
    url: object = upstream
    if isinstance(upstream, Mapping):
        known, url = upstream.get("id"), upstream.get("url")
        if known is not None:
            return (known if isinstance(known, str) else None), True
    try:
        return upstream_url(parse_upstream(url)), False
    except ValueError:
        return None, False


def _misfit_routes(routes: object, pools: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong between routes, and between them and the pools."""
    told: dict[object, int] = {}
    names = [name for name in pools if isinstance(name, str)]
    for place, route in _tables(routes):
        path = f"routes[{place}]"
        pool = route.get("pool")
        if isinstance(pool, str) and pool not in pools:
            if meant := near(pool, names):
                hint = meant
            elif names:
                hint = f": {', '.join(_shown(name) for name in names[:10])}{', …' if len(names) > 10 else ''}"
            else:
                hint = "; there is none: each is a [pools.NAME]"
            yield f"{path}.pool: expected the name of a pool{hint}"
        try:
            pattern = Pattern(route.get("match"))  # type: ignore[arg-type]  # what is no text is a PatternError
        except PatternError:
            continue
        other = told.setdefault(pattern.meaning, place)
        if other != place:
            yield f"{path}.match: expected a pattern of its own; routes[{other}] is for the same requests"


def load_settings(source: Settings | Mapping[str, Any] | str | Path) -> Settings:
    """Settings from a mapping or from the path of a TOML file. Raises SettingsError with all that is wrong."""
    if isinstance(source, Settings):
        return source
    if isinstance(source, str | Path):
        return _load_file(Path(source))
    if not isinstance(source, Mapping):
        raise SettingsError([f"expected a mapping, or the path of a TOML file, and not {type(source).__name__}"])
    return _validate(source, "")


def load_limit(written: Mapping[str, Any], unnamed: Collection[str]) -> LimitSettings:
    """The settings of one rule. `unnamed`: keys that are not suggested in the place of an unknown one.

    Raises SettingsError, whose paths begin below the rule.
    """
    try:
        (limit,) = _validate({"limits": [written]}, "", unnamed).limits
    except SettingsError as error:
        problems = [problem.removeprefix("limits[0].") for problem in error.problems]
        raise SettingsError(problems) from error.__cause__
    return limit


def read_file(path: Path, most: int) -> bytes:
    """A regular file, of at most so many bytes. Raises OSError, whose `strerror` says why, or ValueError.

    Of a pipe or a device it is not known when it comes, nor whether it ends: neither is waited for.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe that nobody writes to would block
    with open(file, "rb") as reader:
        mode = os.fstat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "expected a regular file, and no pipe or device")
        raw = reader.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"expected at most {most} bytes")
    return raw


def _load_file(path: Path) -> Settings:
    try:
        raw = read_file(path, GREATEST_FILE)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise SettingsError([f"{path}: {reason}"]) from None
    if raw.startswith(codecs.BOM_UTF8):
        raise SettingsError([f"{path}: expected UTF-8 without a byte order mark, and the file begins with one"])
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


def _validate(document: Mapping[str, Any], prefix: str, unnamed: Collection[str] = ()) -> Settings:
    settings, problems, cause = None, [], None
    try:
        settings = Settings.model_validate(dict(document))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        problems = [_line(found, document, unnamed) for found in errors]
        cause = next(filter(None, map(_cause, errors)), None)
    except RecursionError:
        problems = ["expected settings that are not nested so deep"]
    problems += _misfits(document)
    if settings is not None and not problems:
        return settings
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    raise SettingsError([prefix + problem for problem in problems]) from cause


def _cause(error: Any) -> BaseException | None:
    """What a module of the user's raised when it was imported."""
    wrong = error.get("ctx", {}).get("error")
    return wrong.__cause__ if isinstance(wrong, Exception) else None


def _line(error: Any, document: Mapping[str, Any], unnamed: Collection[str]) -> str:
    parts = _place(error["loc"], document)
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if path else _shown(part)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = [key for key in _keys_at(parts[:-1]) if key not in unnamed]
        hint = near(str(parts[-1]), known) or (f"; expected {', '.join(known)}" if known else "")
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: expected a value, there is none"
    if kind in ("list_type", "dict_type", "model_type") and (wanted := _WANTED.get((*parts[:1], len(parts)))):
        return f"{path}: expected {wanted}"
    if kind == "model_type":
        return f"{path}: expected {_table_of(parts)}"
    if kind == "list_type":
        return f"{path}: expected a string, or a list of strings"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be", "expected", message)
    return f"{path}: {message}" if path else message


_WANTED: Final[dict[tuple[object, ...], str]] = {
    ("limits", 1): "a list of tables (mappings), which TOML has under a [[limits]] each (two brackets)",
    ("limits", 2): "a table (a mapping), such as { name = …, rate = … }",
    ("routes", 1): "a list of tables (mappings), which TOML has under a [[routes]] each (two brackets)",
    ("pools", 1): "tables (mappings) by the names of pools, which TOML has under a [pools.NAME] each",
    ("pools", 2): "a table (a mapping), such as { upstreams = … }, which TOML has under a [pools.NAME]",
}
"""What should be where a table or a list of them is neither, by the first key and the length of the path."""


def _place(location: tuple[int | str, ...], document: Mapping[str, Any]) -> list[int | str]:
    """Where in a document an error is: without the words of pydantic, and no deeper than the text that is there."""
    parts: list[int | str] = []
    value: object = document
    for part in location:
        if isinstance(value, str):  # "…" for ["…"], or a URL for a table with it
            break
        if isinstance(part, str) and (part == "[key]" or part.startswith(("function-", "constrained-"))):
            continue
        parts.append(part)
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part]
    return parts


def _shown(key: object) -> str:
    text = str(key)
    return text if re.fullmatch(r"[\w-]{1,64}", text) else json.dumps(text[:64])


def _table_of(path: list[int | str]) -> str:
    """What should be at the path of a table, with the keys that it must have, or its first."""
    model = _model_at(path)
    fields = {} if model is None else model.model_fields
    keys = [key for key, field in fields.items() if field.is_required()] or list(fields)[:1]
    return f"a table (a mapping), such as {{ {', '.join(f'{key} = …' for key in keys)} }}"


def _keys_at(path: list[int | str]) -> list[str]:
    """The keys that the schema knows at a path; none where it knows no table."""
    model = _model_at(path)
    return [] if model is None else list(model.model_fields)


def _model_at(path: list[int | str]) -> type[BaseModel] | None:
    kind: Any = Settings
    for part in path:
        if isinstance(part, int):
            kind = next(iter(get_args(kind)), None)  # what the list is of
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        else:
            return None
        if type(None) in get_args(kind):  # a table that may be left out
            kind = get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def warnings(settings: Settings, workers: int | None = None) -> list[str]:
    """What is odd about settings that are right, a line each. `workers`: how many, if not as they say."""
    found = []
    workers = settings.listen.workers if workers is None else workers
    if workers > 1 and settings.store.url is not None and store_scheme(settings.store.url) == "memory":
        found.append(f"store.url: each of {workers} workers counts in memory of its own; without a url they share")
    session = settings.session
    if (
        session is not None
        and session.kind == "store"
        and (session.store or settings.store.url or "memory://") == "memory://"
    ):
        found.append("session.store: memory is each process's own, and ends with it: no other reads these sessions")
    identity = settings.identity
    if identity.user is None:
        keyed = [
            f"limits[{place}]"
            for place, limit in enumerate(settings.limits)
            if "user" in limit.key or limit.tier == "user"
        ]
        found += [
            f"limits[{place}].exempt: no identity.user tells the user, so nobody is exempt by name"
            for place, limit in enumerate(settings.limits)
            if any(isinstance(one, str) and one.startswith("user:") for one in limit.exempt)
        ]
        keyed += [f"pools.{_shown(name)}" for name, pool in settings.pools.items() if pool.key == "user"]
        found += [f"{path}.key: no identity.user tells the user, so each client is its address" for path in keyed]
    by = identity.user.partition(":")[0] if isinstance(identity.user, str) else ""
    if not callable(identity.user) and by not in ("session", "bearer") and not identity.from_gateway:
        for place, limit in enumerate(settings.limits):
            claimed = [
                text for text in (*limit.key, limit.tier) if isinstance(text, str) and text.startswith("claim:")
            ]
            found += [
                f"limits[{place}]: no identity.user tells claims, so {text} is never there" for text in claimed
            ]
    used = {route.pool for route in settings.routes}
    found += [f"pools.{_shown(name)}: no route leads to it" for name in settings.pools if name not in used]
    if settings.store.url is not None and store_scheme(settings.store.url) == "limits":
        from gatekeeper.stores.limits import weaker

        found += [f"store.url: {line}" for line in weaker(settings.store.url)]
    return found


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a settings file, for editors to complete it by."""
    return Settings.model_json_schema(mode="validation")
