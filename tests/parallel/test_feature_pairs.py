"""Every pair of features, layouts among them, trains as in one process: a covering array instead of all combinations.

`make test` takes rows at random (their seed is in the report's header), `make test-slow` all of them.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
from covering_array import Row, covering_array
from features import (
    EXACT,
    FACTORS,
    ROUNDED,
    config_of,
    differences,
    forbidden,
    is_rounded,
    ranks_of,
    run_row,
)

from megatron_completep.config import check_world

SLICE = 12  # rows of `make test`


@cache
def rows() -> list[Row]:
    return covering_array(FACTORS, forbidden)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        count, every = len(rows()), metafunc.function.__name__ == test_every_row_equals_one_process.__name__
        chosen = range(count) if every else sorted(random.Random(metafunc.config.getoption("--pairs-seed")).sample(range(count), SLICE))
        metafunc.parametrize("number", chosen)


def problems(pool, row: Row, mutation: str = "") -> list[str]:
    """Where a row's run in its layout is not that of one process."""
    config, alone = config_of(row), config_of(row, one_process=True)
    check_world(config, ranks_of(row))
    tolerance = ROUNDED if is_rounded(row) else EXACT
    found = differences(pool.run(ranks_of(row), run_row, config, mutation), run_row(0, alone), config.optimizer.base_lr, tolerance)
    if is_rounded(row):  # the row's other pairs are to be seen at full precision
        found += problems(pool, row | {"gradient type": "float32"}, mutation)
    return found


def test_a_random_row_equals_one_process(pool, number):
    assert problems(pool, rows()[number]) == [], rows()[number]


@pytest.mark.slow
def test_every_row_equals_one_process(pool, number):
    assert problems(pool, rows()[number]) == [], rows()[number]
