"""The command line: `gatekeeper check FILE`, `gatekeeper schema`, `gatekeeper --version`.

Exit statuses: 0 all is well, 2 the settings or the command are wrong. Errors go to standard error.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gatekeeper import __version__
from gatekeeper.errors import MissingExtra, SettingsError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import json_schema

if TYPE_CHECKING:
    import typer


def _app() -> "typer.Typer":
    try:
        import typer
    except ImportError:
        raise MissingExtra("The command line", "cli") from None

    app = typer.Typer(add_completion=False, no_args_is_help=True)

    def version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"gatekeeper {__version__}")
            raise typer.Exit

    @app.callback()
    def main(
        version: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Rate limits at the front door of a Python web application."""

    @app.command()
    def check(file: Annotated[Path, typer.Argument(help="A settings file in TOML.")]) -> None:
        """Report everything that is wrong with a settings file."""
        # As servers do: settings may name functions of the application.
        sys.path.insert(0, "")
        try:
            keeper = Gatekeeper(file)
        except SettingsError as error:
            for problem in error.problems:
                typer.echo(problem, err=True)
            count = len(error.problems)
            typer.echo(f"{count} {'error' if count == 1 else 'errors'}", err=True)
            raise typer.Exit(2) from None
        for rule in keeper.gate.rules:
            matches = rule.pattern.text if rule.pattern is not None else "all requests"
            typer.echo(f"{rule.name}: {matches}: {', '.join(limit.policy for limit in rule.limits)}")
        if not keeper.gate.rules:
            typer.echo("no limits: every request passes")

    @app.command()
    def schema() -> None:
        """Print the JSON Schema of settings files, for editors to complete them by."""
        typer.echo(json.dumps(json_schema(), indent=2))

    return app


def main() -> None:
    """The entry point of the `gatekeeper` command."""
    try:
        app = _app()
    except MissingExtra as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    app()
