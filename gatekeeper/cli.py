"""The command line: `gatekeeper serve FILE`, `gatekeeper check FILE`, `gatekeeper schema`, `gatekeeper --version`.

Exit statuses: 0 all is well, 1 the output could not be written, 2 the settings or the command are wrong. Errors and
warnings go to standard error.
"""

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from gatekeeper import __version__
from gatekeeper.errors import MissingExtra, SettingsError, StoreError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.keyfiles import KeyFileError, exposed, load_file, rotated, save_file
from gatekeeper.keyfiles import generate as generated
from gatekeeper.keys import ALGORITHMS, KeyRingError, KeyState
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import json_schema, load_settings, store_scheme, warnings
from gatekeeper.settings.values import Duration
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
        for warning in (*warnings(keeper.settings), *exposed(keeper.settings.keys)):
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

    app.add_typer(_keys(tell), name="keys")

    @app.command()
    def schema() -> None:
        """Print the JSON Schema of settings files, for editors to complete them by."""
        tell(json.dumps(json_schema(), indent=2))

    return app


def _keys(tell: Callable[[str], None]) -> "typer.Typer":
    """The commands that keep a file of keys."""
    import typer

    keys = typer.Typer(no_args_is_help=True, help="Make, list and rotate the keys that sign sessions and pins.")
    kept = Annotated[Path, typer.Argument(help="A file of keys, as `generate --file` makes it.")]

    def failed(error: Exception) -> NoReturn:
        typer.echo(str(error), err=True)
        raise typer.Exit(1)

    @keys.command()
    def generate(
        file: Annotated[
            Path | None, typer.Option(help="Add the key to this file, made if need be; there it is pending.")
        ] = None,
        algorithm: Annotated[
            str, typer.Option(help=f"One of {', '.join(ALGORITHMS)}; all but HS256 need a file.")
        ] = "HS256",
    ) -> None:
        """Draw a new key: print it as a secret for the environment, or add it to a file.

        The first key of a file is active, and signs at once. Another one is pending: servers accept what it signs,
        and `rotate` lets it sign.
        """
        if file is None:
            if algorithm != "HS256":
                failed(KeyFileError(f"expected --file for {algorithm}"))
            tell(secrets.token_urlsafe(32))
            return
        try:
            known = load_file(file) if file.exists() else []
            made = generated(algorithm, KeyState.PENDING if known else KeyState.ACTIVE)
            save_file(file, [*known, (made, made.created or 0)])
        except (KeyFileError, KeyRingError, MissingExtra) as error:
            failed(error)
        tell(f"{made.id} {made.algorithm} {made.state}")

    @keys.command("list")
    def listed(file: kept) -> None:
        """List the keys of a file: id, algorithm, state, and when it came into it, a line each."""
        try:
            for key, since in load_file(file):
                tell(f"{key.id} {key.algorithm} {key.state} {_day(since)}")
        except (KeyFileError, KeyRingError, MissingExtra) as error:
            failed(error)

    @keys.command()
    def rotate(
        file: kept,
        keep: Annotated[
            str, typer.Option(help="How long a key is still accepted that does not sign any more.")
        ] = "30d",
    ) -> None:
        """Let the pending key sign, and the one that signed retire; keys that have retired for long are dropped.

        Have all servers read a pending key before: generate it, wait a minute, rotate. Without one a new key signs
        at once, and servers that have not read the file yet take what it signs for forged.
        """
        try:
            longest = Duration().read(keep) // 10**9
        except ValueError as error:
            failed(KeyFileError(f"--keep: {error}"))
        try:
            known = load_file(file)
            if not any(key.state is KeyState.PENDING for key, _ in known):
                typer.echo(
                    "warning: no key was pending; servers that have not read the new one reject it", err=True
                )
            after = rotated(known, int(time.time()), longest)
            save_file(file, after)
        except (KeyFileError, KeyRingError, MissingExtra) as error:
            failed(error)
        for key, since in after:
            tell(f"{key.id} {key.algorithm} {key.state} {_day(since)}")

    return keys


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


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
    if keeper.keys is not None:
        yield f"keys: {', '.join(f'{key.id} ({key.state})' for key in keeper.keys.ring.keys)}"
    session = keeper.settings.session
    if session is not None:
        where = "with the client" if session.kind == "token" else "in a store"
        yield f"sessions: {where}, idle for {session.idle // 10**9} s, {session.absolute // 10**9} s in all"
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
        drained = sum(upstream.drain for upstream in pool.upstreams)
        drains = f", {drained} of which {'drains' if drained == 1 else 'drain'}" if drained else ""
        yield f"pool {name}: {policy}{by} over {count} {'upstream' if count == 1 else 'upstreams'}{drains}"
        if pool.affinity is not None:
            ways = [("cookie", pool.affinity.cookie_of(name)), ("field", pool.affinity.header)]
            told = " or ".join(f"{way} {called}" for way, called in ways if called is not None)
            strict = ", strictly" if pool.affinity.strict else ""
            yield f"pool {name}: clients keep to theirs for {-(-pool.affinity.ttl // 10**9)} s, by {told}{strict}"
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
