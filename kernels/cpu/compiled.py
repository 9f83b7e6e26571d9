"""What CPU tensors run between products: the definitions of `reference`, compiled by Inductor.

The functions have the signatures of those beside it. There is no second formula: forward is the
definition itself, and backward is its derivative by autograd, taken inside the compiled function,
so that each of the two is one or two passes over memory. It needs a C++ compiler.

float64 tensors and other devices are not served: they keep the operators, so that float64 results
do not depend on a compiler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..reference import Join, Norm
from . import pointwise
from . import residual_norm as cpu_norm

_Result = TypeVar("_Result")

# The loss is defined in float64; compiled, it computes in what its operators do.
IN_FLOAT32: dict[str, Any] = {"math_dtype": torch.float32}
SHAPES = 64  # for which torch compiles one function, before it runs the next one uncompiled


class CompiledDefinitions:
    """The operations between products, each compiled when it is first called.

    A shape, a type, or a number such as the residual multiplier that was not seen before is
    compiled anew: that takes seconds, or a look into Inductor's cache.

    torch's own operators stay where they are as fast: for the backward of LayerNorm, and in float32
    for the activations but for the backward of SwiGLU.

    backend: what torch.compile takes; tests use others than Inductor.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        # Older versions know the limit as a global setting alone, which stays as it is.
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = SHAPES
        self._options = options
        self.norm_forward = torch.compile(reference.norm_with_statistics, **options)
        self.residual_norm_forward = torch.compile(
            reference.residual_norm_with_statistics, **options
        )
        self._residual_norm_backward = torch.compile(_residual_norm_backward, **options)
        self._swiglu_forward = torch.compile(reference.swiglu, **options)
        self.swiglu_backward = torch.compile(_swiglu_backward, **options)
        self._squared_relu_forward = torch.compile(reference.squared_relu, **options)
        self._squared_relu_backward = torch.compile(_squared_relu_backward, **options)
        self.join_heads = torch.compile(reference.join_heads, **options)
        self.rotary = torch.compile(reference.rotary, **options)
        self.rotary_ = torch.compile(_rotary_, **options)
        self.cross_entropy_forward = torch.compile(_cross_entropy_forward, **options)
        self.cross_entropy_backward_ = torch.compile(_cross_entropy_backward_, **options)

    def graph(self, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """A function of tensors, compiled as a whole when it is first called."""
        compiled: Callable[..., _Result] = torch.compile(function, **self._options)
        return compiled

    def residual_norm_backward(
        self,
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
        """(d_residual, d_branch (empty without a branch), partials [1, K, H])."""
        has = (has_branch, has_bias, has_branch_bias)
        if not norm.rms:
            return cpu_norm.residual_norm_backward(
                d_y, d_out, y, mean, rstd, weight, *has, join, norm
            )
        gradients: tuple[Tensor, Tensor, Tensor] = self._residual_norm_backward(
            d_y, d_out, y, weight, *has, join, norm
        )
        return gradients

    def swiglu_forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]."""
        if gate_up.dtype == torch.float32:
            return pointwise.swiglu_forward(gate_up)
        out: Tensor = self._swiglu_forward(gate_up)
        return out

    def squared_relu_forward(self, x: Tensor) -> Tensor:
        """`max(x, 0)^2`."""
        if x.dtype == torch.float32:
            return pointwise.squared_relu_forward(x)
        out: Tensor = self._squared_relu_forward(x)
        return out

    def squared_relu_backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        """The gradient of `x`."""
        if x.dtype == torch.float32:
            return pointwise.squared_relu_backward(d_out, x)
        d_x: Tensor = self._squared_relu_backward(d_out, x)
        return d_x


def server_of(x: Tensor, compiled: CompiledDefinitions | None) -> CompiledDefinitions | None:
    """`compiled` if it is there and serves tensors such as `x`, else None: the operators run."""
    served = x.device.type == "cpu" and x.dtype != torch.float64
    return compiled if served else None


def _cross_entropy_forward(*arguments: Any) -> Tensor:
    return reference.cross_entropy_forward(*arguments, **IN_FLOAT32)


def _cross_entropy_backward_(*arguments: Any) -> None:
    reference.cross_entropy_backward_(*arguments, **IN_FLOAT32)


def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    (gradient,) = _gradients(reference.swiglu, (gate_up,), d_out)
    return gradient


def _squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    (gradient,) = _gradients(reference.squared_relu, (x,), d_out)
    return gradient


def _rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    x.copy_(reference.rotary(x, cos, sin, inverse))


def _residual_norm_backward(
    d_y: Tensor | None,
    d_out: Tensor,
    y: Tensor,
    weight: Tensor,
    has_branch: bool,
    has_bias: bool,
    has_branch_bias: bool,
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator, but for the statistics of y, which it computes again."""
    gain = weight.float()
    # The definition has the same derivative at any bias.
    vectors = (gain, torch.zeros_like(gain)) if has_bias else (gain, None)

    def out_of(stream: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.norm(stream, weight, bias, norm, d_out.dtype)

    # In float32, whatever is stored: a sum of gradients is rounded once.
    d_stream, *d_vectors = _gradients(out_of, (y.float(), *vectors), d_out)
    if d_y is not None:
        d_stream = d_stream + d_y.float()
    d_branch = d_out.new_empty(0)
    if has_branch:
        # The branch receives the whole gradient of y, through the scaled add.
        d_update, *d_branch_bias = _branch_gradients(d_stream, has_branch_bias, join)
        d_branch = d_update.to(d_out.dtype)
        d_vectors += d_branch_bias
    return d_stream.to(y.dtype), d_branch, torch.stack(d_vectors)[None]


def _branch_gradients(d_y: Tensor, has_bias: bool, join: Join) -> tuple[Tensor, ...]:
    """The gradients of the branch, and of its bias if it has one, of float32 `d_y`."""
    # The sum is linear: its derivative is the same everywhere, so also at 0.
    bias = d_y.new_zeros(d_y.shape[-1]) if has_bias else None

    def y_of(branch: Tensor, bias: Tensor | None) -> Tensor:
        return reference.scaled_add(torch.zeros_like(d_y), branch, bias, join)

    return _gradients(y_of, (torch.zeros_like(d_y), bias), d_y)


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the inputs that are not None; behind a None stands no tensor."""
    given = [each for each in inputs if each is not None]
    absent = (None,) * (len(inputs) - len(given))
    pulled_back = torch.func.vjp(lambda *tensors: function(*tensors, *absent), *given)
    gradients: tuple[Tensor, ...] = pulled_back[1](d_out)
    return gradients
