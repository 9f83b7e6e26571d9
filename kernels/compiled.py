"""What CPU tensors run between products: the definitions of `reference`, compiled by Inductor.

The functions have the signatures of those in `cpu/`. There is no second formula: forward is the
definition itself, and backward is its derivative by autograd, taken inside the compiled function,
so that each of the two is one or two passes over memory. It needs a C++ compiler.

float64 tensors and other devices are not served: theirs are the functions that they have without a
compiler, so that float64 results do not depend on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Join, Norm


class CompiledDefinitions:
    """The operations between products, each compiled when it is first called.

    A shape, a type, or a number such as the residual multiplier that was not seen before is
    compiled anew: that takes seconds, or a look into Inductor's cache. Beyond eight of them for one
    operation in a process torch runs the definition uncompiled, and says so.

    backend: what torch.compile takes; tests use others than Inductor.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, backend=backend, dynamic=False)

        self.scaled_add_forward = compiled(reference.scaled_add)
        self.scaled_add_backward = compiled(_scaled_add_backward)
        self.swiglu_forward = compiled(reference.swiglu)
        self.swiglu_backward = compiled(_swiglu_backward)
        self.squared_relu_forward = compiled(reference.squared_relu)
        self.squared_relu_backward = compiled(_squared_relu_backward)
        self.rotary = compiled(reference.rotary)
        self.rotary_ = compiled(_rotary_)
        self.residual_norm_backward = compiled(_residual_norm_backward)
        self._norm = compiled(reference.norm)
        self._scaled_residual_norm = compiled(reference.scaled_residual_norm)

    def norm_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out [..., H], empty, empty): backward computes the statistics again."""
        out = self._norm(x, weight, bias, norm, out_dtype)
        nothing = x.new_empty(0)
        return out, nothing, nothing

    def residual_norm_forward(
        self,
        residual: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        join: Join,
        norm: Norm,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, out, empty, empty)."""
        y, out = self._scaled_residual_norm(residual, branch, branch_bias, weight, bias, join, norm)
        nothing = y.new_empty(0)
        return y, out, nothing, nothing


def server_of(x: Tensor, compiled: CompiledDefinitions | None) -> CompiledDefinitions | None:
    """`compiled` if it is there and serves tensors such as `x`, else None: the operators run."""
    served = x.device.type == "cpu" and x.dtype != torch.float64
    return compiled if served else None


def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    (gradient,) = _gradients(reference.swiglu, (gate_up,), d_out)
    return gradient


def _squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    (gradient,) = _gradients(reference.squared_relu, (x,), d_out)
    return gradient


def _rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    x.copy_(reference.rotary(x, cos, sin, inverse))


def _scaled_add_backward(
    d_y: Tensor, has_branch_bias: bool, join: Join, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d_branch, partials [1, 1 or 0, H])."""
    d_branch, vectors = _branch_gradients(d_y.float(), has_branch_bias, join)
    return d_branch.to(branch_dtype), _as_partials(vectors, d_y)


def _residual_norm_backward(
    d_y: Tensor | None,
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch: bool,
    has_bias: bool,
    has_branch_bias: bool,
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_residual, d_branch (empty without a branch), partials [1, K, H]); no mean, rstd needed."""
    gain = weight.float()
    # The definition's value at any bias has the same derivative.
    vectors = (gain, torch.zeros_like(gain)) if has_bias else (gain, None)

    def out_of(stream: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.norm(stream, weight, bias, norm, d_out.dtype)

    # In float32, whatever is stored: gradients that are summed are rounded once.
    d_stream, *d_vectors = _gradients(out_of, (y.float(), *vectors), d_out)
    if d_y is not None:
        d_stream = d_stream + d_y.float()
    d_branch = d_out.new_empty(0)
    if has_branch:
        # The branch receives the whole gradient of y, through the scaled add.
        d_update, d_branch_bias = _branch_gradients(d_stream, has_branch_bias, join)
        d_branch = d_update.to(d_out.dtype)
        d_vectors += d_branch_bias
    return d_stream.to(y.dtype), d_branch, _as_partials(d_vectors, y)


def _branch_gradients(d_y: Tensor, has_bias: bool, join: Join) -> tuple[Tensor, list[Tensor]]:
    """(the gradient of the branch, that of its bias if it has one), of float32 `d_y`."""
    # The sum is linear: its derivative is the same everywhere, so also at 0.
    branch = torch.zeros_like(d_y)
    bias = d_y.new_zeros(d_y.shape[-1]) if has_bias else None

    def y_of(branch: Tensor, bias: Tensor | None) -> Tensor:
        return reference.scaled_add(torch.zeros_like(d_y), branch, bias, join)

    d_branch, *d_bias = _gradients(y_of, (branch, bias), d_y)
    return d_branch, d_bias


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the inputs that are not None; None can only stand behind tensors."""
    given = [each for each in inputs if each is not None]
    absent = (None,) * (len(inputs) - len(given))
    _, gradients_of = torch.func.vjp(lambda *tensors: function(*tensors, *absent), *given)
    gradients: tuple[Tensor, ...] = gradients_of(d_out)
    return gradients


def _as_partials(vectors: list[Tensor], like: Tensor) -> Tensor:
    """The sums over all rows as partial sums with one row, [1, K, H] float32."""
    if not vectors:
        return like.new_empty((1, 0, like.shape[-1]), dtype=torch.float32)
    return torch.stack(vectors)[None]
