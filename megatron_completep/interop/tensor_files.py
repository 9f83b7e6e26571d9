"""Hugging Face safetensors folders, read and written with one tensor in memory at a time.

A folder holds one file, or several with an index. No pickle is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from megatron_completep.errors import DataError
from megatron_completep.interop.model_folder import ModelFolder

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Named = Sequence[tuple[str, tuple[int, ...]]]  # (name, shape)


def write_tensors(
    folder: Path,
    tensors: Named,
    dtype: str,
    tensor_of: Callable[[str], Tensor],
    shard_bytes: int,
) -> list[Path]:
    """Write all tensors, in order, as one file or as several of at most `shard_bytes`.

    A larger tensor gets a file of its own. `tensor_of(name)` is called once for each tensor, so
    that memory holds one. Returns the paths of the files, the index included. Raises OSError.
    """
    width = DTYPES[dtype][1].itemsize
    contents = _split(tensors, width, shard_bytes)
    count = len(contents)
    # One file needs no index.
    if count == 1:
        _write_file(folder / SINGLE, contents[0], dtype, tensor_of)
        return [folder / SINGLE]

    paths = []
    weight_map = {}
    for number, content in enumerate(contents, start=1):
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(path, content, dtype, tensor_of)
        paths.append(path)
        weight_map.update({name: path.name for name, _ in content})

    # transformers finds a tensor's file by the index alone.
    elements = sum(math.prod(shape) for _, shape in tensors)
    metadata = {"total_size": elements * width, "total_parameters": elements}
    index = {"metadata": metadata, "weight_map": weight_map}
    index_path = folder / INDEX
    index_path.write_text(json.dumps(index, indent=2) + "\n")
    return [*paths, index_path]


def _split(tensors: Named, width: int, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors of each file; `width` is the number of bytes of an element."""
    contents: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = math.prod(shape) * width
        # A file takes at least one tensor, however large.
        if contents[-1] and filled + size > shard_bytes:
            contents.append([])
            filled = 0
        contents[-1].append((name, shape))
        filled += size
    return contents


def _write_file(path: Path, tensors: Named, dtype: str, tensor_of: Callable[[str], Tensor]) -> None:
    """Write one file: the header's length (uint64), the header as JSON, then the tensors' bytes."""
    label, torch_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded_header = json.dumps(header, separators=(",", ":")).encode()
    # Spaces behind the JSON align the tensors to 8 bytes.
    encoded_header += b" " * (-len(encoded_header) % 8)

    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded_header)) + encoded_header)
        for name, shape in tensors:
            tensor = tensor_of(name)
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            file.write(_raw_bytes(tensor, torch_dtype))


def _raw_bytes(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The elements as uint8 [bytes], since numpy has no bfloat16."""
    flat = tensor.to(dtype).contiguous().flatten()
    return flat.view(torch.uint8).numpy()


class TensorFolder:
    """The tensors of a Hugging Face folder. Names are read at once, tensors one by one.

    Raises DataError.
    """

    def __init__(self, folder: Path, only: str | None = None):
        """only: INDEX or SINGLE, to read that one of the two."""
        self.folder = folder
        self._files = ModelFolder(folder)
        self._open: dict[str, Any] = {}
        self._only = only
        self._file_of = self._locate()

    @property
    def has_both(self) -> bool:
        """Whether there is an index beside a single file that it does not name."""
        is_both = self._files.has(INDEX) and self._files.has(SINGLE)
        return is_both and SINGLE not in self._file_of.values()

    def _locate(self) -> dict[str, str]:
        """File by tensor name, from the index or from the single file."""
        if self._files.has(INDEX) and self._only != SINGLE:
            return self._read_index()
        if self._files.has(SINGLE):
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        # An older model may have pickled weights alone: say why they are not read.
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        if pickled:
            raise DataError(
                f"{self.folder}: its weights are in {pickled[0]}, a pickle, which can run any "
                "program when it is read. Use a version of the model with .safetensors files, or "
                "convert it where you trust it (save_pretrained)."
            )
        raise DataError(
            f"{self.folder}: no {SINGLE} and no {INDEX}. Give the folder of a Hugging Face model."
        )

    def _read_index(self) -> dict[str, str]:
        """File by tensor name, from the index; every file of it lies in this folder."""
        path = self.folder / INDEX
        weight_map = self._files.json_object(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise DataError(
                f"{path}: not an index of safetensors files: weight_map must name a file for every "
                "tensor."
            )
        for file in sorted(set(weight_map.values())):
            if not self._files.has(file):
                raise DataError(
                    f"{path}: names the file {file!r}, which is not in this folder. Download the "
                    "model again."
                )
            self._files.path(file)  # refuses links out of the folder before any tensor is read
        return weight_map

    def _file(self, name: str) -> Any:
        """The open safetensors file of this name; each is opened once."""
        # Opening maps the file into memory; no tensor is read by it.
        if name not in self._open:
            try:
                self._open[name] = safetensors.safe_open(self._files.path(name), framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise DataError(
                    f"{self.folder / name}: not a safetensors file ({error}). Download it again."
                ) from None
        return self._open[name]

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, type such as 'BF16') of a tensor."""
        unread = self._read(name, lambda file: file.get_slice(name))
        return tuple(unread.get_shape()), unread.get_dtype()

    def value(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU and in its stored type."""
        tensor: Tensor = self._read(name, lambda file: file.get_tensor(name))
        return tensor

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        # A damaged file may open, and fail only when a tensor is read.
        file = self._file_of[name]
        try:
            return read(self._file(file))
        except safetensors.SafetensorError as error:
            raise DataError(
                f"{self.folder / file}: tensor {name} cannot be read ({error}). Download the file "
                "again."
            ) from None
