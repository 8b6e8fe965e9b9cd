"""The schema of settings: one for TOML files, mappings and keyword arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from gatekeeper.http.addresses import NetworkError, parse_network
from gatekeeper.http.parts import PartError, part
from gatekeeper.http.routes import Pattern
from gatekeeper.ratelimit.rates import parse_rates
from gatekeeper.ratelimit.rules import KEYS, KeyPartError, Native, key_part
from gatekeeper.settings.affinity import AffinitySettings
from gatekeeper.settings.base import Boolean, Integer, Model, Strings, Text, as_list, default
from gatekeeper.settings.bearer import BearerSettings
from gatekeeper.settings.keys import Keys
from gatekeeper.settings.session import SessionSettings
from gatekeeper.settings.values import (
    OBJECT,
    STORE_PATTERN,
    Address,
    Duration,
    NoModuleError,
    Size,
    is_asynchronous,
    load_object,
    near,
    nth,
    parse_address,
    parse_upstream,
    proper_name,
    store_url,
    takes_one,
    upstream_url,
)
from gatekeeper.upstreams.policies import POLICIES


def _each(texts: list[Any], check: Callable[[Any], object]) -> None:
    """Raises the ValueError of the first text that is wrong, and tells which it is."""
    for place, text in enumerate(texts):
        try:
            check(text)
        except ValueError as error:
            told = f"{error} (see the {nth(place)})" if len(texts) > 1 else str(error)
            raise ValueError(told) from error.__cause__


def _rates(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one rate")
    _each(texts, parse_rates)
    parse_rates(";".join(texts))
    return texts


def _pattern(text: str) -> str:
    Pattern(text)
    return text


def _function(value: object, expected: str) -> Callable[..., Any]:
    """A function, or the one that "package.module:function" names."""
    if isinstance(value, str) and OBJECT.fullmatch(value):
        value = load_object(value)
    if not callable(value):
        raise ValueError(expected)
    return value


def _asked(value: object, expected: str) -> Callable[..., Any]:
    """A function that is called with the request alone."""
    function = _function(value, expected)
    if not takes_one(function):
        raise ValueError("expected a function of the request, that is of one parameter")
    return function


def _meant(text: str, known: str, is_part: Callable[[str], bool]) -> str:
    """The end of a line: which of the known parts of a key was perhaps meant by a text, if any.

    What is behind the colon of "cokie:a" is a name, and no secret: it is told where "cookie:a" would be a part.
    """
    kind, colon, name = text.partition(":")
    words = [re.split("[:/]", one)[0] for one in re.split(", | or ", known)]
    fitting = [word for word in words if is_part(word + colon + name)]
    return "" if kind in words else near(kind, fitting, colon + name)


def _is_key_part(text: str) -> bool:
    if text.startswith("param:"):  # of a parameter the pattern decides
        return True
    with suppress(KeyPartError):
        key_part(text)
        return True
    return False


def _one_key(value: object) -> object:
    if not isinstance(value, str):
        return _asked(value, f"expected {KEYS}")
    return value if _is_key_part(value) else _asked_by_name(value)


def _asked_by_name(text: str) -> Callable[..., Any]:
    """The function that a text names. A misspelt part of a key, such as "cokie:a", has the form of one as well."""
    meant = _meant(text, KEYS, _is_key_part)
    try:
        return _asked(text, f"expected {KEYS}{meant}")
    except NoModuleError:
        if "." in text.partition(":")[0]:
            raise
        raise ValueError(f"expected {KEYS}{meant or '; there is no module of that name'}") from None


def _keys(value: object) -> object:
    value = [value] if isinstance(value, str) or callable(value) else value
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) or callable(one) for one in value):
        raise ValueError("expected a string, or a list of strings")
    if not value:
        raise ValueError("expected at least one part")
    found: list[object] = []
    _each(list(value), lambda one: found.append(_one_key(one)))
    return found


def _cost(value: object) -> object:
    expected = 'expected a number from 1 to 1000000000, or "package.module:function" of the request'
    if type(value) is int:
        if not 1 <= value <= 10**9:
            raise ValueError(expected)
        return value
    return _asked(value, expected)


def _tier(value: object) -> object:
    return _one_key(value)


def _tiers(value: object) -> object:
    """Rates by the name of a tier; "unlimited" is no rate at all."""
    if not isinstance(value, Mapping):
        raise ValueError('expected rates by the name of their tier, such as pro = "600/minute"')
    found: dict[str, list[str]] = {}
    for name, rates in value.items():
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            raise ValueError("expected names of tiers of 1 to 64 characters")
        if rates == "unlimited":
            found[name] = []
            continue
        texts = as_list(rates)
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'expected a rate, a list of rates, or "unlimited" for {json.dumps(name)}')
        try:
            found[name] = _rates(list(texts))
        except ValueError as error:
            raise ValueError(f"{error} (see {json.dumps(name)})") from None
    return found


_EXEMPT_EXPECTED: Final = (
    'expected networks such as "10.0.0.0/8" or "file:PATH" of such, "user:NAME", "header:NAME=VALUE", '
    'or "package.module:function"'
)


def _exemptions(value: object) -> object:
    value = [value] if isinstance(value, str) or callable(value) else value
    if not isinstance(value, list | tuple):
        raise ValueError(_EXEMPT_EXPECTED)
    found: list[object] = []
    _each(list(value), lambda one: found.append(_exemption(one)))
    return found


def _exemption(value: object) -> object:
    if isinstance(value, str):
        if re.fullmatch(r"user:.{1,256}|header:[A-Za-z0-9-]{1,64}=.{1,256}|file:.+", value):
            return value
        with suppress(NetworkError):
            parse_network(value)
            return value
    return _asked(value, _EXEMPT_EXPECTED)


def _listed_networks(texts: list[str]) -> list[str]:
    _each(texts, lambda text: (text.startswith("file:") and len(text) > 5) or parse_network(text))
    return texts


def _settle(text: str) -> str:
    if text not in ("app", "bytes") and not re.fullmatch(r"header:[A-Za-z0-9-]{1,64}", text):
        raise ValueError('expected "app", "bytes" or "header:NAME"')
    return text


def _api_key(text: str) -> str:
    if text != "bearer":
        kind = text.partition(":")[0]
        try:
            if kind not in ("header", "cookie", "query"):
                raise PartError
            part(text)
        except PartError:
            raise ValueError('expected header:NAME, cookie:NAME, query:NAME or "bearer"') from None
    return text


def _outcome(text: str) -> None:
    if text != "disconnect" and not re.fullmatch(r"[1-5](xx|[0-9]{2})", text):
        raise ValueError('expected statuses such as "404" or "5xx", or "disconnect"')


def _outcomes(texts: list[str]) -> list[str]:
    _each(texts, _outcome)
    return texts


def _field_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
        raise ValueError('expected the name of one field, such as "X-Forwarded-For" or "Forwarded"')
    return text


def _networks(texts: list[str]) -> list[str]:
    try:
        _each(texts, lambda text: text == "unix" or parse_network(text))
    except ValueError as error:
        raise ValueError(str(error).replace("or addresses", 'addresses, or "unix"')) from None
    return texts


_USER_EXPECTED: Final = (
    'expected "session:NAME", "bearer:CLAIM", "header:NAME", "package.module:function" or a function'
)
_USER_NAMES: Final = {
    "session": re.compile(r"[!-~]{1,64}"),
    "bearer": re.compile(r"[!-~]{1,64}"),
    "header": re.compile(r"[A-Za-z0-9-]{1,64}"),
}


def _user(value: object) -> object:
    if isinstance(value, str):
        kind, colon, name = value.partition(":")
        if kind in _USER_NAMES and colon:
            if not _USER_NAMES[kind].fullmatch(name):
                raise ValueError(_USER_EXPECTED)
            return value
    return _asked(value, _USER_EXPECTED)


MOST_WEIGHT: Final = 1000
MOST_VNODES: Final = 10_000
MOST_UPSTREAMS: Final = 10_000


def _policy(value: object) -> object:
    expected = f'expected {", ".join(POLICIES)}, "package.module:Name" or a class'
    if isinstance(value, str):
        if value in POLICIES:
            return value
        if not OBJECT.fullmatch(value):
            meant = near(value, POLICIES)
            raise ValueError(f"expected a policy{meant}" if meant else expected)
        value = load_object(value)
    if not callable(value):
        raise ValueError(expected)
    return value


_POOL_KEYS: Final = "ip, user, header:NAME, cookie:NAME, query:NAME, claim:NAME or path"


def _is_pool_key(text: str) -> bool:
    if text in ("ip", "user", "path"):
        return True
    with suppress(PartError):
        part(text)
        return ":" in text
    return False


def _pool_key(text: str) -> str:
    if not _is_pool_key(text):
        raise ValueError(f"expected {_POOL_KEYS}{_meant(text, _POOL_KEYS, _is_pool_key)}")
    return text


def _upstreams(value: object) -> object:
    """Each as a table, where it was given as a URL alone."""
    value = as_list(value)
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list of URLs, or of tables with a url")
    if not value:
        raise ValueError("expected at least one upstream")
    if len(value) > MOST_UPSTREAMS:
        raise ValueError(f"expected at most {MOST_UPSTREAMS} upstreams")
    for place, one in enumerate(value):
        if not isinstance(one, str | Mapping | UpstreamSettings):
            raise ValueError(f"expected URLs, or tables with a url (see the {nth(place)})")
    return [{"url": one} if isinstance(one, str) else one for one in value]


StoreUrl: TypeAlias = Annotated[
    str, AfterValidator(store_url), WithJsonSchema({"type": "string", "pattern": STORE_PATTERN})
]


class StoreSettings(Model):
    """Where counters live."""

    url: (
        Annotated[Text, AfterValidator(store_url), WithJsonSchema({"type": "string", "pattern": STORE_PATTERN})]
        | None
    ) = Field(
        None,
        repr=False,  # it may hold a password
        description="memory://, shared:///PATH, redis://…, redis+cluster://…, or a storage URI of limits; "
        "or env:NAME. By default memory://.",
    )
    timeout: Annotated[int, Duration()] = default("50ms", "How long another machine's answer is waited for.")
    max_keys: Integer = Field(
        1_000_000, ge=1, description="Keys held at most. New ones beyond it share one bucket a rule."
    )
    size: Annotated[int, Size(1 << 20)] | None = Field(
        None, description="The bytes that a shared store reserves; by default what max_keys needs."
    )
    on_error: Literal["local", "allow", "deny"] = Field(
        "local",
        description="What rules do while the store does not answer: count in the process, let pass, or refuse.",
    )


class IdentitySettings(Model):
    """Who is asking."""

    trusted_proxies: Annotated[Strings, AfterValidator(_networks)] = Field(
        [],
        description='Networks whose forwarding header is believed; "unix" for peers on a Unix socket.',
    )
    header: Annotated[Text, AfterValidator(_field_name)] = Field(
        "X-Forwarded-For",
        description='The one header those proxies write: X-Forwarded-For, "Forwarded", or one with an address.',
    )
    ipv6_prefix: Integer = Field(64, ge=1, le=128, description="IPv6 clients of a network this long are one.")
    user: Annotated[
        str | Callable[..., Any] | None,
        BeforeValidator(lambda value: value if value is None else _user(value), json_schema_input_type=str | None),
    ] = Field(
        None,
        description='"session:NAME" (a member of the session), "bearer:NAME" (a claim of a foreign token), '
        '"header:NAME" (believed from trusted proxies) or "package.module:function" of the request.',
    )
    api_key: Annotated[Text, AfterValidator(_api_key)] = Field(
        "header:X-API-Key",
        description='Where the part api_key is: header:NAME, cookie:NAME, query:NAME or "bearer".',
    )
    from_gateway: Boolean = Field(
        False, description="Whether a gateway's word is believed (Gatekeeper-Identity), from trusted proxies."
    )
    bearer: BearerSettings | None = Field(None, description='Whose tokens they are of which "bearer:NAME" tells.')
    max_body: Annotated[int, Size(1, 1 << 16)] = default(
        "64KiB", "How much of a body is read for keys of form and JSON fields. A longer one is answered 413."
    )


class PenaltySettings(Model):
    """When a key that is refused again and again is banned, and for how long."""

    strikes: Integer = Field(10, ge=1, le=1_000_000, description="So many refusals")
    within: Annotated[int, Duration()] = default("10m", "within so long")
    ban: Annotated[int, Duration()] = default("1m", "ban the key for so long, each time twice as long,")
    at_most: Annotated[int, Duration()] = default("1d", "up to so long.")


class LimitSettings(Model):
    """A rule: which requests, whose quota, how much."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["rate"]}, {"required": ["concurrency"]}]},
    )

    name: Annotated[Text, AfterValidator(proper_name)] = Field(
        description="Told to clients; one of its own a rule."
    )
    rate: Annotated[Strings, AfterValidator(_rates)] = Field(
        [], description='"5/minute", or several: at most so many in any window of that length.'
    )
    concurrency: Integer | None = Field(
        None, ge=1, le=10**6, description="In place of a rate: at most so many in progress."
    )
    lease: Annotated[int, Duration()] = default(
        "1m", "How long one in progress counts whose process died. (Who lives renews it.)"
    )
    match: Annotated[Text, AfterValidator(_pattern)] | None = Field(
        None,
        description='"[METHOD|METHOD] [host]/path" with {name}, {name:path} and a final *; none: all requests.',
    )
    per: Literal["request", "message"] = Field(
        "request", description="What is counted: requests, or the messages that a client sends within a WebSocket."
    )
    key: Annotated[
        list[Any], BeforeValidator(_keys, json_schema_input_type=str | list[str]), Field(validate_default=False)
    ] = Field(["ip"], description=f"What a quota is counted by: {KEYS}.")
    algorithm: Literal["sliding_window", "gcra", "sliding_counter", "fixed_window"] | None = Field(
        None, description="sliding_window, unless a burst is given: then gcra."
    )
    burst: Integer | None = Field(
        None, ge=1, le=10**9, description="The capacity of gcra's bucket; by default the rate's amount."
    )
    cost: Annotated[int | Callable[..., Any], BeforeValidator(_cost, json_schema_input_type=int | str)] = Field(
        1, description='Units that a request costs: a number, or "package.module:function" of the request.'
    )
    settle: Annotated[Text, AfterValidator(_settle)] | None = Field(
        None,
        description='What tells the real cost once it is known: "app", "bytes" or "header:NAME" of the response.',
    )
    tier: Annotated[Any, BeforeValidator(_tier, json_schema_input_type=str | None)] = Field(
        None, description="What names a request's tier: as a key's part."
    )
    tiers: Annotated[
        dict[str, list[str]],
        BeforeValidator(_tiers, json_schema_input_type=dict[str, str | list[str]]),
    ] = Field({}, description='Rates by tier, or "unlimited"; others have the rate of the rule.')
    exempt: Annotated[list[Any], BeforeValidator(_exemptions, json_schema_input_type=str | list[str])] = Field(
        [],
        repr=False,  # the value of a header may be a password
        description='Who is not limited: networks, "file:PATH" of such, user:NAME, header:NAME=VALUE, functions.',
    )
    scope: Annotated[Text, AfterValidator(proper_name)] | None = Field(
        None, description="Rules of one scope spend one quota."
    )
    overrides: Strings = Field([], description="Names of rules that do not apply where this one does.")
    penalty: PenaltySettings | None = Field(None, description="Bans a key that is refused again and again.")
    shadow: Boolean = Field(False, description="Decides and counts, and never refuses.")
    on_error: Literal["local", "allow", "deny"] | None = Field(None, description="As the store's, for this rule.")
    give_back: Annotated[Strings, AfterValidator(_outcomes)] = Field(
        [], description='Outcomes that do not count: "404", "5xx", "disconnect". The charge is undone.'
    )
    reset_on: Annotated[Strings, AfterValidator(_outcomes)] = Field(
        [], description="Outcomes after which the key's quota is whole again."
    )
    preflights: Boolean = Field(False, description="Whether CORS preflights are charged.")

    @property
    def counted_by(self) -> str:
        return self.algorithm or ("gcra" if self.burst is not None else "sliding_window")

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """All functions that are called for a request."""
        parts = (*self.key, self.cost, self.tier, *self.exempt)
        return [one for one in parts if callable(one) and not isinstance(one, Native)]


