"""Hugging Face safetensors folders, one tensor in memory at a time: sharded files with their index, out and in. No pickle is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Named = Sequence[tuple[str, tuple[int, ...]]]  # (name, shape)


def write_tensors(
    folder: Path, tensors: Named, dtype: str, values: Callable[[str], Tensor], shard_bytes: int
) -> list[Path]:
    """Write all tensors, in order, as one file or as shards of at most `shard_bytes` (a larger tensor is a file of its own).

    `values(name)` is asked once for each, so that memory holds one. Returns the files, the index with them. Raises OSError.
    """
    width = DTYPES[dtype][1].itemsize
    shards = _split(tensors, width, shard_bytes)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype, values)
    paths = [folder / file for file in files]
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard
        }
        total = sum(_numel(shape) for _, shape in tensors)
        index = {
            "metadata": {"total_size": total * width, "total_parameters": total},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        paths.append(folder / INDEX)
    return paths


def _split(tensors: Named, width: int, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = _numel(shape) * width
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    return shards


def _write_file(path: Path, tensors: Named, dtype: str, values: Callable[[str], Tensor]) -> None:
    label, torch_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + _numel(shape) * torch_dtype.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            value = values(name)
            assert tuple(value.shape) == shape, (name, value.shape, shape)
            file.write(value.to(torch_dtype).contiguous().flatten().view(torch.uint8).numpy())


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class TensorFolder:
    """The tensors of a Hugging Face folder: names, shapes and types at once, values one by one. Raises DataError."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = ModelFolder(folder)
        self._open: dict[str, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        """File by tensor name, from the index or from the single file."""
        index = self.folder / INDEX
        if self._files.has(INDEX):
            weight_map = self._files.json_object(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise DataError(
                    f"{index}: not an index of safetensors files: weight_map must name a file for every tensor."
                )
            for file in sorted(set(weight_map.values())):
                if not self._files.has(file):
                    raise DataError(
                        f"{index}: names the file {file!r}, which is not in this folder. Download the model again."
                    )
                self._files.path(file)
            return weight_map
        if self._files.has(SINGLE):
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        if pickled:
            raise DataError(
                f"{self.folder}: its weights are in {pickled[0]}, a pickle, which can run any program when it is read. "
                "Use a version of the model with .safetensors files, or convert it where you trust it (save_pretrained)."
            )
        raise DataError(
            f"{self.folder}: no {SINGLE} and no {INDEX}. Give the folder of a Hugging Face model."
        )

    def _file(self, name: str) -> Any:
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
        return list(self._file_of)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, type such as 'BF16') of a tensor."""
        part = self._read(name, lambda file: file.get_slice(name))
        return tuple(part.get_shape()), part.get_dtype()

    def value(self, name: str) -> Tensor:
        return self._read(name, lambda file: file.get_tensor(name))

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        file = self._file_of[name]
        try:
            return read(self._file(file))
        except safetensors.SafetensorError as error:
            raise DataError(
                f"{self.folder / file}: tensor {name} cannot be read ({error}). Download the file again."
            ) from None
