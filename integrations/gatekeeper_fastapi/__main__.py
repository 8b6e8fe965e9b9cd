"""`python -m gatekeeper_fastapi package.module:app`: what limits its routes.

Exit statuses: 0 there is nothing to warn of, 1 there are warnings, 2 there is no such application.
"""

from __future__ import annotations

import sys

from gatekeeper.settings import load_object
from gatekeeper_fastapi.report import check


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or ":" not in arguments[0]:
        sys.stderr.write("usage: python -m gatekeeper_fastapi package.module:app\n")
        return 2
    sys.path.insert(0, "")  # as servers do
    try:
        app = load_object(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"{arguments[0]}: {error}\n")
        return 2
    report = check(app)
    sys.stdout.write(f"{report}\n")
    return 1 if report.warnings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
