"""Reading a checkpoint into any layout: each rank intersects the boxes it needs with those stored, and reads these bytes only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_completep.checkpoint.boxes import Box, OwnedBox, strides_of
from megatron_completep.checkpoint.files import CheckedFile, StoredBox
from megatron_completep.checkpoint.manifest import Manifest, read_manifest
from megatron_completep.checkpoint.parts import TORCH_DTYPES, Part, Parts, Wanted, parts_by_block
from megatron_completep.errors import CheckpointError


class StoredCheckpoint:
    """A committed checkpoint open for reading. Opening checks manifest, sizes and headers, and that nothing is missing."""

    def __init__(self, folder: Path, manifest: Manifest, boxes: Iterable[StoredBox]):
        self.folder, self.manifest = folder, manifest
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
        return cls.checked(folder, manifest, boxes)

    @classmethod
    def checked(
        cls, folder: Path, manifest: Manifest, boxes: Iterable[StoredBox]
    ) -> StoredCheckpoint:
        """With the boxes of all its files. Raises CheckpointError where they are not all that the manifest promises."""
        checkpoint = cls(folder, manifest, boxes)
        checkpoint._check_coverage()
        return checkpoint

    def tensor(self, name: str, state: str = "master") -> Tensor:
        """One logical tensor, whole."""
        stored = self.manifest.parameters.get(name)
        if stored is None or state not in self.manifest.states:
            known = ", ".join(sorted(self.manifest.parameters)[:8])
            raise CheckpointError(
                f"{self.folder}: no tensor {state}/{name}. Its parameters: {known}, ..."
            )
        return self.rows(state, name, 0, stored.shape[0])

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a logical tensor."""
        parameter = self.manifest.parameters[name]
        box = Box((start, *[0] * (len(parameter.shape) - 1)), (stop - start, *parameter.shape[1:]))
        flat = torch.empty(box.numel, dtype=TORCH_DTYPES[parameter.dtype])
        self.read_into([(OwnedBox(name, box, 0, strides_of(box.sizes)), state, flat)])
        return flat.view(box.sizes)

    def parts_of(self, wanted: Iterable[Wanted]) -> Parts:
        """The blocks that hold what is wanted, and where it goes. Raises CheckpointError for what the checkpoint does not hold."""
        wanted = list(wanted)
        shapes = {
            name: tuple(parameter.shape) for name, parameter in self.manifest.parameters.items()
        }
        missing = sorted(
            {
                o.name
                for o, _, _ in wanted
                if o.name not in shapes
                or not o.box.within(Box((0,) * len(shapes[o.name]), shapes[o.name]))
            }
        )
        if missing:
            names = ", ".join(missing[:8]) + (
                f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            )
            raise CheckpointError(
                f"{self.folder}: holds no tensors of this model's shapes for {names}."
            )
        return parts_by_block(wanted, self._by_name, self.manifest.block_size)

    def read_into(self, wanted: Iterable[Wanted]) -> None:
        """Fill (box, state, flat tensor), file by file and block by block, every byte checked. Raises CheckpointError."""
        parts = self.parts_of(wanted)
        with BlockReader(self.folder, self.manifest) as reader:
            for name, block in sorted(parts):
                reader.read(name, block, parts[name, block])

    def _check_coverage(self) -> None:
        """Every state holds every element of every parameter, in its type: sizes add up and no two boxes overlap."""
        problems = []
        for name, parameter in self.manifest.parameters.items():
            whole = Box((0,) * len(parameter.shape), tuple(parameter.shape))
            for state in self.manifest.states:
                boxes = self._by_name[state, name]
                if any(not b.box.within(whole) or b.dtype != parameter.dtype for b in boxes):
                    problems.append(
                        f"{state}/{name}: a part lies outside of {list(whole.sizes)}, or is not {parameter.dtype}"
                    )
                elif sum(b.box.numel for b in boxes) != whole.numel or _overlap(boxes):
                    problems.append(
                        f"{state}/{name}: parts of {sum(b.box.numel for b in boxes)} of {whole.numel} elements"
                    )
        elements = sum(
            math.prod(parameter.shape) for parameter in self.manifest.parameters.values()
        )
        if elements != self.manifest.elements:
            problems.append(
                f"the manifest counts {self.manifest.elements} elements, its parameters have {elements}"
            )
        unknown = sorted({name for _, name in self._by_name} - self.manifest.parameters.keys())
        unknown += sorted(
            {f"state {state}" for state, _ in self._by_name if state not in self.manifest.states}
        )
        problems += [f"{name}: stored, but not listed in the manifest" for name in unknown]
        if problems:
            raise CheckpointError(
                "\n  ".join([f"{self.folder}: tensors are not whole", *problems[:20]])
            )


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


class BlockReader:
    """Reads blocks of a checkpoint's files, one file open at a time; only what passed its check gets anywhere."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._files = folder, {stored.name: stored for stored in manifest.files}
        self._block_size = manifest.block_size
        self._open: CheckedFile | None = None
        self._scratch: Tensor | None = None
        self.bytes_read = 0

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open is not None:
            self.bytes_read += self._open.bytes_read
            self._open.close()
            self._open = None

    def read(
        self, name: str, block: int, parts: Sequence[Part], buffer: Tensor | None = None
    ) -> Tensor:
        """Read one block and place its parts; returns its bytes, in `buffer` (uint8) when that is given. Raises CheckpointError."""
        file = self._file(name)
        begin, size = block * self._block_size, file.size_of(block)
        direct = parts[0].direct(begin, size) if len(parts) == 1 else None
        if direct is not None:
            file.read_block(block, direct.numpy())
            return direct
        if buffer is None:
            if self._scratch is None:
                self._scratch = torch.empty(self._block_size, dtype=torch.uint8)
            buffer = self._scratch
        data = buffer[:size]
        file.read_block(block, data.numpy())
        for part in parts:
            part.place(begin, data)
        return data

    def _file(self, name: str) -> CheckedFile:
        if self._open is None or self._open.stored.name != name:
            self.close()
            self._open = CheckedFile(self._folder, self._files[name], self._block_size)
        return self._open
