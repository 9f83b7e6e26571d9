"""This rank's part of the state that a checkpoint holds: which boxes, in which flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_completep.completep import declaration_of
from megatron_completep.optim.distributed_adamw import DistributedAdamW
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.placement import placement_of
from megatron_completep.training.checkpoint.boxes import Box, OwnedBox, owned_boxes

STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """The boxes that this rank's optimizer shard holds, under their stored names.

    `written` are those that this rank writes: a parameter that every tensor rank holds is the first one's, a tied copy is
    nobody's. Weights in bf16 are not stored: they are the rounded masters.
    """

    owned: tuple[OwnedBox, ...]
    written: tuple[OwnedBox, ...]
    dtype: str

    @classmethod
    def of(cls, optimizer: DistributedAdamW, context: ParallelContext) -> Shard:
        placements = {name: placement_of(p) for name, p in optimizer.parameters.items()}
        shapes = {name: tuple(p.shape) for name, p in optimizer.parameters.items()}
        stored_name = {name: placement.tied_to or name for name, placement in placements.items()}
        owned, written = [], []
        for found in owned_boxes(optimizer.segments, placements, shapes):
            placement = placements[found.name]
            box = OwnedBox(stored_name[found.name], found.box, found.start, found.row_stride)
            owned.append(box)
            copy = placement.tied_to not in (None, found.name) or (placement.replicated and context.tensor.rank > 0)
            if not copy and context.replica.rank == 0:
                written.append(box)
        return cls(tuple(owned), tuple(written), "F64" if optimizer.master.dtype == torch.float64 else "F32")

    @property
    def written_bytes(self) -> int:
        """Bytes of values that this rank writes, all states together."""
        return sum(owned.box.numel for owned in self.written) * len(STATES) * (8 if self.dtype == "F64" else 4)


def view_of(flat: Tensor, owned: OwnedBox, part: Box | None = None) -> Tensor:
    """A box (or a part of it) as a view of the flat shard."""
    start, sizes, strides = owned.locate(part or owned.box)
    return torch.as_strided(flat, sizes, strides, flat.storage_offset() + start)


def describe_parameters(optimizer: DistributedAdamW, dtype: str) -> dict[str, dict]:
    """Role and logical shape of every parameter of this rank's stages, tied copies left out."""
    found = {}
    for name, parameter in optimizer.parameters.items():
        placement, declaration = placement_of(parameter), declaration_of(name, parameter)
        if placement.tied_to in (None, name):
            shape = list(placement.global_shape)
            found[name] = {"role": declaration.role.value, "width_ratio": declaration.width_ratio, "shape": shape, "dtype": dtype}
    return found
