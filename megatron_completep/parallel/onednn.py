"""oneDNN's matrix product, which torch ships beside its own, and where it is worth calling.

torch's float32 products on a CPU go to MKL. On processors of AMD it uses vectors of 256 bits, while
oneDNN uses those of 512 where there are any. Units of 512 bits, which Zen 5 has, compute these at
twice the rate; there oneDNN was measured at 1.6 to 3 times MKL's speed forward and 1.1 to 1.8 times
for weight gradients. Zen 4 computes both at one rate; there it was measured at 1 to 1.3 times
forward, and slower for weight gradients. Small products are slower everywhere (docs/kernels.md).

Which library computes a product follows from the processor and the product's shape alone, so that a
run repeats to the bit on its machine: nothing is timed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

AMD = "AuthenticAMD"
ZEN_5 = 26  # the family of processors with units of 512 bits


@dataclass(frozen=True)
class Processor:
    """What the rule asks of a processor.

    vendor: as it calls its maker itself; empty where nothing tells. family: its number there.
    avx512: whether it has vectors of 512 bits.
    """

    vendor: str = ""
    family: int = 0
    avx512: bool = False


class LeastWork(NamedTuple):
    """Multiplications of a product from which on oneDNN computes it; None: never."""

    product: int  # x W^T, and the gradient of x
    weight_gradient: int | None


# Measured: on Zen 4 the two libraries meet between 4 and 12 million multiplications.
PRODUCTS_ALONE = LeastWork(1 << 23, None)
ALL_PRODUCTS = LeastWork(1 << 23, 1 << 28)


def least_work(processor: Processor) -> LeastWork | None:
    """Where oneDNN is the faster library on a processor; None: nowhere, as far as was measured."""
    if processor.vendor != AMD or not processor.avx512:
        return None
    return ALL_PRODUCTS if processor.family >= ZEN_5 else PRODUCTS_ALONE


class Linear(Protocol):
    """torch's operator for a linear layer through oneDNN, as torch.compile calls it.

    It takes strided matrices, and `x` of any number of dimensions. It has no gradient, and says so
    in a warning only.
    """

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        scalars: list[float],
        algorithm: str,
    ) -> Tensor:
        """activation(x [..., in] weight^T + bias) -> [..., out]; "none" is no activation."""
        ...


def find_linear() -> Linear | None:
    """The operator; None where this build of torch has none that computes what is expected."""
    # A name that torch does not promise to keep.
    return working(getattr(torch.ops.mkldnn, "_linear_pointwise", None))


def working(operator: Linear | None) -> Linear | None:
    """The operator where it computes a product and its two gradients, else None.

    The operands of gradients are transposed views. Their numbers are small and whole: sums of their
    products are exact in any order.
    """
    if operator is None:
        return None
    x = torch.arange(24.0).view(2, 3, 4) - 12
    weight = torch.arange(20.0).view(5, 4)
    bias = torch.arange(5.0)
    rows = x.flatten(0, 1)
    try:
        with torch.no_grad():
            out = operator(x, weight, bias, "none", [], "")
            d_rows = operator(out, weight.t(), None, "none", [], "")
            d_weight = operator(out.flatten(0, 1).t(), rows.t(), None, "none", [], "")
    except (RuntimeError, TypeError):  # a build without oneDNN, or another list of arguments
        return None
    expected = x @ weight.t() + bias
    exact = (
        torch.equal(out, expected)
        and torch.equal(d_rows, expected @ weight)
        and torch.equal(d_weight, expected.flatten(0, 1).t() @ rows)
    )
    return operator if exact else None


def read_processor(description: Path = Path("/proc/cpuinfo")) -> Processor:
    """This machine's processor, from what Linux says of it; elsewhere one without a name."""
    try:
        text = description.read_text()
    except OSError:
        return Processor()
    # The first processor stands for all.
    fields = dict(re.findall(r"^(\w[\w ]*?)\s*:\s*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    family = fields.get("cpu family", "")
    return Processor(
        fields.get("vendor_id", ""),
        int(family) if family.isdigit() else 0,
        "avx512f" in fields.get("flags", "").split(),
    )
