"""The errors that Gatekeeper raises. None of them ever carries a secret or a store's URI."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gatekeeper.commands import Verdict


class GatekeeperError(Exception):
    """The base of all errors of this package."""


class SettingsError(GatekeeperError, ValueError):
    """The settings are wrong. All that is wrong with them is reported together.

    `problems` has one line a problem: where it is, what was expected, and what is near to what was typed.
    No line shows the value itself, for it may be a secret.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class MissingExtra(GatekeeperError, ImportError):
    """A feature was asked for whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs more packages: pip install 'gatekeeper-http[{extra}]' "
            f"(in a checkout: pip install -e '.[{extra}]')"
        )


class StoreError(GatekeeperError):
    """A store could not answer. Policy decides what follows (`on_error`); the request does not fail of it."""

    # A reply is a Verdict or a StoreError: both can be asked whether the hit was allowed.
    allowed: ClassVar[bool] = False


class SessionError(GatekeeperError, ValueError):
    """A session cannot be used so: it holds what cannot be stored, or it would have to be loaded before."""


class Limited(GatekeeperError):
    """A decorated function was called more often than its limit allows.

    `verdict` says how long to wait. Inside a request the middleware turns this into the 429 response.
    """

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(f"rate limit exceeded; retry after {verdict.retry_after:.3f} s")
