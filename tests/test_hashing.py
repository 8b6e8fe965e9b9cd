"""The ring puts keys where it always has, spreads them evenly, and moves none without need."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice, permutations
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.upstreams import hashing
from gatekeeper.upstreams.hashing import Ring, position, positions

CIRCLE = 1 << 32
HUNDRED = [f"http://10.0.0.{number}:8080" for number in range(100)]
KEYS = [f"user{number}" for number in range(5000)]

keys = st.text(st.characters(exclude_categories=()), max_size=12)
ids = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=7, unique=True)


def naive_order(names: Sequence[str], vnodes: int, weights: Mapping[str, int], key: str) -> list[str]:
    """Every point of every id by its distance from the key, the ids by the nearest of theirs."""
    place = position(key)
    points = [
        ((point - place) % CIRCLE, name)
        for name in names
        for point in positions(name, vnodes * weights.get(name, 1))
    ]
    return list(dict.fromkeys(name for _, name in sorted(points)))


def shares(names: Sequence[str], vnodes: int) -> dict[str, float]:
    """The part of the circle that falls to each id, the mean being 1."""
    points = sorted((point, name) for name in names for point in positions(name, vnodes))
    found = dict.fromkeys(names, 0)
    before = points[-1][0] - CIRCLE
    for point, name in points:
        found[name] += point - before
        before = point
    assert sum(found.values()) == CIRCLE
    return {name: share * len(names) / CIRCLE for name, share in found.items()}


class TestVersionOne:
    """What is written here is in use: another hash makes another version, and never changes this one."""

    def test_the_version(self) -> None:
        assert hashing.VERSION == 1

    @pytest.mark.parametrize(
        ("id", "first", "eighteenth"),
        [
            ("a", [0x80D57370, 0x04269D93, 0xFC7579C3], 0xF0A8889E),
            ("http://127.0.0.1:9001", [0x80E4C6F0, 0x58A2DC43, 0xA2F0E0A6], 0xFC49AEB2),
            ("ü", [0x7A18D71B, 0xF4F1C0F6, 0x7DBBFAA3], 0xCD987F25),
        ],
    )
    def test_points(self, id: str, first: list[int], eighteenth: int) -> None:
        assert positions(id, 3) == first
        assert positions(id, 18)[17] == eighteenth
        assert positions(id, 160)[:18] == positions(id, 18)  # more points leave those that are there

    @pytest.mark.parametrize(
        ("key", "place"),
        [
            ("", 0),
            ("user1", 0xA7A55CC5),
            ("user2", 0x0069303F),
            ("10.0.0.1", 0xB03751A3),
            ("ü", 0xFF1AD945),
            ("\ud800", 0xB29E18A8),
        ],
    )
    def test_keys(self, key: str, place: int) -> None:
        assert position(key) == place

    @pytest.mark.parametrize(
        ("key", "order"),
        [
            ("", "dcabe"),
            ("user1", "daebc"),
            ("user2", "abdec"),
            ("user3", "ecabd"),
            ("10.0.0.1", "baced"),
            ("ü", "deacb"),
        ],
    )
    def test_owners(self, key: str, order: str) -> None:
        ring = Ring(["a", "b", "c", "d", "e"])
        assert "".join(ring.owners(key)) == order
        assert ring.owner(key) == order[0]

    def test_weights(self) -> None:
        ring = Ring(["a", "b", "c"], vnodes=40, weights={"b": 3})
        assert repr(ring) == "<Ring of 3 ids, 200 points>"
        assert Counter(map(ring.owner, KEYS[:1000])) == {"a": 201, "b": 626, "c": 173}


@settings(max_examples=200)
@given(ids, st.integers(1, 40), st.data(), st.lists(keys, min_size=1, max_size=20))
def test_the_order_is_that_of_a_scan_of_all_points(
    names: list[str], vnodes: int, data: st.DataObject, asked: list[str]
) -> None:
    weights = data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, 4)))
    ring = Ring(names, vnodes, weights)
    for key in asked:
        order = naive_order(names, vnodes, weights, key)
        assert list(ring.owners(key)) == order
        # The first time an arc is looked up, and the second.
        assert ring.owner(key) == ring.owner(key) == order[0]


@settings(max_examples=200)
@given(st.permutations("abcde"), st.integers(1, 6), st.lists(st.integers(0, CIRCLE - 1), max_size=20), st.data())
def test_points_that_collide_and_keys_on_a_point_follow_the_rule(
    names: list[str], vnodes: int, places: list[int], data: st.DataObject
) -> None:
    few = st.sampled_from([0, 1, 1 << 31, (1 << 31) + 1, CIRCLE - 2, CIRCLE - 1])
    drawn = {name: data.draw(st.lists(few, min_size=vnodes, max_size=vnodes)) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "positions", lambda id, count: drawn[id])
        patch.setattr(hashing, "crc32", lambda data: int(data) * pow(0x9E3779B1, -1, CIRCLE) % CIRCLE)
        ring = Ring(names, vnodes)
        for place in [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, CIRCLE - 1, *places]:
            key = str(place)
            assert position(key) == place
            points = sorted(((point - place) % CIRCLE, name) for name in names for point in drawn[name])
            order = list(dict.fromkeys(name for _, name in points))
            assert list(ring.owners(key)) == order
            assert ring.owner(key) == ring.owner(key) == order[0]


@pytest.mark.parametrize(("winner", "other"), [("u1058", "u80"), ("u1751", "u28")])
def test_of_two_that_collide_the_one_that_sorts_first_has_the_point(winner: str, other: str) -> None:
    (point,) = set(positions(winner, 160)) & set(positions(other, 160))
    both = Ring([other, winner])
    points = sorted(positions(winner, 160) + positions(other, 160))
    before = points[bisect_left(points, point) - 1]
    numbers = (f"k{number}" for number in range(1_000_000))
    for key in islice((key for key in numbers if before < position(key) <= point), 3):
        assert list(both.owners(key)) == [winner, other]
        assert Ring([other]).owner(key) == other


@settings(max_examples=50)
@given(ids.filter(lambda names: len(names) > 1), st.integers(1, 40), st.lists(keys, min_size=1, max_size=30))
def test_whoever_is_taken_away_leaves_the_order_of_the_others(
    names: list[str], vnodes: int, asked: list[str]
) -> None:
    whole = Ring(names, vnodes)
    for gone in names:
        rest = Ring([name for name in names if name != gone], vnodes)
        for key in asked:
            assert list(rest.owners(key)) == [name for name in whole.owners(key) if name != gone]


def test_removing_one_moves_exactly_its_keys_and_adding_it_takes_keys_only_for_itself() -> None:
    whole = Ring(HUNDRED)
    for gone in HUNDRED[::25]:
        rest = Ring([id for id in HUNDRED if id != gone])
        for key in KEYS:
            before, after = whole.owner(key), rest.owner(key)
            assert (before == after) is (before != gone)


def test_what_one_had_falls_to_many() -> None:
    ring = Ring(HUNDRED)
    heirs = Counter(
        second for first, second in (islice(ring.owners(key), 2) for key in KEYS) if first == HUNDRED[7]
    )
    assert len(heirs) > 20


def test_a_greater_weight_takes_keys_only_for_itself() -> None:
    before, after = Ring(HUNDRED), Ring(HUNDRED, weights={HUNDRED[3]: 5})
    moved = [key for key in KEYS if before.owner(key) != after.owner(key)]
    assert {after.owner(key) for key in moved} == {HUNDRED[3]}
    assert 0.03 < len(moved) / len(KEYS) < 0.05  # from 1/100 to 5/104


def test_the_order_in_which_ids_are_given_does_not_matter() -> None:
    first, *others = (Ring(names, vnodes=7, weights={"b": 2}) for names in permutations("abcd"))
    for ring in others:
        assert [list(ring.owners(key)) for key in KEYS[:200]] == [list(first.owners(key)) for key in KEYS[:200]]


@pytest.mark.parametrize(
    ("points", "servers", "deviation", "least", "most"),
    [
        (1, 1000, 0.998, 0.005, 5.25),
        (10, 1000, 0.315, 0.37, 1.98),
        (100, 200, 0.0997, 0.76, 1.28),
        (1000, 100, 0.0316, 0.92, 1.09),
    ],
)
def test_shares_deviate_as_in_the_table_of_lamping_and_veach(
    points: int, servers: int, deviation: float, least: float, most: float
) -> None:
    found = shares([f"server{number}" for number in range(servers)], points)
    assert fmean(found.values()) == pytest.approx(1)
    assert pstdev(found.values()) == pytest.approx(deviation, rel=0.1)
    within = sum(least <= share <= most for share in found.values())  # the interval holds 99 % of them
    assert within >= 0.98 * servers


@pytest.mark.parametrize("form", ["user{}", "10.1.{}", "{:016x}", "/items/{}/", "{:b}", "2001:db8:0:{:x}::/64"])
def test_keys_that_count_up_spread_as_if_drawn_by_lot(form: str) -> None:
    ring = Ring(HUNDRED)
    share = shares(HUNDRED, 160)
    count = 10_000
    counts = Counter(ring.owner(form.format(number)) for number in range(count))
    chi2 = sum((counts[id] - share[id] * count / 100) ** 2 / (share[id] * count / 100) for id in HUNDRED)
    assert 0.5 < chi2 / 99 < 1.5
    assert pstdev(counts.values()) * 100 / count == pytest.approx((1 / 160 + 100 / count) ** 0.5, rel=0.15)


def test_of_equal_arcs_too_each_has_its_share_of_keys_that_count_up() -> None:
    """Without the factor crc32 fails here: its keys clump in some arcs and leave out others."""
    for form in ("user{}", "session/{}/a", "{:06d}", "x{:b}y"):
        counts = Counter(position(form.format(number)) >> 26 for number in range(2000))
        assert sum((counts[arc] - 2000 / 64) ** 2 / (2000 / 64) for arc in range(64)) / 63 < 1.6


@pytest.mark.parametrize(
    ("names", "vnodes", "weights", "message"),
    [
        ([], 160, {}, "expected 1 to 65536 ids, and not 0"),
        (["a", "b", "a"], 160, {}, "expected each id once: 'a' is there twice"),
        (["a"], 0, {}, "vnodes: expected 1 or more, and not 0"),
        (["a"], 160, {"b": 1}, "weights: 'b' is not among the ids"),
        (["a"], 160, {"a": 0}, "weights: expected 1 or more for 'a', and not 0"),
    ],
)
def test_what_makes_no_ring_is_refused(
    names: list[str], vnodes: int, weights: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        Ring(names, vnodes, weights)
    assert str(caught.value) == message
