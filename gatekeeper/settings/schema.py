"""The schema of settings: one for TOML files, mappings and keyword arguments."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)

from gatekeeper.http.parts import PartError, part
from gatekeeper.http.routes import Pattern
from gatekeeper.ratelimit.rates import parse_rates
from gatekeeper.ratelimit.rules import key_part
from gatekeeper.settings.values import (
    OBJECT,
    Address,
    Duration,
    Size,
    load_object,
    nth,
    parse_address,
    parse_upstream,
    proper_name,
    upstream_url,
)
from gatekeeper.upstreams.policies import POLICIES


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def as_list(value: object) -> object:
    """A list with the text, or what else it is."""
    return [value] if isinstance(value, str) else value


def _each(texts: list[str], check: Callable[[str], object]) -> None:
    """Raises the ValueError of the first text that is wrong, and tells which it is."""
    for place, text in enumerate(texts):
        try:
            check(text)
        except ValueError as error:
            raise ValueError(f"{error} (see the {nth(place)})" if len(texts) > 1 else str(error)) from None


def _rates(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one rate")
    _each(texts, parse_rates)
    parse_rates(";".join(texts))
    return texts


def _pattern(text: str) -> str:
    Pattern(text)
    return text


def _keys(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one part")
    _each(texts, key_part)
    return texts


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


_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


def _network(text: str) -> None:
    try:
        network = None if text == "unix" else ipaddress.ip_network(text)
        if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
            raise ValueError  # the addresses are unmapped before they are compared
    except ValueError:
        raise ValueError(
            'expected networks such as "10.0.0.0/8" (IPv4 as IPv4, no bit set behind the prefix), '
            'addresses, or "unix"'
        ) from None


def _networks(texts: list[str]) -> list[str]:
    _each(texts, _network)
    return texts


_USER_EXPECTED: Final = 'expected "header:NAME", "package.module:function" or a function'


def _user(value: object) -> object:
    if isinstance(value, str):
        kind, colon, name = value.partition(":")
        if kind == "header" and colon:
            if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", name):
                raise ValueError(_USER_EXPECTED)
            return value
        if not OBJECT.fullmatch(value):
            raise ValueError(_USER_EXPECTED)
        value = load_object(value)
    if not callable(value):
        raise ValueError(_USER_EXPECTED)
    return value


MOST_WEIGHT: Final = 1000
MOST_VNODES: Final = 10_000
MOST_UPSTREAMS: Final = 10_000


def _policy(value: object) -> object:
    expected = f'expected {", ".join(POLICIES)}, "package.module:Name" or a class'
    if isinstance(value, str):
        if value in POLICIES:
            return value
        if not OBJECT.fullmatch(value):
            near = difflib.get_close_matches(value[:64], POLICIES, n=1)
            raise ValueError(f'expected a policy; did you mean "{near[0]}"?' if near else expected)
        value = load_object(value)
    if not callable(value):
        raise ValueError(expected)
    return value


def _pool_key(text: str) -> str:
    if text not in ("ip", "user", "path"):
        try:
            if ":" not in text:
                raise PartError
            part(text)
        except PartError:
            raise ValueError("expected ip, user, header:NAME, cookie:NAME or path") from None
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


Integer: TypeAlias = Annotated[int, Strict()]  # true is no number
Boolean: TypeAlias = Annotated[bool, Strict()]  # nor is 1 a truth
Strings: TypeAlias = Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])]


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

    name: Annotated[str, AfterValidator(proper_name)] = Field(description="Told to clients; one of its own a rule.")
    rate: Annotated[Strings, AfterValidator(_rates)] = Field(
        description='"5/minute", or several: at most so many in any window of that length.'
    )
    match: Annotated[str, AfterValidator(_pattern)] | None = Field(
        None,
        description='"[METHOD|METHOD] [host]/path" with {name}, {name:path} and a final *; none: all requests.',
    )
    key: Annotated[Strings, AfterValidator(_keys)] = Field(
        ["ip"],
        description="What a quota is counted by: ip, user, route, method, host, global, header:NAME, cookie:NAME.",
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


def _default(written: object, description: str) -> Any:
    """A field whose default is written as in a file."""
    return Field(written, validate_default=True, description=description)


class ListenSettings(_Model):
    """Where the gateway listens, and what it bears with from clients."""

    address: Annotated[str, AfterValidator(lambda text: str(parse_address(text)))] = Field(
        "127.0.0.1:8080",
        description='"host:port" (port 0: any that is free), "[v6]:port", or "unix:/path".',
    )
    forwarded: Literal["x-forwarded", "forwarded", "none"] = Field(
        "x-forwarded",
        description="What upstreams are told of the client: X-Forwarded-For, -Proto, -Host; Forwarded; or nothing.",
    )
    head_timeout: Annotated[int, Duration()] = _default(
        "10s", "How long after its first byte the head of a request may take, and a new connection to begin one."
    )
    idle_timeout: Annotated[int, Duration()] = _default(
        "75s", "How long a client's connection is kept without a request."
    )
    body_timeout: Annotated[int, Duration()] = _default(
        "30s", "The longest pause of a request's body, and of a client that does not read its response."
    )
    least_rate: Annotated[int, Size(0, 1 << 30)] = _default(
        256, "Bytes a second that a request's body must bring, taken over body_timeout; 0: as slow as it likes."
    )
    drain_timeout: Annotated[int, Duration(zero=True)] = _default(
        "10s", "How long requests may take to finish once the gateway is asked to end."
    )
    max_head: Annotated[int, Size(1 << 10, 1 << 24)] = _default(
        "32KiB", "The greatest head of a request: its line and its fields."
    )
    max_fields: Integer = Field(100, ge=1, le=10_000, description="The most fields of a request.")
    max_body: Annotated[int, Size()] = _default("1GiB", "The greatest body of a request.")
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


class UpstreamSettings(_Model):
    """A service that answers."""

    url: Annotated[str, AfterValidator(lambda text: upstream_url(parse_upstream(text)))] = Field(
        description='"http://host:port" (port 80 if there is none), or "http+unix:///path" of a socket.'
    )
    id: str = _default(
        None, "What it is known by, of its own in the pool: hashing and health go by it. By default the URL."
    )
    weight: Integer = Field(1, ge=1, le=MOST_WEIGHT, description="Its share beside the others'.")
    max_in_flight: Integer | None = Field(
        None, ge=1, le=1_000_000, description="Requests at a time; full, it is passed over. None: no bound."
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


class HealthSettings(_Model):
    """When an upstream is passed over because its answers fail."""

    failures: Integer = Field(3, ge=1, le=1_000_000, description="So many in a row eject it.")
    eject_for: Annotated[int, Duration()] = _default(
        "10s", "For how long at first; longer each time. Then one request is its trial."
    )
    eject_at_most: Annotated[int, Duration()] = _default("5m", "For how long at most.")


class PoolSettings(_Model):
    """Upstreams that answer the same requests, and how one of them is chosen."""

    policy: Annotated[str | Callable[..., Any], BeforeValidator(_policy, json_schema_input_type=str)] = Field(
        "least_connections",
        description='round_robin, random, least_connections, ring, or "package.module:Name".',
    )
    key: Annotated[str, AfterValidator(_pool_key)] = Field(
        "ip",
        description="What a ring hashes: ip, user, header:NAME, cookie:NAME, path; what lacks it, by its address.",
    )
    vnodes: Integer = Field(
        160, ge=1, le=MOST_VNODES, description="The points of an upstream of weight 1 on a ring."
    )
    upstreams: Annotated[
        list[UpstreamSettings],
        BeforeValidator(_upstreams, json_schema_input_type=str | list[str | UpstreamSettings]),
    ] = Field(description="URLs, or tables with a url.")
    connect_timeout: Annotated[int, Duration()] = _default("2s", "How long connecting to an upstream may take.")
    response_timeout: Annotated[int, Duration()] = _default(
        "30s", "How long an upstream may take until the head of its response."
    )
    read_timeout: Annotated[int, Duration()] = _default("60s", "The longest pause of a response's body.")
    idle_timeout: Annotated[int, Duration(zero=True)] = _default(
        "4s",
        "How long an unused connection to an upstream is kept: less than the upstream keeps it. 0s: not at all.",
    )
    health: HealthSettings = Field(default_factory=HealthSettings)


class RouteSettings(_Model):
    """Which requests a pool answers."""

    match: Annotated[str, AfterValidator(_pattern)] = Field(
        description='"[METHOD|METHOD] [host]/path" with {name}, {name:path} and a final *; the most specific wins.'
    )
    pool: str = Field(description="The name of a pool.")


class Settings(_Model):
    """All settings."""

    store: StoreSettings = Field(default_factory=StoreSettings)
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    response: ResponseSettings = Field(default_factory=ResponseSettings)
    limits: list[LimitSettings] = Field([], description="The rules. All that match a request apply to it.")
    listen: ListenSettings = Field(default_factory=ListenSettings)
    pools: dict[Annotated[str, Strict(), AfterValidator(proper_name)], PoolSettings] = Field(
        {}, description="Upstreams by the name of their pool. (The middleware ignores them.)"
    )
    routes: list[RouteSettings] = Field(
        [], description="Which pool answers a request: the most specific route that matches it. None: 404."
    )
