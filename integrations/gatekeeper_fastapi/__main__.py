"""`python -m gatekeeper_fastapi package.module:app [--workers N] [--strict]`: what limits its routes.

Exit statuses: 0 all is well, 1 with `--strict` there are warnings, 2 there is no such application.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from gatekeeper.settings import load_object
from gatekeeper_fastapi.places import is_application
from gatekeeper_fastapi.report import check


def main(arguments: list[str]) -> int:
    parser = ArgumentParser("python -m gatekeeper_fastapi", description="List each route with what limits it.")
    parser.add_argument("app", metavar="package.module:app")
    parser.add_argument("--workers", type=int, help="How many processes serve it.")
    parser.add_argument("--strict", action="store_true", help="End with status 1 if there is a warning.")
    told = parser.parse_args(arguments)
    if ":" not in told.app:
        parser.error('expected "package.module:app"')
    sys.path.insert(0, "")  # as servers do
    try:
        app = load_object(told.app)
    except ValueError as error:
        sys.stderr.write(f"{told.app}: {error}\n")
        return 2
    if not is_application(app):
        factory = "; if it makes one, name what it has made" if callable(app) else ""
        sys.stderr.write(
            f"{told.app}: expected an application of FastAPI's or Starlette's, not {type(app).__name__}{factory}\n"
        )
        return 2
    report = check(app, workers=told.workers)
    sys.stdout.write(f"{report}\n")
    return 1 if told.strict and report.warnings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
