"""E3, E4 and E5 of the parameterization, through the distributed optimizer;
and AdamW and clipping against torch's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep.completep import table as page
from megatron_completep.config.schema import RoleFactors
from megatron_completep.kernels.control import STEP
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.roles import Role
from tests.support.configs import GPT2
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    completep_config,
    group_of,
    model_config,
    optimizer_config,
    small_setup,
    table_for,
    train_step,
)

BIASED = {**GPT2, "qk_norm": True}
# Of the masters.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24}


def masters(optimizer: DistributedOptimizer) -> dict[str, Tensor]:
    """The master weights by name, copied."""
    return {
        p.name: optimizer.shards.master[p.start : p.start + p.size].clone()
        for p in optimizer.shards.layout.pieces
    }


# E3: the first step.


def displacement_errors(dtype: torch.dtype, alpha: float) -> dict[str, float]:
    """|largest change of a tensor in the first step - its learning rate|,
    in units of what rounding allows.
    """
    eta, m_N, m_L = 2e-3, 2, 2
    gpt, optimizer, _ = small_setup(
        BIASED, {"alpha": alpha}, {"base_weight_decay": 0.0, "base_eps": 1e-30}, dtype
    )
    before = masters(optimizer)
    train_step(gpt, optimizer, eta, batch_of(gpt.config))
    errors = {}
    for name, after in masters(optimizer).items():
        hidden = name.startswith("layers.") and "norm" not in name and name.endswith("weight")
        expected = (
            eta
            * (m_L ** (alpha - 1) if name.startswith("layers.") else 1.0)
            / (m_N if hidden else 1)
        )
        moved = (after - before[name]).double().abs().max().item()
        allowed = (
            1e-9 * expected
            if dtype == torch.float64
            else 4 * ROUNDING[dtype] * max(1e-2, after.abs().max().item())
        )
        errors[name] = abs(moved - expected) / allowed
    return errors


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_step_moves_every_tensor_by_its_learning_rate(
    dtype: torch.dtype, alpha: float
) -> None:
    errors = displacement_errors(dtype, alpha)
    assert max(errors.values()) < 1, {name: value for name, value in errors.items() if value >= 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_learning_rate_factor_shows_in_the_first_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table with the depth factor of the final norm where it does not belong."""
    original = page.RULES["adamw"]

    def wrong(*arguments: float) -> dict:
        rows = original(*arguments)
        return {**rows, Role.FINAL_NORM: rows[Role.PRE_NORM]}

    monkeypatch.setitem(page.RULES, "adamw", wrong)
    errors = displacement_errors(dtype, 0.5)
    assert {name for name, value in errors.items() if value >= 1} == {
        "final_norm.weight",
        "final_norm.bias",
    }


def test_a_large_epsilon_acts_as_each_group_s_own() -> None:
    """First step: lr * g / (|g| + eps) with the group's eps. A single eps for all would not fit."""
    gpt, optimizer, _ = small_setup(
        BIASED, {}, {"base_weight_decay": 0.0, "base_eps": 0.02, "grad_clip": 0.0}
    )
    before, batch = masters(optimizer), batch_of(gpt.config)
    train_step(gpt, optimizer, 1e-2, batch)
    counted = (batch[1] != -100).sum()
    mismatch_with_one_eps = 0.0
    for piece in optimizer.shards.layout.pieces:
        group = group_of(optimizer.groups, piece.name)
        g = optimizer.shards.grad[piece.start : piece.start + piece.size] / counted
        moved = before[piece.name] - optimizer.shards.master[piece.start : piece.start + piece.size]
        torch.testing.assert_close(
            moved, 1e-2 * group.lr_factor * g / (g.abs() + group.eps), rtol=1e-9, atol=1e-15
        )
        single = 1e-2 * group.lr_factor * g / (g.abs() + 0.02)
        mismatch_with_one_eps = max(
            mismatch_with_one_eps, ((moved - single).abs().max() / moved.abs().max()).item()
        )
    assert mismatch_with_one_eps > 0.1


# E4: nothing but decay.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradients_shrink_every_decayed_tensor_by_eta_lambda(dtype: torch.dtype) -> None:
    """At alpha = 1 the factor is the same whatever the width and depth; gains and biases stay."""
    eta, lam = 0.5, 0.125
    for completep_changes in ({}, {"base_hidden_size": 8, "base_num_layers": 1}):
        gpt, optimizer, _ = small_setup(
            BIASED, completep_changes, {"base_weight_decay": lam}, dtype
        )
        before = masters(optimizer)
        optimizer.begin_step(1)
        optimizer.step(eta, torch.zeros(()), torch.tensor(7))
        shapes = {name: p.dim() for name, p in gpt.named_parameters()}
        for name, after in masters(optimizer).items():
            factor = 1 - eta * lam if shapes[name] == 2 else 1.0
            torch.testing.assert_close(
                after, before[name] * factor, rtol=4 * ROUNDING[dtype], atol=0
            )


