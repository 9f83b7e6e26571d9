"""The matrix products of the parallel layers, as an object that is handed to them.

The products of torch are the definition. Another library, or products of fewer bits, is another
implementation; layers do not know which one they have.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.errors import ConfigError

APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"


class Products:
    """The products of torch. T tokens; every input may be a view."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] W^T + b -> [..., out]."""
        return F.linear(x, weight, bias)

    def input_gradient(self, d_out: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """d_out [..., out] W -> [..., in].

        out: where to write the result; d_out must be a matrix then.
        """
        if out is None:
            return d_out @ weight
        return torch.mm(d_out, weight, out=out)

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        """total [out, in] += d_out^T x, of d_out [T, out] and x [T, in].

        total: float32 (float64 for float64 products).
        first: overwrite `total`; this is the first contribution of a step.
        """
        kernels.add_product(total, d_out.t(), x, overwrite=first)


class ApexProducts(Products):
    """Weight gradients by the GEMM of apex, which adds bf16 products into the float32 total."""

    def __init__(self) -> None:
        self._add = importlib.import_module(APEX_EXTENSION).wgrad_gemm_accum_fp32

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        # The extension can only add.
        if first:
            total.zero_()
        self._add(x, d_out, total)


def choose_products(backend: str, device: torch.device, precision: torch.dtype) -> Products:
    """The products of a run.

    backend: `training.weight_gradient`; auto takes apex where it is installed and applies.

    Raises ConfigError when apex is asked for and NVIDIA's extension is missing, or does not apply
    to this device and type.
    """
    applies = device.type == "cuda" and precision == torch.bfloat16
    # Looked up and not imported: importing an extension for another CUDA can crash.
    installed = importlib.util.find_spec(APEX_EXTENSION) is not None
    if backend == "apex" and not applies:
        kind = str(precision).removeprefix("torch.")
        raise ConfigError(
            "training.weight_gradient = apex serves bf16 on a GPU; "
            f"this run is {kind} on {device.type}. Use auto."
        )
    if backend == "apex" and not installed:
        raise ConfigError(
            f"training.weight_gradient = apex, but NVIDIA's extension {APEX_EXTENSION} "
            "is not installed. Build apex with it (the package called apex on the public index "
            "is another one), or use auto."
        )
    if backend == "torch" or not (applies and installed):
        return Products()
    return ApexProducts()
