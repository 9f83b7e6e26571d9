"""E7: the logits of the generation path (one token at a time,
key/value caches) are those of the training path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.models import batch_of, build_model, model_config, table_for, table_with

CASES: list[dict[str, Any]] = [
    {"position": "rope"},
    {"position": "learned", "bias": True, "norm": "layernorm", "tied_embeddings": True},
    {"position": "alibi", "activation": "squared_relu", "bias": True, "norm": "layernorm"},
    {"position": "rope", "num_query_groups": 2, "qk_norm": True},
    {"position": "alibi", "num_query_groups": 1},
    {"moe": {"num_experts": 4, "top_k": 2, "shared_ffn_hidden_size": 24}},
]


def incremental_logits(
    gpt: torch.nn.Module, tokens: torch.Tensor, pieces: list[int]
) -> torch.Tensor:
    """Logits of the whole sequence, fed in pieces of the given lengths over one cache."""
    caches = gpt.new_caches(tokens.shape[0], tokens.shape[1])
    return torch.cat([gpt(piece, caches=caches) for piece in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "pieces",
    [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [4, 3, 5]],
    ids=["tokens", "prompt_then_tokens", "pieces"],
)
def test_logits_of_the_generation_path_equal_those_of_the_training_path(
    case: dict[str, Any], pieces: list[int]
) -> None:
    model = model_config(**case, logit_multiplier=1.5, input_multiplier=2.0)
    gpt = build_model(model)
    tokens, _ = batch_of(model)
    with torch.no_grad():
        torch.testing.assert_close(
            incremental_logits(gpt, tokens, pieces), gpt(tokens), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_loss_is_the_cross_entropy_of_the_generation_logits(case: dict[str, Any]) -> None:
    """The loss owns its logits:
    it too must use the multiplier that generation uses, and no padded column.
    """
    model = model_config(**case, logit_multiplier=1.5)
    gpt = build_model(model)
    tokens, labels = batch_of(model)
    with torch.no_grad():
        logits = incremental_logits(gpt, tokens, [1] * tokens.shape[1])
        assert logits.shape[-1] == model.vocab_size
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        torch.testing.assert_close(gpt(tokens, labels=labels), expected, rtol=1e-12, atol=0)


def test_a_multiplier_forgotten_when_generating_is_caught() -> None:
    """The authors' own code forgets the 1/m_N when sampling."""
    model = model_config()
    gpt = build_model(model)
    tokens, _ = batch_of(model)
    with torch.no_grad():
        training = gpt(tokens)
        forgetful = build_model(model, table_with(table_for(model), logit_multiplier=1.0))
        difference = (incremental_logits(forgetful, tokens, [1] * 12) - training).abs().max()
    assert difference > 0.1


def test_a_sequence_can_grow_beyond_the_training_length_with_rope() -> None:
    model = model_config(position="rope")
    gpt = build_model(model)
    tokens, _ = batch_of(model, seq_length=2 * model.seq_length)
    with torch.no_grad():
        torch.testing.assert_close(
            incremental_logits(gpt, tokens, [20, 1, 1, 1, 1]), gpt(tokens), rtol=1e-12, atol=1e-12
        )
