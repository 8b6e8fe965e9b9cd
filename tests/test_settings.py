"""Settings: what is wrong with them is told all at once, a line each, and never shows a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gatekeeper.errors import GatekeeperError, SettingsError
from gatekeeper.settings import GREATEST_FILE, Settings, json_schema, load_settings

SECRET = "hunter2"
"""Stands in as many wrong values as can be, and must show in no error."""


def problems_of(source: Any) -> tuple[str, ...]:
    """What is wrong with settings, held to be one line a problem without the secret."""
    with pytest.raises(SettingsError) as caught:
        load_settings(source)
    error = caught.value
    assert str(error) == "\n".join(error.problems)
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None  # a traceback would show the values
    assert all(problem and "\n" not in problem for problem in error.problems)
    return error.problems


def limit(**values: Any) -> dict[str, Any]:
    return {"limits": [{"name": "a", "rate": "5/minute", **values}]}


def user_function(request: object) -> str:
    return "alice"


EVERYTHING: dict[str, Any] = {
    "store": {"url": "memory://", "max_keys": 1000, "on_error": "deny"},
    "identity": {
        "trusted_proxies": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1", "unix"],
        "header": "Forwarded",
        "ipv6_prefix": 56,
        "user": "header:X-User",
    },
    "response": {"fields": False},
    "limits": [
        {"name": "default", "rate": "300/minute"},
        {
            "name": "login",
            "match": "POST /login",
            "rate": ["5/minute", "20/hour"],
            "key": ["ip", "route", "header:X-Tenant"],
            "algorithm": "sliding_counter",
            "cost": 2,
            "on_error": "allow",
            "give_back": ["404", "5xx", "disconnect"],
            "preflights": True,
        },
        {"name": "bursty.1", "rate": "10/second", "burst": 50, "key": "user"},
    ],
}
"""A document that sets everything."""

TOML = """\
[store]
url = "memory://"

[identity]
trusted_proxies = "10.0.0.0/8"

