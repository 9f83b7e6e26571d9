"""Number and bytes of the collectives of a step are what the plan says, on every axis."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.counting import planned_and_counted
from tests.support.configs import TIED_GPT2

TIED = {**TIED_GPT2, "qk_norm": True}
GROUPED = {"num_query_groups": 2, "bias": True, "norm": "layernorm"}
CONTEXT = {"context_parallel_size": 2}
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}

FLOAT8 = {"float8": "tensorwise", "float8_least_size": 16, "precision": "bf16"}
MUON = {"type": "muon", "muon": {"base_lr": 0.02, "precision": "master"}}
SMALL_BATCHES = {**MUON, "muon": {**MUON["muon"], "exchange_megabytes": 0.02}}

EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}

# name -> (processes, settings that differ)
RUNS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "data 2": (2, {}),
    "data 2, gradients in bf16": (
        2,
        {"parallel": {"gradient_dtype": "bf16"}, "training": {"precision": "bf16"}},
    ),
    "data 4, optimizer over 2": (4, {"parallel": {"optimizer_shard_size": 2}, "model": TIED}),
    "data 4, gradients over 2": (
        4,
        {"parallel": {"optimizer_shard_size": 2, "sharding": "gradients"}, "model": TIED},
    ),
    "tensor 2": (2, {"parallel": {"tensor_parallel_size": 2}, "model": TIED}),
    "tensor 2, recomputed": (
        2,
        {"parallel": {"tensor_parallel_size": 2}, "training": {"recompute": "full"}},
    ),
    "tensor 2 with sequence": (2, {"parallel": SEQUENCE, "model": TIED}),
    "tensor 2 with sequence, selectively recomputed": (
        2,
        {"parallel": SEQUENCE, "training": {"recompute": "selective"}},
    ),
    "tensor 2 with sequence, recomputed, float64": (
        2,
        {
            "parallel": SEQUENCE,
            "training": {"recompute": "full", "precision": "float64", "label_smoothing": 0.1},
        },
    ),
    "pipeline 2, gpipe, tied": (
        2,
        {"parallel": {"pipeline_parallel_size": 2, "schedule": "gpipe"}, "model": TIED},
    ),
    "pipeline 2, 1f1b": (2, {"parallel": {"pipeline_parallel_size": 2}}),
    "pipeline 2, float32 residual stream": (
        2,
        {
            "parallel": {"pipeline_parallel_size": 2},
            "model": {"fp32_residual": True},
            "training": {"precision": "bf16"},
        },
    ),
    "pipeline 2, virtual 2": (
        2,
        {
            "parallel": {
                "pipeline_parallel_size": 2,
                "virtual_pipeline_size": 2,
                "schedule": "interleaved_1f1b",
            }
        },
    ),
    "pipeline 2, zero-bubble": (
        2,
        {"parallel": {"pipeline_parallel_size": 2, "schedule": "zero_bubble"}, "model": GROUPED},
    ),
    "data 2, Muon in small batches": (2, {"optimizer": SMALL_BATCHES}),
    "tensor 2, data 2, Muon": (
        4,
        {"parallel": SEQUENCE, "optimizer": MUON, "model": {"num_query_groups": 2}},
    ),
    "tensor 2 with sequence, data 2, float8, recomputed": (
        4,
        {"parallel": SEQUENCE, "training": {**FLOAT8, "recompute": "full"}},
    ),
    "data 2, experts on both, recomputed": (
        2,
        {
            "parallel": {"expert_parallel_size": 2},
            "model": {"moe": EXPERTS},
            "training": {"recompute": "full"},
        },
    ),
    "tensor 2 with sequence, data 2, experts on 2, shared": (
        4,
        {
            "parallel": {**SEQUENCE, "expert_parallel_size": 2},
            "model": {"moe": {**EXPERTS, "shared_ffn_hidden_size": 32}},
        },
    ),
    "context 2, tensor 2 with sequence, balance loss and router z-loss, recomputed": (
        4,
        {
            "parallel": {**SEQUENCE, **CONTEXT},
            "model": {"moe": {**EXPERTS, "balance_loss": 0.02, "router_z_loss": 0.01}},
            "training": {"recompute": "full"},
        },
    ),
    "context 2": (2, {"parallel": CONTEXT, "model": {"num_query_groups": 2}}),
    "context 2, tensor 2 with sequence, a group at a time, selectively recomputed": (
        4,
        {
            "parallel": {**SEQUENCE, **CONTEXT, "context_heads_at_once": 1},
            "training": {"recompute": "selective"},
        },
    ),
    "context 2, pipeline 2, recomputed": (
        4,
        {
            "parallel": {**CONTEXT, "pipeline_parallel_size": 2},
            "training": {"recompute": "full"},
        },
    ),
    "tensor 2, pipeline 2, data 2": (
        8,
        {"parallel": {**SEQUENCE, "pipeline_parallel_size": 2}, "model": TIED},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_collectives_of_a_step_are_what_the_plan_says(pool, name):
    processes, sections = RUNS[name]
    for planned, counted in pool.run(processes, planned_and_counted, sections):
        assert planned and counted == planned


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        (
            "tensor 2 with sequence",
            "inputs of attention and MLP for the weight gradients, backward",
        ),
        ("tensor 2 with sequence", "gradients of norms and biases in the shard"),
        ("context 2", "gradients of keys and values, backward"),
        ("pipeline 2, 1f1b", "its gradient to the stage before, backward"),
        ("tensor 2, data 2, Muon", "orthogonal factors from the owners"),
        ("data 2", "whether a rank was asked to stop"),
    ],
)
def test_a_plan_that_forgets_a_collective_is_caught(pool, name, forgotten):
    """Negative control."""
    processes, sections = RUNS[name]
    results = pool.run(processes, planned_and_counted, sections, forgotten)
    assert any(counted != planned for planned, counted in results)
