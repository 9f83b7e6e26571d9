"""Matrix products of float8 operands with one scale each: `training.float8: tensorwise`.

Inputs and weights are e4m3, gradients of outputs e5m2. A scale is the power of two by which an
operand was divided before it was rounded: it brings the largest element into the upper octave of
its type. Powers of two cost at most one bit of range and make every use of a scale exact.

What a product is stands in `multiply`: on a GPU `torch._scaled_mm`; elsewhere operands are
multiplied by their scales and then by each other in float32, which is the definition.

A scale is a maximum over the whole operand where layouts divide it and the parts meet again: over
shards and tensor ranks for a weight (`weight_scales.py`), over the parts of a sequence for an input
that is gathered. So those are the same bytes in every layout. Of what the ranks of a row-parallel
layer hold for themselves each takes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.config.float8_rules import MULTIPLE
from megatron_completep.config.schema import TrainingConfig
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_reduce, start_all_gather
from megatron_completep.parallel.parameter import spec_of
from megatron_completep.parallel.products import Products
from megatron_completep.parallel.sequence import SequencePart
from megatron_completep.roles import Role

INPUT = "input"
GRADIENT = "gradient"


class Operand(NamedTuple):
    """A rounded matrix: `data` [rows, columns] times `scale` [], float32, is what it stands for.

    transposed: `data` once more, as [columns, rows] in memory; None where no product needs it.
    """

    data: Tensor
    scale: Tensor
    transposed: Tensor | None = None


class Scaling(Protocol):
    """Says how large the elements of an operand are."""

    def largest(self, matrix: Float8Matrix, kind: str, x: Tensor, axis: Axis | None) -> Tensor:
        """float32 []: the magnitude up to which elements of x are told apart.

        kind: INPUT or GRADIENT. axis: of the ranks that hold the other parts of the operand.
        """


class Dynamic:
    """The largest magnitude of the operand itself."""

    def largest(self, matrix: Float8Matrix, kind: str, x: Tensor, axis: Axis | None) -> Tensor:
        """Communicates over the axis, if there is one."""
        amax = kernels.largest_magnitude(x)
        return amax if axis is None else all_reduce(amax, axis, dist.ReduceOp.MAX)


@dataclass(frozen=True)
class Float8Settings:
    """Which matrices are converted, and what their weight gradient is made of.

    weight_gradient: `high`: of the operands before rounding; `float8`: of rounded ones.
    least_size: matrices with a smaller dimension on this rank stay as they are.
    """

    weight_gradient: str = "high"
    least_size: int = 2048

    def takes(self, role: Role, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this role and local shape is converted."""
        if role != Role.HIDDEN_WEIGHT or len(shape) != 2:
            return False
        return min(shape) >= self.least_size and not any(size % MULTIPLE for size in shape)


def float8_settings(training: TrainingConfig) -> Float8Settings:
    """What the configuration says of float8."""
    return Float8Settings(training.float8_weight_gradient, training.float8_least_size)


