"""Balancing at the rate that is the default, over as many steps as it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_completep.instruments.expert_taps import LoadTaps
from megatron_completep.instruments.trial import Trial, for_short_runs, read_batches
from megatron_completep.model.routing import Routing, observing, routers
from megatron_completep.parallel.context import ParallelContext
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

STEPS = 300


def settled_load(folder: Path, bias_rate: float, base_lr: float) -> float:
    """The largest load over the mean in the last 30 steps, of the layer where it is largest.

    At the start one expert's score is 2 standard deviations over what its weights give.
    """
    moe = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32, "bias_rate": bias_rate}
    config = proxy_config(folder, model={"moe": moe})
    config = for_short_runs(config, STEPS, base_lr=base_lr)
    trial = Trial.build(config, ParallelContext.single())
    steps = read_batches(config, trial.context, STEPS)
    (model,) = trial.chunks
    spreads: list[float] = []

    def spread(layer: int, routing: Routing) -> None:
        spreads.append(routing.scores.std().item())

    with observing(model, spread), torch.no_grad():
        model(steps[0][0].tokens)
    for router, deviation in zip(routers(model), spreads, strict=True):
        assert router.bias is not None
        router.bias.data[3] = 2 * deviation
    loads = LoadTaps(trial.chunks)
    for number, batches in enumerate(steps, start=1):
        with loads.recording():
            trial.step.run(batches, number).read()
    # What the router began with was trained on: a bias goes no farther than its rate in a step.
    for router, deviation in zip(routers(model), spreads, strict=True):
        assert router.bias is not None
        assert abs(router.bias[3].item() - 2 * deviation) <= 1.01 * STEPS * bias_rate + 1e-6
    largest = loads.largest(30 / STEPS)
    assert largest is not None
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("base_lr", [2**-12, 2**-9])
def test_a_preferring_router_in_training_is_balanced_in_300_steps_of_the_default_rate(
    tmp_path: Path, base_lr: float
) -> None:
    write_markov_chain(tmp_path / "text")
    assert settled_load(tmp_path, 1e-3, base_lr) <= 1.5
    assert settled_load(tmp_path, 1e-12, base_lr) > 2