[[limits]]
name = "login"
match = "POST /login"
rate = ["5/minute", "20/hour"]
"""


# What is right


def test_nothing_need_be_set() -> None:
    settings = load_settings({})
    assert settings.limits == []
    assert settings.identity.trusted_proxies == []
    assert settings.identity.header == "X-Forwarded-For"
    assert settings.store.url == "memory://"


def test_everything_can_be_set() -> None:
    settings = load_settings(EVERYTHING)
    assert settings.store.max_keys == 1000
    assert settings.identity.trusted_proxies == ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1", "unix"]
    assert settings.response.fields is False
    assert [rule.counted_by for rule in settings.limits] == ["sliding_window", "sliding_counter", "gcra"]


def test_one_text_stands_for_a_list_of_one() -> None:
    (rule,) = load_settings(limit(key="user", give_back="5xx")).limits
    assert (rule.rate, rule.key, rule.give_back) == (["5/minute"], ["user"], ["5xx"])


def test_settings_are_their_own_source() -> None:
    settings = load_settings(EVERYTHING)
    assert load_settings(settings) is settings


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_the_same_as_its_mapping(tmp_path: Path, kind: type[str] | type[Path]) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(TOML, encoding="utf-8")
    assert load_settings(kind(path)) == load_settings(
        {
            "identity": {"trusted_proxies": ["10.0.0.0/8"]},
            "limits": [{"name": "login", "match": "POST /login", "rate": ["5/minute", "20/hour"]}],
        }
    )


def test_the_user_may_be_a_function_or_the_name_of_one() -> None:
    assert load_settings({"identity": {"user": user_function}}).identity.user is user_function
    assert load_settings({"identity": {"user": "json:dumps"}}).identity.user is json.dumps
    assert load_settings({"identity": {"user": "json.decoder:JSONDecoder.decode"}}).identity.user is (
        json.JSONDecoder.decode
    )


def test_settings_are_frozen() -> None:
    settings = load_settings(EVERYTHING)
    for model, field, value in [
        (settings, "limits", []),
        (settings.store, "max_keys", 1),
        (settings.identity, "user", None),
        (settings.response, "fields", True),
        (settings.limits[0], "cost", 5),
    ]:
        before = getattr(model, field)
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, field, value)
        assert getattr(model, field) == before


def test_loading_leaves_the_mapping_as_it_was() -> None:
    before = json.dumps(EVERYTHING)
    load_settings(EVERYTHING)
    assert json.dumps(EVERYTHING) == before


# What is wrong


@pytest.mark.parametrize(
    ("document", "path", "expected"),
    [
        ({"store": SECRET}, "store", "expected a valid dictionary"),
        ({"store": [SECRET]}, "store", "expected a valid dictionary"),
        ({"store": {"url": f"redis://user:{SECRET}@host"}}, "store.url", "expected 'memory://'"),
        ({"store": {"url": {"password": SECRET}}}, "store.url", "expected 'memory://'"),
        ({"store": {"max_keys": SECRET}}, "store.max_keys", "expected a valid integer"),
        ({"store": {"max_keys": 0}}, "store.max_keys", "expected greater than or equal to 1"),
        ({"store": {"max_keys": 1.5}}, "store.max_keys", "expected a valid integer"),
        ({"store": {"on_error": SECRET}}, "store.on_error", "expected 'local', 'allow' or 'deny'"),
        ({"identity": SECRET}, "identity", "expected a valid dictionary"),
        ({"identity": {"trusted_proxies": SECRET}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": ["10.0.0.0/8", SECRET]}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": ["10.0.0.1/8"]}}, "identity.trusted_proxies", "no bit set behind the prefix"),
        ({"identity": {"trusted_proxies": ["10.0.0.0/33"]}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": {SECRET: SECRET}}}, "identity.trusted_proxies", "expected a string, or a list of strings"),
        ({"identity": {"trusted_proxies": [7]}}, "identity.trusted_proxies[0]", "expected a valid string"),
        ({"identity": {"header": f"{SECRET}, Forwarded"}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": ""}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": "X_Forwarded_For"}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": ["Forwarded", SECRET]}}, "identity.header", "expected a valid string"),
        ({"identity": {"ipv6_prefix": 0}}, "identity.ipv6_prefix", "expected greater than or equal to 1"),
        ({"identity": {"ipv6_prefix": 129}}, "identity.ipv6_prefix", "expected less than or equal to 128"),
        ({"identity": {"ipv6_prefix": SECRET}}, "identity.ipv6_prefix", "expected a valid integer"),
        ({"identity": {"user": SECRET}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": ""}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": 7}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": {"name": SECRET}}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": "header:"}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": f"header:{SECRET} x"}}, "identity.user", 'expected "header:NAME"'),
        ({"identity": {"user": f"{SECRET}:function"}}, "identity.user", "expected a module that can be imported"),
        ({"identity": {"user": f"json.{SECRET}:function"}}, "identity.user", "expected a module that can be imported"),
        ({"identity": {"user": f"json:{SECRET}"}}, "identity.user", "expected a name that the module has"),
        ({"identity": {"user": f"json:dumps.{SECRET}"}}, "identity.user", "expected a name that the module has"),
        ({"identity": {"user": "os:sep"}}, "identity.user", "function"),
        ({"identity": {"user": "sys:maxsize"}}, "identity.user", "function"),
        ({"response": {"fields": SECRET}}, "response.fields", "expected a valid boolean"),
        ({"limits": SECRET}, "limits", "two brackets"),
        ({"limits": {"name": SECRET}}, "limits", "two brackets"),
        ({"limits": [SECRET]}, "limits[0]", "expected a valid dictionary"),
        ({"limits": [{"rate": "5/minute"}]}, "limits[0].name", "expected a value, there is none"),
        ({"limits": [{"name": SECRET}]}, "limits[0].rate", "expected a value, there is none"),
        (limit(name=f"{SECRET} x"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=""), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="é"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="a\n"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="*5"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=SECRET * 10), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=[SECRET]), "limits[0].name", "expected a valid string"),
        (limit(rate=SECRET), "limits[0].rate", "expected a rate"),
        (limit(rate=f"5/{SECRET}"), "limits[0].rate", "expected a rate"),
        (limit(rate="0/minute"), "limits[0].rate", "expected a rate"),
        (limit(rate=["5/minute", SECRET]), "limits[0].rate", "expected a rate"),
        (limit(rate=["5/minute", "9/minute"]), "limits[0].rate", "expected one rate a period"),
        (limit(rate=[]), "limits[0].rate", "expected at least one rate"),
        (limit(rate=5), "limits[0].rate", "expected a string, or a list of strings"),
        (limit(rate=[{SECRET: SECRET}]), "limits[0].rate[0]", "expected a valid string"),
        (limit(match=SECRET), "limits[0].match", "expected a pattern"),
        (limit(match=f"/{SECRET}*"), "limits[0].match", "expected a pattern"),
        (limit(match=[SECRET]), "limits[0].match", "expected a valid string"),
        (limit(key=SECRET), "limits[0].key", "expected ip, user, route"),
        (limit(key=["ip", SECRET]), "limits[0].key", "expected ip, user, route"),
        (limit(key=[]), "limits[0].key", "expected at least one part"),
        (limit(key="header:"), "limits[0].key", "header:NAME"),
        (limit(key=f"cookie:{SECRET}"), "limits[0].key", "header:NAME"),
        (limit(key=f"header:{SECRET} x"), "limits[0].key", "header:NAME"),
        (limit(key="header:\N{CYRILLIC CAPITAL LETTER KA}"), "limits[0].key", "header:NAME"),
        (limit(key=[7]), "limits[0].key[0]", "expected a valid string"),
        (limit(algorithm=SECRET), "limits[0].algorithm", "expected 'sliding_window', 'gcra'"),
        (limit(burst=0), "limits[0].burst", "expected greater than or equal to 1"),
        (limit(burst=SECRET), "limits[0].burst", "expected a valid integer"),
        (limit(burst=10**9 + 1), "limits[0].burst", "expected less than or equal to 1000000000"),
        (limit(burst=9, algorithm="fixed_window"), "limits[0]", "gcra"),
        (limit(burst=9, rate=["5/minute", "9/hour"]), "limits[0]", "expected one rate beside a burst"),
        (limit(cost=0), "limits[0].cost", "expected greater than or equal to 1"),
        (limit(cost=SECRET), "limits[0].cost", "expected a valid integer"),
        (limit(cost=6), "limits[0]", "expected a cost within the rate"),
        (limit(cost=6, rate=["9/minute", "5/hour"]), "limits[0]", "expected a cost within the rate"),
        (limit(cost=4, burst=3), "limits[0]", "expected a cost within the rate"),
        (limit(on_error=SECRET), "limits[0].on_error", "expected 'local', 'allow' or 'deny'"),
        (limit(give_back=SECRET), "limits[0].give_back", "expected statuses"),
        (limit(give_back=["404", SECRET]), "limits[0].give_back", "expected statuses"),
        (limit(give_back="600"), "limits[0].give_back", "expected statuses"),
        (limit(give_back="4x"), "limits[0].give_back", "expected statuses"),
        (limit(give_back=[404]), "limits[0].give_back[0]", "expected a valid string"),
        (limit(preflights=SECRET), "limits[0].preflights", "expected a valid boolean"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_by_its_path_and_what_was_expected(document: Any, path: str, expected: str) -> None:
    (problem,) = problems_of(document)
    assert problem.startswith(f"{path}: ")
    assert expected in problem


def test_rules_that_share_a_name_are_told_by_their_places() -> None:
    rules = [{"name": name, "rate": "5/minute"} for name in (SECRET, "b", SECRET)]
    (problem,) = problems_of({"limits": rules})
    assert problem.startswith("limits[2].name: ")
    assert "limits[0]" in problem
    assert "limits[1]" not in problem


def test_names_that_clients_could_not_tell_apart_are_told() -> None:
    rules = [{"name": "a", "rate": ["5/minute", "6/hour"]}, {"name": "a-60s", "rate": "7/minute"}]
    (problem,) = problems_of({"limits": rules})
    assert problem.startswith("limits[1].name: expected a name of its own")


def test_what_is_wrong_between_values_is_told_beside_what_is_wrong_with_one() -> None:
    rules = [
        {"name": "a", "rate": "5/minute", "cost": 6, "match": SECRET},
        {"name": "a", "rate": "5/minute", "burst": 3, "algorithm": "fixed_window", "fieldz": 1},
    ]
    problems = problems_of({"limits": rules, "wrong": 1})
    assert sorted(problem.partition(": ")[0] for problem in problems) == [
        "limits[0]", "limits[0].match", "limits[1]", "limits[1].fieldz", "limits[1].name", "wrong",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "path", "near"),
    [
        ({"stroe": {"url": SECRET}}, "stroe", "store"),
        ({"limit": [SECRET]}, "limit", "limits"),
        ({"store": {"ulr": SECRET}}, "store.ulr", "url"),
        ({"store": {"max_key": SECRET}}, "store.max_key", "max_keys"),
        ({"identity": {"trusted_proxy": SECRET}}, "identity.trusted_proxy", "trusted_proxies"),
        ({"identity": {"headers": SECRET}}, "identity.headers", "header"),
        ({"response": {"field": SECRET}}, "response.field", "fields"),
        (limit(mach=SECRET), "limits[0].mach", "match"),
        (limit(giveback=SECRET), "limits[0].giveback", "give_back"),
    ],
)
def test_a_misspelt_key_is_told_with_the_nearest_right_one(document: Any, path: str, near: str) -> None:
    assert problems_of(document) == (f'{path}: unknown key; did you mean "{near}"?',)


@pytest.mark.parametrize(
    ("document", "path", "known"),
    [
        ({"zzz": SECRET}, "zzz", ["store", "identity", "response", "limits"]),
        ({"store": {"zzz": SECRET}}, "store.zzz", ["url", "max_keys", "on_error"]),
        (limit(zzz=SECRET), "limits[0].zzz", ["name", "rate", "match"]),
    ],
)
def test_a_key_that_is_near_to_none_is_told_with_all_that_are_known(
    document: Any, path: str, known: list[str]
) -> None:
    (problem,) = problems_of(document)
    assert problem.startswith(f"{path}: unknown key; expected {', '.join(known)}")


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31mred", "a.b", "", "x" * 10_000, "\ud800", 7, (1, 2), None, b"a"])
def test_no_key_breaks_the_line_or_fills_the_screen(key: Any) -> None:
    for document in ({key: SECRET}, {"store": {key: SECRET}}, limit() | {key: SECRET}):
        (problem,) = problems_of(document)
        assert problem.isprintable()
        assert len(problem) < 300


def test_all_that_is_wrong_is_told_together() -> None:
    problems = problems_of(
        {
            "stroe": {},
            "store": {"url": SECRET, "max_keys": SECRET},
            "identity": {"trusted_proxies": SECRET, "ipv6_prefix": 0, "user": SECRET},
            "limits": [
                {"name": "a", "rate": SECRET, "match": SECRET, "key": SECRET},
                {"name": "b", "rate": "5/minute"},
                {"name": f"{SECRET} c", "rates": SECRET, "burst": SECRET},
                {"name": "d", "rate": "5/minute", "cost": 6},
            ],
            "response": {"fields": SECRET},
        }
    )
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "identity.ipv6_prefix",
        "identity.trusted_proxies",
        "identity.user",
        "limits[0].key",
        "limits[0].match",
        "limits[0].rate",
        "limits[2].burst",
        "limits[2].name",
        "limits[2].rate",
        "limits[2].rates",
        "limits[3]",
        "response.fields",
        "store.max_keys",
        "store.url",
        "stroe",
    ]


@pytest.mark.parametrize("source", [None, 7, b"hunter2", [SECRET], (SECRET,), {SECRET}])
def test_what_is_no_source_of_settings_is_told_by_its_kind(source: Any) -> None:
    (problem,) = problems_of(source)
    assert type(source).__name__ in problem


def test_settings_that_hold_themselves_are_refused() -> None:
    document: dict[str, Any] = {"limits": []}
    document["limits"].append(document)
    document["store"] = document
    assert problems_of(document)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(SECRET)
    | st.sampled_from(["unix", "1/day"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "rate", "match", "key", "url", "user", "header", "limits", "zzz"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["store", "identity", "limits", "response", "zzz"]), JSON, max_size=3))
def test_no_document_makes_anything_but_settings_or_a_settings_error(document: dict[str, Any]) -> None:
    told = ""
    try:
        load_settings(document)
    except SettingsError as error:
        told = str(error)
    assert SECRET not in told


# Files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'[store]\nurl = "{SECRET}\n', 2),
        (f"[store]\nurl = {SECRET}\n", 2),
        (f'[store]\nurl = "{SECRET}" {SECRET}\n', 2),
        (f"[store]\n\n{SECRET}\n", 3),
        ("[store]\n[store]\n", 2),
        (f'[store]\nurl = "\\{SECRET}"\n', 2),
        ("[store\n", 1),
        (f"a = 2024-02-30 # {SECRET}\n", 1),
    ],
)
def test_an_error_of_toml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: expected TOML: ")
    assert f"line {line}," in problem


def test_each_error_of_a_file_begins_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(f'[stroe]\n[store]\nurl = "{SECRET}"\n', encoding="utf-8")
    assert sorted(problems_of(path)) == [
        f"{path}: store.url: expected 'memory://'",
        f'{path}: stroe: unknown key; did you mean "store"?',
    ]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert problems_of(path) == (f"{path}: No such file or directory",)
    assert problems_of(str(path)) == (f"{path}: No such file or directory",)


def test_a_directory_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == (f"{tmp_path}: Is a directory",)


def test_a_path_that_no_file_can_have_is_told_and_not_as_wrong_toml() -> None:
    (problem,) = problems_of("none\0.toml")
    assert "TOML" not in problem


def test_a_file_that_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(f"# {SECRET}\n[store]\n# caf".encode() + b"\xe9\n")
    assert problems_of(path) == (f"{path}: expected UTF-8 (line 3)",)


def test_a_file_that_is_too_great_is_told_by_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(b"#" * (GREATEST_FILE + 1))
    assert problems_of(path) == (f"{path}: expected at most {GREATEST_FILE} bytes",)


def test_a_file_of_the_greatest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(b"#" * GREATEST_FILE)
    assert load_settings(path) == Settings()


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{a = " * 100_000])
def test_a_file_that_is_nested_too_deep_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(text, encoding="utf-8")
    assert problems_of(path) == (f"{path}: expected TOML that is not nested so deep",)


def test_a_number_of_thousands_of_digits_is_not_told_as_nesting(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text("[store]\nmax_keys = " + "9" * 5000, encoding="utf-8")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert "nested" not in problem


def test_the_error_is_a_value_error_of_this_package() -> None:
    assert issubclass(SettingsError, GatekeeperError)
    assert issubclass(SettingsError, ValueError)


# The JSON Schema

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}

KEYWORDS = {
    "$defs", "$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum", "items", "maximum",
    "minimum", "properties", "required", "title", "type",
}  # fmt: skip
"""The words of JSON Schema that `accepts` understands."""


def accepts(schema: Any, value: Any, root: Any) -> bool:
    """Whether a schema accepts a value (JSON Schema 2020-12, as far as our schema uses it)."""
    assert set(schema) <= KEYWORDS, f"unknown words {set(schema) - KEYWORDS}"
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)
    if "anyOf" in schema:
        return any(accepts(one, value, root) for one in schema["anyOf"])
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if kind == "integer":
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if kind == "array":
        return all(accepts(schema["items"], item, root) for item in value)
    if kind == "object":
        known = schema["properties"]
        assert schema["additionalProperties"] is False
        return (
            set(value) <= set(known)
            and set(schema.get("required", [])) <= set(value)
            and all(accepts(known[name], item, root) for name, item in value.items())
        )
    return True


def test_the_schema_has_a_description_and_sound_references_everywhere() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == {"store", "identity", "response", "limits"} == set(Settings.model_fields)
    for model in (schema, *schema["$defs"].values()):
        assert model["type"] == "object"
        assert model["description"]
        assert set(model.get("required", [])) <= set(model["properties"])
        for name, field in model["properties"].items():
            if "$ref" in field:
                assert field["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            else:
                assert field["description"], name
                assert "default" in field or name in model["required"]


@pytest.mark.parametrize(
    "document",
    [
        {},
        EVERYTHING,
        limit(),
        limit(key="user", match="/api/*", give_back="5xx"),
        {"identity": {"trusted_proxies": "unix", "user": "json:dumps"}},
    ],
)
def test_a_right_document_passes_the_schema_and_the_settings(document: dict[str, Any]) -> None:
    schema = json_schema()
    assert accepts(schema, document, schema)
    load_settings(document)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"stroe": {}},
        {"store": {"url": "redis://"}},
        {"store": {"max_keys": 0}},
        {"identity": {"ipv6_prefix": 129}},
        {"identity": {"trusted_proxies": [7]}},
        {"identity": {"user": 7}},
        {"limits": {}},
        {"limits": [{"name": "a"}]},
        limit(algorithm="leaky"),
        limit(burst=0),
        limit(rate=5),
        limit(on_error="panic"),
        limit(preflights="maybe"),
    ],
)
def test_a_wrong_document_passes_neither_the_schema_nor_the_settings(document: Any) -> None:
    schema = json_schema()
    assert not accepts(schema, document, schema)
    with pytest.raises(SettingsError):
        load_settings(document)
