"""Telemetry of experts: each figure against the routing counted by hand, and in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_completep.model.routing import Routing, fixing, observing
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.experts import DEAD, DROPPED, ENTROPY, LOAD
from megatron_completep.telemetry.telemetry import Telemetry
from tests.support.ranks import context_on
from tests.telemetry.test_telemetry import batch, config_of, telemetry_of

MOE: dict[str, Any] = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 20}


def telemetry_with(
    parallel: dict[str, Any], context: ParallelContext | None = None, **moe: Any
) -> tuple[Telemetry, TrainingStep]:
    config = config_of(2, parallel=parallel, moe={**MOE, **moe})
    return telemetry_of(config, context or ParallelContext.single(), 2)


def of_experts(figures: dict[str, float]) -> dict[str, float]:
    return {name: f for name, f in figures.items() if name.startswith(("expert", "d"))}


def test_loads_are_those_of_the_step_and_entropies_those_of_the_probe() -> None:
    """A third step is counted choice by choice, and the probe's scores are taken apart."""
    telemetry, step = telemetry_with({})
    config = step.config
    (model,) = step.forward_backward.chunks
    chosen: dict[int, list[int]] = {0: [], 1: []}

    def note(layer: int, routing: Routing) -> None:
        chosen[layer] += routing.experts.flatten().tolist()

    with observing(model, note):
        step.run([batch(config, 30), batch(config, 31)], 3).read()
    scores: dict[int, torch.Tensor] = {}

    def keep(layer: int, routing: Routing) -> None:
        scores[layer] = routing.scores

    with observing(model, keep), torch.no_grad():
        model(batch(config, 1000).tokens)
    all_figures = telemetry.figures()
    assert "update_ratio/router" in all_figures
    assert "update_ratio/balance_bias" not in all_figures
    figures = of_experts(all_figures)
    for layer in (0, 1):
        load = [chosen[layer].count(expert) for expert in range(6)]
        expected = max(load) / (sum(load) / 6)
        assert figures[f"{LOAD}layers.{layer}"] == pytest.approx(expected, rel=1e-12)
        assert expected > 1.05  # loads that are all equal would show nothing
        probabilities = torch.distributions.Categorical(probs=scores[layer])
        entropy = probabilities.entropy().mean().item() / torch.tensor(6.0).double().log().item()
        assert figures[f"{ENTROPY}layers.{layer}"] == pytest.approx(entropy, rel=1e-9)
    assert figures[DROPPED] == 0
    assert len(figures) == 6


def test_experts_without_a_token_are_counted_in_all_layers() -> None:
    telemetry, step = telemetry_with({}, balance="none", gate="softmax")
    (model,) = step.forward_backward.chunks
    tokens = batch(step.config, 1000).tokens.numel()
    choices = {0: torch.tensor([[0, 5]]).expand(tokens, 2), 1: torch.arange(6).view(3, 2)}
    choices[1] = choices[1].repeat(tokens // 3 + 1, 1)[:tokens]
    assert of_experts(telemetry.figures())[DEAD] == 0
    with fixing(model, choices):
        figures = of_experts(telemetry.figures())
    assert figures[DEAD] == 4
    assert figures[f"{LOAD}layers.0"] == 3.0  # E / k
    assert figures[f"{LOAD}layers.1"] == pytest.approx(1.0, abs=0.2)


def test_a_dense_model_has_no_figures_of_experts() -> None:
    assert of_experts(telemetry_of(config_of(2), ParallelContext.single(), 1)[0].figures()) == {}


def figures_on(rank: int, parallel: dict[str, Any], moe: dict[str, Any]) -> dict[str, float]:
    config = config_of(2, parallel=parallel, moe={**MOE, **moe})
    context = context_on(rank, config.parallel)
    return of_experts(telemetry_of(config, context, 2)[0].figures())


@pytest.mark.parametrize(
    ("world_size", "parallel", "moe"),
    [
        (2, {"expert_parallel_size": 2}, {}),
        (
            4,
            {
                "tensor_parallel_size": 2,
                "sequence_parallel": True,
                "pipeline_parallel_size": 2,
                "expert_parallel_size": 2,
            },
            {"balance": "none"},
        ),
    ],
    ids=["data, experts", "tensor, pipeline, loads of the probe"],
)
def test_the_figures_of_experts_are_those_of_one_process(
    pool, world_size: int, parallel: dict[str, Any], moe: dict[str, Any]
) -> None:
    expected = figures_on(0, {}, moe)
    for figures in pool.run(world_size, figures_on, parallel, moe):
        assert figures == pytest.approx(expected, rel=1e-8)
