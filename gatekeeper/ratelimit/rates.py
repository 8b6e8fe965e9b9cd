"""The words for a rate: "5/minute", "100 per 2 hours", "5/minute; 20/hour" (the grammar of `limits`)."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final, NamedTuple

import limits

from gatekeeper.errors import GatekeeperError

EXPECTED: Final = (
    "a rate: an amount from 1 to 1000000000, then second, minute, hour, day, week, month (30 days) or year "
    '(12 such months), as in "5/minute", "100 per 2 hours" or "5/minute; 20/hour"'
)

MOST: Final = 10**9
"""The greatest amount. It bounds the state of a key (a third of a kilobyte) and the arithmetic on it."""

LONGEST: Final = 10 * 360 * 86_400
"""The longest period in seconds (ten of the grammar's years)."""

_WEEKS: Final = re.compile(r"(?<![a-z])weeks?\s*$", re.IGNORECASE)
_NOUGHT: Final = re.compile(r"(?<![0-9.])0+(?![0-9.])")


class RateError(GatekeeperError, ValueError):
    """The text is not a rate. The message says what is expected and does not repeat the text."""


class Rate(NamedTuple):
    """`amount` units in each `period` (seconds)."""

    amount: int
    period: int


def parse_rates(text: str) -> tuple[Rate, ...]:
    """Read one or more rates, longest period last; two for the same period are refused.

    Raises RateError.
    """
    if not isinstance(text, str) or len(text) > 256 or not text.isascii():
        raise RateError(f"expected {EXPECTED}")
    rates = sorted((_parse(part) for part in re.split("[,;|]", text)), key=lambda rate: rate.period)
    for one, two in pairwise(rates):
        if one.period == two.period:
            raise RateError("expected one rate a period: two have the same one, and only the lower could count")
    return tuple(rates)


def _parse(part: str) -> Rate:
    # The grammar of `limits` has no weeks; they are read as its days, so that nothing is registered with it.
    if _NOUGHT.search(part):  # it would read no minutes as one
        raise RateError(f"expected {EXPECTED}")
    days, weeks = _WEEKS.subn("day", part)
    try:
        # parse_many, for `parse` drops what follows the first rate without a word.
        (item,) = limits.parse_many(days)
    except ValueError:
        raise RateError(f"expected {EXPECTED}") from None
    period = item.get_expiry() * (7 if weeks else 1)
    if not (1 <= item.amount <= MOST and item.multiples >= 1 and 1 <= period <= LONGEST):
        raise RateError(f"expected {EXPECTED}")
    return Rate(item.amount, period)
