"""Reading a checkpoint into any layout: each rank intersects the boxes it needs with those stored, and reads these bytes only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_completep.errors import CheckpointError
from megatron_completep.training.checkpoint.boxes import Box, OwnedBox
from megatron_completep.training.checkpoint.files import DTYPES, CheckedFile, StoredBox
from megatron_completep.training.checkpoint.manifest import Manifest, read_manifest
from megatron_completep.training.checkpoint.shard import STATES, view_of


class StoredCheckpoint:
    """A committed checkpoint open for reading. Opening checks manifest, sizes and headers, and that nothing is missing."""

    def __init__(self, folder: Path, manifest: Manifest, boxes: Iterable[StoredBox]):
        self.folder, self.manifest = folder, manifest
        self.bytes_read = 0
        self._by_name: dict[tuple[str, str], list[StoredBox]] = defaultdict(list)
        for box in boxes:
            self._by_name[box.state, box.name].append(box)

    @classmethod
    def open(cls, folder: Path | str) -> StoredCheckpoint:
        """Raises CheckpointError that names the file and what is wrong with it."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        boxes = []
        for stored in manifest.files:
            with CheckedFile(folder, stored, manifest.block_size) as file:
                boxes += file.index()
        checkpoint = cls(folder, manifest, boxes)
        checkpoint._check_coverage()
        return checkpoint

    def to_json(self) -> dict[str, Any]:
        """What another rank needs to read from it without opening every file."""
        boxes = [[*map(list, (b.box.offsets, b.box.sizes)), b.file, b.state, b.name, b.dtype, b.start, b.stop] for b in self._boxes()]
        return {"folder": str(self.folder), "manifest": self.manifest.model_dump(mode="json"), "boxes": boxes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StoredCheckpoint:
        boxes = [StoredBox(f, s, n, Box(tuple(o), tuple(z)), d, a, b) for o, z, f, s, n, d, a, b in value["boxes"]]
        return cls(Path(value["folder"]), Manifest.model_validate(value["manifest"]), boxes)

    def _boxes(self) -> Iterable[StoredBox]:
        return (box for boxes in self._by_name.values() for box in boxes)

    def tensor(self, name: str, state: str = "master") -> Tensor:
        """One logical tensor, whole."""
        stored = self.manifest.parameters.get(name)
        if stored is None or state not in STATES:
            known = ", ".join(sorted(self.manifest.parameters)[:8])
            raise CheckpointError(f"{self.folder}: no tensor {state}/{name}. Its parameters: {known}, ...")
        shape = tuple(stored.shape)
        flat = torch.empty(int(np.prod(shape)), dtype=torch.float64 if stored.dtype == "F64" else torch.float32)
        whole = OwnedBox(name, Box((0,) * len(shape), shape), 0, shape[-1])
        self.read_into([(whole, state, flat)])
        return flat.view(shape)

    def read_states(self, owned: Iterable[OwnedBox], flats: Mapping[str, Tensor]) -> None:
        """Fill a shard's flat states with what is stored of its boxes."""
        self.read_into([(box, state, flats[state]) for state in STATES for box in owned])

    def read_into(self, wanted: Iterable[tuple[OwnedBox, str, Tensor]]) -> None:
        """Fill (box, state, flat tensor) one file after the other, in file order, every byte checked. Raises CheckpointError."""
        work: dict[str, list[tuple[StoredBox, Box, OwnedBox, Tensor]]] = defaultdict(list)
        for owned, state, flat in wanted:
            for stored in self._by_name[state, owned.name]:
                part = stored.box.intersect(owned.box)
                if part is not None:
                    work[stored.file].append((stored, part, owned, flat))
        files = {stored.name: stored for stored in self.manifest.files}
        for name in sorted(work):
            with CheckedFile(self.folder, files[name], self.manifest.block_size) as file:
                for stored, part, owned, flat in sorted(work[name], key=lambda item: item[0].start):
                    _copy_part(file, stored, part, view_of(flat, owned, part))
                self.bytes_read += file.bytes_read

    def _check_coverage(self) -> None:
        """Every state holds every element of every parameter, in its type: sizes add up and no two boxes overlap."""
        problems = []
        for name, parameter in self.manifest.parameters.items():
            whole = Box((0,) * len(parameter.shape), tuple(parameter.shape))
            for state in STATES:
                boxes = self._by_name[state, name]
                if any(b.box.intersect(whole) != b.box or b.dtype != parameter.dtype for b in boxes):
                    problems.append(f"{state}/{name}: a part lies outside of {list(whole.sizes)}, or is not {parameter.dtype}")
                elif sum(b.box.numel for b in boxes) != whole.numel or _overlap(boxes):
                    problems.append(f"{state}/{name}: parts of {sum(b.box.numel for b in boxes)} of {whole.numel} elements")
        unknown = sorted({name for _, name in self._by_name} - self.manifest.parameters.keys())
        problems += [f"{name}: stored, but not listed in the manifest" for name in unknown]
        if problems:
            raise CheckpointError("\n  ".join([f"{self.folder}: tensors are not whole", *problems[:20]]))


def _overlap(boxes: list[StoredBox]) -> bool:
    """Whether two boxes share an element. Those of one tensor are sorted, so only near ones are compared."""
    ordered = sorted(boxes, key=lambda b: b.box.offsets)
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            if second.box.offsets[0] >= first.box.offsets[0] + first.box.sizes[0]:
                break
            if first.box.intersect(second.box) is not None:
                return True
    return False


def _copy_part(file: CheckedFile, stored: StoredBox, part: Box, target: Tensor) -> None:
    """Read the rows of a stored box that `part` touches, and copy its columns to `target`."""
    dtype = DTYPES[stored.dtype]
    row_elements = stored.box.numel // stored.box.sizes[0]
    first_row = part.offsets[0] - stored.box.offsets[0]
    begin = stored.start + first_row * row_elements * dtype.itemsize
    whole_rows = part.sizes[1:] == stored.box.sizes[1:]
    values_dtype = torch.float64 if stored.dtype == "F64" else torch.float32
    if whole_rows and target.device.type == "cpu" and target.is_contiguous() and target.dtype == values_dtype:
        file.read_into(begin, target.numpy().reshape(-1).view(np.uint8))
        return
    rows_at_once = max(1, (64 << 20) // max(1, row_elements * dtype.itemsize))
    for row in range(0, part.sizes[0], rows_at_once):
        rows = min(rows_at_once, part.sizes[0] - row)
        data = file.read(begin + row * row_elements * dtype.itemsize, rows * row_elements * dtype.itemsize)
        values = torch.from_numpy(data.view(dtype)).view(rows, *stored.box.sizes[1:])
        if not whole_rows:
            column = part.offsets[1] - stored.box.offsets[1]
            values = values[:, column : column + part.sizes[1]]
        target[row : row + rows].copy_(values)
