"""What tools/checkpoint.py does: list, describe, verify, compare and rewrite checkpoints.

None of it needs a model or a process group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_completep.checkpoint.compare import Difference, differences
from megatron_completep.checkpoint.files import (
    BLOCK_SIZE,
    CheckedFile,
    NamedArray,
    key_of,
    write_tensor_file,
)
from megatron_completep.checkpoint.load import StoredCheckpoint
from megatron_completep.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFile,
    committed_steps,
    folder_name,
    not_counted,
    read_manifest,
    seal,
)
from megatron_completep.checkpoint.save import check_space
from megatron_completep.errors import CheckpointError
from megatron_completep.files import new_folder, write_whole
from megatron_completep.optim.boxes import Box


def checkpoints_of(run: Path) -> Path:
    """The folder of checkpoints of a run. Raises CheckpointError where there is none.

    run: the run's output_dir, or that folder itself.
    """
    # An empty folder of this name is one as well: a run that has not saved yet.
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and (folder.name == "checkpoints" or committed_steps(folder)):
            return folder
    raise CheckpointError(
        f"{run}: no checkpoints. Give a run's output_dir, which holds checkpoints/step_NNNNNNNN/."
    )


def checkpoint_at(path: Path) -> Path:
    """The folder of a checkpoint. Raises CheckpointError where there is none.

    path: the folder itself, or a run, whose newest checkpoint is meant.
    """
    if (path / MANIFEST).exists():
        return path
    folders = committed_steps(checkpoints_of(path))
    if not folders:
        raise CheckpointError(f"{path}: no committed checkpoint.")
    return folders[max(folders)]


def list_checkpoints(run: Path) -> list[dict[str, Any]]:
    """One row for each entry that is named like a checkpoint, lowest step first.

    `problem` is null where the manifest can be read; otherwise the other fields are.
    """
    checkpoints = checkpoints_of(run)
    no_checkpoints = not_counted(checkpoints)
    rows = []
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
        # The manifest alone, as a list of many large checkpoints must come at once.
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            row["problem"] = str(error)
            continue
        row["bytes"] = manifest.total_size
        row["files"] = len(manifest.files)
        row["layout"] = manifest.layout
        row["tokens"] = manifest.state.tokens
        row["problem"] = None
    return rows


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without hashes and generator states."""
    manifest = StoredCheckpoint.open(folder).manifest
    fields = manifest.model_dump(mode="json", exclude={"rng", "files"})
    files = [{"name": file.name, "bytes": file.size} for file in manifest.files]
    return {"folder": str(folder), **fields, "files": files, "bytes": manifest.total_size}


