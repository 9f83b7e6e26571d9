"""The iterations against the orthogonal factor by SVD in float64, and against torch's own Muon."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_completep.optim.newton_schulz import (
    normalize_,
    one_by_one,
    orthogonalize,
    polynomials,
    together,
)

SHAPES = [(48, 48), (96, 32), (32, 128)]


def matrix(d_out: int, d_in: int, smallest: float, seed: int = 0) -> Tensor:
    """A float64 matrix whose singular values lie evenly between `smallest` and 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(drawn, full_matrices=False)
    return (u * torch.linspace(smallest, 1, min(d_out, d_in), dtype=torch.float64)) @ v


def factor(m: Tensor, coefficients: str = "polar_express", iterations: int = 5) -> Tensor:
    return orthogonalize(m.clone()[None], polynomials(coefficients, iterations))[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("coefficients", "values", "mean"),
    [("polar_express", (0.85, 1.15), (0.98, 1.02)), ("quintic", (0.68, 1.2), (0.84, 0.98))],
)
def test_all_singular_values_become_about_1_and_the_factors_of_the_svd_stay(
    shape: tuple[int, int],
    coefficients: str,
    values: tuple[float, float],
    mean: tuple[float, float],
) -> None:
    m = matrix(*shape, 0.1)
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    within = u.T @ factor(m, coefficients) @ v.T
    singular = within.diagonal()
    assert (within - torch.diag(singular)).abs().max() < 1e-12
    assert values[0] < singular.min() and singular.max() < values[1]
    assert mean[0] < singular.square().mean().sqrt() < mean[1]
    # The control: two iterations are too few for the smallest.
    assert (u.T @ factor(m, coefficients, 2) @ v.T).diagonal().min() < values[0]


def test_more_iterations_of_the_polar_express_converge_to_the_factor_itself() -> None:
    m = matrix(48, 64, 0.01)
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    assert relative(factor(m, iterations=12), u @ v) < 1e-12
    assert relative(factor(m, "quintic", 12), u @ v) > 0.05


def torch_update(m: Tensor, iterations: int) -> Tensor:
    """What torch's Muon subtracts in its first step, without the factor for the shape."""
    parameter = torch.nn.Parameter(torch.zeros_like(m))
    parameter.grad = m.clone()
    torch.optim.Muon(
        [parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=iterations
    ).step()
    return -parameter.detach() / math.sqrt(max(1.0, m.shape[0] / m.shape[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_quintic_iterations_are_those_of_torch(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = matrix(*shape, 0.1).float()
    ours = factor(m, "quintic")
    # torch always iterates in bf16.
    assert 1e-5 < relative(torch_update(m, 5), ours) < 3e-2
    assert relative(factor(m.bfloat16(), "quintic"), ours) < 3e-2
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self)
    assert relative(torch_update(m, 5), ours) < 1e-5
    assert relative(torch_update(m, 4), ours) > 1e-2  # the control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e30])
def test_the_size_of_a_matrix_does_not_matter(dtype: torch.dtype, size: float) -> None:
    m = matrix(32, 48, 0.1).to(dtype)
    assert relative(factor(m * size), factor(m)) < (1e-5 if dtype == torch.float32 else 5e-2)
    if size < 1:
        with_floor = (m * size) / ((m * size).norm() + 1e-7)  # the control
        assert with_floor.norm() < 0.5


def test_a_matrix_of_zeros_stays_zero_and_others_of_the_stack_do_not_see_it() -> None:
    stack = torch.stack([torch.zeros(32, 48, dtype=torch.float64), matrix(32, 48, 0.1)])
    both = orthogonalize(stack.clone(), polynomials("polar_express", 5))
    assert not both[0].any()
    torch.testing.assert_close(both[1], factor(stack[1]), rtol=1e-12, atol=1e-14)


def test_a_large_float32_matrix_is_divided_by_its_norm_to_the_last_digits() -> None:
    m = torch.rand(2048, 512, generator=torch.Generator().manual_seed(0))
    expected = m.double() / m.double().norm()
    stack = m.clone()[None]
    normalize_(stack)
    assert relative(stack[0], expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_is_iterated_together_or_one_by_one_to_the_same_factors(
    shape: tuple[int, int],
) -> None:
    stack = torch.stack([matrix(*shape, 0.1, seed) for seed in range(3)])
    normalize_(stack)
    sequence = polynomials("polar_express", 5)
    expected = together(stack.clone(), sequence)
    torch.testing.assert_close(one_by_one(stack, sequence), expected, rtol=0, atol=1e-13)
