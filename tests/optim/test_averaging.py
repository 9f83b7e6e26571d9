"""Gradients are averaged over the tokens that count, whatever the micro-batches they came in;
and modules that know no queue.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.optim.optimizer import DistributedOptimizer, StepResult
from megatron_completep.parallel.parameter import declare
from megatron_completep.roles import Role
from tests.support.models import (
    batch_of,
    build_optimizer,
    model_config,
    optimizer_config,
    plain_table,
    small_setup,
    train_step,
)

Batch = tuple[Tensor, Tensor]


def uneven_batches() -> list[Batch]:
    """Three micro-batches of 2 sequences in which very different shares of the labels count."""
    model = model_config()
    return [
        batch_of(model, seed, batch=2, ignored=share)
        for seed, share in ((0, 0.0), (1, 0.5), (2, 0.75))
    ]


def joined(batches: list[Batch]) -> Batch:
    tokens, labels = zip(*batches, strict=True)
    return torch.cat(tokens), torch.cat(labels)


def run(
    batches: list[Batch], dtype: torch.dtype = torch.float64, steps: int = 3
) -> tuple[Tensor, StepResult]:
    gpt, optimizer, _ = small_setup(
        {"tied_embeddings": True}, optimizer={"base_eps": 1e-4}, dtype=dtype
    )
    for _ in range(steps):
        result = train_step(gpt, optimizer, 1e-2, *batches)
    return optimizer.shards.master.clone(), result


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_gradient_accumulation_equals_one_big_batch(dtype: torch.dtype, tolerance: float) -> None:
    batches = uneven_batches()
    big, big_result = run([joined(batches)], dtype)
    small, small_result = run(batches, dtype)
    torch.testing.assert_close(small, big, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(small_result.loss, big_result.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(small_result.grad_norm, big_result.grad_norm, rtol=tolerance, atol=0)
    assert (
        small_result.tokens.item() == big_result.tokens.item() == (joined(batches)[1] != -100).sum()
    )


def test_the_order_of_micro_batches_does_not_matter() -> None:
    batches = uneven_batches()
    torch.testing.assert_close(run(batches)[0], run(batches[::-1])[0], rtol=1e-11, atol=1e-11)


def test_the_mean_of_micro_batch_means_would_differ() -> None:
    """What averaging per micro-batch would give: here far from the average over tokens."""
    batches = uneven_batches()
    gpt, _, _ = small_setup()
    with torch.no_grad():
        means = [gpt(tokens, labels=labels) / (labels != -100).sum() for tokens, labels in batches]
        tokens, labels = joined(batches)
        whole = gpt(tokens, labels=labels) / (labels != -100).sum()
    assert abs(torch.stack(means).mean() - whole) > 1e-3


def test_ignored_labels_leave_no_trace() -> None:
    """Sequences whose labels are all ignored may stand in the batch or not."""
    tokens, labels = batch_of(model_config(), 0, batch=2, ignored=0.0)
    padded = torch.cat((tokens, tokens.flip(1))), torch.cat((labels, torch.full_like(labels, -100)))
    (with_padding, a), (without, b) = run([padded]), run([(tokens, labels)])
    torch.testing.assert_close(with_padding, without, rtol=1e-11, atol=1e-11)
    assert a.tokens == b.tokens == labels.numel()


def test_the_reported_loss_and_norm_are_those_of_the_token_average() -> None:
    gpt, optimizer, _ = small_setup()
    tokens, labels = batch_of(gpt.config)
    with torch.no_grad():
        expected = F.cross_entropy(gpt(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
    result = train_step(gpt, optimizer, 1e-2, (tokens, labels))
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    norm = optimizer.shards.grad.norm() / (labels != -100).sum()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-12, atol=0)


def test_a_gradient_of_the_step_before_is_overwritten_and_an_unused_one_is_zero() -> None:
    gpt, optimizer, _ = small_setup()
    train_step(gpt, optimizer, 0.0, batch_of(gpt.config, 0))
    first = optimizer.shards.grad.clone()
    train_step(gpt, optimizer, 0.0, batch_of(gpt.config, 0))
    assert torch.equal(optimizer.shards.grad, first)
    optimizer.begin_step(1)
    optimizer.step(0.0, torch.zeros(()), torch.tensor(1))
    assert not optimizer.shards.grad.any()


# Modules that know no queue.


class PlainModel(nn.Module):
    """Nothing of the project but declared roles:
    a shared weight used twice, a branch that may stay unused.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.spare = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        for name, parameter in self.named_parameters():
            parameter.data = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
            )
            role = Role.HIDDEN_BIAS if name.endswith("bias") else Role.HIDDEN_WEIGHT
            declare(parameter, role, 6, 3 if role == Role.HIDDEN_WEIGHT else 6)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        hidden = torch.tanh(self.first(torch.tanh(self.first(x))))
        return (self.spare if spare else self.second)(hidden)


def batches_of(step: int, count: int) -> list[Tensor]:
    return [
        torch.randn(
            5, 6, generator=torch.Generator().manual_seed(10 * step + i), dtype=torch.float64
        )
        for i in range(count)
    ]


def plain_pair(
    dtype: torch.dtype,
) -> tuple[PlainModel, DistributedOptimizer, PlainModel, torch.optim.AdamW]:
    ours, theirs = PlainModel(), PlainModel().to(dtype)
    table = plain_table(width_multiplier=2.0, depth_multiplier=4.0)
    optimizer = build_optimizer(
        ours.to(dtype), table, optimizer_config(grad_clip=0.05, base_eps=1e-3), dtype
    )
    values = {
        name: (1e-2 * g.lr_factor, g.weight_decay, g.eps) for name, g in optimizer.groups.items()
    }
    groups = [
        {"params": [p], "lr": values[n][0], "weight_decay": values[n][1], "eps": values[n][2]}
        for n, p in theirs.named_parameters()
    ]
    return ours, optimizer, theirs, torch.optim.AdamW(groups, betas=(0.9, 0.95))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_plain_autograd_modules_train_as_under_torch(
    dtype: torch.dtype, tolerance: float, micro_batches: int
) -> None:
    ours, optimizer, theirs, reference = plain_pair(dtype)
    for step in range(5):
        optimizer.begin_step(micro_batches)
        reference.zero_grad(set_to_none=True)
        for x in batches_of(step, micro_batches):
            for model in (ours, theirs):
                model(x.to(dtype), spare=step == 3).square().sum().backward()
        for parameter in theirs.parameters():
            parameter.grad = (
                torch.zeros_like(parameter)
                if parameter.grad is None
                else parameter.grad / (5 * micro_batches)
            )
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        reference.step()
        optimizer.step(1e-2, torch.zeros(()), torch.tensor(5 * micro_batches))
        assert all(parameter.grad is None for parameter in ours.parameters())
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_plain_modules_train_under_bf16_with_float32_masters() -> None:
    model = PlainModel().float()
    optimizer = build_optimizer(
        model, plain_table(), optimizer_config(base_weight_decay=0.0), torch.bfloat16
    )
    losses = []
    for _ in range(40):
        optimizer.begin_step(1)
        loss = model(batches_of(0, 1)[0].bfloat16()).float().square().sum()
        loss.backward()
        losses.append(optimizer.step(3e-3, loss, torch.tensor(5)).loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.first.weight.dtype == torch.bfloat16
    assert optimizer.shards.master.dtype == torch.float32