def verify_checkpoint(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one problem a line.

    Checks the manifest, sizes, every hash, headers, that no element is missing, and that no other
    file lies in the folder.
    """
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
    listed = {file.name for file in manifest.files} | {MANIFEST}
    for name in sorted(set(os.listdir(folder)) - listed):
        problems.append(f"{folder / name}: does not belong to the checkpoint")
    # Whether elements are missing can be told only where the files themselves are sound.
    if not problems:
        try:
            StoredCheckpoint.open(folder)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def compare_checkpoints(
    folder_a: Path, folder_b: Path
) -> tuple[list[Difference], list[dict[str, Any]]]:
    """The settings that differ, and the tensors that differ, each with the largest difference.

    The difference is null where the shapes differ or one checkpoint lacks the tensor.
    """
    stored_a = StoredCheckpoint.open(folder_a)
    stored_b = StoredCheckpoint.open(folder_b)
    parameters_a = stored_a.manifest.parameters
    parameters_b = stored_b.manifest.parameters
    settings = differences(_settings(stored_a.manifest), _settings(stored_b.manifest))
    rows: list[dict[str, Any]] = []
    for name in sorted(parameters_a.keys() | parameters_b.keys()):
        parameter_a = parameters_a.get(name)
        parameter_b = parameters_b.get(name)
        # Whatever the roles: those are among the settings.
        if parameter_a is None or parameter_b is None or parameter_a.shape != parameter_b.shape:
            rows.append({"tensor": name, "largest_difference": None})
            continue
        # One pair of tensors is in memory at a time.
        for state in stored_a.manifest.states_of(name):
            # States that only one of them has are among the settings that differ.
            if state not in stored_b.manifest.states_of(name):
                continue
            tensor_a = stored_a.tensor(name, state)
            tensor_b = stored_b.tensor(name, state)
            if not torch.equal(tensor_a, tensor_b):
                largest = (tensor_a.double() - tensor_b.double()).abs().max().item()
                rows.append({"tensor": f"{state}/{name}", "largest_difference": largest})
    return settings, rows


def _settings(manifest: Manifest) -> dict[str, Any]:
    """What two checkpoints are compared by, besides their tensors."""
    parameters = {}
    for name, parameter in manifest.parameters.items():
        parameters[name] = [parameter.role, parameter.width_ratio, parameter.shape]
    return {
        "step": manifest.step,
        "updates": manifest.updates,
        "state": manifest.state.model_dump(),
        "config": manifest.config,
        "table": manifest.table,
        "fingerprints": manifest.fingerprints,
        "layout": manifest.layout,
        "states": manifest.states,
        "parameters": parameters,
    }


# (state, name, first row, row after the last) -> these rows of the tensor.
Rows = Callable[[str, str, int, int], torch.Tensor]


def reshard_checkpoint(folder: Path, output: Path, count: int) -> Path:
    """Write the same checkpoint again as `count` files under `output`; returns its folder.

    Tensors, step and settings stay, so that readers cannot tell the difference. Raises
    CheckpointError: damaged source, no space, or the target exists.
    """
    stored = StoredCheckpoint.open(folder)
    return rewrite_checkpoint(stored.manifest, output, count, stored.rows)


def rewrite_checkpoint(manifest: Manifest, output: Path, count: int, rows: Rows) -> Path:
    """Commit a checkpoint with this manifest as `count` files under `output`; returns its folder.

    The rows of every tensor are shared out evenly among the files, one of which must fit in memory.
    Raises CheckpointError: no space, or the target exists.
    """
    target = output / folder_name(manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} exists. Choose another folder.")
    try:
        # A folder of another name until all of it is written.
        with new_folder(target) as temporary:
            check_space(output, manifest.stored_bytes)
            files = _write_files(temporary, manifest, count, rows)
            # A snapshot becomes a checkpoint of no run in particular.
            changes = {"files": files, "block_size": BLOCK_SIZE, "run": None}
            write_whole(temporary / MANIFEST, seal(manifest.model_copy(update=changes)))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or target} cannot be written: {error.strerror or error}. "
            "Choose another folder, or free some space."
        ) from None
    return target


def _write_files(folder: Path, manifest: Manifest, count: int, rows: Rows) -> list[StoredFile]:
    """Write the tensors as `count` files, fewer where there are fewer rows."""
    dtype = next(iter(manifest.parameters.values())).dtype
    metadata = {"format": "pt", "step": str(manifest.step), "attempt": manifest.attempt}
    files = []
    for number in range(count):
        tensors = list(_share(manifest, rows, number, count))
        if tensors:
            path = folder / f"part_{number:05d}_of_{count:05d}.safetensors"
            files.append(write_tensor_file(path, tensors, dtype, metadata))
    return files


def _share(manifest: Manifest, rows: Rows, number: int, count: int) -> Iterator[NamedArray]:
    """The tensors of one file: rows [number, number + 1) / count of each."""
    for state in manifest.states:
        for name, parameter in manifest.parameters.items():
            if state not in manifest.states_of(name):
                continue
            row_count = parameter.shape[0]
            start = row_count * number // count
            stop = row_count * (number + 1) // count
            # Fewer rows than files.
            if start == stop:
                continue
            tensor = rows(state, name, start, stop).contiguous()
            box = Box((start, *[0] * (tensor.dim() - 1)), tuple(tensor.shape))
            yield key_of(state, name, box), box.sizes, tensor.numpy()
