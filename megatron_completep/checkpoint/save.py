"""Writing a checkpoint: stage, write, hash, commit.

Every attempt has a fresh folder whose name starts with a dot. It becomes a checkpoint by one
rename, after its files, its manifest and the folder itself are on disk. Whatever stops a save
before that leaves the older checkpoints as they are.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_completep.checkpoint.files import BLOCK_SIZE, key_of, write_tensor_file
from megatron_completep.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFile,
    folder_name,
    read_manifest,
    seal,
)
from megatron_completep.checkpoint.shard import Shard, view_of
from megatron_completep.errors import CheckpointError, size_text
from megatron_completep.files import is_being_filled, sync_folder
from megatron_completep.parallel.exchange import Exchange, LongWork, describe, join_problems

FailPoint = Callable[[str], None]  # called at named places; only tests pass one that does something

MARGIN_BYTES = 16 << 20  # headers, the manifest, and a little for the metrics that go on


class Staging:
    """Host copies of the flat states, so that training may go on while they are written.

    The buffers are kept from save to save.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, complete on return; page-locked for those of a GPU."""
        for name, flat in flats.items():
            if name not in self._buffers:
                pinned = flat.is_cuda
                buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=pinned)
                self._buffers[name] = buffer
            self._buffers[name].copy_(flat, non_blocking=True)
        # All copies run at once, and are waited for together.
        if any(flat.is_cuda for flat in flats.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError, with the bytes needed and free, when a checkpoint does not fit.

    needed: bytes of its tensors.
    """
    free = shutil.disk_usage(folder).free
    needed_with_margin = needed + MARGIN_BYTES
    if needed_with_margin > free:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {size_text(needed_with_margin)} "
            f"({size_text(MARGIN_BYTES)} of it a reserve), {size_text(free)} are free. "
            "Free some, lower checkpoint.keep, or use another training.output_dir."
        )


