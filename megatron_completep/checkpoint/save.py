"""Writing a checkpoint: copy to the host, write and hash, commit.

Every attempt has a fresh folder whose name starts with a dot. It becomes a checkpoint by one
rename, after its files, its manifest and the folder itself are on disk. An interruption before the
rename leaves the older checkpoints untouched.
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
from megatron_completep.optim.rule import MASTER
from megatron_completep.parallel.exchange import Exchange, LongWork, describe, join_problems

# Fault-injection callback, called with the name of each point that a save reaches. Only tests pass
# one that is not a no-op.
FailPoint = Callable[[str], None]

MARGIN_BYTES = 16 << 20  # for headers, the manifest, and metrics that are written meanwhile


class Staging:
    """Host copies of the flat states, so that training can continue while they are written.

    The buffers are kept from save to save.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors to the host, into pinned memory if they are on a GPU.

        The copies are complete on return.
        """
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
            f"(including a reserve of {size_text(MARGIN_BYTES)}), but only {size_text(free)} are "
            "free. Free disk space, lower checkpoint.keep, or use another training.output_dir."
        )


def write_checkpoint(
    checkpoints: Path,
    is_leader: bool,
    exchange: Exchange,
    shard: Shard,
    flats: Mapping[str, Tensor],
    content: dict[str, Any],
    fail_point: FailPoint,
    work: LongWork,
) -> Path:
    """Write and commit a checkpoint together with all ranks; returns its folder.

    It may run in the training thread or in a separate one. Raises CheckpointError, the same on
    every rank, and leaves nothing behind then.

    Args:
        checkpoints: the folder in which the checkpoint is made.
        is_leader: whether this rank creates and commits the folder. Of the ranks that see the same
            `checkpoints`, exactly one does.
        flats: the tensors of the shard's states.
        content: the fields of the manifest that are known beforehand; those of rank 0 are used on
            every rank. Node-local snapshots therefore have the same manifest on every node.
        work: notified of every block that is written, so that a slow writer is not mistaken for a
            dead rank.
    """
    # Rank 0's content and attempt id replace those of every other rank.
    content = exchange.broadcast({**content, "attempt": secrets.token_hex(4)})
    step = content["step"]
    folder = checkpoints / f".{folder_name(step)}.{content['attempt']}"
    try:
        exchange.together(lambda: folder.mkdir(parents=True) if is_leader else None)
        fail_point("save.folder_created")
        own_record = _write_part(folder, exchange, shard, flats, content, fail_point, work.goes_on)
        # Commit only after every rank has reported that its file is on disk, or why it is not.
        records = work.gather_results(own_record)
        fail_point("save.hashes_exchanged")
        problems = {}
        for rank, record in enumerate(records):
            if "problem" in record:
                problems[rank] = record["problem"]
        if problems:
            raise CheckpointError(
                f"step {step} is not saved: {join_problems(problems, exchange.size)}"
            )
        exchange.together(
            lambda: _commit(folder, records, content, fail_point) if is_leader else None
        )
        fail_point("save.committed")
        return checkpoints / folder_name(step)
    except CheckpointError:
        # All ranks raise this error together, so none of them still writes to the folder.
        if is_leader:
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

    Disk errors are returned, not raised, because the other ranks wait for this rank's record.
    """
    if not shard.to_write[MASTER]:
        return {}
    path = folder / f"rank_{exchange.rank:05d}_of_{exchange.size:05d}.safetensors"
    try:
        # State by state, each in memory order, so that adjacent boxes are written in one write.
        tensors = []
        for state in shard.states:
            for owned in shard.to_write[state]:
                array = _array(view_of(flats[state], owned))
                tensors.append((key_of(state, owned.name, owned.box), owned.box.sizes, array))
        metadata = {"format": "pt", "step": str(content["step"]), "attempt": content["attempt"]}
        stored = write_tensor_file(path, tensors, shard.dtype, metadata, fail_point, progress)
    except (OSError, CheckpointError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        space = f"{size_text(shard.bytes_to_write)} to write, {size_text(free)} free"
        return {"problem": f"{path}: {describe(error)} ({space})"}
    elements = sum(owned.box.numel for owned in shard.to_write[MASTER])
    return {"file": stored.model_dump(), "elements": elements}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _commit(
    folder: Path, records: list[dict[str, Any]], content: dict[str, Any], fail_point: FailPoint
) -> str:
    """Write the manifest and rename the folder to its final name, which is returned."""
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
    # Sync the folder before the rename makes it visible as a checkpoint.
    sync_folder(folder)
    fail_point("save.before_rename")
    target = folder.with_name(folder_name(manifest.step))
    replaced = _move_aside(target)
    fail_point("save.older_one_moved")
    # The commit point.
    os.rename(folder, target)
    fail_point("save.renamed")
    sync_folder(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return target.name


def _move_aside(target: Path) -> Path | None:
    """Move an existing folder of the same step aside; returns its new path, or None without one.

    A folder of the same step exists after a rollback, or if its checkpoint was damaged.
    """
    if not os.path.lexists(target):
        return None
    replaced = target.with_name(f".replaced.{target.name}.{secrets.token_hex(4)}")
    os.rename(target, replaced)
    return replaced


def clean_up(checkpoints: Path) -> list[str]:
    """Remove what interrupted saves left, and put back a checkpoint that had been moved away.

    The caller must hold the run's lock. Folders that another tool is currently writing are left
    alone. Returns lines for the user.
    """
    if not checkpoints.is_dir():
        return []
    lines = []
    for entry in sorted(checkpoints.iterdir()):
        if entry.name.startswith(".replaced.step_"):
            step_name = entry.name.split(".")[2]  # of .replaced.STEP_NAME.TOKEN
            target = checkpoints / step_name
            # The save was interrupted between its two renames, before the new folder was in place.
            if not target.exists() and _is_complete(entry):
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
    """Whether the folder's name is one that only unfinished saves and removals use."""
    if not entry.name.startswith((".step_", ".replaced.step_", ".removing.step_")):
        return False
    return entry.is_dir() and not entry.is_symlink()


def _is_complete(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def jsonable(value: Any) -> Any:
    """The value after a JSON round trip, for comparison with values read from a file."""
    return json.loads(json.dumps(value, default=str))
