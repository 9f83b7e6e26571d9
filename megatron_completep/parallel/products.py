"""The matrix products of the parallel layers, as an object that is handed to them.

The products of torch are the definition. Another library is another implementation; layers do not
know which one they have.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.onednn import (
    PRODUCTS_ALONE,
    LeastWork,
    Linear,
    Processor,
    find_linear,
    least_work,
)
from megatron_completep.parallel.sequence import SequencePart
from megatron_completep.parallel.traced import TracedProducts

APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"


class Products:
    """The products of torch. T tokens; every input may be a view.

    library: its name in start-up lines and manifests.
    """

    library: ClassVar[str] = "torch"

    def of(self, weight: Parameter) -> Products:
        """The products of one weight; other libraries may treat weights differently."""
        return self

    def traced(self) -> TracedProducts | None:
        """These products inside a compiled graph; None: they cannot be part of one."""
        return TracedProducts() if type(self) is Products else None

    def forward_of_part(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: SequencePart
    ) -> Tensor:
        """`forward` of the whole sequence [S, ...], of which x [s, ...] is this rank's part.

        Communicates over the sequence's axis, if that is split.
        """
        return self.forward(sequence.gather(x), weight, bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] W^T + b -> [..., out]."""
        return F.linear(x, weight, bias)

    def input_gradient(self, d_out: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """d_out [..., out] W -> [..., in].

        out: the tensor to write the result to, if any; d_out must then be a matrix.
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


class OneDnnProducts(Products):
    """Float32 products on a CPU by oneDNN, if they are large enough; others by torch.

    The operator has no gradient, so torch computes every product that autograd has to differentiate
    (logits). torch also computes every product inside a compiled region that is not handed
    `traced()`: there Inductor accepts only a constant weight for the operator.
    """

    library: ClassVar[str] = "onednn"

    def __init__(self, linear: Linear, least: LeastWork = PRODUCTS_ALONE) -> None:
        """least: how large a product must be for oneDNN to compute it."""
        self._linear = linear
        self._least = least

    def traced(self) -> TracedProducts:
        # In a graph the operator costs host time that torch's own products do not. At four times
        # the work it is a small part of what oneDNN saves.
        return TracedProducts(self._least._replace(product=4 * self._least.product))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Multiplications of the product: tokens x in x out. Below the bound the call costs more
        # than oneDNN saves.
        large = x.numel() * weight.shape[0] >= self._least.product
        if not large or not _may_call(x, weight):
            return super().forward(x, weight, bias)
        return self._linear(x, weight, bias, "none", [], "")

    def input_gradient(self, d_out: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        large = d_out.numel() * weight.shape[1] >= self._least.product
        if not large or not _may_call(d_out, weight):
            return super().input_gradient(d_out, weight, out)
        # The operator transposes its second operand, so that it gets W^T for d_out W.
        d_x = self._linear(d_out, weight.t(), None, "none", [], "")
        # It has no argument for its output.
        return d_x if out is None else out.copy_(d_x)

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        least = self._least.weight_gradient
        large = least is not None and total.numel() * x.shape[0] >= least
        if not large or not _may_call(d_out, x):
            super().add_weight_gradient(total, d_out, x, first)
            return
        # The operator cannot add to the total, so that takes one more pass over it.
        # d_out^T x, with x^T in the place of the operand that it transposes.
        product = self._linear(d_out.t(), x.t(), None, "none", [], "")
        total.copy_(product) if first else total.add_(product)


class ApexProducts(Products):
    """Weight gradients by the GEMM of apex, which adds bf16 products into the float32 total."""

    library: ClassVar[str] = "apex"

    def __init__(self) -> None:
        self._add = importlib.import_module(APEX_EXTENSION).wgrad_gemm_accum_fp32

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        # The extension can only add.
        if first:
            total.zero_()
        self._add(x, d_out, total)


def choose_products(
    weight_gradient: str,
    matrix_products: str,
    device: torch.device,
    precision: torch.dtype,
    processor: Processor,
    find: Callable[[], Linear | None] = find_linear,
) -> Products:
    """The products of a training run.

    weight_gradient: `training.weight_gradient`; auto takes apex if it is installed and applies.
    matrix_products: `training.matrix_products`; auto takes oneDNN if it applies, and `least_work`
        says that it is faster on this processor.
    find: gives oneDNN's operator, or None.

    Raises ConfigError if a library is asked for that is missing, or that does not apply to this
    device and dtype.
    """
    # Who names a library means it: unlike auto, it is refused where it would be replaced.
    if matrix_products == "onednn" and not _onednn_applies(device, precision):
        raise ConfigError(
            "training.matrix_products = onednn serves float32 on a CPU; "
            f"this run is {_name_of(precision)} on {device.type}. Use auto."
        )
    if _takes_apex(weight_gradient, device, precision):
        return ApexProducts()
    products = choose_inference_products(matrix_products, device, precision, processor, find)
    # Where this build has no such operator, torch's products were returned in its place.
    if matrix_products == "onednn" and products.library != "onednn":
        raise ConfigError(
            f"training.matrix_products = onednn, but torch {torch.__version__} has no oneDNN "
            "product that works here. Use auto, or a build of torch with oneDNN."
        )
    return products


def choose_inference_products(
    matrix_products: str,
    device: torch.device,
    precision: torch.dtype,
    processor: Processor,
    find: Callable[[], Linear | None] = find_linear,
) -> Products:
    """The products of a trained model; arguments as in `choose_products`.

    The model may run on another machine, and in another dtype, than it was trained: a library that
    does not apply here is no mistake, and torch's products replace it.
    """
    least = least_work(processor)
    # Named by the user, it also runs where no measurement speaks for it, but without weight
    # gradients, which were slower on Zen 4.
    if matrix_products == "onednn" and least is None:
        least = PRODUCTS_ALONE
    if matrix_products == "torch" or least is None or not _onednn_applies(device, precision):
        return Products()
    linear = find()
    return Products() if linear is None else OneDnnProducts(linear, least)


def _may_call(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN's operator can compute this product, whatever its size."""
    if a.dtype != torch.float32:
        return False
    # The operator has no gradient and would cut the graph with no more than a warning.
    differentiated = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return not differentiated and not torch.compiler.is_compiling()


def _onednn_applies(device: torch.device, precision: torch.dtype) -> bool:
    """Whether `OneDnnProducts` are of use: for float32 on a CPU.

    torch sends bf16 products to oneDNN by itself, and oneDNN refuses float64.
    """
    return device.type == "cpu" and precision == torch.float32


def _takes_apex(backend: str, device: torch.device, precision: torch.dtype) -> bool:
    """Whether weight gradients go to apex. Raises ConfigError if it is asked for but unusable."""
    applies = device.type == "cuda" and precision == torch.bfloat16
    # Looked up and not imported: importing an extension built for another CUDA can crash.
    installed = importlib.util.find_spec(APEX_EXTENSION) is not None
    if backend == "apex" and not applies:
        raise ConfigError(
            "training.weight_gradient = apex serves bf16 on a GPU; "
            f"this run is {_name_of(precision)} on {device.type}. Use auto."
        )
    if backend == "apex" and not installed:
        raise ConfigError(
            f"training.weight_gradient = apex, but NVIDIA's extension {APEX_EXTENSION} "
            "is not installed. Build apex with it (the package called apex on the public index "
            "is another one), or use auto."
        )
    return backend != "torch" and applies and installed


def _name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
