"""Quotas made whole again by hand, by the words that rules and keys are known by to people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from gatekeeper.commands import Batch
from gatekeeper.errors import StoreError
from gatekeeper.gate import Gate
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import RateLimit, Rule, bounded, secret
from gatekeeper.settings import LimitSettings
from gatekeeper.ticket import BareTicket


class Known(NamedTuple):
    """A rule, and the settings that it was made of."""

    rule: Rule
    settings: LimitSettings


def known(keeper: Gatekeeper) -> list[Known]:
    """The rules of a Gatekeeper's settings."""
    return [Known(*one) for one in zip(keeper.gate.rules, keeper.settings.limits, strict=True)]


def reset(keeper: Gatekeeper, rules: Iterable[Known], name: str, values: Sequence[str]) -> None:
    """Make a quota whole again: that of the rules of a name, for the values of the parts of their keys, in order.

    An address stands for a part that a request has not. Raises ValueError if no rule has that name, or its key has
    other parts; StoreError if the store does not answer.
    """
    found = list(rules)
    named = [one for one in found if one.rule.name == name]
    if not named:
        names = ", ".join(dict.fromkeys(one.rule.name for one in found))
        raise ValueError(f"RULE: expected the name of a rule{': ' * bool(names)}{names}")
    resets: list[tuple[RateLimit, str]] = []
    for rule, settings in named:
        if len(settings.key) != len(values):
            parts = ", ".join(part if isinstance(part, str) else "a function" for part in settings.key)
            raise ValueError(f"KEY: expected {len(settings.key)}, one for each of: {parts}")
        keys = _keys(keeper.gate, settings, values)
        resets += [(limit, key) for limit in _limits(rule) for key in keys]
    # A batch without hits has no answer to tell whether the store has given one.
    for reply in keeper.ask(Batch([(resets[0][0], "", 0)], resets=resets, spend=False)):
        if isinstance(reply, StoreError):
            raise reply


def _limits(rule: Rule) -> Iterator[RateLimit]:
    yield from rule.limits
    for limits in rule.tiers.values():
        yield from limits


def _keys(gate: Gate, settings: LimitSettings, values: Sequence[str]) -> list[str]:
    """The keys that a rule may have for these values: a part may have been missing, and an address in its place."""
    if tuple(settings.key) == ("ip",):
        return [_address(gate, values[0])]
    parts = []
    for part, value in zip(settings.key, values, strict=True):
        text = _address(gate, value) if part == "ip" else _stored(part, value)
        there = f"={text}" if len(values) == 1 else f"{len(text)}={text}|"
        missing = f"@{_address(gate, value)}{'' if len(values) == 1 else '|'}"
        parts.append([there] if part == "ip" else [there, missing])
    return [bounded("".join(key)) for key in product(*parts)]


def _stored(part: object, value: str) -> str:
    """A value as a key holds it: what is secret, only as a digest."""
    is_secret = isinstance(part, str) and (
        part == "api_key" or part.startswith("cookie:") or part.lower() == "header:authorization"
    )
    return (secret(value) or "") if is_secret else value


def _address(gate: Gate, text: str) -> str:
    """An address by the name under which it is counted: that of its network, for IPv6."""
    return gate.address(BareTicket(text.partition("/")[0]))
