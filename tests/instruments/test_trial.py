"""Shapes of a trial: what changes with width and depth,
and what a user's own factors come to there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_completep.config.schema import OverrideConfig
from megatron_completep.instruments.coordinate_check import Job, Sample, train
from megatron_completep.instruments.coordinate_verdict import judge
from megatron_completep.instruments.trial import Design, Trial, for_short_runs, reshape, stretch
from megatron_completep.parallel.context import ParallelContext
from tests.support.corpora import write_markov_chain
from tests.support.models import group_of
from tests.support.runs import proxy_config

SINGLE = ParallelContext.single()
OWN = {
    "completep": {
        "base_hidden_size": 32,
        "base_num_layers": 2,
        "factors": {"hidden_weight": {"lr": 3.0, "weight_decay": 0.5}},
    },
    "optimizer": {
        "base_lr": 2**-9,
        "overrides": [
            {"pattern": "layers.1.*", "lr": 4.0},
            {"pattern": "*.attention.qkv.weight", "lr": 0.5},
        ],
    },
}


def test_a_layers_own_factors_are_stretched_over_the_depth_and_others_stay():
    overrides = [
        OverrideConfig(pattern=pattern, lr=2.0)
        for pattern in ("layers.0.*", "layers.1.mlp.*", "embedding*", "layers.*.norm*")
    ]
    assert stretch(overrides, 2, 2) == overrides
    found = [o.pattern for o in stretch(overrides, 2, 5)]
    assert found == [
        *(f"layers.{k}.*" for k in (0, 1, 2)),
        "layers.3.mlp.*",
        "layers.4.mlp.*",
        "embedding*",
        "layers.*.norm*",
    ]
    assert {o.lr for o in stretch(overrides, 2, 5)} == {2.0}


def lr_factors(folder: Path, depth: int, width: int, **sections: dict) -> dict[str, float]:
    config = for_short_runs(reshape(proxy_config(folder, "modern", **sections), width, depth), 1)
    return {
        name: group.lr_factor
        for name, group in Trial.build(config, SINGLE).optimizer.groups.items()
    }


@pytest.mark.parametrize(("depth", "width"), [(2, 32), (8, 32), (8, 64)])
def test_own_factors_multiply_the_table_alike_at_every_shape(
    tmp_path: Path, depth: int, width: int
):
    plain, own = lr_factors(tmp_path, depth, width), lr_factors(tmp_path, depth, width, **OWN)
    ratios = {name: own[name] / plain[name] for name in plain}
    for layer in range(depth):
        in_second_half = 4.0 if 2 * layer >= depth else 1.0
        assert ratios[f"layers.{layer}.mlp.down.weight"] == pytest.approx(3.0 * in_second_half)
        assert group_of(ratios, f"layers.{layer}.attention.qkv.weight") == pytest.approx(
            1.5 * in_second_half
        )
        assert ratios[f"layers.{layer}.mlp_norm.weight"] == pytest.approx(in_second_half)
    assert ratios["embedding.weight"] == ratios["final_norm.weight"] == 1.0


BRANCH_ENDS = ("*.attention.output.*", "*.mlp.down.*")


def losses_with(tmp_path: Path, multiplier: float, **own: float) -> list[float]:
    """Of three steps in float64, without clipping; `own`:
    the factors of every branch's last matrix and bias.
    """
    overrides = [{"pattern": pattern, **own} for pattern in BRANCH_ENDS]
    optimizer = {
        "base_eps": 1e-4,
        "base_weight_decay": 0.5,
        "grad_clip": 0.0,
        "overrides": overrides,
    }
    config = proxy_config(
        tmp_path, "paper", optimizer=optimizer, model={"residual_multiplier": multiplier}
    )
    return train(Job("model", reshape(config, num_layers=4), Design(), 3, "float64"), SINGLE).losses


def test_a_factor_on_the_branches_is_factors_of_their_last_matrices(tmp_path: Path):
    """To the last bit for a power of two; each of the four is needed."""
    write_markov_chain(tmp_path / "text", 8_000)
    halved = {"init_std": 0.5, "lr": 0.5, "weight_decay": 2.0, "eps": 2.0}
    expected = losses_with(tmp_path, 0.5)
    assert losses_with(tmp_path, 1.0, **halved) == expected
    for name in halved:
        assert losses_with(tmp_path, 1.0, **(halved | {name: 1.0})) != expected, name


@pytest.mark.slow
def test_a_model_with_own_factors_keeps_its_sizes_over_depth(tmp_path: Path):
    """Stretched over the depth they transfer;
    a factor that stays with the two first layers would fade away as 1 / L.
    """
    write_markov_chain(tmp_path / "text")
    config = proxy_config(tmp_path, "gpt2", **OWN)
    jobs = {
        depth: Job("model", reshape(config, num_layers=depth), Design(), 10, "float32")
        for depth in (2, 4, 8, 16)
    }
    samples = [
        Sample("depth", "model", 32, depth, 0, train(job, SINGLE)) for depth, job in jobs.items()
    ]
    found = {f.band.quantity: f for f in judge(samples).findings}
    assert found["update, hidden matrices"].passed
    assert not found["stream change"].wrong
