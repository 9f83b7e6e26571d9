"""Reading a checkpoint into any layout.

Each rank intersects the boxes that it needs with the boxes that are stored, and reads these bytes
only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_completep.checkpoint.files import CheckedFile, StoredBox
from megatron_completep.checkpoint.manifest import Manifest, StoredParameter, read_manifest
from megatron_completep.checkpoint.parts import TORCH_DTYPES, Part, Parts, Target, parts_by_block
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.boxes import Box, OwnedBox, strides_of

SHOWN_NAMES = 8  # in a message, of what may be hundreds


class StoredCheckpoint:
    """A committed checkpoint open for reading.

    Opening checks the manifest, the sizes and headers of the files, and that no element of any
    tensor is missing. The other bytes are checked when they are read.
    """

    def __init__(self, folder: Path, manifest: Manifest, boxes: Iterable[StoredBox]):
        self.folder = folder
        self.manifest = manifest
        self._by_name: dict[tuple[str, str], list[StoredBox]] = defaultdict(list)
        for box in boxes:
            self._by_name[box.state, box.name].append(box)

    @classmethod
    def open(cls, folder: Path | str) -> StoredCheckpoint:
        """Open a checkpoint.

        Raises CheckpointError that names the file and what is wrong with it.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        # The headers alone, which tell what is missing before any tensor is read.
        boxes = []
        for stored in manifest.files:
            with CheckedFile(folder, stored, manifest.block_size) as file:
                boxes += file.index()
        return cls.checked(folder, manifest, boxes)

    @classmethod
    def checked(
        cls, folder: Path, manifest: Manifest, boxes: Iterable[StoredBox]
    ) -> StoredCheckpoint:
        """A checkpoint with the boxes of all of its files.

        Raises CheckpointError where the boxes are not all that the manifest promises.
        """
        checkpoint = cls(folder, manifest, boxes)
        checkpoint._check_coverage()
        return checkpoint

    def tensor(self, name: str, state: str = "master") -> Tensor:
        """One logical tensor as a whole. Raises CheckpointError where the checkpoint has none."""
        stored = self.manifest.parameters.get(name)
        if stored is None or state not in self.manifest.states_of(name):
            names = ", ".join(sorted(self.manifest.parameters)[:SHOWN_NAMES])
            raise CheckpointError(
                f"{self.folder}: no tensor {state}/{name}. Its parameters: {names}, ..."
            )
        return self.rows(state, name, 0, stored.shape[0])

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a logical tensor."""
        parameter = self.manifest.parameters[name]
        row_shape = parameter.shape[1:]
        box = Box((start, *[0] * len(row_shape)), (stop - start, *row_shape))
        flat = torch.empty(box.numel, dtype=TORCH_DTYPES[parameter.dtype])
        # A shard that consists of this box alone.
        owned = OwnedBox(name, box, 0, strides_of(box.sizes))
        self.read_into([(owned, state, flat)])
        return flat.view(box.sizes)

    def parts_of(self, targets: Iterable[Target]) -> Parts:
        """The blocks that hold what the targets need, and where it goes.

        Raises CheckpointError for boxes that the checkpoint does not hold.
        """
        targets = list(targets)
        missing_names = set()
        for owned, _, _ in targets:
            parameter = self.manifest.parameters.get(owned.name)
            if parameter is None or not owned.box.within(_whole_box(parameter)):
                missing_names.add(owned.name)
        # All names at once, as a model that differs differs in many.
        if missing_names:
            names = ", ".join(sorted(missing_names)[:SHOWN_NAMES])
            if len(missing_names) > SHOWN_NAMES:
                names += f" and {len(missing_names) - SHOWN_NAMES} more"
            raise CheckpointError(
                f"{self.folder}: holds no tensors of this model's shapes for {names}."
            )
        return parts_by_block(targets, self._by_name, self.manifest.block_size)

    def read_into(self, targets: Iterable[Target]) -> None:
        """Fill the targets, file by file and block by block, every byte checked.

        Raises CheckpointError.
        """
        overlaps = self.parts_of(targets)
        # Sorted, so that each file is opened once and read from the front.
        with BlockReader(self.folder, self.manifest) as reader:
            for file, block in sorted(overlaps):
                reader.read(file, block, overlaps[file, block])

    def _check_coverage(self) -> None:
        """Raise CheckpointError unless every state holds every element of every parameter once."""
        problems = []
        elements = 0
        for name, parameter in self.manifest.parameters.items():
            elements += math.prod(parameter.shape)
            for state in self.manifest.states_of(name):
                problems += self._coverage_problems(state, name, parameter)
            for state in self.manifest.states.keys() - set(self.manifest.states_of(name)):
                if (state, name) in self._by_name:
                    problems.append(f"{state}/{name}: stored, but not listed in the manifest")
        if elements != self.manifest.elements:
            problems.append(
                f"the manifest counts {self.manifest.elements} elements, "
                f"its parameters have {elements}"
            )

        # What the manifest does not list would be read by nobody, and is no checkpoint of ours.
        unknown_names = {name for _, name in self._by_name} - self.manifest.parameters.keys()
        unknown_states = {state for state, _ in self._by_name} - self.manifest.states.keys()
        unknown = sorted(unknown_names)
        unknown += [f"state {state}" for state in sorted(unknown_states)]
        problems += [f"{name}: stored, but not listed in the manifest" for name in unknown]
        if problems:
            title = f"{self.folder}: tensors are not whole"
            raise CheckpointError("\n  ".join([title, *problems[:20]]))

    def _coverage_problems(self, state: str, name: str, parameter: StoredParameter) -> list[str]:
        """What is wrong with the boxes of one state of one parameter: at most one line.

        They make up the tensor where all lie inside of it, their sizes add up to its size, and no
        two of them overlap.
        """
        tensor_box = _whole_box(parameter)
        boxes = self._by_name[state, name]
        for stored in boxes:
            if not stored.box.within(tensor_box) or stored.dtype != parameter.dtype:
                return [
                    f"{state}/{name}: a part lies outside of {list(tensor_box.sizes)}, "
                    f"or is not {parameter.dtype}"
                ]
        stored_elements = sum(stored.box.numel for stored in boxes)
        if stored_elements != tensor_box.numel or _overlap(boxes):
            return [f"{state}/{name}: parts of {stored_elements} of {tensor_box.numel} elements"]
        return []


def _whole_box(parameter: StoredParameter) -> Box:
    """The box that is all of a parameter."""
    return Box((0,) * len(parameter.shape), tuple(parameter.shape))


def _overlap(boxes: list[StoredBox]) -> bool:
    """Whether two boxes of one tensor share an element."""
    # Sorted by their first rows, so that a box can only overlap those that begin before it ends.
    ordered = sorted(boxes, key=lambda stored: stored.box.offsets)
    for i, stored in enumerate(ordered):
        end_row = stored.box.offsets[0] + stored.box.sizes[0]
        for later in ordered[i + 1 :]:
            if later.box.offsets[0] >= end_row:
                break
            if stored.box.intersect(later.box) is not None:
                return True
    return False


class BlockReader:
    """Reads blocks of a checkpoint's files, with one file open at a time.

    Only bytes that passed the check of their block's hash reach their place for good: a read that
    fails raises, and its caller must not use what was filled.

    bytes_read: from files that are closed by now.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._files = {stored.name: stored for stored in manifest.files}
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
        self, name: str, block: int, overlaps: Sequence[Part], buffer: Tensor | None = None
    ) -> Tensor:
        """Read one block and place its parts. Returns the bytes of the block (uint8).

        Raises CheckpointError.

        Args:
            name: of the file.
            overlaps: what goes where.
            buffer: where the bytes are read to, unless they go straight to their place; None: a
                buffer that the next call overwrites.
        """
        file = self._file(name)
        begin = block * self._block_size
        size = file.size_of(block)

        # Most blocks of a large tensor belong to one place as they are, and need no copy.
        direct = overlaps[0].direct(begin, size) if len(overlaps) == 1 else None
        if direct is not None:
            file.read_block(block, direct.numpy())
            return direct

        # All others are cut up in memory, after the whole block has passed its check.
        if buffer is None:
            if self._scratch is None:
                self._scratch = torch.empty(self._block_size, dtype=torch.uint8)
            buffer = self._scratch
        data = buffer[:size]
        file.read_block(block, data.numpy())
        for overlap in overlaps:
            overlap.place(begin, data)
        return data

    def _file(self, name: str) -> CheckedFile:
        if self._open is None or self._open.stored.name != name:
            self.close()
            self._open = CheckedFile(self._folder, self._files[name], self._block_size)
        return self._open
