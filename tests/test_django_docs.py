"""The project that docs/frameworks/django.md shows, put together and run as its reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks" / "django.md"
BLOCK = re.compile(r"^```py(?:thon)?\n# shop/(\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BESIDES = """\
SECRET_KEY = "of a test"
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
REST_FRAMEWORK = {"DEFAULT_THROTTLE_CLASSES": ["shop.throttles.Burst"]}
"""
"""What each project has, and the page does not show."""


def test_the_project_of_the_page_passes_its_checks_and_its_tests(tmp_path: Path) -> None:
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    assert files.keys() == {"settings.py", "urls.py", "throttles.py", "tests.py"}
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in files.items():
        (folder / name).write_text(text + (BESIDES if name == "settings.py" else ""), encoding="utf-8")
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": str(tmp_path)}
    environ.pop("PYTHONWARNINGS", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "django", *arguments]
        return subprocess.run(
            call, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False
        )

    checked = run("check")
    assert (checked.returncode, checked.stderr) == (0, "")
    tested = run("test", "shop")
    assert tested.returncode == 0, tested.stderr
    assert "Ran 2 tests" in tested.stderr
    listed = run("gatekeeper", "check")
    assert listed.stdout.splitlines() == [
        "* /report: default, @limit (10/minute)",
        "* /export/{year}: default, @limit (3/minute)",
        "GET|POST /basket: default, @limit (100/minute), @limit (2/minute)",
        "* /account/orders/: default, account, account-pages (20/minute), @limit (10/minute)",
    ]
    script = "from shop.throttles import Burst; assert Burst().allow_request is not None"
    assert run("shell", "-v0", "-c", script).returncode == 0