class AccessSettings(Model):
    """Who is let through, and who is not answered, whatever the rules."""

    allow: Annotated[Strings, AfterValidator(_listed_networks)] = Field(
        [], description='Networks that are never limited, and "file:PATH" of such, one a line.'
    )
    deny: Annotated[Strings, AfterValidator(_listed_networks)] = Field(
        [], description="Networks that are answered 403. Who is in both is let through."
    )
    reload: Annotated[int, Duration()] = default("10s", "How often the files are looked at for a change.")


class ResponseSettings(Model):
    """What responses tell."""

    fields: Boolean = Field(True, description="RateLimit and RateLimit-Policy on each response a rule applied to.")
    x_ratelimit: Literal["seconds", "epoch"] | None = Field(
        None,
        description="X-RateLimit-Limit, -Remaining and -Reset, too: the last in seconds from now, or as a time.",
    )
    retry_jitter: Annotated[int, Duration(zero=True)] = default(
        "0s", "Up to so much is added to Retry-After, so that those refused together do not return together."
    )
    body: Annotated[Text, Field(max_length=1 << 16)] | None = Field(
        None, description="The body of refusals. {status}, {retry_after} and {rules} are filled in."
    )
    content_type: Annotated[Text, Field(pattern=r"^[!-~][ -~]{0,127}$")] = Field(
        "text/plain; charset=utf-8", description="Of that body."
    )
    handler: Annotated[
        Callable[..., Any] | None,
        BeforeValidator(
            lambda value: value if value is None else _handler(value),
            json_schema_input_type=str | None,
        ),
    ] = Field(None, description='"package.module:function" of the ticket and its Refusal that returns a Refusal.')
    close_code: Literal[1008, 1013] = Field(1013, description="The close code of a WebSocket that a limit ends.")


