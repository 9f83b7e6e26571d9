"""The residual stream as a value that layers hand on.

A branch's output is not added where it is made: it waits in the stream until the next norm, whose
kernel adds it, scaled by the depth multiplier, and norms the sum in the same pass over memory. At
the end of a pipeline stage it is added alone, so that one tensor is sent.

s sequence (this rank's part of it), B micro-batch, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_completep import kernels


class Branch(NamedTuple):
    """What attention and MLP return."""

    out: Tensor  # [s, B, H], without its bias
    bias: Tensor | None = None  # [H], added by the kernel that joins the branch to the stream


class Stream(NamedTuple):
    """The stream between two modules, and the branch that is still to be added."""

    residual: Tensor  # [s, B, H]
    site: int  # branches that joined before, in the whole model: each drops other elements
    seed: Tensor | None = None  # int64, one element, of the dropout; None: nothing is dropped
    pending: Branch | None = None

    def hold(self, branch: Branch) -> Stream:
        """The stream with a branch that waits for the next norm."""
        return self._replace(pending=branch)

    def joined(self, residual: Tensor) -> Stream:
        """The stream after its branch has joined it."""
        return Stream(residual, self.site + 1, self.seed)

    def site_seed(self) -> Tensor | None:
        """The dropout seed of the branch that joins here."""
        return None if self.seed is None else self.seed + self.site

    def settle(self, join: kernels.Join, sink: kernels.Sink) -> Tensor:
        """The stream [s, B, H] with the pending branch added; gradients of its bias go to sink."""
        if self.pending is None:
            return self.residual
        out, bias = self.pending
        return kernels.scaled_add(self.residual, out, bias, join.under(self.site_seed()), sink)
