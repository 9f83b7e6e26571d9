"""Every pair of features, layouts among them, trains as in one process:
a covering array instead of all combinations.

`make test` takes rows at random (their seed is in the report's header), `make test-slow` all of
them.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from megatron_completep.config import check_world
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.cross_entropy import LossConfig
from tests.parallel.covering_array import Row, all_pairs, covering_array, pairs_of
from tests.parallel.features import (
    ENDS_ALONE,
    EXACT,
    FACTORS,
    FORGOTTEN_SUM,
    OVERRIDES_ON_FIRST_STAGE,
    ROUNDED,
    ROWS_OF_THE_RANK,
    config_of,
    differences,
    forbidden,
    is_rounded,
    ranks_of,
    run_row,
)

SLICE = 5  # rows of `make test`


@cache
def rows() -> list[Row]:
    return covering_array(FACTORS, forbidden)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        count = len(rows())
        every = metafunc.function.__name__ == test_every_row_equals_one_process.__name__
        chosen = (
            range(count)
            if every
            else sorted(
                random.Random(metafunc.config.getoption("--pairs-seed")).sample(range(count), SLICE)
            )
        )
        metafunc.parametrize("number", chosen)


def problems(pool, row: Row, mutation: str = "") -> list[str]:
    """Where a row's run in its layout is not that of one process."""
    config, alone = config_of(row), config_of(row, one_process=True)
    check_world(config, ranks_of(row))
    tolerance = ROUNDED if is_rounded(row) else EXACT
    found = differences(
        pool.run(ranks_of(row), run_row, config, mutation),
        run_row(0, alone),
        config.optimizer.base_lr,
        tolerance,
    )
    if is_rounded(row):  # the row's other pairs are to be seen at full precision
        found += problems(pool, row | {"gradient type": "float32"}, mutation)
    return found


def test_a_random_row_equals_one_process(pool, number):
    assert problems(pool, rows()[number]) == [], rows()[number]


@pytest.mark.slow
def test_every_row_equals_one_process(pool, number):
    assert problems(pool, rows()[number]) == [], rows()[number]


def test_every_pair_that_is_not_refused_stands_in_a_row_that_the_configuration_allows():
    missing = set(all_pairs(FACTORS, forbidden)) - {
        pair for row in rows() for pair in pairs_of(row)
    }
    assert missing == set()
    for row in rows():
        check_world(config_of(row), ranks_of(row))


def test_what_the_array_leaves_out_is_what_the_configuration_refuses():
    first = {factor: levels[0] for factor, levels in FACTORS.items()}
    for (one, ones), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for a, b in itertools.product(ones, others):
            if forbidden((one, a), (other, b)):
                known = r"tensor_parallel_size|model\.moe|parallel\.sharding"
                with pytest.raises(ConfigError, match=known):
                    config_of(first | {one: a, other: b})


def row_of(**levels: str) -> Row:
    """The first level of each factor but these."""
    first = {factor: levels_of[0] for factor, levels_of in FACTORS.items()}
    return first | levels


@pytest.mark.parametrize(
    "layout",
    [
        "data 2",
        "pipeline 2, 1f1b, data 2",
        pytest.param("context 2 by heads, tensor 2, sequence", marks=pytest.mark.slow),
    ],
)
def test_every_layout_draws_the_masks_of_one_process(pool, layout):
    row = row_of(layout=layout, dropout="0.2") | {"micro-batch": "2"}
    assert problems(pool, row) == []


# Negative controls.


@pytest.mark.parametrize(
    "layout", ["data 2", pytest.param("tensor 2, sequence", marks=pytest.mark.slow)]
)
def test_masks_that_depend_on_the_rank_are_caught(pool, layout):
    found = problems(pool, row_of(layout=layout, dropout="0.2"), ROWS_OF_THE_RANK)
    assert any("loss" in line for line in found), found


def row_with(**levels: str) -> Row:
    """The first row of the array that holds these levels."""
    wanted = {name.replace("_", " "): level for name, level in levels.items()}
    return next(row for row in rows() if wanted.items() <= row.items())


@pytest.mark.slow
def test_a_forgotten_sum_of_gradients_is_caught(pool):
    found = problems(pool, row_with(layout="tensor 2, sequence"), FORGOTTEN_SUM)
    assert any("norm.weight is off" in line for line in found), found


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_overrides_that_the_first_stage_alone_sees_are_caught(pool, embeddings):
    row = row_with(overrides="ends", embeddings=embeddings) | {
        "layout": "pipeline 2, 1f1b, split 3 and 1",
        "dropout": "none",
        "sharding": "optimizer",
    }
    found = problems(pool, row, OVERRIDES_ON_FIRST_STAGE)
    assert any("final_norm.weight" in line and "is not Group" in line for line in found), found
    ends_differ = any("in tied embedding of tensor 0, slice 0" in line for line in found)
    assert ends_differ == (embeddings == "tied"), found


def test_ends_of_a_tied_embedding_that_go_their_own_ways_are_caught(pool):
    row = row_with(embeddings="tied") | {
        "layout": "pipeline 2, 1f1b, data 2",
        "dropout": "none",
        "sharding": "optimizer",
        "heads": "4",
    }
    assert any("in tied embedding of tensor 0" in line for line in problems(pool, row, ENDS_ALONE))


def test_a_validation_that_is_the_objective_is_caught(pool, monkeypatch):
    """One process evaluates what it trains on; the layout as it should."""
    row = row_with(layout="tensor 2", loss="both")
    monkeypatch.setattr(LossConfig, "without_terms", property(lambda loss: loss))
    assert any(": validation " in line for line in problems(pool, row))
