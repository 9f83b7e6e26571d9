"""The orthogonal factor of matrices, by iterations that are matrix products alone.

With M = U S V^T, the factor is U V^T: all singular values become 1. An odd polynomial
p(X) = a X + b (X X^T) X + c (X X^T)^2 X acts on the singular values alone, and a few of them in
turn take (0, 1] near 1.

quintic: Jordan's polynomial, in every iteration. It is steep at 0 and does not converge: singular
    values end between .68 and 1.20.
polar_express: the polynomials of arXiv 2505.16932, each the best for the interval that the one
    before leaves, from [1e-3, 1]. A longer sequence repeats the last one, which converges.
"""

from __future__ import annotations

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]  # a, b, c

QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
_SAFETY = 1.01  # all but the last are for a slightly larger interval, against rounding in bf16
_POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def polynomials(coefficients: str, iterations: int) -> list[Polynomial]:
    """The polynomial of each iteration.

    coefficients: a name of `optimizer.muon.coefficients`.
    """
    if coefficients == "quintic":
        return [QUINTIC] * iterations
    sequence = []
    for number in range(iterations):
        a, b, c = _POLAR_EXPRESS[min(number, len(_POLAR_EXPRESS) - 1)]
        if number < len(_POLAR_EXPRESS) - 1:
            sequence.append((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5))
        else:
            sequence.append((a, b, c))
    return sequence


def orthogonalize(stack: Tensor, sequence: list[Polynomial]) -> Tensor:
    """The orthogonal factor of each matrix of a stack [k, d_out, d_in], of the same type.

    `stack` is overwritten. A matrix may have any size: it is divided by its norm, and nothing but a
    matrix of zeros is left as it is.
    """
    normalize_(stack)
    return together(stack, sequence) if stack.is_cuda else one_by_one(stack, sequence)


def together(stack: Tensor, sequence: list[Polynomial]) -> Tensor:
    """The iterations for all matrices at once: on a GPU small products leave units idle."""
    # The products are of the smaller side.
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    for a, b, c in sequence:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def one_by_one(stack: Tensor, sequence: list[Polynomial]) -> Tensor:
    """The iterations matrix by matrix, in place: on a CPU a stack took 1.3 times as long."""
    tall = stack.shape[-2] > stack.shape[-1]
    for matrix in stack:
        x = matrix.mT.contiguous() if tall else matrix
        for a, b, c in sequence:
            gram = x @ x.mT
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.addmm(x, polynomial, x, beta=a)
        matrix.copy_(x.mT if tall else x)
    return stack


def normalize_(stack: Tensor) -> None:
    """Divide each matrix of a stack by its Frobenius norm, in place.

    Squares are summed in float64: those of numbers of 1e-24, which a clipped gradient may have, are
    0 in float32. There is no floor under the norm, below which an update would fade.
    """
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    norm = torch.where(norm > 0, norm, 1.0)
    # In bf16 a norm of 8 bits would be off by up to 0.4 %.
    stack.div_(norm if stack.dtype == torch.float64 else norm.float())


def newton_schulz_flops(d_out: int, d_in: int, iterations: int) -> float:
    """Floating-point operations of one matrix."""
    small = min(d_out, d_in)
    large = max(d_out, d_in)
    # The Gram matrix, its square, and the product with the matrix.
    return iterations * (2.0 * small * small * large + 2.0 * small**3 + 2.0 * small * small * large)
