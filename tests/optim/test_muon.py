"""Muon against a plain one-file implementation of a whole model, and what it must not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_completep.completep import table_of
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.errors import ConfigError
from megatron_completep.kernels.control import SKIP
from megatron_completep.model.gpt import GPT
from megatron_completep.optim import muon as rule_of_muon
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.muon import Muon
from megatron_completep.optim.newton_schulz import newton_schulz_flops, orthogonalize, polynomials
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.gradients import accumulate_tensor
from tests.optim.plain_muon import PlainOptimizer
from tests.support.configs import small_config
from tests.support.models import batch_of, completep_config, muon_config, small_setup, train_step
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

GROUPED = {"num_query_groups": 2, "activation": "swiglu"}
EPS = 1e-6


def setup(
    model: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64, **optimizer: Any
) -> tuple[GPT, DistributedOptimizer]:
    settings = dict(muon_config(**optimizer))
    gpt, ours, _ = small_setup({**GROUPED, **(model or {})}, {}, settings, dtype)
    return gpt, ours


def weights_of(gpt: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in gpt.named_parameters()}


# A whole model.


def plain_twin(gpt: GPT, settings: OptimizerConfig, heads: list[int]) -> PlainOptimizer:
    """m_N = m_L = 2 at alpha 1: no factor of depth, and epsilons of Table 1."""
    assert settings.muon is not None
    weights = weights_of(gpt)
    eps = {}
    for name in weights:
        in_block = name.startswith("layers.")
        eps[name] = EPS / 2 / (2 if in_block else 1)
    return PlainOptimizer(
        weights,
        lr=settings.base_lr,
        muon_lr=settings.muon.base_lr,
        decay=settings.base_weight_decay,
        muon_decay=settings.muon.base_weight_decay,
        eps=eps,
        clip=settings.grad_clip,
        sizes=[32, 16, 16],
        heads=heads,
    )


@pytest.mark.parametrize(
    ("parts", "heads"), [("per_projection", [1, 1, 1]), ("per_head", [4, 2, 2])]
)
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_ten_steps_of_a_whole_model_are_those_of_a_plain_implementation(
    parts: str, heads: list[int], grad_clip: float
) -> None:
    muon = {"coefficients": "quintic", "parts": parts, "base_weight_decay": 0.3}
    settings = muon_config(base_eps=EPS, grad_clip=grad_clip, muon=muon)
    gpt, optimizer, _ = small_setup(GROUPED, {}, dict(settings))
    plain = plain_twin(gpt, settings, heads)
    wrong = plain_twin(gpt, settings, [4, 2, 2] if heads == [1, 1, 1] else [1, 1, 1])
    for step in range(10):
        tokens, labels = batch_of(gpt.config, step)
        for twin in (plain, wrong):
            leaves = {n: w.clone().requires_grad_() for n, w in twin.weights.items()}
            logits = PlainTwin(leaves, gpt.config, completep_config()).logits(tokens)
            loss = cross_entropy_sum(logits, labels) / (labels != -100).sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            twin.step(dict(zip(leaves, gradients, strict=True)))
        train_step(gpt, optimizer, settings.base_lr, (tokens, labels))
    rate = settings.base_lr
    apart = {n: (w - plain.weights[n]).abs().max().item() for n, w in weights_of(gpt).items()}
    assert max(apart.values()) < 1e-10 * rate, apart
    control = {n: (w - wrong.weights[n]).abs().max().item() for n, w in weights_of(gpt).items()}
    assert control["layers.0.attention.qkv.weight"] > 0.2 * rate


def test_the_first_update_of_every_part_has_the_spectral_norm_of_its_rate() -> None:
    gpt, optimizer = setup(base_weight_decay=0.0, muon={"base_weight_decay": 0.0})
    before = weights_of(gpt)
    train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, batch=8))
    moved = (
        before["layers.1.attention.qkv.weight"] - weights_of(gpt)["layers.1.attention.qkv.weight"]
    )
    for part, size in zip(moved.split([32, 16, 16]), (32, 16, 16), strict=True):
        singular = torch.linalg.svdvals(part) / (2e-2 * math.sqrt(size / 32))
        assert singular.max() < 1.15 and singular.median() > 0.85
    # The control: the factor of all three together is another matrix.
    joint = torch.linalg.svdvals(moved) / (2e-2 * math.sqrt(64 / 32))
    assert (joint - 1).abs().max() > 0.2


# What must not happen.


def push(
    gpt: GPT, optimizer: DistributedOptimizer, gradient: Callable[[str, Tensor], Tensor]
) -> None:
    """A step with these gradients, of one token."""
    optimizer.begin_step(1)
    for name, parameter in gpt.named_parameters():
        gpt.queue.push(parameter, accumulate_tensor(gradient(name, parameter.detach())))
    optimizer.step(1e-2, torch.zeros(()), torch.tensor(1))


def noise(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_small_gradients_lead_to_the_same_updates(grad_clip: float) -> None:
    changes = []
    for size in (1.0, 1e-12, 1e-24):
        precise = {"precision": "master"}
        gpt, optimizer = setup(dtype=torch.float32, grad_clip=grad_clip, muon=precise)
        before = weights_of(gpt)
        push(gpt, optimizer, lambda name, like, size=size: noise(name, like) * size)
        changes.append(weights_of(gpt)["layers.0.mlp.up.weight"] - before["layers.0.mlp.up.weight"])
    for change in changes[1:]:
        assert (change - changes[0]).norm() < 1e-5 * changes[0].norm()
    assert changes[0].norm() > 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_part_no_state_and_no_master(bad: float) -> None:
    gpt, optimizer = setup()
    train_step(gpt, optimizer, 1e-2, batch_of(gpt.config))
    before = {name: state.clone() for name, state in optimizer.states.items()}

    def one_bad(name: str, like: Tensor) -> Tensor:
        gradient = noise(name, like)
        if name == "layers.2.attention.qkv.weight":
            gradient[3, 3] = bad
        return gradient

    push(gpt, optimizer, one_bad)
    assert optimizer.control[SKIP] == 1
    assert all(torch.equal(state, before[name]) for name, state in optimizer.states.items())
    push(gpt, optimizer, noise)
    assert not torch.equal(optimizer.states["momentum"], before["momentum"])  # the control


def test_on_a_gpu_the_flag_is_not_read_and_still_keeps_what_is_not_finite_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of a GPU, on this processor: the numbers of the step are tensors."""
    gpt, optimizer = setup()
    twin, expected = setup()
    train_step(twin, expected, 1e-2, batch_of(gpt.config))

    def on_device(_: Muon, control: Tensor) -> Any:
        return rule_of_muon._Step(control[0], control[2], control[SKIP] == 0)

    monkeypatch.setattr(Muon, "_step", on_device)
    train_step(gpt, optimizer, 1e-2, batch_of(gpt.config))
    for name, state in optimizer.states.items():
        torch.testing.assert_close(state, expected.states[name], rtol=1e-12, atol=1e-15)
    before = {name: state.clone() for name, state in optimizer.states.items()}
    push(gpt, optimizer, lambda name, like: noise(name, like) * math.nan)
    assert all(torch.equal(state, before[name]) for name, state in optimizer.states.items())


