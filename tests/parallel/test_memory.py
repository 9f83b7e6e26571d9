"""Peak memory of a rank of our data-parallel step against torch's data-parallel programs:
same model, same batch, same processes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_completep.benchmarks.parallel_benchmark import (
    OURS,
    our_program,
    peak_memories,
    peak_memory,
)
from megatron_completep.benchmarks.training_benchmark import BenchmarkSettings
from megatron_completep.config.schema import ModelConfig

MODEL = ModelConfig(
    hidden_size=256,
    num_layers=4,
    num_attention_heads=4,
    ffn_hidden_size=1024,
    vocab_size=4096,
    seq_length=256,
    norm="layernorm",
    activation="gelu",
    position="learned",
    bias=True,
)
SETTINGS = BenchmarkSettings(MODEL, batch_size=8)


def measure(rank: int, precision: str) -> dict[str, int]:
    return peak_memories(SETTINGS, precision)


def wasteful(settings: BenchmarkSettings, precision: str) -> Callable[[], None]:
    step, kept = our_program(settings, precision), torch.ones(16 << 20)
    return lambda: (step(), kept.sum(), None)[-1]


def measure_waste(rank: int) -> tuple[int, int]:
    small = BenchmarkSettings(MODEL.model_copy(update={"num_layers": 1}), batch_size=1)
    peak_memory(our_program, small, "bf16")
    return peak_memory(our_program, small, "bf16"), peak_memory(wasteful, small, "bf16")


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=pytest.mark.slow) for p in ("bf16", "float32")]
)
def test_a_rank_needs_no_more_memory_than_under_ddp_with_zero_or_under_fsdp2(pool, precision):
    for peaks in pool.run(2, measure, precision):
        others = {name: peak for name, peak in peaks.items() if name != OURS}
        assert len(others) == 2 and peaks[OURS] <= min(others.values()), peaks


def test_a_program_that_holds_more_is_seen(pool):
    """Negative control: 64 MB more."""
    for plain, more in pool.run(2, measure_waste):
        assert more - plain > 50e6
