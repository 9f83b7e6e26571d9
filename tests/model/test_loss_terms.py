"""What the objective is the sum of, beside torch's cross-entropy in float64;
without gradients it is that alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep.data.tokenizer import BytesTokenizer
from megatron_completep.inference.scoring import Scorer
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.cross_entropy import IGNORED, LossConfig
from tests.support.models import batch_of, build_model, model_config

OPTIONS = [(0.02, 0.0), (0.0, 0.15), (0.03, 0.2)]
CHUNKS = [1 << 28, 512]  # bytes: all logits at once; a few tokens at a time


def model_with(loss: LossConfig) -> tuple[GPT, Tensor, Tensor]:
    model = model_config()
    return build_model(model, loss=loss), *batch_of(model)


def parts(
    gpt: GPT, tokens: Tensor, labels: Tensor, z_loss: float, smoothing: float
) -> dict[str, float]:
    """Cross-entropy and what is added to it, from the logits, with torch alone."""
    with torch.no_grad():
        logits, targets = gpt(tokens).flatten(0, 1), labels.flatten()
    pure, smoothed = (
        F.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=mass
        ).item()
        for mass in (0.0, smoothing)
    )
    squares = (torch.logsumexp(logits, -1).square() * (targets != IGNORED)).sum().item()
    named = {"cross_entropy": pure, "z_loss": z_loss * squares, "label_smoothing": smoothed - pure}
    return {name: value for name, value in named.items() if name == "cross_entropy" or value}


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize(("z_loss", "smoothing"), OPTIONS)
def test_the_terms_are_those_of_torch_and_add_up_to_the_objective(
    z_loss: float, smoothing: float, chunk_bytes: int
) -> None:
    gpt, tokens, labels = model_with(LossConfig(z_loss, smoothing, chunk_bytes))
    head = gpt.unembedding
    objective = sum(
        gpt(t, labels=y).item() for t, y in zip(tokens.split(1), labels.split(1), strict=True)
    )
    terms = dict(zip(head.loss.terms, head.take_terms().tolist(), strict=True))
    expected = parts(gpt, tokens, labels, z_loss, smoothing)
    assert terms == pytest.approx(expected, rel=1e-12)
    assert sum(terms.values()) == pytest.approx(objective, rel=1e-12)
    assert head.take_terms().tolist() == [0.0] * len(terms)  # they were taken


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize(("z_loss", "smoothing"), OPTIONS)
def test_without_gradients_the_loss_is_the_pure_cross_entropy(
    z_loss: float, smoothing: float, chunk_bytes: int
) -> None:
    gpt, tokens, labels = model_with(LossConfig(z_loss, smoothing, chunk_bytes))
    expected = parts(gpt, tokens, labels, z_loss, smoothing)
    with torch.no_grad():
        assert gpt(tokens, labels=labels).item() == pytest.approx(
            expected["cross_entropy"], rel=1e-12
        )
    # With gradients it is more.
    assert abs(gpt(tokens, labels=labels).item() - expected["cross_entropy"]) > 0.1


def test_a_plain_objective_has_no_terms_to_report() -> None:
    gpt, tokens, labels = model_with(LossConfig())
    gpt(tokens, labels=labels)
    assert gpt.unembedding.loss.terms == () and gpt.unembedding.take_terms().numel() == 0


def test_texts_are_scored_by_the_pure_cross_entropy() -> None:
    model = model_config(vocab_size=257, num_layers=2)
    gpt = build_model(model, loss=LossConfig(0.05, 0.3))
    context, target = [5, 9], [200, 17, 3]
    with torch.no_grad():
        logits = gpt(torch.tensor([[*context, *target[:-1]]]))[0, len(context) - 1 :]
    expected = -F.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
    (found,) = Scorer(gpt, BytesTokenizer()).score([(context, target)])
    assert found.log_likelihood == pytest.approx(expected, rel=1e-12)