def _handler(value: object) -> Callable[..., Any]:
    function = _function(value, _HANDLER_EXPECTED)
    if is_asynchronous(function):
        raise ValueError(f"{_HANDLER_EXPECTED}, and not asynchronous")
    return function


_HANDLER_EXPECTED: Final = 'expected "package.module:function" or a function, of the ticket and its Refusal'


class ListenSettings(Model):
    """Where the gateway listens, and what it bears with from clients."""

    address: Annotated[Text, AfterValidator(lambda text: str(parse_address(text)))] = Field(
        "127.0.0.1:8080",
        description='"host:port" (port 0: any that is free), "[v6]:port", or "unix:/path".',
    )
    workers: Integer = Field(1, ge=1, le=256, description="Processes that serve. They share their counters.")
    forwarded: Literal["x-forwarded", "forwarded", "none"] = Field(
        "x-forwarded",
        description="What upstreams are told of the client: X-Forwarded-For, -Proto, -Host; Forwarded; or nothing.",
    )
    head_timeout: Annotated[int, Duration()] = default(
        "10s", "How long after its first byte the head of a request may take, and a new connection to begin one."
    )
    idle_timeout: Annotated[int, Duration()] = default(
        "75s", "How long a client's connection is kept without a request."
    )
    body_timeout: Annotated[int, Duration()] = default(
        "30s", "The longest pause of a request's body, and of a client that does not read its response."
    )
    least_rate: Annotated[int, Size(0, 1 << 30)] = default(
        256, "Bytes a second that a request's body must bring, taken over body_timeout; 0: as slow as it likes."
    )
    drain_timeout: Annotated[int, Duration(zero=True)] = default(
        "10s", "How long requests may take to finish once the gateway is asked to end."
    )
    max_head: Annotated[int, Size(1 << 10, 1 << 24)] = default(
        "32KiB", "The greatest head of a request: its line and its fields."
    )
    max_fields: Integer = Field(100, ge=1, le=10_000, description="The most fields of a request.")
    max_body: Annotated[int, Size()] = default("1GiB", "The greatest body of a request.")
    max_connections: Integer = Field(
        16_384, ge=1, le=1_000_000, description="Connections of clients at a time. More are closed at once."
    )
    max_connections_per_address: Integer = Field(
        512,
        ge=0,
        le=1_000_000,
        description="Those of one address, unless it is a trusted proxy's; 0: no bound but max_connections.",
    )
    access_log: Boolean = Field(False, description="Whether a line for each request goes to standard output.")

    @property
    def place(self) -> Address:
        """The address, parsed."""
        return parse_address(self.address)


