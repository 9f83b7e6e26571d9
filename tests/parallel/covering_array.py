"""Rows that hold every pair of levels of any two factors:
what pairs of features do to each other, at a fraction of all combinations.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]  # factor -> level
Pair = frozenset[tuple[str, str]]  # of two (factor, level)
# Whether two (factor, level) cannot stand in one row; symmetric.
Forbidden = Callable[[tuple[str, str], tuple[str, str]], bool]


def all_pairs(factors: Mapping[str, Sequence[str]], forbidden: Forbidden) -> list[Pair]:
    """Every pair of levels of two factors that may stand together, in the order of the factors."""
    return [
        frozenset((a, b))
        for (one, ones), (other, others) in itertools.combinations(factors.items(), 2)
        for a, b in itertools.product(
            [(one, level) for level in ones], [(other, level) for level in others]
        )
        if not forbidden(a, b)
    ]


def pairs_of(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def covering_array(factors: Mapping[str, Sequence[str]], forbidden: Forbidden) -> list[Row]:
    """Rows over all factors in which every pair of `all_pairs` stands at least once;
    the same rows for the same arguments.

    Greedy: a row begins with the first pair that is missing; each further factor takes the level
    that brings most missing pairs, and among equals the one that was used least.
    """
    missing = dict.fromkeys(all_pairs(factors, forbidden))
    used: Counter[tuple[str, str]] = Counter()
    rows = []
    while missing:
        row: Row = dict(sorted(next(iter(missing))))
        for factor in sorted(factors, key=lambda name: -len(factors[name])):
            if factor in row:
                continue
            allowed = [
                level
                for level in factors[factor]
                if not any(forbidden((factor, level), held) for held in row.items())
            ]
            assert allowed, f"no level of {factor} goes with {row}"

            def gain(level: str, factor: str = factor, row: Row = row) -> tuple[int, int]:
                new = sum(frozenset(((factor, level), held)) in missing for held in row.items())
                return new, -used[factor, level]

            row[factor] = max(allowed, key=gain)
        used.update(row.items())
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append({factor: row[factor] for factor in factors})
    return rows
