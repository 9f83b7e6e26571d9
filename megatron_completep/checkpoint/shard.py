"""This rank's part of the state that a checkpoint holds: which boxes, in which flat tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_completep.optim.boxes import Box, OwnedBox, owned_boxes
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.rule import MASTER
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec


@dataclass(frozen=True)
class Shard:
    """The boxes that this rank's optimizer shard holds, under their stored names.

    Weights in bf16 are not stored: they are the rounded masters.

    Attributes:
        owned: by state, all boxes that this rank has of it, in the order of its flat tensor.
        to_write: by state, those that this rank writes in a save. A parameter that every tensor
            rank holds is written by the first of them only, and the copy of a tied one by none.
        dtype: F32 or F64, as safetensors calls it.
    """

    owned: Mapping[str, tuple[OwnedBox, ...]]
    to_write: Mapping[str, tuple[OwnedBox, ...]]
    dtype: str

    @classmethod
    def of(cls, optimizer: DistributedOptimizer, context: ParallelContext) -> Shard:
        shards = optimizer.shards
        owned: dict[str, tuple[OwnedBox, ...]] = {}
        to_write: dict[str, tuple[OwnedBox, ...]] = {}
        for state in optimizer.states:
            segments = shards.segments
            if state != MASTER:
                segments = optimizer.rule.segments_of(state)
            boxes = owned_boxes(segments, shards.specs)
            owned[state] = tuple(_stored(box, shards.specs) for box in boxes)
            # A load fills all boxes. In a save each element is written by one rank only.
            primary = [b for b in boxes if shards.specs[b.name].is_primary(b.name, context)]
            to_write[state] = tuple(_stored(box, shards.specs) for box in primary)
        dtype = "F64" if shards.master.dtype == torch.float64 else "F32"
        return cls(owned, to_write, dtype)

    @property
    def states(self) -> tuple[str, ...]:
        """What is stored, in this order."""
        return tuple(self.to_write)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the tensors that this rank writes, all states together."""
        elements = 0
        for boxes in self.to_write.values():
            elements += sum(owned.box.numel for owned in boxes)
        return elements * (8 if self.dtype == "F64" else 4)


def _stored(box: OwnedBox, specs: Mapping[str, Spec]) -> OwnedBox:
    """The box under the name that its parameter is stored by."""
    return replace(box, name=specs[box.name].stored_name(box.name))


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
            described[name] = describe(spec, dtype, optimizer.rule.stored_states(spec))
    return described


def describe(spec: Spec, dtype: str, states: Sequence[str] | None) -> dict[str, Any]:
    """What a checkpoint says of one parameter, see `manifest.StoredParameter`.

    states: those that are stored of it; None: all.
    """
    return {
        "role": spec.role.value,
        "width_ratio": spec.width_ratio,
        "shape": list(spec.shape),
        "dtype": dtype,
        "states": None if states is None else list(states),
    }