class UpstreamSettings(Model):
    """A service that answers."""

    url: Annotated[Text, AfterValidator(lambda text: upstream_url(parse_upstream(text)))] = Field(
        description='"http://host:port" (port 80 if there is none), or "http+unix:///path" of a socket.'
    )
    id: Text = default(
        None, "What it is known by, of its own in the pool: hashing and health go by it. By default the URL."
    )
    weight: Integer = Field(1, ge=1, le=MOST_WEIGHT, description="Its share beside the others'.")
    max_in_flight: Integer | None = Field(
        None, ge=1, le=1_000_000, description="Requests at a time; full, it is passed over. None: no bound."
    )
    drain: Boolean = Field(
        False, description="Whether it gets no new clients: only those go on with it that are pinned to it."
    )

    @field_validator("id", mode="before", json_schema_input_type=str | None)
    @classmethod
    def _own_or_url(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return info.data.get("url", "")
        return proper_name(value) if isinstance(value, str) else value

    @property
    def place(self) -> Address:
        """The URL, parsed."""
        return parse_upstream(self.url)


class HealthSettings(Model):
    """When an upstream is passed over because its answers fail."""

    failures: Integer = Field(3, ge=1, le=1_000_000, description="So many in a row eject it.")
    eject_for: Annotated[int, Duration()] = default(
        "10s", "For how long at first; longer each time. Then one request is its trial."
    )
    eject_at_most: Annotated[int, Duration()] = default("5m", "For how long at most.")


class PoolSettings(Model):
    """Upstreams that answer the same requests, and how one of them is chosen."""

    policy: Annotated[str | Callable[..., Any], BeforeValidator(_policy, json_schema_input_type=str)] = Field(
        "least_connections",
        description='round_robin, random, least_connections, ring, or "package.module:Name".',
    )
    key: Annotated[Text, AfterValidator(_pool_key)] = Field(
        "ip",
        description=f"What a ring hashes: {_POOL_KEYS}; what lacks it, by its address. With the policy ring, one "
        "of your own, or affinity.",
    )
    vnodes: Integer = Field(
        160, ge=1, le=MOST_VNODES, description="The points of an upstream of weight 1 on a ring."
    )
    upstreams: Annotated[
        list[UpstreamSettings],
        BeforeValidator(_upstreams, json_schema_input_type=str | list[str | UpstreamSettings]),
    ] = Field(description="URLs, or tables with a url.")
    connect_timeout: Annotated[int, Duration()] = default("2s", "How long connecting to an upstream may take.")
    response_timeout: Annotated[int, Duration()] = default(
        "30s", "How long an upstream may take until the head of its response."
    )
    read_timeout: Annotated[int, Duration()] = default("60s", "The longest pause of a response's body.")
    idle_timeout: Annotated[int, Duration(zero=True)] = default(
        "4s",
        "How long an unused connection to an upstream is kept: less than the upstream keeps it. 0s: not at all.",
    )
    pass_identity: Boolean = Field(
        False, description="Whether the upstreams are told who was verified, and what was charged."
    )
    affinity: AffinitySettings | None = Field(
        None, description="How clients keep to the upstream that has answered them. None: they do not."
    )
    health: HealthSettings = Field(default_factory=HealthSettings)


class RouteSettings(Model):
    """Which requests a pool answers."""

    match: Annotated[Text, AfterValidator(_pattern)] = Field(
        description='"[METHOD|METHOD] [host]/path" with {name}, {name:path} and a final *; the most specific wins.'
    )
    pool: Text = Field(description="The name of a pool.")


class Settings(Model):
    """All settings."""

    enabled: Boolean = Field(True, description="Whether anything is limited at all.")
    keys: Keys = Field(
        [],
        repr=False,
        description="What signs sessions, pins and identities: the first key. The others still verify.",
    )
    store: StoreSettings = Field(default_factory=StoreSettings)
    access: AccessSettings = Field(default_factory=AccessSettings)
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    session: SessionSettings | None = Field(None, description="What is remembered of clients; None: nothing.")
    response: ResponseSettings = Field(default_factory=ResponseSettings)
    limits: list[LimitSettings] = Field([], description="The rules. All that match a request apply to it.")
    listen: ListenSettings = Field(default_factory=ListenSettings)
    pools: dict[Annotated[Text, AfterValidator(proper_name)], PoolSettings] = Field(
        {}, description="Upstreams by the name of their pool. (The middleware ignores them.)"
    )
    routes: list[RouteSettings] = Field(
        [], description="Which pool answers a request: the most specific route that matches it. None: 404."
    )
