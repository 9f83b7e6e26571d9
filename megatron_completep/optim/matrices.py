"""Which rank makes which matrix orthogonal, and what has to travel for it. Arithmetic only.

An orthogonal factor is that of a whole matrix: of a shard, or of query, key and value stacked, it
would be another one. The state of a matrix lies in flat shards, cut anywhere. So the ranks that
hold a stage's state together (`ParallelContext.stage`) send their elements of each matrix to one
owner and get theirs of the result back. Every rank computes the same division from sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import sub
from typing import NamedTuple

from megatron_completep.optim.boxes import Box, OwnedBox, owned_boxes
from megatron_completep.optim.layout import Layout
from megatron_completep.parallel.parameter import Spec, part_name


@dataclass(frozen=True)
class Matrix:
    """One logical matrix: a part of a parameter, or a head of a part.

    box: where it lies in the logical parameter; dimensions before the last two have size 1.
    """

    name: str  # of the parameter, on this rank
    part: str
    box: Box

    @property
    def group(self) -> str:
        """The name of its group."""
        return part_name(self.name, self.part)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.box.sizes[-2], self.box.sizes[-1]

    @property
    def cost(self) -> int:
        """What the iterations cost, relative to other matrices."""
        return max(self.shape) * min(self.shape) ** 2


class Holding(NamedTuple):
    """Elements of one matrix in one rank's shard."""

    start: int  # in the shard
    sizes: tuple[int, int]
    strides: tuple[int, int]
    offsets: tuple[int, int]  # of the first element, in the matrix
    sends: bool  # False where another rank holds the same elements and sends them

    @property
    def numel(self) -> int:
        return self.sizes[0] * self.sizes[1]


@dataclass(frozen=True)
class Division:
    """The matrices of a stage over the ranks that hold its state.

    Attributes:
        ranks: how many there are.
        owners: of each matrix, the rank that makes it orthogonal.
        batches: numbers of matrices that travel at once, in the order in which they do.
        holdings: rank -> number of a matrix -> its elements there, in shard order.
    """

    ranks: int
    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    holdings: tuple[Mapping[int, Sequence[Holding]], ...]

    def sent_elements(self, batch: Sequence[int]) -> int:
        """Elements of a batch that all ranks send together."""
        return sum(self.matrices[number].box.numel for number in batch)

    def costs(self) -> list[int]:
        """What each rank computes, as `Matrix.cost` counts."""
        costs = [0] * self.ranks
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            costs[owner] += matrix.cost
        return costs


def divide(
    layout: Layout,
    specs: Mapping[str, Spec],
    names: Iterable[str],
    shards: int,
    tensor_ranks: int,
    per_head: bool,
    batch_elements: int,
) -> Division:
    """Divide the matrices of a stage.

    Args:
        layout: of the parameters of a rank; it is the same on all ranks of a stage.
        specs: of the parameters, as any tensor rank has them.
        names: of the parameters whose matrices are meant.
        shards, tensor_ranks: ranks along the two axes.
        per_head: whether each head of a part is a matrix.
        batch_elements: that a rank sends, and that it receives, at once; a batch has one matrix at
            least.
    """
    matrices: list[Matrix] = []
    numbers: dict[str, range] = {}  # of the matrices of a parameter
    for name in names:
        first = len(matrices)
        matrices += _matrices_of(name, specs[name], per_head)
        numbers[name] = range(first, len(matrices))

    holdings = []
    # The tensor ranks of a shard side by side, which is the order of ranks in
    # `ParallelContext.stage`.
    for shard, tensor_rank in product(range(shards), range(tensor_ranks)):
        of_rank = {name: _on_tensor_rank(specs[name], tensor_rank) for name in numbers}
        segments = layout.segments({"gradient": shard})
        boxes = owned_boxes((s for s in segments if s.name in numbers), of_rank)
        # Of a parameter that is not split all tensor ranks hold the same, and the first one sends.
        holdings.append(_holdings(boxes, of_rank, matrices, numbers, tensor_rank == 0))

    owners = _owners(matrices, shards * tensor_ranks)
    batches = _batches(matrices, owners, holdings, batch_elements)
    return Division(len(holdings), tuple(matrices), owners, batches, tuple(holdings))


