"""The command line: `gatekeeper serve FILE`, `gatekeeper check FILE`, `gatekeeper schema`, `gatekeeper --version`.

Exit statuses: 0 all is well, 1 the output could not be written, 2 the settings or the command are wrong. Errors and
warnings go to standard error.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from gatekeeper import __version__
from gatekeeper.errors import MissingExtra, SettingsError, StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import json_schema, load_settings, store_scheme, warnings
from gatekeeper.storage import check_store, is_unused
from gatekeeper.stores.memory import MemoryStore

if TYPE_CHECKING:
    import typer


def _app() -> "typer.Typer":
    try:
        import typer
    except ImportError:
        raise MissingExtra("The command line", "cli") from None

    app = typer.Typer(add_completion=False, no_args_is_help=True)

    def tell(text: str) -> None:
        """A line on standard output; where it cannot be written, the status is 1."""
        try:
            typer.echo(text)
        except BrokenPipeError:
            raise  # who reads has seen enough: no error to speak of
        except OSError as error:
            typer.echo(f"standard output: {error.strerror}", err=True)
            # What the stream still holds would be tried again at the end, with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    def wrong(error: SettingsError) -> NoReturn:
        for problem in error.problems:
            typer.echo(problem, err=True)
        count = len(error.problems)
        typer.echo(f"{count} {'error' if count == 1 else 'errors'}", err=True)
        raise typer.Exit(2) from None

    def version(wanted: bool) -> None:
        if wanted:
            tell(f"gatekeeper {__version__}")
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
        """Report everything that is wrong with a settings file, or else what it says."""
        # As servers do: settings may name functions of the application.
        sys.path.insert(0, "")
        try:
            keeper = Gatekeeper(file, store=MemoryStore())  # that of the settings is another process's
            check_store(keeper.settings.store, keeper.limits())
        except SettingsError as error:
            wrong(error)
        except MissingExtra as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        for line in _told(keeper):
            tell(line)
        for warning in warnings(keeper.settings):
            typer.echo(f"warning: {warning}", err=True)

    @app.command()
    def serve(
        file: Annotated[Path, typer.Argument(help="A settings file in TOML.")],
        listen: Annotated[str | None, typer.Option(help='In place of listen.address: "host:port".')] = None,
        workers: Annotated[int | None, typer.Option(min=1, max=256, help="In place of listen.workers.")] = None,
    ) -> None:
        """Run the gateway that a settings file describes, until SIGTERM or Ctrl-C."""
        sys.path.insert(0, "")
        try:
            from gatekeeper.gateway import supervisor, worker  # noqa: F401  # it tells what is not installed
        except MissingExtra as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        try:
            status = supervisor.serve(file, listen, workers)
        except SettingsError as error:
            wrong(error)
        except MissingExtra as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except supervisor.BindError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        raise typer.Exit(status)

    @app.command()
    def bans(
        file: Annotated[Path, typer.Argument(help="A settings file in TOML.")],
        lift: Annotated[
            tuple[str, str] | None,
            typer.Option(help="Lift the ban of a key: the rule's name, and the key as listed."),
        ] = None,
    ) -> None:
        """List the keys that are banned: rule, seconds left and key, a line each. Or lift one of the bans.

        What cannot be printed of a key is shown as \\x1b or \\u2028, and read so, too.
        """
        sys.path.insert(0, "")
        try:
            settings = load_settings(file)
            if store_scheme(settings.store.url or "memory://") == "memory":
                raise SettingsError([_UNSEEN])
            unused = is_unused(settings.store)
            keeper = Gatekeeper(settings, store=MemoryStore() if unused else None)
            if unused:
                check_store(settings.store, keeper.limits())
                typer.echo("nothing is counted there yet: no process has used the store", err=True)
        except SettingsError as error:
            wrong(error)
        except MissingExtra as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        try:
            if lift is not None:
                if keeper.lift(lift[0], _read_back(lift[1])):
                    return
                typer.echo("the key is not banned", err=True)
                raise typer.Exit(1)
            for ban in keeper.bans():
                tell(f"{ban.rule} {ban.seconds:.0f} {_printable(ban.key)}")
        except KeyError as error:
            typer.echo(error.args[0], err=True)
            raise typer.Exit(2) from None
        except StoreError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        finally:
            keeper.close()

    @app.command()
    def schema() -> None:
        """Print the JSON Schema of settings files, for editors to complete them by."""
        tell(json.dumps(json_schema(), indent=2))

    return app


_UNSEEN = (
    "store.url: expected one that processes share, such as shared:///dev/shm/gatekeeper: without it (or with "
    "memory://) those that serve count where no other process can look, and so do the workers of a gateway"
)


def _printable(key: str) -> str:
    """A key as it can be printed: in an escape are control characters, what a terminal cannot show, backslashes."""
    text = "".join(
        one if one.isprintable() and one != "\\" else one.encode("unicode_escape").decode("ascii") for one in key
    )
    encoding = sys.stdout.encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)


_ESCAPE = re.compile(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})")


def _read_back(text: str) -> str:
    """The key that was printed so."""
    return _ESCAPE.sub(lambda escape: escape[0].encode("ascii").decode("unicode_escape"), text)


def _told(keeper: Gatekeeper) -> Iterator[str]:
    """What settings say, a line for each rule, pool and route. No URL is shown."""
    for rule in keeper.gate.rules:
        matches = rule.pattern.text if rule.pattern is not None else "all requests"
        yield f"{rule.name}: {matches}: {', '.join(limit.policy for limit in rule.limits)}{_besides(rule)}"
    if not keeper.settings.enabled:
        yield "switched off: every request passes"
    access = keeper.settings.access
    for name, networks in (("allow", access.allow), ("deny", access.deny)):
        if networks:
            yield f"{name}: {len(networks)} {'entry' if len(networks) == 1 else 'entries'}"
    if not keeper.gate.rules:
        yield "no limits: every request passes"
    for name, pool in keeper.settings.pools.items():
        policy = pool.policy if isinstance(pool.policy, str) else getattr(pool.policy, "__name__", "of your own")
        by = f" by {pool.key}" if pool.policy == "ring" else ""
        count = len(pool.upstreams)
        yield f"pool {name}: {policy}{by} over {count} {'upstream' if count == 1 else 'upstreams'}"
    for route in keeper.settings.routes:
        yield f"route {route.match}: {route.pool}"


def _besides(rule: Rule) -> str:
    """What else there is to know of a rule."""
    told = [
        f"{name}: {', '.join(limit.policy for limit in tier) or 'unlimited'}" for name, tier in rule.tiers.items()
    ]
    told += ["per message"] if rule.messages else []
    told += ["with exemptions"] if rule.exempt is not None else []
    told += [f"in place of {', '.join(sorted(rule.overrides))}"] if rule.overrides else []
    told += ["bans who is refused too often"] if rule.penalty is not None else []
    told += ["in shadow: refuses nothing"] if rule.shadow else []
    return f" ({'; '.join(told)})" if told else ""


def main() -> None:
    """The entry point of the `gatekeeper` command."""
    try:
        app = _app()
    except MissingExtra as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    app()
