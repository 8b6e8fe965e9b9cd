"""What the README and the documentation show is run: code, settings, commands, links, the keys of settings."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gatekeeper.settings import json_schema, load_settings
from gatekeeper.testing import virtual

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[Any]:
    """Each fenced block of a language, with a name that says where it begins."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            if block[1] == language:
                line = text.count("\n", 0, block.start()) + 1
                name = f"{page.relative_to(ROOT)}:{line}"
                found.append(pytest.param(page, line, block[2], id=name))
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks("python"))
def test_a_block_of_python_runs_by_itself(
    page: Path, line: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEKEEPER_KEY", secrets.token_urlsafe(32))
    # What is shown to the second holds on a slow machine, too; but what is shown of a store asks that store.
    clock: AbstractContextManager[object] = nullcontext() if "redis://" in code else virtual()
    with clock:
        # The blank lines make a traceback point into the page.
        exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "block"})


class Shop(ModuleType):
    """The application whose functions the pages name, as `shop:plan_of`: it has them all."""

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if name.startswith("__"):  # what Python itself asks of a module
            raise AttributeError(name)
        return lambda request: None


@pytest.mark.parametrize(("page", "line", "text"), blocks("toml"))
def test_a_block_of_toml_is_a_settings_file(
    page: Path, line: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shop", Shop("shop"))
    monkeypatch.setenv("GATEKEEPER_STORE", "redis://redis.example")
    load_settings(tomllib.loads(text))


def commands() -> Iterator[Any]:
    """Each `$ gatekeeper …` of a console block, with the output shown below it."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block.values[2], flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield pytest.param(command, output, id=command)


@pytest.mark.parametrize(("command", "output"), list(commands()))
def test_a_command_prints_what_is_shown(command: str, output: str) -> None:
    program, *arguments = command.split()
    assert program == "gatekeeper"
    call = [sys.executable, "-c", "from gatekeeper.cli import main; main()", *arguments]
    environ = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run(call, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), f"{target}: there is no such file"
        if heading:
            assert heading in headings(other), f"{target}: there is no such heading"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


LISTED = {"keys", "limits", "routes", "pools.NAME.upstreams"}
"""The tables that come in lists."""

TOP = "At the top"
"""The heading of the keys that are in no table."""


def schema_keys() -> Iterator[Any]:
    """Each key of the schema: the heading of its table, the key, what the schema says of it."""
    schema = json_schema()
    for name, below in schema["properties"].items():
        if any("$ref" in one for one in references(below)):
            yield from table_keys(schema, name, below)
        else:
            yield pytest.param(TOP, name, below["default"], id=name)


def table_keys(schema: Any, table: str, below: Any) -> Iterator[Any]:
    """The keys of a table, or of each in a list of tables, or of each that has a name; and of those in it."""
    if "additionalProperties" in below:
        table, below = f"{table}.NAME", below["additionalProperties"]
    heading = f"[[{table}]]" if table in LISTED else f"[{table}]"
    below = next(one for one in references(below) if "$ref" in one)
    model = schema["$defs"][below["$ref"].rpartition("/")[2]]
    for key, what in model["properties"].items():
        if "$ref" not in what:
            default = what["default"] if key not in model.get("required", ()) else "required"
            yield pytest.param(heading, key, default, id=f"{table}.{key}")
        if any("$ref" in one for one in references(what)):
            yield from table_keys(schema, f"{table}.{key}", what)


def references(what: Any) -> Iterator[Any]:
    """What a value may be, in a list or under a name as well."""
    yield what
    inner = [what[key] for key in ("items", "additionalProperties") if isinstance(what.get(key), dict)]
    for one in inner or what.get("anyOf", ()):
        yield from references(one)


def settings_rows() -> dict[tuple[str, str], list[str]]:
    """The rows of docs/settings.md, by (heading, key)."""
    rows = {}
    for section in re.split(r"^## ", (ROOT / "docs/settings.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = section.partition("\n")[0].strip("`")
        for row in re.findall(r"^\| `\w+` \|.*\|$", section, re.MULTILINE):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            rows[heading, cells[0].strip("`")] = cells
    return rows


@pytest.mark.parametrize(("heading", "key", "default"), list(schema_keys()))
def test_each_key_of_the_schema_is_documented_with_its_default(heading: str, key: str, default: object) -> None:
    cells = settings_rows()[heading, key]
    expected = "required" if default == "required" else "none" if default is None else f"`{json.dumps(default)}`"
    assert len(cells) == 4
    assert cells[2] == expected


def test_no_key_is_documented_that_the_schema_lacks() -> None:
    assert set(settings_rows()) == {tuple(key.values[:2]) for key in schema_keys()}


def shown_keys(table: str, value: Any) -> Iterator[tuple[str, str]]:
    """The keys that a document sets, by (heading, key) as `settings_rows` has them."""
    heading = TOP if not table else f"[[{table}]]" if table in LISTED else f"[{table}]"
    for key, below in value.items():
        name = f"{table}.{key}" if table else key
        tables = [one for one in below if isinstance(one, dict)] if isinstance(below, list) else []
        if key == "pools":
            for pool in below.values():
                yield from shown_keys("pools.NAME", pool)
            continue
        if isinstance(below, dict) and name != "limits.tiers":  # whose keys are names of the user's own
            tables = [below]
        if not tables or (heading, key) in settings_rows():
            yield heading, key
        for one in tables:
            yield from shown_keys(name, one)


def test_the_settings_page_shows_each_key_in_its_whole_files() -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    shown = {
        key
        for section in re.split(r"^## ", page, flags=re.MULTILINE)
        if section.startswith("A whole ")
        for _, text in FENCE.findall(section)
        for key in shown_keys("", tomllib.loads(text))
    }
    assert shown == set(settings_rows())