def _matrices_of(name: str, spec: Spec, per_head: bool) -> Iterator[Matrix]:
    """The logical matrices of a parameter, in order."""
    *leading, rows, columns = spec.shape
    start = 0
    for part in spec.logical_parts:
        # Parts, and the heads of a part, are stacked along the rows.
        size = spec.parts[part] if part else rows
        heads = spec.heads.get(part, 1) if per_head else 1
        head_size = size // heads
        for head in range(heads):
            first_row = start + head * head_size
            # Without leading dimensions there is one empty index, and so one matrix.
            for index in product(*map(range, leading)):
                ones = (1,) * len(leading)
                yield Matrix(name, part, Box((*index, first_row, 0), (*ones, head_size, columns)))
        start += size


def _on_tensor_rank(spec: Spec, rank: int) -> Spec:
    """The spec of the same parameter on another tensor rank."""
    split = {dim: share._replace(rank=rank) for dim, share in spec.split.items()}
    return replace(spec, split=split)


def _holdings(
    boxes: Iterable[OwnedBox],
    specs: Mapping[str, Spec],
    matrices: Sequence[Matrix],
    numbers: Mapping[str, range],
    is_first: bool,
) -> dict[int, list[Holding]]:
    """What one rank holds of each matrix.

    is_first: whether it is the first of the ranks that share a parameter that is not split.
    """
    holdings: dict[int, list[Holding]] = {}
    for owned in boxes:
        sends = is_first or not specs[owned.name].replicated
        for number in numbers[owned.name]:
            # A run of the shard may cover several parts or heads, and begin or end inside of one.
            inner = owned.box.intersect(matrices[number].box)
            if inner is None:
                continue
            start, sizes, strides = owned.locate(inner)
            offsets = tuple(map(sub, inner.offsets, matrices[number].box.offsets))
            # Dimensions before the last two have size 1 in a matrix, and so in what is held of it.
            holding = Holding(
                start,
                (sizes[-2], sizes[-1]),
                (strides[-2], strides[-1]),
                (offsets[-2], offsets[-1]),
                sends,
            )
            holdings.setdefault(number, []).append(holding)
    return holdings


def _owners(matrices: Sequence[Matrix], ranks: int) -> tuple[int, ...]:
    """The owner of each matrix: the costliest first, each to the rank with the least work."""
    work = [0] * ranks
    owners = [0] * len(matrices)
    # Numbers break ties between matrices, and between ranks: all ranks must find the same owners.
    for number in sorted(range(len(matrices)), key=lambda n: (-matrices[n].cost, n)):
        owner = min(range(ranks), key=lambda rank: (work[rank], rank))
        owners[number] = owner
        work[owner] += matrices[number].cost
    return tuple(owners)


def _batches(
    matrices: Sequence[Matrix],
    owners: Sequence[int],
    holdings: Sequence[Mapping[int, Sequence[Holding]]],
    batch_elements: int,
) -> tuple[tuple[int, ...], ...]:
    """Cut the exchange into batches of bounded size.

    Owners take turns, so that all have work in every batch; of an owner's matrices those of one
    shape come together, as they are multiplied together.
    """
    holders: dict[int, list[tuple[int, int]]] = {}  # of a matrix: rank, elements that it sends
    for rank, of_rank in enumerate(holdings):
        for number, held in of_rank.items():
            elements = sum(holding.numel for holding in held if holding.sends)
            holders.setdefault(number, []).append((rank, elements))

    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    received = [0] * len(holdings)
    sent = [0] * len(holdings)
    for number in _in_turns(matrices, owners, len(holdings)):
        owner = owners[number]
        size = matrices[number].box.numel
        # The buffers of both directions are bounded: the owner's, and those of all that send to it.
        full = received[owner] + size > batch_elements
        full |= any(sent[rank] + part > batch_elements for rank, part in holders[number])
        # A matrix above the bound has to travel as well: it opens a batch and exceeds it.
        if batch and full:
            batches.append(tuple(batch))
            batch = []
            received = [0] * len(holdings)
            sent = [0] * len(holdings)
        batch.append(number)
        received[owner] += size
        for rank, part in holders[number]:
            sent[rank] += part
    if batch:
        batches.append(tuple(batch))
    return tuple(batches)


def _in_turns(matrices: Sequence[Matrix], owners: Sequence[int], ranks: int) -> Iterator[int]:
    """The numbers of all matrices: the first of each owner, then the second of each, ..."""
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(matrices)), key=lambda n: (matrices[n].shape, n)):
        queues[owners[number]].append(number)
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]
