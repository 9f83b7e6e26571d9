"""Laziness: its verdicts, what it computes against the block taken as a function,
and what it says of right and wrong rules.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.func import jvp

from megatron_completep.errors import ConfigError
from megatron_completep.instruments.check_report import describe_laziness, write_laziness
from megatron_completep.instruments.coordinate_verdict import Verdict
from megatron_completep.instruments.laziness import (
    LazinessSample,
    block_laziness,
    block_output,
    collect,
    judge,
)
from megatron_completep.instruments.trial import Trial, for_short_runs, read_batches, reshape
from megatron_completep.parallel.context import ParallelContext
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

SINGLE = ParallelContext.single()


def made_up(exponents: dict[str, float]) -> list[LazinessSample]:
    depths = [2, 4, 8, 16, 32]
    return [
        LazinessSample(rule, d, s, [0.1 * d**p] * d)
        for rule, p in exponents.items()
        for d in depths
        for s in range(2)
    ]


@pytest.mark.parametrize(
    ("own", "control", "verdict"),
    [
        (-0.1, -0.72, Verdict.RIGHT),
        (-0.5, -0.72, Verdict.WRONG),
        (-0.33, -0.94, Verdict.CANNOT_TELL),
        (-0.1, -0.3, Verdict.CANNOT_TELL),
    ],
)
def test_the_verdict_follows_from_the_exponents(own: float, control: float, verdict: Verdict):
    result = judge(made_up({"own": own, "alpha_0.5": control, "mup": 0.0}), base_num_layers=2)
    assert result.verdict == verdict
    assert result.slopes["own"].value == pytest.approx(own, abs=1e-12)
    assert "layers" in describe_laziness(result, 2)


def seeds(rule: str, exponents: list[float]) -> list[LazinessSample]:
    return [
        LazinessSample(rule, d, s, [0.1 * d**p] * d)
        for s, p in enumerate(exponents)
        for d in (8, 16, 32)
    ]


@pytest.mark.parametrize(
    ("own", "control", "words"),
    [
        ([-0.1, 0.0], [-0.7, -0.71], "holds both what a complete model has"),
        ([-0.5, -0.6], [-0.7, -0.71], "holds both what a complete model has"),
        ([-0.1], [-0.7, -0.71], "no interval, for there is one seed"),
        ([-0.9], [-0.7], "no interval, for there is one seed"),
        ([-0.1, -0.11], [-0.6, -0.8], "reaches above -0.25"),
        ([-0.1, -0.11], [-0.7], "reaches above -0.25"),
    ],
)
def test_an_interval_that_holds_both_answers_cannot_tell(
    own: list[float], control: list[float], words: str
):
    result = judge(seeds("own", own) + seeds("alpha_0.5", control), base_num_layers=2)
    assert result.verdict == Verdict.CANNOT_TELL
    assert words in result.reason


def test_the_published_laziness_keeps_its_verdict():
    published = json.loads(
        (Path(__file__).parents[2] / "docs/results/laziness/laziness.json").read_text()
    )
    result = judge([LazinessSample(**sample) for sample in published["samples"]], base_num_layers=2)
    assert result.verdict == Verdict.RIGHT, result.reason


def test_shallow_models_alone_cannot_tell():
    assert judge([LazinessSample("own", 2, 0, [0.1, 0.1])], 2).verdict == Verdict.CANNOT_TELL


def trial_of(folder: Path, architecture: str = "gpt2", **optimizer: float) -> Trial:
    config = reshape(proxy_config(folder, architecture), num_layers=4)
    short = for_short_runs(config, 1, "float64", base_weight_decay=0.0, base_eps=1e-30, **optimizer)
    return Trial.build(short, SINGLE)


def test_the_measure_equals_one_with_an_exact_directional_derivative(tmp_path: Path):
    """J d by forward-mode differentiation of a block written in plain torch,
    in place of the central difference.
    """
    write_markov_chain(tmp_path / "text", 8_000)
    measured = block_laziness(trial_of(tmp_path))
    trial = trial_of(tmp_path)
    model, (batches,) = trial.chunks[0], read_batches(trial.config, SINGLE, 1)
    with trial.taps.recording() as taps, torch.no_grad():
        model(batches[0].tokens)
        x = taps.streams["layers.1.attention_norm"][0]
    inputs = model._attention_inputs(x, batches[0].tokens.shape[1], None, None, None)
    before = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers.1.")
    }
    trial.step.run(batches, 1).read()
    after = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers.1.")
    }

    block = PlainBlock(trial.table.residual_multiplier, trial.table.attention_scale, heads=2)

    def function(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return block({name.removeprefix("layers.1."): w for name, w in weights.items()}, x)

    start, along = jvp(function, (before,), ({n: after[n] - before[n] for n in before},))
    expected = ((function(after) - start - along).norm() / along.norm()).item()
    assert measured[1] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        block_output(model, model.blocks()[1][1], x, inputs),
        function(after),
        rtol=1e-10,
        atol=1e-12,
    )


class PlainBlock:
    """The gpt2 block of `ARCHITECTURES` as formulas:
    layernorm, causal attention without positions, GELU.
    """

    def __init__(self, multiplier: float, scale: float, heads: int):
        self.multiplier, self.scale, self.heads = multiplier, scale, heads

    def __call__(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x + self.multiplier * self.attention(w, self.norm(w, "attention_norm", x))
        inner = torch.nn.functional.gelu(self.linear(w, "mlp.up", self.norm(w, "mlp_norm", x)))
        return x + self.multiplier * self.linear(w, "mlp.down", inner)

    def linear(self, w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(self, w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def attention(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)
            for part in self.linear(w, "attention.qkv", x).chunk(3, -1)
        )
        scores = self.scale * q @ k.transpose(-1, -2)
        future = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v
        return self.linear(w, "attention.output", mixed.permute(2, 0, 1, 3).flatten(2))


def test_a_smaller_step_is_lazier(tmp_path: Path):
    """The remainder is of second order: r falls with the learning rate, in proportion."""
    write_markov_chain(tmp_path / "text", 8_000)
    large = block_laziness(trial_of(tmp_path, base_lr=2**-8))
    small = block_laziness(trial_of(tmp_path, base_lr=2**-11))
    assert all(b < a / 4 for a, b in zip(large, small, strict=True))


def test_results_are_written_beside_each_other(tmp_path: Path):
    write_laziness(judge(made_up({"own": -0.1, "alpha_0.5": -0.7}), 2), tmp_path, {})
    assert {"laziness.json", "laziness.png", "laziness.html"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_model_split_over_ranks_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="one process"):
        collect(proxy_config(tmp_path, parallel={"tensor_parallel_size": 2}), [2, 4])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_completep_stays_complete_and_alpha_half_becomes_lazy(tmp_path: Path):
    write_markov_chain(tmp_path / "text")
    config = proxy_config(tmp_path, "gpt2", optimizer={"base_lr": 2**-8})
    result = judge(collect(config, [2, 4, 8, 16, 32], 3), 2)
    assert result.verdict == Verdict.RIGHT, describe_laziness(result, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_alpha_half_checked_as_ones_own_is_called_lazy(tmp_path: Path):
    write_markov_chain(tmp_path / "text")
    config = proxy_config(tmp_path, "gpt2", optimizer={"base_lr": 2**-8}, completep={"alpha": 0.5})
    assert (
        judge(collect(config, [2, 8, 16, 32], 2, ("own", "alpha_0.5")), 2).verdict == Verdict.WRONG
    )
