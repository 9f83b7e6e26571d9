"""The generator of pairwise rows does what it says,
on factors small enough to count by hand and on random ones.
"""

from __future__ import annotations

import itertools
import random

import pytest

from tests.parallel.covering_array import Row, covering_array


def nothing(a: tuple[str, str], b: tuple[str, str]) -> bool:
    return False


def uncovered(rows: list[Row], factors: dict[str, list[str]], forbidden=nothing) -> list[tuple]:
    """By the definition, one pair after the other."""
    return [
        (one, level, other, second)
        for one, other in itertools.combinations(factors, 2)
        for level, second in itertools.product(factors[one], factors[other])
        if not forbidden((one, level), (other, second))
        and not any(r[one] == level and r[other] == second for r in rows)
    ]


def test_three_switches_need_four_rows_instead_of_eight():
    switches = {name: ["off", "on"] for name in "abc"}
    rows = covering_array(switches, nothing)
    assert len(rows) == 4
    assert uncovered(rows, switches) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_that_is_allowed_stands_in_a_row_and_no_other(seed):
    random_source = random.Random(seed)
    factors = {
        f"f{n}": [str(level) for level in range(random_source.randint(2, 6))] for n in range(9)
    }
    # Level 0 goes with everything.
    levels = [(name, level) for name, values in factors.items() for level in values if level != "0"]
    refused = {frozenset(random_source.sample(levels, 2)) for _ in range(20)}

    def forbidden(a, b):
        return frozenset((a, b)) in refused

    rows = covering_array(factors, forbidden)
    assert rows == covering_array(factors, forbidden)
    assert uncovered(rows, factors, forbidden) == []
    assert not [
        row for row in rows for a, b in itertools.combinations(row.items(), 2) if forbidden(a, b)
    ]
    assert all(row.keys() == factors.keys() for row in rows)
    assert len(rows) < 60  # the largest two factors alone need up to 36


def test_a_missing_row_is_noticed():
    """Negative control: the rows that came first are not superfluous."""
    factors = {name: ["x", "y", "z"] for name in "abcd"}
    rows = covering_array(factors, nothing)
    assert uncovered(rows[1:], factors) != []
