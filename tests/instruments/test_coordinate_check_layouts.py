"""The coordinate check measures the same under every layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config.schema import ParallelConfig
from megatron_completep.instruments.coordinate_check import Measurement, measure
from megatron_completep.instruments.trial import Trial, for_short_runs, read_batches, reshape
from megatron_completep.parallel.context import ParallelContext
from tests.support.corpora import write_markov_chain
from tests.support.ranks import context_on
from tests.support.runs import proxy_config


def measured(folder: str, parallel: dict[str, Any], context: ParallelContext) -> Measurement:
    config = proxy_config(Path(folder), parallel=parallel, training={"micro_batch_size": 2})
    short = for_short_runs(reshape(config, num_layers=4), 4, "float64")
    batches = read_batches(short, context, 4)
    return measure(Trial.build(short, context), batches[:3], batches[3])


def on_rank(rank: int, folder: str, parallel: dict[str, Any]) -> Measurement:
    return measured(folder, parallel, context_on(rank, ParallelConfig(**parallel)))


TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, TENSOR),
        (2, PIPELINE),
        (2, {}),
        (4, {**TENSOR, **PIPELINE}),
        pytest.param(8, {**TENSOR, **PIPELINE}, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline", "data", "tensor x pipeline", "tensor x pipeline x data"],
)
def test_every_layout_measures_what_one_process_does(
    pool, tmp_path: Path, world_size: int, parallel: dict[str, Any]
):
    write_markov_chain(tmp_path / "text", 8_000)
    expected = flat(measured(str(tmp_path), {}, ParallelContext.single()))
    for other in pool.run(world_size, on_rank, str(tmp_path), parallel):
        assert flat(other) == pytest.approx(expected, rel=1e-7)


def flat(measurement: Measurement) -> dict[str, float]:
    """All figures by name, so that they can be compared."""
    found: dict[str, float] = {}
    for name, value in asdict(measurement).items():
        rows = value if isinstance(value, list) else [value]
        for index, row in enumerate(rows):
            for key, number in (row if isinstance(row, dict) else {"": row}).items():
                found[f"{name}.{index}.{key}"] = number
    return found
