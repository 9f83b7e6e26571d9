"""A matrix is made orthogonal as a whole, whatever layout holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_completep.optim.newton_schulz import orthogonalize, polynomials
from tests.parallel.layouts import Case, relative_error, train
from tests.parallel.test_layouts import LAYOUTS as ALL_LAYOUTS
from tests.support.configs import TIED_GPT2

LAYOUTS: dict[str, dict[str, Any]] = ALL_LAYOUTS  # type: ignore[assignment]
GROUPED = {"num_query_groups": 2}
MUON: dict[str, Any] = {"type": "muon", "muon": {"base_lr": 2e-2}, "base_eps": 1e-4}
SMALL_BATCHES = {"base_lr": 2e-2, "exchange_megabytes": 0.02, "parts": "per_head"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "data 4, optimizer shared by 2": (LAYOUTS["data 4, optimizer shared by 2"], GROUPED, {}),
    "data 4, small batches of heads": (
        {"world_size": 4, "bucket_megabytes": 0.01},
        {"num_query_groups": 4},
        {"muon": SMALL_BATCHES},
    ),
    "tensor 2 with sequence": (
        LAYOUTS["tensor 2 with sequence"],
        {**TIED_GPT2, "qk_norm": True},
        {},
    ),
    "pipeline 2, virtual 2, zero-bubble": (
        LAYOUTS["pipeline 2, virtual 2, zero-bubble"],
        GROUPED,
        {},
    ),
    "tensor 2, data 4, optimizer shared by 2": (
        {
            "world_size": 8,
            "tensor_parallel_size": 2,
            "optimizer_shard_size": 2,
            "bucket_megabytes": 0.03,
        },
        GROUPED,
        {},
    ),
}


def case_of(layout: dict[str, Any], model: dict[str, Any], optimizer: dict[str, Any]) -> Case:
    settings = {**MUON, **optimizer}
    pipeline = layout.get("pipeline_parallel_size", 1)
    batches = 4 if pipeline > 1 else 1
    return Case(layout, model, settings, batches, steps=3, precision="float64")


@pytest.mark.parametrize("name", CASES)
def test_three_steps_in_every_layout_are_those_of_one_process(pool: Any, name: str) -> None:
    layout, model, optimizer = CASES[name]
    outcomes = pool.run(layout["world_size"], train, case_of(layout, model, optimizer))
    truth = train(0, case_of({}, model, optimizer))
    errors = relative_error(outcomes, truth, "parameters")
    assert max(errors.values()) < 1e-10, errors
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(truth.losses, rel=1e-10)


def test_the_factor_of_a_shard_is_another_matrix() -> None:
    """What the comparison above would see of an update by tensor rank, or of q, k, v stacked."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    spectrum = 1 / torch.arange(1, 65, dtype=torch.float64)
    whole = ((u * spectrum) @ v)[None]
    sequence = polynomials("polar_express", 5)
    right = orthogonalize(whole.clone(), sequence)[0]
    for dim in (1, 2):
        shards = [orthogonalize(part.clone(), sequence)[0] for part in whole.chunk(2, dim)]
        assert (torch.cat(shards, dim - 1) - right).norm() > 0.2 * right.norm()