class Float8Products(Products):
    """Gives each weight its products: in float8, or those of `high` where it is left out.

    weights: the converted ones, by their parameters.
    """

    def __init__(
        self, high: Products, settings: Float8Settings, scaling: Scaling | None = None
    ) -> None:
        self.high = high
        self.settings = settings
        self.scaling = scaling or Dynamic()
        self.weights: dict[Parameter, Float8Matrix] = {}

    @property
    def library(self) -> str:  # type: ignore[override]
        """The name of the products that are not in float8, and that there are others."""
        return f"{self.high.library}, {len(self.weights)} matrices in float8"

    def of(self, weight: Parameter) -> Products:
        if not self.settings.takes(spec_of(weight).role, tuple(weight.shape)):
            return self.high
        self.weights[weight] = Float8Matrix(weight, self)
        return self.weights[weight]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.high.forward(x, weight, bias)

    def input_gradient(self, d_out: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return self.high.input_gradient(d_out, weight, out)

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        self.high.add_weight_gradient(total, d_out, x, first)


class Float8Matrix(Products):
    """The products of one weight [out, in], which is rounded once for all uses of a step.

    name: of the layer, where an instrument gave it one.
    scaling: of inputs and gradients.
    """

    library: ClassVar[str] = "float8"

    def __init__(self, weight: Parameter, owner: Float8Products) -> None:
        self.name = ""
        self.scaling = owner.scaling
        self._parameter = weight
        self._owner = owner
        self._rounded: Operand | None = None
        # The largest magnitude of the weight in the whole layout; None: nobody told it yet.
        self._amax: Callable[[], Tensor] | None = None

    def renew(self, amax: Callable[[], Tensor] | None = None) -> None:
        """The weight has changed: round it anew when it is used next.

        amax: gives its largest magnitude [] over all ranks that share it; None: that of this rank.
        """
        self._rounded = None
        self._amax = amax

    def rounded(self) -> Operand:
        """The weight and its transpose. It must have arrived (`Shards`)."""
        if self._rounded is None:
            weight = self._parameter.detach()
            amax = kernels.largest_magnitude(weight) if self._amax is None else self._amax()
            self._rounded = Operand(*kernels.float8_cast(weight, amax, False, True))
        return self._rounded

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rounded = self._round(x.flatten(0, -2), INPUT)
        return self._forward(rounded, x, bias)

    def forward_of_part(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: SequencePart
    ) -> Tensor:
        """Gathers the rounded input: half the bytes. Communicates over the sequence's axis."""
        if not sequence.split:
            return self.forward(x, weight, bias)
        rounded = self._round(x.flatten(0, -2), INPUT, sequence.axis)
        # gloo has no float8.
        parts = start_all_gather(rounded.data.view(torch.uint8), sequence.axis).wait()
        gathered = rounded._replace(data=parts.view(rounded.data.dtype))
        shape = x.new_empty(sequence.whole_length(x.shape[0]), *x.shape[1:], device="meta")
        return self._forward(gathered, shape, bias).to(x.dtype)

    def _forward(self, rounded: Operand, x: Tensor, bias: Tensor | None) -> Tensor:
        out = multiply(rounded, self.rounded(), x.dtype, fast=True)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias

    def input_gradient(self, d_out: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        rounded = self._round(d_out.flatten(0, -2), GRADIENT)
        _, scale, transposed = self.rounded()
        assert transposed is not None
        # d_out W: the second operand of `multiply` is [in, out].
        d_x = multiply(rounded, Operand(transposed, scale), d_out.dtype, fast=False)
        d_x = d_x.view(*d_out.shape[:-1], d_x.shape[-1])
        return d_x if out is None else out.copy_(d_x)

    def add_weight_gradient(self, total: Tensor, d_out: Tensor, x: Tensor, first: bool) -> None:
        if self._owner.settings.weight_gradient == "high":
            self._owner.high.add_weight_gradient(total, d_out, x, first)
            return
        gradient = self._round(d_out, GRADIENT, transpose=True)
        inputs = self._round(x, INPUT, transpose=True)
        assert gradient.transposed is not None and inputs.transposed is not None
        product = multiply(
            Operand(gradient.transposed, gradient.scale),
            Operand(inputs.transposed, inputs.scale),
            torch.float32,
            fast=False,
        )
        total.copy_(product) if first else total.add_(product)

    def _round(
        self, x: Tensor, kind: str, axis: Axis | None = None, transpose: bool = False
    ) -> Operand:
        amax = self.scaling.largest(self, kind, x, axis)
        return Operand(*kernels.float8_cast(x, amax, kind == GRADIENT, transpose))


def multiply(a: Operand, b: Operand, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k] b^T of b [n, k] -> [m, n] in `dtype`.

    fast: on a GPU, add up in fewer bits than float32 (NVIDIA's fast accumulation).
    """
    if a.data.is_cuda:
        scaled_mm = torch._scaled_mm
        return scaled_mm(
            a.data,
            b.data.t(),
            scale_a=a.scale,
            scale_b=b.scale,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
    unrounded = a.data.float() * a.scale
    right = b.data.float() * b.scale
    return F.linear(unrounded, right).to(dtype)


def require_float8(device: torch.device) -> None:
    """Raises ConfigError where float8 products cannot run."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"training.float8 = tensorwise needs a GPU with float8 units (Ada, Hopper or later), "
            f"but {torch.cuda.get_device_name(device)} has none. Use float8 = none."
        )


def require_float8_weights(products: Float8Products, has_layers: bool) -> None:
    """Raises ConfigError where the filter left nothing on a rank with layers."""
    if has_layers and not products.weights:
        raise ConfigError(
            "training.float8 = tensorwise converts no matrix of this model: on each rank one "
            f"dimension is below training.float8_least_size = {products.settings.least_size}, or "
            f"no multiple of {MULTIPLE}. Use float8 = none, or a smaller float8_least_size."
        )