# What is kept, and how much at once.


def test_a_matrix_has_a_momentum_and_all_else_the_moments_of_adamw() -> None:
    gpt, optimizer = setup()
    matrices = sum(p.numel() for n, p in gpt.named_parameters() if "layers." in n and p.dim() == 2)
    others = sum(p.numel() for p in gpt.parameters()) - matrices
    for state, elements in (("momentum", matrices), ("exp_avg", others), ("exp_avg_sq", others)):
        stored = sum(segment.size for segment in optimizer.rule.segments_of(state))
        assert stored == elements
        padding = 64 * len(optimizer.shards.segments)
        assert elements <= optimizer.states[state].numel() < elements + padding


def test_small_batches_bound_what_travels_and_change_nothing() -> None:
    largest = 96 * 32  # elements of gate and up, which are matrices of 48 x 32 each
    megabytes = 1.5 * largest * 8 / 2**20
    gpt, optimizer = setup()
    few, bounded = setup(muon={"exchange_megabytes": megabytes})
    for step in range(2):
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, step))
        train_step(few, bounded, 1e-2, batch_of(gpt.config, step))
    division = bounded.rule.exchange.division
    assert len(division.batches) > 4 > len(optimizer.rule.exchange.division.batches)
    limit = megabytes * 2**20 / 8
    sizes = [division.sent_elements(batch) for batch in division.batches]
    assert max(sizes) <= limit and sum(sizes) == optimizer.states["momentum"].numel()
    for name, weight in weights_of(gpt).items():
        torch.testing.assert_close(weights_of(few)[name], weight, rtol=0, atol=1e-13)


def test_the_operations_are_those_that_torch_counts() -> None:
    for shape in ((64, 256), (256, 64)):
        with FlopCounterMode(display=False) as counted:
            orthogonalize(torch.randn(1, *shape), polynomials("quintic", 5))
        assert counted.get_total_flops() == newton_schulz_flops(*shape, 5)


# Settings.


def test_overrides_reach_a_matrix_and_a_part_of_one() -> None:
    overrides = [
        {"pattern": "*.mlp.down.weight", "lr": 0.5},
        {"pattern": "layers.0.*.weight.k", "lr": 3.0, "weight_decay": 0.0},
    ]
    _, optimizer = setup(overrides=overrides)
    _, plain = setup()
    for name, group in optimizer.groups.items():
        factor = (
            0.5 if "down" in name else 3.0 if name == "layers.0.attention.qkv.weight.k" else 1.0
        )
        assert group.lr_factor == pytest.approx(factor * plain.groups[name].lr_factor)
    assert optimizer.groups["layers.0.attention.qkv.weight.k"].weight_decay == 0.0


def test_a_rate_that_its_type_cannot_hold_is_named_by_its_own_setting() -> None:
    config = small_config(optimizer={"type": "muon", "muon": {"base_lr": 1e-44}})
    with pytest.raises(ConfigError, match=r"optimizer\.muon\.base_lr = 1e-44"):
        check_parameters(config, table_of(config))
