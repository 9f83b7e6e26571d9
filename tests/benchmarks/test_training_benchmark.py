"""The benchmark compares like with like: the plain model computes what ours does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_completep.benchmarks.plain_model import PlainGPT
from megatron_completep.benchmarks.training_benchmark import (
    COMPILED,
    KINDS,
    OURS,
    PLAIN,
    PROGRAMS,
    BenchmarkSettings,
    bootstrap_ratio,
    compare,
    compare_all,
    random_batch,
    run_config,
)
from tests.support.configs import GPT2
from tests.support.models import batch_of, build_model, model_config, table_for

SHAPES: list[dict[str, Any]] = [
    GPT2,
    {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "num_query_groups": 2},
    {
        "norm": "layernorm",
        "activation": "squared_relu",
        "position": "rope",
        "tied_embeddings": True,
    },
]
PLAIN_NAMES = {
    "layers.": "layers.",
    "attention.qkv": "qkv",
    "attention.output": "output",
    "mlp.up": "up",
    "mlp.down": "down",
}


def plain_name(name: str) -> str:
    for ours, plain in PLAIN_NAMES.items():
        name = name.replace(ours, plain)
    return name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["activation"])
def test_the_plain_model_computes_the_same_loss_from_the_same_weights(
    shape: dict[str, Any],
) -> None:
    model = model_config(**shape, vocab_multiple=37, attention_scale="1/sqrt(head_dim)")
    table = table_for(model)
    gpt, plain = build_model(model, table), PlainGPT(model, table).double()
    weights = {plain_name(name): parameter.detach() for name, parameter in gpt.named_parameters()}
    if model.tied_embeddings:
        weights["unembedding.weight"] = weights["embedding.weight"]
    plain.load_state_dict(weights)
    tokens, labels = batch_of(model, ignored=0.0)
    with torch.no_grad():
        loss = plain(tokens, labels).item()
        tolerance = 1e-6  # its loss and angles are float32
        assert gpt(tokens, labels=labels).item() / labels.numel() == pytest.approx(
            loss, rel=tolerance
        )
        plain.layers[0].residual_multiplier = 1.0
        assert plain(tokens, labels).item() != pytest.approx(loss, rel=100 * tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_both_programs_are_timed_in_turn(precision: str) -> None:
    settings = BenchmarkSettings(model_config(), batch_size=2, rounds=4, warmup=1)
    result = compare(settings, precision, torch.device("cpu"))
    assert result.rounds == 4 and result.cpu_time_ratio is not None
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.ratio == pytest.approx(result.ours.median / result.plain.median)
    assert result.ours.tokens_per_second == pytest.approx(2 * 12 / result.ours.median)
    assert result.ours.mfu is None


def test_every_program_takes_turns_and_each_of_ours_is_compared_with_each_plain_one() -> None:
    settings = BenchmarkSettings(model_config(), batch_size=2, rounds=2, warmup=1)
    # Without the compiled ones, whose compilation takes long.
    names = [OURS, PLAIN]
    (only,) = compare_all(settings, "float32", torch.device("cpu"), names)
    assert only.names == (OURS, PLAIN) and only.precision == "float32"
    assert [name for name in PROGRAMS if name.endswith(COMPILED)] == [
        "ours, compiled",
        "plain, compiled",
    ]
    assert run_config(replace(settings, compile=True), "float32").training.compile


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_kinds_of_model_are_ones_that_the_plain_model_has(kind: str) -> None:
    model = model_config(**KINDS[kind])
    tokens, labels = batch_of(model, ignored=0.0)
    assert PlainGPT(model, table_for(model))(tokens, labels).isfinite()


def test_the_interval_of_a_ratio_holds_the_truth_and_excludes_what_is_far() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = (1 + 0.1 * torch.randn(40, generator=generator)).tolist()
    low, high = bootstrap_ratio([2 * x for x in plain], plain)
    assert low == pytest.approx(2) and high == pytest.approx(2)
    other = (1 + 0.1 * torch.randn(40, generator=generator)).tolist()
    low, high = bootstrap_ratio(other, plain)
    assert low < 1 < high and not low < 1.3 < high


def test_batches_have_the_shape_that_is_timed() -> None:
    batch = random_batch(BenchmarkSettings(model_config(), batch_size=3))
    assert batch.tokens.shape == batch.labels.shape == (3, 12)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