def test_decay_at_alpha_one_half_follows_the_table() -> None:
    """Table 1 leaves lr * wd of hidden weights at eta * lambda * m_L^(alpha - 1) there."""
    _, optimizer, _ = small_setup(BIASED, {"alpha": 0.5}, {"base_weight_decay": 0.125})
    before = masters(optimizer)
    optimizer.begin_step(1)
    optimizer.step(0.5, torch.zeros(()), torch.tensor(7))
    after = masters(optimizer)
    for name, depth in (
        ("layers.0.mlp.up.weight", 2**-0.5),
        ("embedding.weight", 1.0),
        ("unembedding.weight", 1.0),
    ):
        torch.testing.assert_close(
            after[name], before[name] * (1 - 0.5 * 0.125 * depth), rtol=1e-15, atol=0
        )


# E5: two ways to write the logit factor.


def trajectories(
    base_hidden_size: int, unembedding: RoleFactors | None = None
) -> tuple[list[float], list[float]]:
    """Losses of 15 steps with 1/m_N in the forward pass,
    and with it absorbed by the unembedding's own factors.
    """
    model = model_config(hidden_size=32)
    m_N = 32 / base_hidden_size
    absorbed = unembedding or RoleFactors(init_std=1 / m_N, lr=1 / m_N, weight_decay=m_N, eps=m_N)
    changes: list[dict[str, Any]] = [{}, {"factors": {"unembedding": absorbed}}]
    runs = []
    for change, logit_multiplier in zip(changes, (1.0, m_N), strict=True):
        shape = model.model_copy(update={"logit_multiplier": logit_multiplier})
        table = table_for(shape, completep_config(base_hidden_size=base_hidden_size, **change))
        assert table.logit_multiplier == pytest.approx(1.0 if change else 1 / m_N, rel=1e-15)
        optimizer_settings = optimizer_config(grad_clip=0.0, base_weight_decay=0.1, base_eps=1e-6)
        gpt = build_model(shape, table, optimizer=optimizer_settings)
        # Exactly the other model's draw over m_N: the initial standard deviation is rounded to
        # float32.
        if change:
            reference = build_model(
                model,
                table_for(model, completep_config(base_hidden_size=base_hidden_size)),
                optimizer=optimizer_settings,
            )
            gpt.unembedding.weight.data.copy_(reference.unembedding.weight / m_N)
        optimizer = build_optimizer(gpt, table, optimizer_settings)
        runs.append(
            [train_step(gpt, optimizer, 1e-2, batch_of(model)).loss.item() for _ in range(15)]
        )
    return runs[0], runs[1]


@pytest.mark.parametrize(
    "base_hidden_size, bound", [(8, 0.0), (16, 0.0), (12, 1e-14)], ids=["4", "2", "8_thirds"]
)
def test_a_logit_factor_in_the_forward_pass_equals_one_absorbed_by_the_unembedding(
    base_hidden_size: int, bound: float
) -> None:
    forward, absorbed = trajectories(base_hidden_size)
    assert forward[-1] < forward[0] - 0.5
    assert max(abs(a - b) for a, b in zip(forward, absorbed, strict=True)) <= bound


@pytest.mark.parametrize("cell", ["lr", "weight_decay", "eps"])
def test_an_absorbed_factor_with_one_wrong_cell_is_told_apart(cell: str) -> None:
    factors = {"init_std": 0.25, "lr": 0.25, "weight_decay": 4.0, "eps": 4.0}
    forward, absorbed = trajectories(8, RoleFactors(**{**factors, cell: 1.0}))
    assert max(abs(a - b) for a, b in zip(forward, absorbed, strict=True)) > 1e-9


# Torch's own AdamW and clipping.


