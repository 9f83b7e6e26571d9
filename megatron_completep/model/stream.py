"""The residual stream as a value that layers hand on.

A branch's output is not added where it is made: it waits in the stream until the next norm, whose
kernel adds it, scaled by the depth multiplier, and norms the sum in the same pass over memory. At
the end of a pipeline stage it is added alone, so that one tensor is sent.

s sequence (this rank's part of it), B micro-batch, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_completep import kernels


def dropout_seeds(seed: Tensor, branches: int) -> Tensor:
    """int64 [branches + 1, 7]: the seed of each place where a branch joins the stream.

    seed: of `kernels.dropout_seed`. branches: of the whole model; branch b joins at place b + 1.
    """
    seeds = seed.repeat(branches + 1, 1)
    seeds[:, 0] += torch.arange(branches + 1, device=seed.device)
    return seeds


class Branch(NamedTuple):
    """What attention and MLP return."""

    out: Tensor  # [s, B, H], without its bias
    bias: Tensor | None = None  # [H], added by the kernel that joins the branch to the stream


class Stream(NamedTuple):
    """The stream between two modules, and the branch that is still to be added."""

    residual: Tensor  # [s, B, H]
    branch_index: int  # branches of the whole model added so far
    dropout_seeds: Tensor | None = None  # of `dropout_seeds`, [sites, 7]; None: nothing is dropped
    pending: Branch | None = None

    def hold(self, branch: Branch) -> Stream:
        """The stream with a branch that waits for the next norm."""
        return self._replace(pending=branch)

    def joined(self, residual: Tensor) -> Stream:
        """The stream after its branch has joined it."""
        return Stream(residual, self.branch_index + 1, self.dropout_seeds)

    def branch_seed(self) -> Tensor | None:
        """The dropout seed of the branch that joins here."""
        return None if self.dropout_seeds is None else self.dropout_seeds[self.branch_index]

    def add_pending(self, join: kernels.Join, sink: kernels.Sink) -> Tensor:
        """The stream [s, B, H] with the pending branch added; gradients of its bias go to sink."""
        if self.pending is None:
            return self.residual
        out, bias = self.pending
        return kernels.scaled_add(self.residual, out, bias, join.under(self.branch_seed()), sink)
