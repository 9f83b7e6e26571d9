"""What tools/checkpoint.py does: list, describe, verify, compare and rewrite checkpoints, without a model or a process group."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_completep.checkpoint.boxes import Box
from megatron_completep.checkpoint.compare import Difference, differences
from megatron_completep.checkpoint.files import (
    BLOCK_SIZE,
    DTYPES,
    CheckedFile,
    key_of,
    write_tensor_file,
)
from megatron_completep.checkpoint.load import StoredCheckpoint
from megatron_completep.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    committed_steps,
    folder_name,
    not_counted,
    read_manifest,
    seal,
)
from megatron_completep.checkpoint.save import check_space
from megatron_completep.errors import CheckpointError
from megatron_completep.files import new_folder, write_whole


def checkpoints_of(run: Path) -> Path:
    """The folder of checkpoints of a run, which may be given itself. Raises CheckpointError."""
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and (folder.name == "checkpoints" or committed_steps(folder)):
            return folder
    raise CheckpointError(
        f"{run}: no checkpoints. Give a run's output_dir, which holds checkpoints/step_NNNNNNNN/."
    )


def checkpoint_at(path: Path) -> Path:
    """A checkpoint's folder, given itself or as the run whose newest is meant. Raises CheckpointError."""
    if (path / MANIFEST).exists():
        return path
    folders = committed_steps(checkpoints_of(path))
    if not folders:
        raise CheckpointError(f"{path}: no committed checkpoint.")
    return folders[max(folders)]


def list_checkpoints(run: Path) -> list[dict[str, Any]]:
    """One row for whatever is named like a checkpoint, lowest step first; `problem` is null where the manifest is whole."""
    rows = []
    checkpoints = checkpoints_of(run)
    no_checkpoints = not_counted(checkpoints)
    for step in sorted({*committed_steps(checkpoints), *no_checkpoints}):
        folder = checkpoints / folder_name(step)
        row: dict[str, Any] = {
            "step": step,
            "folder": str(folder),
            "bytes": None,
            "files": None,
            "layout": None,
            "tokens": None,
        }
        rows.append(row)
        if step in no_checkpoints:
            row["problem"] = no_checkpoints[step]
            continue
        try:
            manifest = read_manifest(folder)
            row |= {
                "bytes": manifest.total_size,
                "files": len(manifest.files),
                "layout": manifest.layout,
            }
            row |= {"tokens": manifest.state.tokens, "problem": None}
        except CheckpointError as error:
            row["problem"] = str(error)
    return rows


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint knows, without its values and generator states."""
    manifest = StoredCheckpoint.open(folder).manifest
    value = manifest.model_dump(mode="json", exclude={"rng", "files"})
    files = [{"name": file.name, "bytes": file.size} for file in manifest.files]
    return {"folder": str(folder), **value, "files": files, "bytes": manifest.total_size}


def verify_checkpoint(folder: Path) -> list[str]:
    """Everything that is wrong: manifest, sizes, every hash, headers, missing parts, files that do not belong."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for stored in manifest.files:
        try:
            with CheckedFile(folder, stored, manifest.block_size) as file:
                file.check_all()
        except CheckpointError as error:
            problems.append(str(error))
    known = {file.name for file in manifest.files} | {MANIFEST}
    problems += [
        f"{folder / name}: does not belong to the checkpoint"
        for name in sorted(set(os.listdir(folder)) - known)
    ]
    if not problems:
        try:
            StoredCheckpoint.open(folder)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def compare_checkpoints(first: Path, second: Path) -> tuple[list[Difference], list[dict[str, Any]]]:
    """Settings that differ, and tensors that differ with the largest absolute difference (null: shapes differ or one lacks it)."""
    left, right = StoredCheckpoint.open(first), StoredCheckpoint.open(second)
    settings = differences(_settings(left.manifest), _settings(right.manifest))
    rows: list[dict[str, Any]] = []
    for name in sorted(left.manifest.parameters.keys() | right.manifest.parameters.keys()):
        here, there = left.manifest.parameters.get(name), right.manifest.parameters.get(name)
        if here is None or there is None or here.shape != there.shape:
            rows.append({"tensor": name, "largest_difference": None})
            continue
        for state in left.manifest.states:
            if state not in right.manifest.states:
                continue  # the settings say so
            a, b = left.tensor(name, state), right.tensor(name, state)
            if not torch.equal(a, b):
                rows.append(
                    {
                        "tensor": f"{state}/{name}",
                        "largest_difference": (a.double() - b.double()).abs().max().item(),
                    }
                )
    return settings, rows


def _settings(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "updates": manifest.updates,
        "state": manifest.state.model_dump(),
        "config": manifest.config,
        "table": manifest.table,
        "fingerprints": manifest.fingerprints,
        "layout": manifest.layout,
        "states": manifest.states,
        "parameters": {
            name: [p.role, p.width_ratio, p.shape] for name, p in manifest.parameters.items()
        },
    }


Rows = Callable[
    [str, str, int, int], torch.Tensor
]  # state, name, first row, row after the last -> values


def reshard_checkpoint(folder: Path, output: Path, count: int) -> Path:
    """Write the same checkpoint again as `count` files under `output`. Values, step and settings stay; readers cannot tell the difference.

    Raises CheckpointError: damaged source, no space, or the target exists.
    """
    stored = StoredCheckpoint.open(folder)
    return rewrite_checkpoint(stored.manifest, output, count, stored.rows)


def rewrite_checkpoint(manifest: Manifest, output: Path, count: int, rows: Rows) -> Path:
    """Commit a checkpoint with this manifest as `count` files under `output`, rows of every tensor shared out evenly among them.

    Needs memory for one file at a time. Raises CheckpointError: no space, or the target exists.
    """
    target = output / folder_name(manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} exists. Choose another folder.")
    sizes = (DTYPES[p.dtype].itemsize * math.prod(p.shape) for p in manifest.parameters.values())
    try:
        with new_folder(target) as temporary:
            check_space(output, len(manifest.states) * sum(sizes))
            files = []
            for part in range(count):
                tensors = list(_share(manifest, rows, part, count))
                if tensors:
                    dtype = next(iter(manifest.parameters.values())).dtype
                    metadata = {
                        "format": "pt",
                        "step": str(manifest.step),
                        "attempt": manifest.attempt,
                    }
                    path = temporary / f"part_{part:05d}_of_{count:05d}.safetensors"
                    files.append(write_tensor_file(path, tensors, dtype, metadata))
            rewritten = manifest.model_copy(
                update={"files": files, "block_size": BLOCK_SIZE, "run": None}
            )
            write_whole(temporary / MANIFEST, seal(rewritten))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or target} cannot be written: {error.strerror or error}. Choose another folder, or free some space."
        ) from None
    return target


def _share(
    manifest: Manifest, rows: Rows, part: int, count: int
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """The tensors of one file: rows [part, part + 1) / count of every one."""
    for state in manifest.states:
        for name, parameter in manifest.parameters.items():
            start, stop = (
                parameter.shape[0] * part // count,
                parameter.shape[0] * (part + 1) // count,
            )
            if start < stop:
                values = rows(state, name, start, stop).contiguous()
                box = Box((start, *[0] * (values.dim() - 1)), tuple(values.shape))
                yield key_of(state, name, box), box.sizes, values.numpy()