def torch_twin(
    gpt: GPT, optimizer: DistributedOptimizer, eta: float
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """torch.optim.AdamW over copies of the masters, one group a parameter."""
    copies = {
        name: torch.nn.Parameter(weight.clone()) for name, weight in masters(optimizer).items()
    }
    pairs = [(copy, group_of(optimizer.groups, name)) for name, copy in copies.items()]
    groups = [
        {
            "params": [copy],
            "lr": eta * g.lr_factor,
            "weight_decay": g.weight_decay,
            "eps": g.eps,
            "factor": g.lr_factor,
        }
        for copy, g in pairs
    ]
    return copies, torch.optim.AdamW(groups, betas=optimizer.config.betas, foreach=False)


@pytest.mark.parametrize("grad_clip", [0.0, 0.3, 100.0])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_adamw_and_clipping_match_torch_over_a_whole_model_and_schedule(
    grad_clip: float, dtype: torch.dtype, tolerance: float
) -> None:
    settings = {"grad_clip": grad_clip, "base_eps": 1e-5, "schedule": "cosine", "warmup_steps": 3}
    gpt, optimizer, _ = small_setup(BIASED, {}, settings, dtype)
    copies, reference = torch_twin(gpt, optimizer, optimizer.config.base_lr)
    clipped = []
    for step in range(1, 11):
        lr = learning_rate(step, optimizer.config, 10)
        batch = batch_of(gpt.config, step)
        result = train_step(gpt, optimizer, lr, batch)
        counted = (batch[1] != -100).sum()
        for piece in optimizer.shards.layout.pieces:
            copies[piece.name].grad = (
                optimizer.shards.grad[piece.start : piece.start + piece.size] / counted
            )
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), grad_clip or float("inf"))
        torch.testing.assert_close(result.grad_norm, norm.double(), rtol=tolerance, atol=0)
        clipped.append(bool(grad_clip) and norm.item() > grad_clip)
        for group in reference.param_groups:
            group["lr"] = lr * group["factor"]
        reference.step()
        for name, weight in masters(optimizer).items():
            torch.testing.assert_close(
                weight, copies[name].detach(), rtol=tolerance, atol=tolerance * 0.1
            )
    assert all(clipped) if grad_clip == 0.3 else not any(clipped)


def test_the_comparison_with_torch_sees_a_wrong_group() -> None:
    gpt, optimizer, _ = small_setup(BIASED, {}, {"base_eps": 1e-5})
    copies, reference = torch_twin(gpt, optimizer, 1e-2)
    optimizer.rule.group_table[0, 1] *= 1.01  # weight decay of one parameter
    batch = batch_of(gpt.config)
    train_step(gpt, optimizer, 1e-2, batch)
    for piece in optimizer.shards.layout.pieces:
        copies[piece.name].grad = (
            optimizer.shards.grad[piece.start : piece.start + piece.size] / (batch[1] != -100).sum()
        )
    torch.nn.utils.clip_grad_norm_(copies.values(), 1.0)
    reference.step()
    wrong = [
        n
        for n, w in masters(optimizer).items()
        if not torch.allclose(w, copies[n], rtol=1e-11, atol=1e-12)
    ]
    assert wrong == [next(iter(optimizer.groups))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    gpt, optimizer, _ = small_setup(dtype=torch.float32)
    train_step(gpt, optimizer, 1e-2, batch_of(gpt.config))
    state = [
        t.clone()
        for t in (
            optimizer.shards.master,
            optimizer.states["exp_avg"],
            optimizer.states["exp_avg_sq"],
            optimizer.control[STEP],
        )
    ]
    optimizer.begin_step(1)
    tokens, labels = batch_of(gpt.config, 1)
    loss = gpt(tokens, labels=labels)
    loss.backward()
    gpt.final_norm.weight.main_grad[3] = bad
    result = optimizer.step(1e-2, loss, torch.tensor(5))
    assert result.skipped.item() == 1.0 and not torch.isfinite(result.grad_norm)
    after = (
        optimizer.shards.master,
        optimizer.states["exp_avg"],
        optimizer.states["exp_avg_sq"],
        optimizer.control[STEP],
    )
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    result = train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, 2))
    assert result.skipped.item() == 0.0 and optimizer.control[STEP].item() == 2.0
    assert not torch.equal(optimizer.shards.master, state[0])
    assert torch.isfinite(optimizer.shards.master).all()


def test_padding_of_the_buffer_and_of_the_vocabulary_stays_zero() -> None:
    gpt, optimizer, _ = small_setup()
    for step in range(3):
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, step))
    used = torch.zeros(optimizer.shards.layout.size, dtype=torch.bool)
    for piece in optimizer.shards.layout.pieces:
        used[piece.start : piece.start + piece.size] = True
    assert not optimizer.shards.master[~used].any() and not used.all()
    for table in (gpt.embedding.weight, gpt.unembedding.weight):
        assert not table[gpt.config.vocab_size :].any() and table.shape[0] > gpt.config.vocab_size
