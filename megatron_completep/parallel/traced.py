"""The products of a linear layer inside a compiled graph, with their gradients.

torch.compile calls MKL there; oneDNN's operator it takes with a constant weight only. Here that is
an operator of our own, which the compiler calls without looking into it.

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
    "onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _empty_result(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("onednn_linear", _onednn_linear, "CPU")
torch.library.register_fake("completep_products::onednn_linear", _empty_result, lib=_library)


@dataclass(frozen=True)
class TracedProducts:
    """least: how large a product must be for oneDNN to compute it; None: torch computes all."""

    least: LeastWork | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] W^T + b -> [..., out]; differentiable."""
        least = self.least
        if least is None or x.numel() * weight.shape[0] < least.product:
            return F.linear(x, weight, bias)
        out: Tensor = _OneDnnLinear.apply(x, weight, bias, least.weight_gradient)
        return out


class _OneDnnLinear(torch.autograd.Function):
    """x W^T + b by oneDNN, and the gradient of x; that of the weight if it is large enough.

    The three have as many multiplications.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, least: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        ctx.least = least
        out: Tensor = torch.ops.completep_products.onednn_linear(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product = torch.ops.completep_products.onednn_linear
        # The operator transposes its second operand, so that it gets W^T for d_out W.
        d_x = product(d_out, weight.t(), None)
        rows = d_out.flatten(0, -2)  # [T, out]
        inputs = x.flatten(0, -2)  # [T, in]
        if ctx.least is not None and x.numel() * weight.shape[0] >= ctx.least:
            d_weight = product(rows.t(), inputs.t(), None)
        else:
            d_weight = rows.t() @ inputs
        return d_x, d_weight, rows.sum(0) if ctx.has_bias else None, None
