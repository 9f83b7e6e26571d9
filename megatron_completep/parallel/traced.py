"""The products of a linear layer inside a compiled graph, with their gradients.

torch.compile calls MKL there, and takes oneDNN's operator with a constant weight only. Here that is
an operator of our own, into which the compiler does not look. Its derivative belongs to it:
torch.compile keeps no graph for the next process that holds an `autograd.Function`.

T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep.parallel.onednn import LeastWork

_torch_library: Any = torch.library  # its classes have no types
_library = _torch_library.Library("completep_products", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int? least) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class TracedProducts:
    """least: how large a product must be for oneDNN to compute it; None: torch computes all."""

    least: LeastWork | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] W^T + b -> [..., out]; differentiable.

        bias: of x's dtype, or float32 beside bf16: then its gradient is float32, too.
        """
        least = self.least
        if least is not None and x.numel() * weight.shape[0] >= least.product:
            return _linear(x, weight, bias, least.weight_gradient)
        if bias is not None and bias.dtype != x.dtype:
            # One pass with what follows it; the product is rounded once more than by a layer.
            return (F.linear(x, weight) + bias).to(x.dtype)
        return F.linear(x, weight, bias)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, least: int | None = None
) -> Tensor:
    """The same by oneDNN, and the gradient of x, too; that of the weight from `least` on."""
    out: Tensor = torch.ops.completep_products.linear.default(x, weight, bias, least)
    return out


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, least: int | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _on_paper(x: Tensor, weight: Tensor, bias: Tensor | None, least: int | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.least = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, the weight and the bias. Each product has as many multiplications as forward's."""
    x, weight = ctx.saved_tensors
    # The operator transposes its second operand, so that it gets W^T for d_out W.
    d_x = _linear(d_out, weight.t())
    rows = d_out.flatten(0, -2)  # [T, out]
    inputs = x.flatten(0, -2)  # [T, in]
    if ctx.least is not None and x.numel() * weight.shape[0] >= ctx.least:
        d_weight = _linear(rows.t(), inputs.t())
    else:
        d_weight = rows.t() @ inputs
    return d_x, d_weight, rows.sum(0) if ctx.has_bias else None, None


_library.impl("linear", _on_cpu, "CPU")
torch.library.register_fake("completep_products::linear", _on_paper, lib=_library)
torch.library.register_autograd(
    "completep_products::linear", _gradients, setup_context=_keep, lib=_library
)
