"""oneDNN's matrix product, which torch ships beside its own, and where it is worth calling.

torch's float32 products on a CPU go to MKL, which takes a slow path on processors of other makers
than Intel. oneDNN computes them at twice the speed there, except for small ones.

Which library computes a product follows from the processor's maker and from the product's shape
alone, so that a run repeats to the bit on its machine: nothing is timed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

AMD = "AuthenticAMD"


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


def processor_vendor(description: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls its maker, such as AuthenticAMD; empty where nothing tells."""
    try:
        text = description.read_text()
    except OSError:
        return ""
    match = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else ""
