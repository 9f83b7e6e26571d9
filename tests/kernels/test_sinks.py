"""Who gets the gradients of an operation's vectors:
autograd, or the sink that the caller hands in, once and in place of it.
"""

import pytest
import torch
from torch import nn

from megatron_completep import kernels
from megatron_completep.kernels import Join, Norm

H = 24
JOIN = Join(0.3, 0.25, kernels.dropout_seed(11))


class Recorder:
    """A sink that keeps what it is handed: vectors, and one function for all of a call."""

    def __init__(self):
        self.pushed = []

    def push_together(self, parameters, accumulate):
        self.pushed.append((parameters, accumulate))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def leaves(dtype):
    """Residual and branch, then branch bias, weight and bias as parameters."""
    rows = [random(5, H, seed=seed, dtype=dtype).requires_grad_() for seed in range(2)]
    return rows, [nn.Parameter(random(H, seed=seed, dtype=dtype)) for seed in range(2, 5)]


def residual_norm(kind):
    def call(rows, vectors, sink):
        y, out = kernels.scaled_residual_norm(*rows, *vectors, JOIN, Norm(kind), sink)
        return y + 2 * out

    return call


# The operation, the vectors of `leaves` that it takes, in the order in which it pushes them.
OPERATIONS = {
    "layernorm": (residual_norm("layernorm"), (1, 2, 0)),
    "rmsnorm": (residual_norm("rmsnorm"), (1, 2, 0)),
    "norm alone": (
        lambda rows, vectors, sink: kernels.norm(rows[0], *vectors[1:], Norm(), sink=sink),
        (1, 2),
    ),
    "norm without a bias": (
        lambda rows, vectors, sink: kernels.norm(
            rows[0], vectors[1], None, Norm("rmsnorm"), sink=sink
        ),
        (1,),
    ),
    "add alone": (
        lambda rows, vectors, sink: kernels.scaled_add(*rows, vectors[0], JOIN, sink),
        (0,),
    ),
    "add without a bias": (
        lambda rows, vectors, sink: kernels.scaled_add(*rows, None, JOIN, sink),
        (),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_sink_gets_once_and_alone_what_autograd_would_have_returned(name, dtype):
    operation, order = OPERATIONS[name]
    rows, vectors = leaves(dtype)
    weights = random(5, H, seed=9, dtype=dtype)
    asked = [leaf for leaf in [*rows, *vectors] if leaf is not None]
    plain = torch.autograd.grad(
        (operation(rows, vectors, None) * weights).sum(), asked, allow_unused=True
    )
    sink = Recorder()
    pushing = torch.autograd.grad(
        (operation(rows, vectors, sink) * weights).sum(), asked, allow_unused=True
    )
    for ours, theirs in zip(pushing[:2], plain[:2], strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)
    assert pushing[2:] == (None, None, None)
    # All vectors of an operation come in one call, so that one launch can serve them.
    assert len(sink.pushed) == (1 if order else 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for parameters, accumulate in sink.pushed:
        assert [id(parameter) for parameter in parameters] == [id(vectors[k]) for k in order]
        main_grads = [torch.full((H,), torch.nan, dtype=wide) for _ in order]
        accumulate(main_grads, [True] * len(order))
        for k, main_grad in zip(order, main_grads, strict=True):
            assert torch.equal(main_grad.to(dtype), plain[2 + k]), (
                "the first contribution is written over what is there"
            )
        before = [main_grad.clone() for main_grad in main_grads]
        # Each vector for itself: the first adds, the last is not asked for, the rest starts anew.
        accumulate([*main_grads[:-1], None], [False] + [True] * (len(order) - 1))
        expected = [2 * before[0], *before[1:]] if len(order) > 1 else before
        for main_grad, values in zip(main_grads, expected, strict=True):
            torch.testing.assert_close(main_grad, values)


def test_a_backward_run_again_for_its_inputs_pushes_again_and_one_not_run_pushes_nothing():
    """So a schedule that asks for the inputs' gradients alone has
    every vector's contribution in the sink, once a backward.
    """
    rows, vectors = leaves(torch.float32)
    sink = Recorder()
    loss = residual_norm("rmsnorm")(rows, vectors, sink).sum()
    assert sink.pushed == []
    torch.autograd.grad(loss, rows, retain_graph=True)
    assert len(sink.pushed) == 1
    torch.autograd.grad(loss, rows)
    assert len(sink.pushed) == 2


def test_a_second_derivative_is_refused():
    rows, vectors = leaves(torch.float64)
    loss = residual_norm("layernorm")(rows, vectors, None).square().sum()
    (gradient,) = torch.autograd.grad(loss, rows[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
