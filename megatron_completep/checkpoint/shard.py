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

    Weights in bf16 are not stored: they are the rounded masters.

    Attributes:
        owned: all of them, in shard order.
        to_write: those that this rank writes in a save. A parameter that every tensor rank holds
            is written by the first of them only, and the copy of a tied one by none.
        states: what is stored of each box, in this order.
        dtype: F32 or F64, as safetensors calls it.
    """

    owned: tuple[OwnedBox, ...]
    to_write: tuple[OwnedBox, ...]
    states: tuple[str, ...]
    dtype: str

    @classmethod
    def of(cls, optimizer: DistributedOptimizer, context: ParallelContext) -> Shard:
        shards = optimizer.shards
        owned = []
        to_write = []
        for local_box in owned_boxes(shards.segments, shards.specs):
            local_name = local_box.name
            spec = shards.specs[local_name]
            box = replace(local_box, name=spec.stored_name(local_name))
            owned.append(box)
            # A load fills all boxes. In a save each element is written by one rank only.
            if spec.is_primary(local_name, context):
                to_write.append(box)
        dtype = "F64" if shards.master.dtype == torch.float64 else "F32"
        return cls(tuple(owned), tuple(to_write), tuple(optimizer.states), dtype)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the tensors that this rank writes, all states together."""
        elements = sum(owned.box.numel for owned in self.to_write)
        item_size = 8 if self.dtype == "F64" else 4
        return elements * len(self.states) * item_size


def view_of(flat: Tensor, owned: OwnedBox, inner: Box | None = None) -> Tensor:
    """A box (or a box inside of it) as a view of the flat shard."""
    start, sizes, strides = owned.locate(inner or owned.box)
    # as_strided counts from the start of the storage, of which `flat` may be a part.
    return torch.as_strided(flat, sizes, strides, flat.storage_offset() + start)


def describe_parameters(optimizer: DistributedOptimizer, dtype: str) -> dict[str, dict[str, Any]]:
    """Role and logical shape of every parameter of this rank's stages, tied copies left out."""
    described = {}
    for name, spec in optimizer.shards.specs.items():
        if not spec.is_copy(name):
            described[name] = describe(spec, dtype)
    return described


def describe(spec: Spec, dtype: str) -> dict[str, Any]:
    """What a checkpoint says of one parameter, see `manifest.StoredParameter`."""
    return {
        "role": spec.role.value,
        "width_ratio": spec.width_ratio,
        "shape": list(spec.shape),
        "dtype": dtype,
    }
