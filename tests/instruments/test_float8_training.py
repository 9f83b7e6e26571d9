"""150 steps of 4 layers x 128 in float8: as good as float32 to the seeds' standard deviation."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config import Config
from megatron_completep.instruments.trial import (
    Trial,
    change,
    for_short_runs,
    read_batches,
    reshape,
    with_seed,
)
from megatron_completep.parallel import float8
from megatron_completep.parallel.context import ParallelContext
from tests.support.corpora import write_documents
from tests.support.runs import proxy_config

STEPS = 150
SEEDS = 3
FLOAT8 = {"float8": "tensorwise", "float8_least_size": 16}


def write_repetitions(prefix: Path, vocabulary: int) -> None:
    """Documents whose tokens mostly repeat the last but one: only attention can know which."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(400):
        document = random.integers(0, vocabulary, 200)
        repeats = random.random(200) < 0.9
        for place in range(2, 200):
            if repeats[place]:
                document[place] = document[place - 2]
        documents.append([document.tolist()])
    write_documents(prefix, documents)


def final_loss(config: Config) -> float:
    """Mean over the last tenth of the steps."""
    context = ParallelContext.single()
    trial = Trial.build(config, context)
    losses = []
    for step, batches in enumerate(read_batches(config, context, STEPS), start=1):
        losses.append(trial.step.run(batches, step).read().loss)
    return fmean(losses[-STEPS // 10 :])


def unscaled(tokens: int):
    """e4m3 for gradients, too, of a loss averaged over tokens, and no scales."""
    true_cast = kernels.float8_cast

    def cast(x: Tensor, amax: Tensor, gradient: bool = False, transpose: bool = False):
        # The scale of this bound is the number of tokens.
        bound = torch.tensor(448.0 * tokens * 0.75) if gradient else amax
        return true_cast(x, bound, False, transpose)

    return mock.patch.object(float8.kernels, "float8_cast", cast)


@pytest.mark.slow
def test_float8_trains_as_float32_does_and_unscaled_gradients_do_not(tmp_path: Path) -> None:
    config = for_short_runs(reshape(proxy_config(tmp_path), 128, 4), STEPS)
    write_repetitions(tmp_path / "text", config.model.vocab_size)
    seeds = [with_seed(config, seed) for seed in range(SEEDS)]
    exact = [final_loss(seed) for seed in seeds]
    for weight_gradient in ("high", "float8"):
        settings = {**FLOAT8, "float8_weight_gradient": weight_gradient}
        rounded = [final_loss(change(seed, training=settings)) for seed in seeds]
        assert abs(fmean(rounded) - fmean(exact)) <= stdev(exact), (exact, rounded)
    tokens = config.training.global_batch_size * config.model.seq_length
    with unscaled(tokens):
        control = final_loss(change(seeds[0], training=FLOAT8))
    assert not control <= exact[0] + 3 * stdev(exact), (exact, control)
