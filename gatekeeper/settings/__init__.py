"""Settings: their schema, and how they are read from files and mappings."""

from gatekeeper.settings.loading import (
    GREATEST_FILE,
    MOST_PROBLEMS,
    json_schema,
    load_settings,
    warnings,
)
from gatekeeper.settings.schema import (
    HealthSettings,
    IdentitySettings,
    LimitSettings,
    ListenSettings,
    PoolSettings,
    ResponseSettings,
    RouteSettings,
    Settings,
    StoreSettings,
    UpstreamSettings,
)
from gatekeeper.settings.values import (
    Address,
    TcpAddress,
    UnixAddress,
    is_asynchronous,
    load_object,
    nth,
    parse_address,
    parse_upstream,
    store_scheme,
)

__all__ = [
    "GREATEST_FILE",
    "MOST_PROBLEMS",
    "Address",
    "HealthSettings",
    "IdentitySettings",
    "LimitSettings",
    "ListenSettings",
    "PoolSettings",
    "ResponseSettings",
    "RouteSettings",
    "Settings",
    "StoreSettings",
    "TcpAddress",
    "UnixAddress",
    "UpstreamSettings",
    "is_asynchronous",
    "json_schema",
    "load_object",
    "load_settings",
    "nth",
    "parse_address",
    "parse_upstream",
    "store_scheme",
    "warnings",
]
