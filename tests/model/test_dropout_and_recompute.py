"""Dropout on the branches, and activation recomputation: the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config.schema import ModelConfig
from megatron_completep.kernels import Join, reference
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import dropout_seeds
from tests.support.models import batch_of, build_model, completep_config, model_config, table_for
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

BRANCHES = 2 * model_config().num_layers
KEY = 12345


def seeds_of(key: int) -> Tensor:
    """The seeds of a whole batch of `batch_of`, as the model takes them."""
    batch, seq_length = batch_of(model_config())[0].shape
    seed = kernels.dropout_seed(key, batch, seq_length=seq_length)
    return dropout_seeds(seed, BRANCHES)[None]


SEEDS = seeds_of(KEY)


def factors(model: ModelConfig, shape: tuple[int, int]) -> list[Tensor]:
    """The dropout factors [B, S, H] of every branch:
    attention and MLP of layer l join at sites 2l + 1 and 2l + 2.
    """
    batch, length = shape
    size = torch.Size((length, batch, model.hidden_size))
    sites = range(1, 2 * model.num_layers + 1)
    factors = []
    for site in sites:
        seed = kernels.dropout_seed(KEY + site, batch, seq_length=length)
        factors.append(reference.dropout_factor(size, Join(1.0, model.dropout, seed)))
    return [factor.double().transpose(0, 1) for factor in factors]


def gradients_of(
    gpt: GPT, tokens: Tensor, labels: Tensor, seeds: Tensor | None = SEEDS
) -> dict[str, Tensor]:
    """The loss and every gradient."""
    loss = gpt(tokens, labels=labels, dropout_seeds=seeds)
    gpt.queue.begin_step(gpt.parameters(), 1)
    loss.backward()
    gpt.queue.finish_step()
    return {
        "loss": loss.detach(),
        **{name: p.main_grad.clone() for name, p in gpt.named_parameters()},
    }


def test_dropout_matches_the_plain_twin_given_the_same_masks() -> None:
    model = model_config(dropout=0.25, bias=True, norm="layernorm", activation="gelu")
    completep = completep_config()
    gpt = build_model(model, table_for(model, completep))
    tokens, labels = batch_of(model)
    found = gradients_of(gpt, tokens, labels)
    weights = {name: p.detach().clone().requires_grad_() for name, p in gpt.named_parameters()}
    twin = PlainTwin(weights, model, completep)
    loss = cross_entropy_sum(
        twin.logits(tokens, branch_factors=factors(model, tuple(tokens.shape))), labels
    )
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-9, atol=1e-11)
    masks = factors(model, tuple(tokens.shape))
    wrong = cross_entropy_sum(twin.logits(tokens, branch_factors=masks[1:] + masks[:1]), labels)
    assert abs(wrong - loss) > 1e-3  # the masks matter


def test_dropout_keeps_the_right_share_and_the_mean_and_differs_by_site() -> None:
    model = model_config(dropout=0.25)
    masks = factors(model, (64, model.seq_length))
    for mask in masks:
        assert set(mask.unique().tolist()) == {
            0.0,
            float(torch.tensor(1 / 0.75, dtype=torch.float32)),
        }
        # 24576 draws: standard deviation 0.003
        assert abs((mask == 0).double().mean() - 0.25) < 0.01
        assert abs(mask.mean() - 1.0) < 0.015
    kept = torch.stack([mask.flatten() > 0 for mask in masks]).double()
    correlation = torch.corrcoef(kept) - torch.eye(len(masks), dtype=torch.float64)
    assert correlation.abs().max() < 0.03


def test_without_a_seed_nothing_is_dropped() -> None:
    model, tokens = model_config(dropout=0.5), batch_of(model_config())[0]
    table = table_for(model)
    dropping = build_model(model, table)
    plain = build_model(model.model_copy(update={"dropout": 0.0}), table)
    with torch.no_grad():
        assert torch.equal(dropping(tokens), plain(tokens))
        assert not torch.equal(dropping(tokens, dropout_seeds=SEEDS), plain(tokens))
        logits = dropping(tokens, dropout_seeds=SEEDS)
        assert torch.equal(dropping(tokens, dropout_seeds=SEEDS), logits)
        assert not torch.equal(dropping(tokens, dropout_seeds=seeds_of(KEY + 1000)), logits)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_recomputation_changes_no_bit(recompute: str, dtype: torch.dtype, position: str) -> None:
    model = model_config(
        dropout=0.1,
        bias=True,
        norm="layernorm",
        qk_norm=True,
        num_query_groups=2,
        position=position,
    )
    table = table_for(model)
    tokens, labels = batch_of(model)
    kept = gradients_of(build_model(model, table, dtype), tokens, labels)
    again = gradients_of(build_model(model, table, dtype, recompute=recompute), tokens, labels)
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name
    other = gradients_of(build_model(model, table, dtype), tokens, labels, seeds_of(KEY + 1))
    assert not torch.equal(other["loss"], kept["loss"])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_runs_each_gradient_once(recompute: str) -> None:
    model = model_config()
    runs = []
    for mode in ("none", recompute):
        gpt = build_model(model, recompute=mode)
        gradients_of(gpt, *batch_of(model), seeds=None)
        runs.append(gpt.queue.runs)
    assert runs[0] == runs[1] == len(list(gpt.parameters()))


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_keeps_fewer_activations(recompute: str) -> None:
    model = model_config()

    def bytes_kept(mode: str) -> int:
        gpt, kept = build_model(model, recompute=mode), {}

        def pack(tensor: Tensor) -> Tensor:
            # Held, so that no address is used twice.
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = gpt(*batch_of(model)[:1], labels=batch_of(model)[1])
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    assert bytes_kept(recompute) < bytes_kept("none")
