"""Hashes of numbers that several ranks must hold alike, computed where they lie.

Sharding says who is right: each slice of the weights is a rounded copy of its owner's masters, so a rank whose copy differs from
what the owner derives anew is wrong, even among two.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext

CHUNK = 1 << 22
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(values: Tensor) -> list[int]:
    """Two 64-bit sums over the bits of a contiguous tensor, plain and by position: any single changed bit changes the first."""
    words = values.detach().view(WORDS[values.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        position = torch.arange(start, start + part.numel(), device=values.device)
        sums += torch.stack((part.sum(), (part * (2 * position + 1)).sum()))
    return sums.tolist()


def replica_hashes(
    optimizer: DistributedOptimizer, context: ParallelContext
) -> dict[str, list[int]]:
    """Named hashes of this rank; those under one name must be equal on all ranks. Names that start with `owner` say what is right."""
    optimizer.wait_for_parameters()
    shards, shard = optimizer.shards, context.shard
    here = f"stage {context.pipeline.rank}, tensor {context.tensor.rank}"
    hashes: dict[str, list[int]] = {}
    for owner in range(shard.size):
        slices = [
            shards.flat[start:stop] for start, stop in shards.layout.slices({"gradient": owner})
        ]
        hashes[f"weights of {here}, slice {owner}"] = (
            bit_sum(torch.cat(slices)) if slices else [0, 0]
        )
    if shards.master.data_ptr() != shards.flat.data_ptr():
        hashes[f"owner: weights of {here}, slice {shard.rank}"] = bit_sum(
            shards.master.to(shards.flat.dtype)
        )
    hashes[f"masters of {here}, slice {shard.rank}"] = bit_sum(shards.master)
    whole = [s for s in shards.segments if shards.specs[s.name].replicated]
    if whole:
        views = [shards.master[s.shard_start : s.shard_start + s.size] for s in whole]
        hashes[f"norms and biases of stage {context.pipeline.rank}, data {context.data.rank}"] = (
            bit_sum(torch.cat(views))
        )
    tied = [s for s in shards.segments if shards.specs[s.name].tied_to is not None]
    if tied:  # in a bucket of their own, so that both ends of the pipeline cut them alike
        views = [shards.master[s.shard_start : s.shard_start + s.size] for s in tied]
        hashes[f"tied embedding of tensor {context.tensor.rank}, slice {shard.rank}"] = bit_sum(
            torch.cat(views)
        )
    return hashes


def who_differs(reports: list[dict[str, list[int]]]) -> list[str]:
    """One line for every set of ranks whose hash is not the owner's, or not the majority's."""
    by_name: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for name, value in report.items():
            by_name[name][rank] = tuple(value)
    found = []
    for name, values in by_name.items():
        truth = by_name.get(f"owner: {name}")
        counts = Counter(values.values()).most_common()
        if name.startswith("owner") or (
            len(counts) == 1 and (truth is None or set(truth.values()) == set(values.values()))
        ):
            continue
        right = next(iter(truth.values())) if truth else counts[0][0]
        tie = truth is None and len(counts) > 1 and counts[0][1] == counts[1][1]
        wrong = (
            sorted(values) if tie else [rank for rank, value in values.items() if value != right]
        )
        found.append(
            f"rank {', '.join(map(str, wrong))} in {name}" + (" (one of them)" if tie else "")
        )
    return found