def write_checkpoint(
    checkpoints: Path,
    leads: bool,
    exchange: Exchange,
    shard: Shard,
    flats: Mapping[str, Tensor],
    content: dict[str, Any],
    fail_point: FailPoint,
    work: LongWork,
) -> Path:
    """Write and commit a checkpoint together with all ranks; returns its folder.

    It may run in the training thread or in one of its own. Raises CheckpointError, the same on
    every rank, and leaves nothing behind then.

    Args:
        checkpoints: the folder in which the checkpoint is made.
        leads: whether this rank creates and commits it; of the ranks that see the same
            `checkpoints`, one does.
        flats: the tensors of the shard's states.
        content: the fields of the manifest that are known beforehand. All places get the same
            manifest.
        work: told of every block that is written, so that no rank takes another for dead.
    """
    content = exchange.broadcast({**content, "attempt": secrets.token_hex(4)})
    step = content["step"]
    folder = checkpoints / f".{folder_name(step)}.{content['attempt']}"
    try:
        exchange.together(lambda: folder.mkdir(parents=True) if leads else None)
        fail_point("save.folder_created")
        own_record = _write_part(folder, exchange, shard, flats, content, fail_point, work.goes_on)
        # Nobody commits before every rank has told that its file is on disk, or why it is not.
        records = work.done(own_record)
        fail_point("save.hashes_exchanged")
        problems = {}
        for rank, record in enumerate(records):
            if "problem" in record:
                problems[rank] = record["problem"]
        if problems:
            raise CheckpointError(
                f"step {step} is not saved: {join_problems(problems, exchange.size)}"
            )
        exchange.together(lambda: _commit(folder, records, content, fail_point) if leads else None)
        fail_point("save.committed")
        return checkpoints / folder_name(step)
    except CheckpointError:
        # Every rank is here, as the error is the same on all: nobody writes to the folder any more.
        if leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_part(
    folder: Path,
    exchange: Exchange,
    shard: Shard,
    flats: Mapping[str, Tensor],
    content: dict[str, Any],
    fail_point: FailPoint,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Write the file of this rank. Returns its record, or what went wrong.

    A disk that fails makes it return too, as the other ranks wait for either.
    """
    if not shard.written:
        return {}
    path = folder / f"rank_{exchange.rank:05d}_of_{exchange.size:05d}.safetensors"
    try:
        # State by state, in the order in which the boxes lie in memory: neighbours are then written
        # at once.
        tensors = []
        for state in shard.states:
            for owned in shard.written:
                array = _array(view_of(flats[state], owned))
                tensors.append((key_of(state, owned.name, owned.box), owned.box.sizes, array))
        metadata = {"format": "pt", "step": str(content["step"]), "attempt": content["attempt"]}
        stored = write_tensor_file(path, tensors, shard.dtype, metadata, fail_point, progress)
    except (OSError, CheckpointError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        space = f"{size_text(shard.written_bytes)} to write, {size_text(free)} free"
        return {"problem": f"{path}: {describe(error)} ({space})"}
    elements = sum(owned.box.numel for owned in shard.written)
    return {"file": stored.model_dump(), "elements": elements}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _commit(
    folder: Path, records: list[dict[str, Any]], content: dict[str, Any], fail_point: FailPoint
) -> str:
    """Write the manifest, and give the folder its name. Returns that name."""
    files = []
    elements = 0
    for record in records:  # a rank that wrote nothing has an empty one
        if "file" in record:
            files.append(StoredFile.model_validate(record["file"]))
            elements += record["elements"]
    manifest = Manifest(**content, block_size=BLOCK_SIZE, files=files, elements=elements)
    data = seal(manifest)
    with open(folder / MANIFEST, "xb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        fail_point("save.manifest_half_written")
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    fail_point("save.manifest_written")
    # The entries of the folder must be on disk before its name promises them.
    sync_folder(folder)
    fail_point("save.before_rename")
    # The one moment at which the checkpoint comes into being.
    target = folder.with_name(folder_name(manifest.step))
    replaced = _make_way(target)
    fail_point("save.older_one_moved")
    os.rename(folder, target)
    fail_point("save.renamed")
    sync_folder(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return target.name


def _make_way(target: Path) -> Path | None:
    """Move a folder of this step away, until the new one is in place; returns where it is then.

    There is one where the run went back, or where the checkpoint was damaged. None: there is none.
    """
    if not os.path.lexists(target):
        return None
    replaced = target.with_name(f".replaced.{target.name}.{secrets.token_hex(4)}")
    os.rename(target, replaced)
    return replaced


def clean_up(checkpoints: Path) -> list[str]:
    """Remove what interrupted saves left, and put back a checkpoint that had been moved away.

    The caller must hold the run's lock. What a tool is writing there at the moment stays. Returns
    lines for the user.
    """
    if not checkpoints.is_dir():
        return []
    lines = []
    for entry in sorted(checkpoints.iterdir()):
        # The save was interrupted between its two renames, and there is no newer folder.
        if entry.name.startswith(".replaced.step_"):
            target = checkpoints / entry.name.split(".")[2]
            if not target.exists() and _is_whole(entry):
                os.rename(entry, target)
                continue
        if not _is_remainder(entry) or is_being_filled(entry):
            continue
        shutil.rmtree(entry, ignore_errors=True)
        if entry.exists():
            lines.append(f"{entry} cannot be removed. Remove it by hand.")
        else:
            lines.append(f"removed {entry.name}, left by an interrupted save")
    return lines


def _is_remainder(entry: Path) -> bool:
    """Whether a folder has a name that only saves and removals under way give."""
    if not entry.name.startswith((".step_", ".replaced.step_", ".removing.step_")):
        return False
    return entry.is_dir() and not entry.is_symlink()


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def jsonable(value: Any) -> Any:
    """The value as JSON will bring it back, so that it can be compared with what was read."""
    return json.loads(json.dumps(value, default=str))
