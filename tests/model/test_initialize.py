"""Initial weights: a pure function of (seed, parameter name, global position),
with the standard deviation of the role.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron_completep.errors import ConfigError
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.initialize import draw, fingerprint, initialize
from megatron_completep.parallel.axis import Share
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec, declare
from megatron_completep.roles import Role
from tests.support.models import (
    build_model,
    completep_config,
    model_config,
    optimizer_config,
    plain_table,
    table_for,
)


def weights(names: list[str], seed: int = 3, width_ratio: int = 4) -> dict[str, torch.Tensor]:
    """A bare module whose parameters are created in the given order."""
    module = nn.Module()
    for name in names:
        module.register_parameter(
            name, declare(nn.Parameter(torch.empty(8, 16)), Role.HIDDEN_WEIGHT, 4 * width_ratio, 4)
        )
    initialize(module, plain_table(width_multiplier=4.0), optimizer_config(), seed)
    return {name: p.detach() for name, p in module.named_parameters()}


def test_the_same_weights_whatever_the_creation_order() -> None:
    forward, backward, alone = weights(["a", "b", "c"]), weights(["c", "b", "a"]), weights(["b"])
    assert {name: fingerprint(w) for name, w in forward.items()} == {
        name: fingerprint(w) for name, w in backward.items()
    }
    assert torch.equal(forward["b"], alone["b"])


def test_names_and_seeds_and_rows_draw_different_numbers() -> None:
    drawn = weights(["a", "b"])
    assert not torch.equal(drawn["a"], drawn["b"])
    assert not torch.equal(drawn["a"], weights(["a"], seed=4)["a"])
    rows = drawn["a"]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_random_state_elsewhere_does_not_matter() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = weights(["a"])["a"]
    torch.manual_seed(2)
    np.random.seed(2)
    torch.randn(5)
    assert torch.equal(first, weights(["a"])["a"])


def test_a_pipeline_stage_and_a_deeper_model_start_from_the_same_bits() -> None:
    model = model_config(num_layers=4)
    table, context = table_for(model), ParallelContext.single()
    whole = GPT(model, table, context)
    stage = GPT(model, table, context, ChunkRange(2, 4, has_embedding=False, has_unembedding=True))
    for gpt in (whole, stage):
        initialize(gpt, table, optimizer_config(), 7)
    names = dict(whole.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in stage.named_parameters())
    assert "layers.2.mlp.down.weight" in dict(stage.named_parameters())


def hidden(*shape: int, **settings: Any) -> Spec:
    return Spec(Role.HIDDEN_WEIGHT, shape, **settings)


def test_every_row_is_the_beginning_of_a_stream_of_its_own() -> None:
    """Long rows after one another: what the generator holds back of one must not reach the next."""
    for name in "abcdefgh":  # keys with and without the highest of 64 bits
        digest = hashlib.blake2b(f"5/{name}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        drawn = draw(hidden(3, 33), 5, name)
        for row, numbers in enumerate(drawn):
            stream = np.random.Generator(np.random.Philox(key=[key, row]))
            assert np.array_equal(numbers, stream.standard_normal(33, dtype=np.float32))


@pytest.mark.parametrize(
    "ranges, dim, settings",
    [
        (((2, 4), (8, 12)), 0, {"parts": {"q": 4, "kv": 8}, "split": {0: Share("tensor", 1, 2)}}),
        (((3, 6),), 1, {"split": {1: Share("tensor", 1, 3)}}),
    ],
)
def test_a_shard_draws_its_part_of_the_whole(ranges: tuple, dim: int, settings: dict) -> None:
    whole = draw(hidden(12, 9), 5, "w")
    part = np.concatenate([whole.take(range(a, b), axis=dim) for a, b in ranges], axis=dim)
    assert np.array_equal(draw(hidden(12, 9, **settings), 5, "w"), part)


def test_a_tensor_of_three_dimensions_split_along_two_draws_its_part_of_the_whole() -> None:
    whole = draw(hidden(4, 6, 5), 5, "w")
    assert np.array_equal(whole.reshape(24, 5), draw(hidden(24, 5), 5, "w"))
    split = {0: Share("expert", 1, 2), 1: Share("tensor", 2, 3)}
    assert np.array_equal(draw(hidden(4, 6, 5, split=split), 5, "w"), whole[2:4, 4:6])


def test_padding_rows_of_the_vocabulary_are_zero() -> None:
    model = model_config(vocab_size=37, vocab_multiple=16)
    gpt = build_model(model, dtype=torch.float32, random_vectors=False)
    assert gpt.embedding.weight.shape[0] == 48
    assert not gpt.embedding.weight[37:].any() and gpt.embedding.weight[:37].all(dim=1).all()


def test_the_draws_are_standard_normal() -> None:
    """Moments, tail and independence of neighbours,
    on a quarter of a million draws; 5 standard errors.
    """
    values = draw(hidden(512, 512), 11, "w").astype(np.float64)
    error = 1 / math.sqrt(values.size)
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * error * math.sqrt(2)
    assert abs((values**4).mean() - 3) < 5 * error * math.sqrt(96)
    assert abs((np.abs(values) > 2).mean() - math.erfc(2 / math.sqrt(2))) < 5 * error * 0.22
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        assert abs((a * b).mean()) < 5 * error


def test_standard_deviation_of_every_role() -> None:
    """Embeddings: sigma; hidden weights: sigma / sqrt(m_N), down: of its own ratio.

    Gains start at 1, biases at 0.
    """
    model = model_config(
        hidden_size=64,
        num_layers=2,
        ffn_hidden_size=256,
        vocab_size=512,
        seq_length=256,
        num_query_groups=2,
        qk_norm=True,
        bias=True,
        norm="layernorm",
        position="learned",
    )
    # m_N = 4, the FFN's ratio is 8
    completep = completep_config(base_hidden_size=16, base_ffn_hidden_size=32)
    table = table_for(model, completep)
    gpt = build_model(model, table, torch.float32, random_vectors=False)
    for name, p in gpt.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            ratio = 8 if "mlp.down" in name else 4 if name.startswith("layers.") else 1
            expected = 0.2 / ratio**0.5
            assert p.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_own_factors_scale_the_draws_of_what_they_name_and_nothing_else() -> None:
    overrides = [
        {"pattern": "layers.0.mlp.*", "init_std": 4.0},
        {"pattern": "*.down.*", "init_std": 0.5},
    ]
    plain, own = (
        build_model(model_config(), None, torch.float32, optimizer=settings, random_vectors=False)
        for settings in (optimizer_config(), optimizer_config(overrides=overrides))
    )
    expected = {
        "layers.0.mlp.up.weight": 4.0,
        "layers.0.mlp.down.weight": 2.0,
        "layers.1.mlp.down.weight": 0.5,
    }
    factors = {
        name: (q / p).nanmedian().item()
        for (name, p), q in zip(plain.named_parameters(), own.parameters(), strict=True)
    }
    assert {name: factors[name] for name in expected} == expected
    assert {name for name, factor in factors.items() if factor != 1.0 and ".down." not in name} == {
        "layers.0.mlp.up.weight"
    }


def test_a_parameter_without_a_role_is_an_error_that_names_it() -> None:
    module = nn.Module()
    module.inner = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"inner\.weight.*no CompleteP role.*hidden_weight"):
        initialize(module, plain_table(), optimizer_config(), 1)
