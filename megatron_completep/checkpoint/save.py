"""Writing a checkpoint: stage, write, hash, commit.

Every attempt has a fresh folder whose name starts with a dot. It becomes a checkpoint by one rename, after its files, its
manifest and the folder itself are on disk; whatever stops a save before that leaves the older checkpoints as they are.
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
    """Host copies of the flat states, so that training may go on while they are written. Kept from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in page-locked memory for a GPU, waiting for them."""
        for name, flat in flats.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(
                    flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda
                )
            self._buffers[name].copy_(flat, non_blocking=True)
        if any(flat.is_cuda for flat in flats.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers


def check_space(folder: Path, needed: int) -> None:
    """CheckpointError, with the bytes needed and free, when a checkpoint does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed + MARGIN_BYTES > free:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {size_text(needed + MARGIN_BYTES)} ({size_text(MARGIN_BYTES)} of it a reserve), "
            f"{size_text(free)} are free. "
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
    """Write and commit a checkpoint together with all ranks; `content` are the manifest's fields that are known beforehand.

    leads: this rank creates and commits the folder; of the ranks that see the same `checkpoints`, one does. All manifests are
    alike, whatever the number of places. Runs in the training thread or in one of its own. Raises CheckpointError, the same on
    every rank; then nothing is left behind. work: hears of every piece that is written.
    """
    content = exchange.broadcast({**content, "attempt": secrets.token_hex(4)})
    folder = checkpoints / f".{folder_name(content['step'])}.{content['attempt']}"
    try:
        exchange.together(lambda: folder.mkdir(parents=True) if leads else None)
        fail_point("save.folder_created")
        records = work.done(
            _write_part(folder, exchange, shard, flats, content, fail_point, work.goes_on)
        )
        fail_point("save.hashes_exchanged")
        problems = {rank: r["problem"] for rank, r in enumerate(records) if "problem" in r}
        if problems:
            raise CheckpointError(
                f"step {content['step']} is not saved: {join_problems(problems, exchange.size)}"
            )
        exchange.together(lambda: _commit(folder, records, content, fail_point) if leads else None)
        fail_point("save.committed")
        return checkpoints / folder_name(content["step"])
    except CheckpointError:
        if leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_part(
    folder: Path,
    exchange: Exchange,
    shard: Shard,
    flats: Mapping[str, Tensor],
    content: dict,
    fail_point: FailPoint,
    progress: Callable,
) -> dict:
    """This rank's file. Returns its record, or what went wrong: the others must hear of it either way."""
    if not shard.written:
        return {}
    path = folder / f"rank_{exchange.rank:05d}_of_{exchange.size:05d}.safetensors"
    try:
        tensors = []
        for state in shard.states:
            for held in shard.written:
                values = _values(view_of(flats[state], held))
                tensors.append((key_of(state, held.name, held.box), held.box.sizes, values))
        metadata = {"format": "pt", "step": str(content["step"]), "attempt": content["attempt"]}
        stored = write_tensor_file(path, tensors, shard.dtype, metadata, fail_point, progress)
        return {"file": stored.model_dump(), "elements": sum(o.box.numel for o in shard.written)}
    except (OSError, CheckpointError) as error:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return {
            "problem": f"{path}: {describe(error)} ({size_text(shard.written_bytes)} to write, {size_text(free)} free)"
        }


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _commit(
    folder: Path, records: list[dict], content: dict[str, Any], fail_point: FailPoint
) -> str:
    files = [StoredFile.model_validate(r["file"]) for r in records if "file" in r]
    elements = sum(r.get("elements", 0) for r in records)
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
    sync_folder(folder)
    fail_point("save.before_rename")
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
    """A folder of this step stands already (another trajectory, or a damaged one): it moves away until the new one is in place."""
    if not os.path.lexists(target):
        return None
    replaced = target.with_name(f".replaced.{target.name}.{secrets.token_hex(4)}")
    os.rename(target, replaced)
    return replaced


def clean_up(checkpoints: Path) -> list[str]:
    """Remove what interrupted saves left, and put back a checkpoint that had just been moved away. Only under the run's lock.

    What a tool is writing there at the moment stays. Returns what is to be said about it.
    """
    said = []
    for entry in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        if entry.name.startswith(".replaced.step_"):
            target = checkpoints / entry.name.split(".")[2]
            if not target.exists() and _is_whole(entry):
                os.rename(entry, target)
                continue
        remainder = entry.name.startswith((".step_", ".replaced.step_", ".removing.step_"))
        if remainder and entry.is_dir() and not entry.is_symlink() and not is_being_filled(entry):
            shutil.rmtree(entry, ignore_errors=True)
            gone = not entry.exists()
            said.append(
                f"removed {entry.name}, left by an interrupted save"
                if gone
                else f"{entry} cannot be removed. Remove it by hand."
            )
    return said


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def jsonable(value: Any) -> Any:
    """A value as it will be read back, so that comparing it with what was read means something."""
    return json.loads(json.dumps(value, default=str))
