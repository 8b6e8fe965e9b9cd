"""The floors of the package: a file imports only from lower floors or its own, and the core does no I/O."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).resolve().parent.parent / "gatekeeper"

FLOORS: Final[dict[str, int]] = {
    room: floor
    for floor, rooms in enumerate(
        (
            "errors http keys commands",
            "identity ratelimit sessions affinity upstreams",
            "gate answers ticket",
            "stores proxy jwks",
            "settings storage upkeep keyfiles user_sessions keeper limiter decorators",
            "asgi coverage gateway quotas testing wsgi",
            "cli",
        )
    )
    for room in rooms.split()
}
"""The floor of each room: a module or package directly under `gatekeeper`. Some are still to be built."""

APART: Final = frozenset({1})
"""Floors whose rooms do not know each other."""

PURE: Final = frozenset({0, 1, 2})
"""Floors without I/O, locks, clock, randomness or framework."""

IMPURE: Final = frozenset(
    {
        "asyncio", "django", "flask", "http.client", "os", "random", "secrets", "selectors", "socket", "starlette",
        "threading", "time", "urllib.request", "werkzeug",
    }
)  # fmt: skip


def runtime_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports under a node, in functions too, but not those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from runtime_imports(ast.Module([other], []))
        else:
            yield from runtime_imports(child)


def imported(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> list[str]:
    """The full dotted name of each thing imported by a module that lies in `package`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = package[: len(package) - node.level + 1] if node.level else ()
    base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def violations(root: Path) -> list[str]:
    """What breaks the rules in the package at `root`, as `path:line: what`, by file and line."""
    found: list[str] = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        is_front = place.parts == ("__init__.py",)
        room = place.parts[0].removesuffix(".py")
        told = f"{root.name}/{place.as_posix()}"
        if not is_front and room not in FLOORS:
            found.append(f"{told}:1: in no room of the table: give it a room")
            continue
        lines: list[tuple[int, str]] = []
        for node in runtime_imports(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for name in imported(node, (root.name, *place.parts[:-1])):
                first, _, rest = name.partition(".")
                if first == root.name:
                    broken = "the front imports its own package" if is_front else _within(room, rest)
                else:
                    broken = None if is_front else _outside(room, name)
                if broken is not None and (node.lineno, broken) not in lines:
                    lines.append((node.lineno, broken))
        found += [f"{told}:{line}: {broken}" for line, broken in sorted(lines)]
    return found


def _within(room: str, target: str) -> str | None:
    other = target.partition(".")[0]
    if other == room or (other.startswith("__") and other.endswith("__")):
        return None
    if other not in FLOORS:
        return f"imports {other or 'the front'}, which is no room: import from the room itself"
    mine, its = FLOORS[room], FLOORS[other]
    if its > mine:
        return f"{room} (floor {mine}) imports {other} (floor {its})"
    if its == mine and mine in APART:
        return f"{room} imports {other}, another room of floor {mine}"
    return None


def _outside(room: str, name: str) -> str | None:
    if FLOORS[room] not in PURE:
        return None
    for impure in IMPURE:
        if name == impure or name.startswith(impure + "."):
            return f"{room} (floor {FLOORS[room]}) imports {impure}"
    return None


def test_every_file_imports_only_what_its_floor_allows() -> None:
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_the_package_is_where_the_check_looks_for_it() -> None:
    names = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {"__init__.py", "gate.py", "http/message.py", "cli.py"} <= names


SOUND: Final = {
    "__init__.py": """\
        from __future__ import annotations
        import time
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from gatekeeper.gate import Gate
        def __getattr__(name):
            from importlib import import_module
            return import_module("gatekeeper.gate")
        """,
    "errors.py": "import typing\nif typing.TYPE_CHECKING:\n    import socket\n    import gatekeeper.cli\n",
    "http/__init__.py": "from gatekeeper.http import message\nfrom .message import Request\n",
    "http/message.py": "from gatekeeper import errors\nfrom ..errors import Wrong\nfrom http import HTTPStatus\n",
    "ratelimit/rules.py": "from gatekeeper.ratelimit import rates\nfrom .rates import Rate\nimport timeit\n",
    "gate.py": "import gatekeeper.identity\nfrom urllib.parse import quote\n",
    "stores/memory.py": "import time, threading\nfrom gatekeeper.gate import Gate\n",
    "decorators.py": "from gatekeeper.keeper import Gatekeeper\nfrom gatekeeper import __version__\n",
    "cli.py": "from gatekeeper import keeper, wsgi\n",
}

BROKEN: Final = {
    "__init__.py": """\
        from __future__ import annotations
        from gatekeeper.errors import Wrong
        def __getattr__(name):
            from . import gate
            return gate
        """,
    "errors.py": "from gatekeeper import commands\nimport gatekeeper.gate\n",
    "http/message.py": """\
        import re, time
        from gatekeeper.http.routes import Table
        from ..identity import Identity
        def late():
            from os import path
            async def later():
                from os.path import join
                if join:
                    import http.client
        """,
    "http/routes.py": "from http import client\nfrom urllib import request\nimport werkzeug.routing\n",
    "identity.py": """\
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from gatekeeper.cli import main
        else:
            from gatekeeper.ratelimit.rates import Rate
        class Identity:
            import secrets
        """,
    "gate.py": """\
        import gatekeeper
        from gatekeeper import Limited
        from gatekeeper import stores
        from gatekeeper import *
        try:
            import asyncio
        except ImportError:
            from threading import Lock
        """,
    "stores/deep/er.py": "import time\nfrom gatekeeper.keeper import Gatekeeper\nfrom ... import wsgi\n",
    "odd.py": "import time\n",
    "parlour/__init__.py": "",
}


def build(root: Path, files: dict[str, str]) -> Path:
    """Write the files under a package of this name, without their common indent."""
    for name, text in files.items():
        path = root / "gatekeeper" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = len(text) - len(text.lstrip(" "))
        path.write_text("\n".join(line[indent:] for line in text.split("\n")), encoding="utf-8")
    return root / "gatekeeper"


def test_the_check_passes_a_tree_that_keeps_the_rules(tmp_path: Path) -> None:
    assert violations(build(tmp_path, SOUND)) == []


def test_the_check_reports_every_violation_with_file_and_line(tmp_path: Path) -> None:
    assert violations(build(tmp_path, BROKEN)) == [
        "gatekeeper/__init__.py:2: the front imports its own package",
        "gatekeeper/__init__.py:4: the front imports its own package",
        "gatekeeper/errors.py:2: errors (floor 0) imports gate (floor 2)",
        "gatekeeper/gate.py:1: imports the front, which is no room: import from the room itself",
        "gatekeeper/gate.py:2: imports Limited, which is no room: import from the room itself",
        "gatekeeper/gate.py:3: gate (floor 2) imports stores (floor 3)",
        "gatekeeper/gate.py:4: imports *, which is no room: import from the room itself",
        "gatekeeper/gate.py:6: gate (floor 2) imports asyncio",
        "gatekeeper/gate.py:8: gate (floor 2) imports threading",
        "gatekeeper/http/message.py:1: http (floor 0) imports time",
        "gatekeeper/http/message.py:3: http (floor 0) imports identity (floor 1)",
        "gatekeeper/http/message.py:5: http (floor 0) imports os",
        "gatekeeper/http/message.py:7: http (floor 0) imports os",
        "gatekeeper/http/message.py:9: http (floor 0) imports http.client",
        "gatekeeper/http/routes.py:1: http (floor 0) imports http.client",
        "gatekeeper/http/routes.py:2: http (floor 0) imports urllib.request",
        "gatekeeper/http/routes.py:3: http (floor 0) imports werkzeug",
        "gatekeeper/identity.py:5: identity imports ratelimit, another room of floor 1",
        "gatekeeper/identity.py:7: identity (floor 1) imports secrets",
        "gatekeeper/odd.py:1: in no room of the table: give it a room",
        "gatekeeper/parlour/__init__.py:1: in no room of the table: give it a room",
        "gatekeeper/stores/deep/er.py:2: stores (floor 3) imports keeper (floor 4)",
        "gatekeeper/stores/deep/er.py:3: stores (floor 3) imports wsgi (floor 5)",
    ]
