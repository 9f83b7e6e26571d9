"""The fused residual norm as a module for any pre-norm model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_completep.kernels import Join, Norm, norm, scaled_residual_norm


class ResidualNorm(nn.Module):
    """Adds a branch to the residual stream and norms the sum, in one pass over memory.

        stream = stream + scale * branch
        normed = norm(stream) * weight + bias

    It stands where a block's branch ends and the next one's norm begins. Tensors on a GPU run a
    Triton kernel, and those on a CPU torch's operators. Sums and statistics are float32 (float64
    for float64 tensors), and the stream is rounded once. There is no second derivative.

    Args:
        hidden_size: of the stream, up to 16384.
        scale: of the branch, `table.residual_multiplier`.
        kind: rmsnorm or layernorm.
        eps: added to the mean square, or the variance.
        bias: whether the norm adds a vector.
    """

    def __init__(
        self,
        hidden_size: int,
        scale: float = 1.0,
        kind: str = "rmsnorm",
        eps: float = 1e-5,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.join = Join(scale)
        self.norm = Norm(kind, eps)
        self.norm.rms  # noqa: B018 - refuses a kind that is not defined, before the first batch
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        zeros = torch.zeros(hidden_size, device=device, dtype=dtype)
        self.bias = nn.Parameter(zeros) if bias else None

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the new stream, its norm), both [..., hidden_size].

        Without a branch (at the first norm) the stream is returned as it is.
        """
        if branch is None:
            return stream, norm(stream, self.weight, self.bias, self.norm)
        return scaled_residual_norm(
            stream, branch, None, self.weight, self.bias, self.join, self.norm
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, scale={self.join.scale:g}, {self.norm}"
