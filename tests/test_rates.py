"""Rates in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.errors import GatekeeperError
from gatekeeper.ratelimit.rates import LONGEST, MOST, Rate, RateError, parse_rates

SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,
    "year": 360 * 86_400,
}

ALPHABET = "0123456789 /;,|.-+\n\tpersecondminutehourdayweekmonthyear%é५"
"""Characters that stand in rates, and some that do not."""


@pytest.mark.parametrize(("unit", "period"), SECONDS.items())
@pytest.mark.parametrize("form", ["7/{0}", "7/{0}s", "7 / {0}", "7 per {0}", "7per {0}s", " 7/1 {0} ", "7/1{0}"])
def test_a_unit_is_read_in_each_of_its_forms(form: str, unit: str, period: int) -> None:
    assert parse_rates(form.format(unit)) == (Rate(7, period),)
    assert parse_rates(form.format(unit).upper()) == (Rate(7, period),)


@pytest.mark.parametrize("unit", ["second", "minute", "hour", "day", "week", "month"])
@pytest.mark.parametrize("form", ["100 per 2 {}s", "100/2{}", "100/2 {}", "100 per 02{}s"])
def test_a_period_may_be_several_units(form: str, unit: str) -> None:
    assert parse_rates(form.format(unit)) == (Rate(100, 2 * SECONDS[unit]),)


@pytest.mark.parametrize("separator", [";", ",", "|", "; ", " , "])
def test_several_rates_are_all_read_the_longest_period_last(separator: str) -> None:
    text = separator.join(["20/hour", "5/minute", "100/day"])
    assert parse_rates(text) == (Rate(5, 60), Rate(20, 3600), Rate(100, 86_400))


def test_the_bounds_themselves_are_allowed() -> None:
    assert parse_rates(f"{MOST}/second") == (Rate(MOST, 1),)
    assert parse_rates("1/10 years") == (Rate(1, LONGEST),)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ";", "5", "/minute", "minute", "5/", "5 minute", "5/minute;", ";5/minute", "5/minute;;1/hour",
        "5/minute 20/hour", "5/minute/hour", "5/minute x", "x 5/minute", "5//minute", "5/minute:",
        "5/fortnight", "5/min", "5/m", "5/s", "5/h", "5/weekly", "5/weekss", "5/microweek", "5/week week",
        "5 a minute", "five/minute", "-5/minute", "+5/minute", "1.5/minute", "5/1.5 minutes", "1e3/minute",
        "5/-1 minute", "5_0/minute", "0x5/minute", "५/minute", "5/ｍinute", "5\N{NO-BREAK SPACE}/minute",
        "10/moon", "5/minute:;1/hour", "5/minute\0", "5/minute#", '"5/minute"',
    ],
)  # fmt: skip
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(RateError):
        parse_rates(text)


@pytest.mark.parametrize(
    "text",
    ["0/minute", "00/minute", "5/0 minutes", "5/0minute", "5 per 0 hours", "0/week", "5/0 weeks", "5/minute;0/day"],
)
def test_zeros_are_refused(text: str) -> None:
    with pytest.raises(RateError):
        parse_rates(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{MOST + 1}/second", "9" * 100 + "/second", "1/11 years", f"1/{LONGEST + 1} seconds",
        "1/" + "9" * 200 + " days", "1/522 weeks",
    ],
)  # fmt: skip
def test_what_is_beyond_the_bounds_is_refused(text: str) -> None:
    with pytest.raises(RateError):
        parse_rates(text)


@pytest.mark.parametrize(
    "text", ["5/minute;5/minute", "5/minute;9/minute", "1/day,2/24 hours", "1/week|1/7 days", "1/year;1/12 months"]
)
def test_two_rates_for_one_period_are_refused(text: str) -> None:
    with pytest.raises(RateError, match="one rate a period"):
        parse_rates(text)


@pytest.mark.parametrize("value", [None, 5, 5.0, b"5/minute", ["5/minute"], ("5/minute",)])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(RateError):
        parse_rates(value)


def test_a_text_longer_than_256_characters_is_refused() -> None:
    fits = "5/minute".ljust(256)
    assert parse_rates(fits) == (Rate(5, 60),)
    with pytest.raises(RateError):
        parse_rates(fits + " ")


def test_the_error_says_what_is_expected_and_not_what_came() -> None:
    with pytest.raises(RateError) as caught:
        parse_rates("hunter2/minute")
    assert "5/minute" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__  # the cause would quote the text in a traceback
    assert isinstance(caught.value, GatekeeperError)
    assert isinstance(caught.value, ValueError)


RATES = st.tuples(st.integers(1, MOST), st.integers(1, 10), st.sampled_from(sorted(SECONDS)))


@settings(max_examples=200, deadline=None)
@given(st.lists(RATES, min_size=1, max_size=5, unique_by=lambda rate: rate[1] * SECONDS[rate[2]]))
def test_what_is_written_is_what_is_read(parts: list[tuple[int, int, str]]) -> None:
    text = "; ".join(f"{amount} per {times} {unit}s" for amount, times, unit in parts)
    expected = sorted(
        (Rate(amount, times * SECONDS[unit]) for amount, times, unit in parts), key=lambda rate: rate.period
    )
    assert parse_rates(text) == tuple(expected)


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.text(ALPHABET)
    | st.from_regex(r"[0-9]{1,12} ?(/|per) ?[0-9]{0,3} ?[a-z]{1,7}[;, ]?", fullmatch=True)
)
def test_no_text_makes_anything_but_rates_or_a_rate_error(text: str) -> None:
    try:
        rates = parse_rates(text)
    except RateError:
        return
    assert rates
    assert all(1 <= rate.amount <= MOST and 1 <= rate.period <= LONGEST for rate in rates)
    assert sorted({rate.period for rate in rates}) == [rate.period for rate in rates]
