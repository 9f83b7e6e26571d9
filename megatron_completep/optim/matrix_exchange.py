"""Brings matrices that lie in flat shards to their owners, and the orthogonal factors back.

A batch of `matrices.Division` goes through five stages: every rank packs its elements, in the type
of the iterations; an all-to-all brings them to the owners; an owner stacks matrices of one shape
and makes them orthogonal together; a second all-to-all brings the factors back; every rank uses its
elements. While an owner computes, the next batch is under way to it, and the factors of the one
before are under way from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_completep.optim.matrices import Division, Holding, Matrix
from megatron_completep.optim.newton_schulz import Polynomial, orthogonalize
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import Pending, start_all_to_all

# Writes this rank's elements of a matrix into a tensor [rows, columns].
Pack = Callable[[Matrix, Holding, Tensor], None]


@dataclass(frozen=True)
class _Run:
    """Elements of one matrix in a buffer that travels, one after the other."""

    number: int  # of the matrix
    holding: Holding
    start: int  # in the buffer

    def view(self, buffer: Tensor) -> Tensor:
        """Its elements, [rows, columns]."""
        return buffer[self.start : self.start + self.holding.numel].view(self.holding.sizes)


@dataclass(frozen=True)
class _Side:
    """What one rank sends or receives in one all-to-all, by the rank at the other end."""

    runs: Sequence[_Run]
    sizes: list[int]  # elements for each rank

    @property
    def elements(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class _Batch:
    """What one rank does in one batch."""

    packed: _Side  # to the owners
    gathered: _Side  # what this rank owns
    scattered: _Side  # what this rank owns, to all that hold it
    used: _Side  # from the owners
    stacks: Sequence[tuple[int, ...]]  # numbers of the owned matrices, by shape


class MatrixExchange:
    """The exchange of one rank.

    Args:
        division: of the matrices over the ranks of `axis`.
        axis: `ParallelContext.stage`.
        sequence: the polynomials of the iterations.
        dtype: of the iterations, and of what travels.
    """

    def __init__(
        self,
        division: Division,
        axis: Axis,
        sequence: list[Polynomial],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.division = division
        self.axis = axis
        self._sequence = sequence
        self._dtype = dtype
        self._device = device
        self._batches = [self._plan(batch) for batch in division.batches]

    def factors(self, pack: Pack) -> Iterator[tuple[Matrix, Holding, Tensor]]:
        """This rank's elements of the orthogonal factor of every matrix.

        Collective over the axis, with the same calls on every rank; the iterator must be exhausted.
        """
        # A slice, as a stage without matrices has no first batch.
        gathering = [self._start_gather(batch, pack) for batch in self._batches[:1]]
        scattering: list[tuple[_Batch, Pending]] = []
        for number, batch in enumerate(self._batches):
            stacks = self._assemble(batch, gathering.pop().wait())
            # The next batch travels to its owners while this one is computed.
            for next_batch in self._batches[number + 1 : number + 2]:
                gathering.append(self._start_gather(next_batch, pack))
            factors = [orthogonalize(stack, self._sequence) for stack in stacks]
            # Buffers for the way back are made next, and a rank is to hold five batches at most.
            del stacks
            scattering.append((batch, self._start_scatter(batch, factors)))
            del factors
            # The factors of the batch before had all of this computation to arrive in.
            if len(scattering) > 1:
                yield from self._received(*scattering.pop(0))
        for batch, pending in scattering:
            yield from self._received(batch, pending)

    def _start_gather(self, batch: _Batch, pack: Pack) -> Pending:
        buffer = torch.empty(batch.packed.elements, dtype=self._dtype, device=self._device)
        for run in batch.packed.runs:
            pack(self.division.matrices[run.number], run.holding, run.view(buffer))
        return start_all_to_all(buffer, self.axis, batch.packed.sizes, batch.gathered.sizes)

    def _assemble(self, batch: _Batch, buffer: Tensor) -> list[Tensor]:
        """The stacks [k, d_out, d_in] of the matrices that this rank owns, one of each shape."""
        stacks = []
        places: dict[int, Tensor] = {}
        for numbers in batch.stacks:
            shape = self.division.matrices[numbers[0]].shape
            # Each element of a matrix is sent by one rank, so the runs below fill all of it.
            stack = torch.empty(len(numbers), *shape, dtype=self._dtype, device=self._device)
            stacks.append(stack)
            # A matrix is a view of its stack, so that it is written there.
            places |= zip(numbers, stack, strict=True)
        for run in batch.gathered.runs:
            _within(places[run.number], run.holding).copy_(run.view(buffer))
        return stacks

    def _start_scatter(self, batch: _Batch, stacks: Sequence[Tensor]) -> Pending:
        places: dict[int, Tensor] = {}
        for numbers, stack in zip(batch.stacks, stacks, strict=True):
            places |= zip(numbers, stack, strict=True)
        buffer = torch.empty(batch.scattered.elements, dtype=self._dtype, device=self._device)
        for run in batch.scattered.runs:
            run.view(buffer).copy_(_within(places[run.number], run.holding))
        return start_all_to_all(buffer, self.axis, batch.scattered.sizes, batch.used.sizes)

    def _received(
        self, batch: _Batch, pending: Pending
    ) -> Iterator[tuple[Matrix, Holding, Tensor]]:
        buffer = pending.wait()
        for run in batch.used.runs:
            yield self.division.matrices[run.number], run.holding, run.view(buffer)

    # --- planning ------------------------------------------------------------------------------

    def _plan(self, batch: Sequence[int]) -> _Batch:
        owners = self.division.owners
        here = self.axis.rank
        # Both ends of a message list its matrices by number: nothing in it says which is which.
        numbers = sorted(batch)
        owned = [number for number in numbers if owners[number] == here]
        by_owner: list[list[int]] = [[] for _ in range(self.division.ranks)]
        for number in numbers:
            by_owner[owners[number]].append(number)
        # This rank sends what it holds, to the owner of each matrix; it receives what all ranks
        # hold, of the matrices that it owns.
        own_holdings = [(here, numbers_of) for numbers_of in by_owner]
        all_holdings = [(rank, owned) for rank in range(self.division.ranks)]
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number in owned:
            by_shape[self.division.matrices[number].shape].append(number)
        return _Batch(
            packed=self._side(own_holdings, senders_only=True),
            gathered=self._side(all_holdings, senders_only=True),
            # Back to every holder: also to those whose copies of the elements were not sent.
            scattered=self._side(all_holdings, senders_only=False),
            used=self._side(own_holdings, senders_only=False),
            stacks=[tuple(members) for members in by_shape.values()],
        )

    def _side(self, ends: Sequence[tuple[int, Sequence[int]]], senders_only: bool) -> _Side:
        """One side of an all-to-all.

        ends: for each rank at the other end, whose elements travel, and of which matrices. The two
        ends list the same elements in the same order.
        """
        runs = []
        sizes = []
        start = 0
        for holder, numbers in ends:
            first = start
            for number in numbers:
                for holding in self.division.holdings[holder].get(number, ()):
                    if holding.sends or not senders_only:
                        runs.append(_Run(number, holding, start))
                        start += holding.numel
            sizes.append(start - first)
        return _Side(runs, sizes)


def _within(matrix: Tensor, holding: Holding) -> Tensor:
    """The elements of a whole matrix that a rank holds."""
    row, column = holding.offsets
    rows, columns = holding.sizes
    return matrix[row : row + rows, column : column + columns]
