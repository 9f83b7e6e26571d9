"""This rank's part of the state that a checkpoint holds: which boxes, in which flat tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_completep.checkpoint.boxes import Box, OwnedBox, owned_boxes
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec


@dataclass(frozen=True)
class Shard:
    """The boxes that this rank's optimizer shard holds, under their stored names.

    `written` are those that this rank writes: a parameter that every tensor rank holds is the first one's, a tied copy is
    nobody's. `states` are stored of each, in this order. Weights in bf16 are not stored: they are the rounded masters.
    """

    owned: tuple[OwnedBox, ...]
    written: tuple[OwnedBox, ...]
    states: tuple[str, ...]
    dtype: str

    @classmethod
    def of(cls, optimizer: DistributedOptimizer, context: ParallelContext) -> Shard:
        owned, written = [], []
        shards = optimizer.shards
        for held in owned_boxes(shards.segments, shards.specs):
            spec = shards.specs[held.name]
            box = replace(held, name=spec.stored_name(held.name))
            owned.append(box)
            if spec.counts_on(held.name, context):
                written.append(box)
        dtype = "F64" if shards.master.dtype == torch.float64 else "F32"
        return cls(tuple(owned), tuple(written), tuple(optimizer.states), dtype)

    @property
    def written_bytes(self) -> int:
        """Bytes of values that this rank writes, all states together."""
        return (
            sum(owned.box.numel for owned in self.written)
            * len(self.states)
            * (8 if self.dtype == "F64" else 4)
        )


def view_of(flat: Tensor, owned: OwnedBox, part: Box | None = None) -> Tensor:
    """A box (or a part of it) as a view of the flat shard."""
    start, sizes, strides = owned.locate(part or owned.box)
    return torch.as_strided(flat, sizes, strides, flat.storage_offset() + start)


def describe_parameters(optimizer: DistributedOptimizer, dtype: str) -> dict[str, dict[str, Any]]:
    """Role and logical shape of every parameter of this rank's stages, tied copies left out."""
    described = {}
    for name, spec in optimizer.shards.specs.items():
        if not spec.is_copy(name):
            described[name] = describe(spec, dtype)
    return described


def describe(spec: Spec, dtype: str) -> dict[str, Any]:
    """What a checkpoint says of one parameter."""
    return {
        "role": spec.role.value,
        "width_ratio": spec.width_ratio,
        "shape": list(spec.shape),
        "dtype": dtype,
    }
