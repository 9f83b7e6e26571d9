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
    pairs = []
    for first, second in itertools.combinations(factors, 2):
        for levels in itertools.product(factors[first], factors[second]):
            a, b = zip((first, second), levels, strict=True)
            if not forbidden(a, b):
                pairs.append(frozenset((a, b)))
    return pairs


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

            def is_allowed(level: str, factor: str = factor, row: Row = row) -> bool:
                return not any(forbidden((factor, level), chosen) for chosen in row.items())

            def gain(level: str, factor: str = factor, row: Row = row) -> tuple[int, int]:
                pairs = [frozenset(((factor, level), chosen)) for chosen in row.items()]
                return sum(pair in missing for pair in pairs), -used[factor, level]

            allowed = [level for level in factors[factor] if is_allowed(level)]
            assert allowed, f"no level of {factor} goes with {row}"

            row[factor] = max(allowed, key=gain)
        used.update(row.items())
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append({factor: row[factor] for factor in factors})
    return rows
