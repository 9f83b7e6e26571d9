"""Which part of the sequence a rank holds of the residual stream, and how parts are combined.

S sequence (a context rank's tokens of it), s this rank's part of that: S itself, or S / ranks under
sequence parallelism, where the ranks that share the matrices divide the sequence, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    sum_over,
)


@dataclass(frozen=True)
class SequencePart:
    """A rank's part of the sequence.

    axis: the ranks that share the matrices.
    split: whether they divide the sequence between them.
    """

    axis: Axis
    split: bool = False

    @property
    def parts(self) -> int:
        """The number of parts that the sequence is divided into."""
        return self.axis.size if self.split else 1

    @property
    def index(self) -> int:
        """The number of this rank's part."""
        return self.axis.rank if self.split else 0

    @property
    def partial_over(self) -> str | None:
        """The axis whose ranks hold shares of a gradient, for parameters that see only the stream.

        None where every rank sees the whole sequence.
        """
        return self.axis.name if self.split else None

    def length(self, seq_length: int) -> int:
        """Tokens of a sequence of this length that this rank holds."""
        return seq_length // self.parts

    def whole_length(self, length: int) -> int:
        """The length of the sequence of which this rank holds `length` tokens."""
        return length * self.parts

    def cut(self, x: Tensor) -> Tensor:
        """[S, ...] -> [s, ...]."""
        return x.chunk(self.parts)[self.index]

    def gather(self, x: Tensor) -> Tensor:
        """[s, ...] -> [S, ...]. Communicates over the axis."""
        return self.start_gather(x).wait() if self.split else x

    def start_gather(self, x: Tensor) -> Pending:
        """Start the same; the caller computes meanwhile."""
        return start_all_gather(x, self.axis) if self.split else Pending(x)

    def sum(self, x: Tensor) -> Tensor:
        """This rank's part [s, ...] of the sum of partial results [S, ...], without gradient.

        Communicates over the axis.
        """
        return self.start_sum(x).wait()

    def start_sum(self, x: Tensor) -> Pending:
        """Start the same; the caller computes meanwhile."""
        start = start_reduce_scatter if self.split else start_all_reduce
        return start(x, self.axis)

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """The same sum, differentiable: the gradient of a partial result is that of the sum."""
        return sum_over(x, self.axis, scatter=self.split)
