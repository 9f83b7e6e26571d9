"""The model, its kernels and its hand-written gradients
against a plain torch twin under autograd, in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import CompletePConfig, ModelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.roles import Role
from tests.support.models import (
    batch_of,
    build_model,
    completep_config,
    model_config,
    table_for,
    table_with,
)
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

TOLERANCE = 1e-10
Build = Callable[[ModelConfig, Table], GPT]

OPTIONS: dict[str, list[Any]] = {
    "norm": ["layernorm", "rmsnorm"],
    "activation": ["gelu", "gelu_tanh", "squared_relu", "swiglu"],
    "position": ["rope", "learned", "alibi"],
    "bias": [True, False],
    "num_query_groups": [None, 2],
    "qk_norm": [False, True],
    "tied_embeddings": [False, True],
    "attention_scale": ["base_head_dim", "1/head_dim", "1/sqrt(head_dim)"],
    "multipliers": [(1.0, 1.0, 1.0, 1.0), (3.0, 0.7, 0.8, 1.3)],
    "parameterization": [("completep", 1.0), ("completep", 0.5), ("mup", 1.0), ("sp", 1.0)],
}


def pairwise_cases() -> list[dict[str, Any]]:
    """A few dozen of the product's combinations in which
    every pair of values of any two options occurs.
    """
    names = list(OPTIONS)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(OPTIONS[a]))
        for j in range(len(OPTIONS[b]))
    }
    generator = torch.Generator().manual_seed(0)
    cases = []
    while missing:
        candidates = [
            {n: int(torch.randint(len(OPTIONS[n]), (), generator=generator)) for n in names}
            for _ in range(30)
        ]
        pairs = [
            {(a, c[a], b, c[b]) for a, b in itertools.combinations(names, 2)} & missing
            for c in candidates
        ]
        best = max(range(len(candidates)), key=lambda index: len(pairs[index]))
        if pairs[best]:
            missing -= pairs[best]
            cases.append({n: OPTIONS[n][candidates[best][n]] for n in names})
    return cases


def all_cases() -> list[dict[str, Any]]:
    return [
        dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())
    ]


def configs(case: dict[str, Any], **changes: Any) -> tuple[ModelConfig, CompletePConfig]:
    settings = dict(case)
    parameterization, alpha = settings.pop("parameterization", ("completep", 1.0))
    names = ("input_multiplier", "logit_multiplier", "residual_multiplier", "attention_multiplier")
    settings |= dict(zip(names, settings.pop("multipliers", (1.0,) * 4), strict=True))
    model = model_config(**{"num_layers": 3, **settings, **changes})
    return model, completep_config(parameterization=parameterization, alpha=alpha)


def compare(
    gpt: GPT,
    model: ModelConfig,
    completep: CompletePConfig,
    loss: LossConfig | None = None,
    **inputs: Tensor,
) -> dict[str, float]:
    """Errors of logits, loss and every gradient against the twin,
    relative to the largest entry of each.
    """
    tokens, labels = batch_of(model)
    weights = {name: p.detach().clone().requires_grad_() for name, p in gpt.named_parameters()}
    twin_logits = PlainTwin(weights, model, completep).logits(tokens, **inputs)
    loss = loss or LossConfig()
    expected = cross_entropy_sum(twin_logits, labels, loss.z_loss, loss.label_smoothing)
    expected.backward()
    with torch.no_grad():
        logits = gpt(tokens, **inputs)
    found = gpt(tokens, labels=labels, **inputs)
    gpt.queue.begin_step(gpt.parameters(), 1)
    found.backward()
    gpt.queue.finish_step()
    errors = {"logits": error(logits, twin_logits), "loss": error(found, expected)}
    for name, parameter in gpt.named_parameters():
        errors[name] = error(parameter.main_grad, weights[name].grad)
    return errors


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def check(case: dict[str, Any], build: Build = build_model, **changes: Any) -> None:
    model, completep = configs(case, **changes)
    gpt = build(model, table_for(model, completep))
    errors = compare(gpt, model, completep)
    too_large = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not too_large


@pytest.mark.parametrize(
    "case",
    pairwise_cases(),
    ids=lambda case: "-".join(str(value) for value in case.values()).replace(" ", ""),
)
def test_loss_and_every_gradient_match_the_plain_twin(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("norm", OPTIONS["norm"])
@pytest.mark.parametrize("activation", OPTIONS["activation"])
def test_the_whole_product_of_options_matches_the_plain_twin(norm: str, activation: str) -> None:
    for case in all_cases():
        if (case["norm"], case["activation"]) == (norm, activation):
            check(case)


def test_pairwise_cases_hold_every_pair_of_values() -> None:
    cases = pairwise_cases()
    for a, b in itertools.combinations(OPTIONS, 2):
        pairs = {(str(case[a]), str(case[b])) for case in cases}
        assert len(pairs) == len(OPTIONS[a]) * len(OPTIONS[b])


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16},  # heads wider than hidden_size / num_attention_heads
        {"num_attention_heads": 3, "head_dim": 8, "position": "alibi"},  # not a power of two
        {"num_attention_heads": 6, "head_dim": 4, "num_query_groups": 3, "position": "alibi"},
        {"num_query_groups": 1},
        {"num_layers": 1},
        {"vocab_size": 32},  # nothing padded
        {"rope_base": 500.0, "norm_eps": 1e-2},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_unusual_shapes_match_the_plain_twin(changes: dict[str, Any]) -> None:
    check({"bias": True, "norm": "layernorm", "activation": "gelu"}, **changes)


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 37 * 8 * 5, 1])
@pytest.mark.parametrize(
    "z_loss, label_smoothing", [(0.0, 0.0), (0.02, 0.0), (0.0, 0.15), (0.03, 0.1)]
)
def test_loss_options_match_the_plain_twin_chunked_or_not(
    chunk_bytes: int, z_loss: float, label_smoothing: float
) -> None:
    """chunk_bytes holds all tokens at once, a few at a time with a rest, and one at a time."""
    model, completep = configs({"multipliers": (1.0, 0.7, 1.0, 1.0)}, num_layers=1)
    loss = LossConfig(z_loss, label_smoothing, chunk_bytes)
    errors = compare(
        build_model(model, table_for(model, completep), loss=loss), model, completep, loss
    )
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_loss_equals_the_unchunked_one(dtype: torch.dtype) -> None:
    model, completep = configs({})
    tokens, labels = batch_of(model)
    results = []
    for chunk_bytes in (1 << 28, 40 * 8 * 7):
        gpt = build_model(
            model, table_for(model, completep), dtype, loss=LossConfig(chunk_bytes=chunk_bytes)
        )
        loss = gpt(tokens, labels=labels)
        (
            2.0 * loss
        ).backward()  # the factor of the backward pass must reach gradients made in forward
        results.append((loss.detach(), *(p.main_grad for p in gpt.parameters())))
        with torch.no_grad():
            torch.testing.assert_close(gpt(tokens, labels=labels), loss.detach(), rtol=1e-6, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)


def test_all_labels_ignored_give_zero_loss_and_zero_gradients() -> None:
    model, completep = configs({})
    for chunk_bytes in (1 << 28, 1):
        gpt = build_model(
            model, table_for(model, completep), loss=LossConfig(chunk_bytes=chunk_bytes)
        )
        tokens, _ = batch_of(model)
        loss = gpt(tokens, labels=torch.full_like(tokens, -100))
        loss.backward()
        assert loss.item() == 0.0
        assert all(not p.main_grad.any() for p in gpt.parameters())


def test_documents_in_one_sample_match_the_plain_twin() -> None:
    model, completep = configs({})
    gpt = build_model(model, table_for(model, completep))
    document_ids, positions = two_documents(model, cut=5)
    errors = compare(gpt, model, completep, positions=positions, document_ids=document_ids)
    assert max(errors.values()) < TOLERANCE, errors


def two_documents(model: ModelConfig, cut: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """document_ids and positions [B, S] of samples that hold two documents,
    the second from token `cut` on.
    """
    order = torch.arange(model.seq_length).expand(batch, -1)
    return (order >= cut).long(), torch.where(order < cut, order, order - cut)


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_documents_in_one_sample_equal_documents_run_alone(position: str) -> None:
    model, completep = configs({"position": position, "num_query_groups": 2})
    gpt = build_model(model, table_for(model, completep))
    tokens, _ = batch_of(model)
    document_ids, positions = two_documents(model, cut=5)
    with torch.no_grad():
        together = gpt(tokens, positions=positions, document_ids=document_ids)
        alone = torch.cat((gpt(tokens[:, :5]), gpt(tokens[:, 5:])), dim=1)
        mixed = gpt(tokens)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert (mixed - alone)[
        :, 5:
    ].abs().max() > 1e-3  # without document_ids the second document sees the first


def test_documents_that_differ_between_samples_are_kept_apart() -> None:
    model, completep = configs({})
    gpt = build_model(model, table_for(model, completep))
    tokens, _ = batch_of(model)
    order = torch.arange(model.seq_length)
    cuts = [3, 7, model.seq_length]
    document_ids = torch.stack([(order >= cut).long() for cut in cuts])
    positions = torch.stack([torch.where(order < cut, order, order - cut) for cut in cuts])
    with torch.no_grad():
        together = gpt(tokens, positions=positions, document_ids=document_ids)
        for row, cut in enumerate(cuts):
            parts = [
                gpt(part)
                for part in (tokens[row : row + 1, :cut], tokens[row : row + 1, cut:])
                if part.numel()
            ]
            torch.testing.assert_close(
                together[row], torch.cat(parts, dim=1)[0], rtol=1e-12, atol=1e-12
            )


def test_rotary_angles_follow_a_change_of_precision() -> None:
    """The angles are kept between calls; those of a float32 run would spoil a float64 one."""
    model, completep = configs({})
    tokens, _ = batch_of(model)
    table = table_for(model, completep)
    fresh, used = build_model(model, table), build_model(model, table)
    with torch.no_grad():
        used.float()(tokens)
        used.double().load_state_dict(fresh.state_dict())
        assert torch.equal(used(tokens), fresh(tokens))


# Negative controls: the comparison sees what it must see.


def without_final_multiplier(model: ModelConfig, table: Table) -> GPT:
    """The multiplier missing on the last MLP branch, whose sum the final norm takes."""
    gpt = build_model(model, table)
    gpt.final_norm.join = kernels.Join()
    return gpt


def without_logit_multiplier(model: ModelConfig, table: Table) -> GPT:
    return build_model(model, table_with(table, logit_multiplier=1.0))


def without_residual_multiplier(model: ModelConfig, table: Table) -> GPT:
    return build_model(model, table_with(table, residual_multiplier=1.0))


def with_unscaled_branch_bias(model: ModelConfig, table: Table) -> GPT:
    """The branch's bias added beside the multiplier, not under it."""
    gpt = build_model(model, table)

    def unscaled(_module: nn.Module, _inputs: object, branch: Branch) -> Branch:
        return branch._replace(bias=branch.bias / table.residual_multiplier)

    for _, block in gpt.blocks():
        block.attention.register_forward_hook(unscaled)
        block.mlp.register_forward_hook(unscaled)
    return gpt


@pytest.mark.parametrize(
    "build",
    [
        without_final_multiplier,
        without_logit_multiplier,
        without_residual_multiplier,
        with_unscaled_branch_bias,
    ],
    ids=lambda build: build.__name__,
)
def test_a_wrong_model_is_told_from_the_plain_twin(build: Build) -> None:
    case = {"bias": True, "norm": "layernorm"}
    check(case)
    with pytest.raises(AssertionError):
        check(case, build)


def test_every_role_is_tried_by_the_comparison() -> None:
    model, completep = configs({"bias": True, "norm": "layernorm", "qk_norm": True})
    gpt = build_model(model, table_for(model, completep))
    experts = model_config(moe={"num_experts": 4, "top_k": 2})  # compared in test_experts.py
    parameters = [*gpt.parameters(), *build_model(experts).parameters()]
    assert {p.spec.role for p in parameters} == set(Role)
