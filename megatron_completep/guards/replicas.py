"""Hashes of numbers that several ranks must hold alike, computed on their devices.

Sharding tells which copy is right: each slice of the weights is a rounded copy of its owner's
masters, so a rank whose copy differs from what the owner rounds anew is wrong, even among two.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from megatron_completep.optim.layout import Segment
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.context import ParallelContext

CHUNK = 1 << 22  # elements that are summed at a time, which bounds the memory for their positions
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


def bit_sum(tensor: Tensor) -> list[int]:
    """Two 64-bit sums over the bits of a contiguous tensor: a plain one, and one by position.

    Any single changed bit changes the first; the second notices elements that changed places.
    """
    words = tensor.detach().view(WORDS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), device=tensor.device)
        # The weights are odd, as an even one would drop the highest bit of a word.
        weighted = chunk * (2 * position + 1)
        sums += torch.stack((chunk.sum(), weighted.sum()))
    return sums.tolist()


def replica_hashes(
    optimizer: DistributedOptimizer, context: ParallelContext
) -> dict[str, list[int]]:
    """The hashes of this rank by name. Those under one name must be equal on all ranks.

    A hash under `owner: NAME` is what those under NAME must be. Waits for the device, and
    communicates nothing but the parameters that are still on their way.
    """
    optimizer.wait_for_parameters()
    shards = optimizer.shards
    shard = context.shard
    hashes: dict[str, list[int]] = {}
    for axis in shards.reductions:
        hashes |= _axis_hashes(shards, axis, _holder(context, axis))

    # What every tensor rank holds.
    replicated = [s for s in shards.segments if shards.specs[s.name].replicated]
    if replicated:
        name = f"norms and biases of stage {context.pipeline.rank}, data {context.data.rank}"
        # Ranks that share a sequence own different slices.
        if context.context.size > 1:
            name += f", context {context.context.rank}"
        hashes[name] = _master_hash(shards, replicated)
    # What both ends of the pipeline hold. It lies in a bucket of its own, so both cut it alike.
    tied = [s for s in shards.segments if shards.specs[s.name].tied_to is not None]
    if tied:
        name = f"tied embedding of tensor {context.tensor.rank}, slice {shard.rank}"
        hashes[name] = _master_hash(shards, tied)
    return hashes


def _holder(context: ParallelContext, axis: str) -> str:
    """What the ranks of an axis hold alike, for messages."""
    if axis == context.gradient.name:
        return f"stage {context.pipeline.rank}, tensor {context.tensor.rank}"
    return f"stage {context.pipeline.rank}, experts of rank {context.expert.rank}"


def _axis_hashes(shards: Shards, axis: str, holder: str) -> dict[str, list[int]]:
    """The hashes of the parameters whose gradients are summed over one axis."""
    buckets = [bucket for bucket in shards.layout.buckets if bucket.axis == axis]
    shard = shards.reductions[axis].shard
    hashes: dict[str, list[int]] = {}
    # The weights, slice by slice: all data ranks hold all slices, and each slice has one owner.
    for owner in range(shard.size):
        runs = [bucket.slice_of(owner) for bucket in buckets]
        slices = [shards.flat[start:stop] for start, stop in runs]
        name = f"weights of {holder}, slice {owner}"
        hashes[name] = bit_sum(torch.cat(slices)) if slices else [0, 0]
    masters = shards.master
    if len(buckets) < len(shards.layout.buckets):
        runs = [bucket.in_shard for bucket in buckets]
        views = [shards.master[start:stop] for start, stop in runs]
        masters = torch.cat(views) if views else shards.master[:0]
    if shards.master.data_ptr() != shards.flat.data_ptr():
        rounded = masters.to(shards.flat.dtype)
        hashes[f"owner: weights of {holder}, slice {shard.rank}"] = bit_sum(rounded)
    # The masters, which every replica of a shard holds.
    hashes[f"masters of {holder}, slice {shard.rank}"] = bit_sum(masters)
    return hashes


def _master_hash(shards: Shards, segments: list[Segment]) -> list[int]:
    """The hash of the masters of some segments, one after the other."""
    views = [shards.master[s.shard_start : s.shard_start + s.size] for s in segments]
    return bit_sum(torch.cat(views))


def who_differs(reports: list[dict[str, list[int]]]) -> list[str]:
    """One line for every set of ranks whose hash is not the owner's, or not the majority's.

    reports: what `replica_hashes` returned on each rank.
    """
    by_name: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for name, sums in report.items():
            by_name[name][rank] = tuple(sums)

    lines = []
    for name, hashes in by_name.items():
        if name.startswith("owner"):
            continue
        owner_hashes = by_name.get(f"owner: {name}")
        counts = Counter(hashes.values()).most_common()
        if len(counts) == 1 and (
            owner_hashes is None or set(owner_hashes.values()) == set(hashes.values())
        ):
            continue

        # The owner is right, or else the majority. Without either, every rank may be wrong.
        right = next(iter(owner_hashes.values())) if owner_hashes else counts[0][0]
        tie = owner_hashes is None and len(counts) > 1 and counts[0][1] == counts[1][1]
        if tie:
            wrong_ranks = sorted(hashes)
        else:
            wrong_ranks = [rank for rank, sums in hashes.items() if sums != right]
        note = " (one of them)" if tie else ""
        lines.append(f"rank {', '.join(map(str, wrong_ranks))} in {name}{note}")
    return lines
