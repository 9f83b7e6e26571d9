"""What a damaged checkpoint or snapshot leaves behind in a run: nothing.

Everything is read and checked before anything is placed.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint, files
from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.examine import reshard_checkpoint
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.inference.generation import load_model
from tests.checkpoint.layouts import LAYOUTS, build, run, save
from tests.checkpoint.stored_files import change_manifest, manifest_of, use_small_blocks
from tests.support.checkpoints import TinyRun, checkpointed_config

# 384,000 parameters of the ends alone: a file of 4.7 MB, more than one block of hashes
MANY = {"vocab_size": 12_000}


def with_snapshots(folder: Path, async_save: bool = False, **model: int) -> Config:
    checkpoint = {"async_save": async_save, "local_dir": str(folder / "node"), "local_interval": 1}
    return checkpointed_config(folder / "run", model=model, checkpoint=checkpoint)


def snapshot_of(config: Config, steps: int) -> TinyRun:
    """A run that made so many steps, and a snapshot after each."""
    tiny = TinyRun(config)
    for _ in range(steps):
        tiny.train(1)
        tiny.checkpointer.save(tiny.state, local=True)
    tiny.checkpointer.close()
    return tiny


def flip_near_the_end(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    with open(path, "r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1000, 2)
        file.write(bytes([byte ^ 4]))


def generator_states() -> tuple[object, ...]:
    return (
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.get_rng_state().numpy().tobytes(),
    )


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "node").glob("run.*/step_*"))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_damaged_snapshot_leaves_nothing_behind(tmp_path, monkeypatch, async_save):
    model, block_size = MANY, files.BLOCK_SIZE
    if async_save:  # the same with many small blocks
        use_small_blocks(monkeypatch)
        model, block_size = {}, 4096
    config = with_snapshots(tmp_path, async_save, **model)
    trained = snapshot_of(config, 1)
    (folder,) = snapshots(tmp_path)
    # So that whole blocks come before the damaged one.
    assert next(folder.glob("*.safetensors")).stat().st_size > block_size
    whole = TinyRun(config)
    assert whole.resume() and whole.bits() == trained.bits()  # the control: undamaged, it arrives
    flip_near_the_end(folder)
    fresh, damaged = TinyRun(checkpointed_config(tmp_path / "other", model=model)), TinyRun(config)
    before = generator_states()
    assert not damaged.resume()
    assert damaged.bits() == fresh.bits() and generator_states() == before
    assert any(
        "the snapshot of step 1 is not used: " in line and "damaged between bytes" in line
        for line in damaged.messages
    )
    assert damaged.train(2) == fresh.train(2) and damaged.bits() == fresh.bits()
    damaged.save()  # what the load left in the buffers of asynchronous saves is not what is saved
    damaged.checkpointer.close()
    again = TinyRun(config)
    assert again.resume() and again.state.step == 2 and again.bits() == fresh.bits()


def test_generator_states_that_are_none_leave_nothing_behind(tmp_path):
    config = with_snapshots(tmp_path)
    snapshot_of(config, 1)
    (folder,) = snapshots(tmp_path)
    rng = manifest_of(folder)["rng"]
    # Python's and numpy's are whole, torch's comes last
    change_manifest(folder, {"rng": {**rng, "torch": rng["torch"][:400]}})
    fresh, damaged = TinyRun(checkpointed_config(tmp_path / "other")), TinyRun(config)
    before = generator_states()
    assert not damaged.resume()
    assert damaged.bits() == fresh.bits() and generator_states() == before
    assert any(
        "the manifest of step 1 holds no state that this version reads" in line
        for line in damaged.messages
    )


def test_behind_a_damaged_snapshot_the_one_before_arrives_whole(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    config = with_snapshots(tmp_path)
    run_of_two = TinyRun(config)
    expected = []
    for _ in range(2):
        run_of_two.train(1)
        run_of_two.checkpointer.save(run_of_two.state, local=True)
        expected.append(run_of_two.bits())
    flip_near_the_end(snapshots(tmp_path)[1])
    again = TinyRun(config)
    assert again.resume() and again.state.step == 1 and again.bits() == expected[0] != expected[1]


def test_a_damaged_checkpoint_of_the_shared_disk_changes_nothing_in_the_run_that_goes_back_to_it(
    tmp_path, monkeypatch
):
    use_small_blocks(monkeypatch)
    tiny = TinyRun(checkpointed_config(tmp_path))
    for _ in range(2):
        tiny.train(1)
        tiny.save()
    flip_near_the_end(tmp_path / "checkpoints" / "step_00000001")
    before, generators = tiny.bits(), generator_states()
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        tiny.checkpointer.go_back(1)
    assert tiny.bits() == before and generator_states() == generators
    assert (
        tmp_path / "checkpoints" / "step_00000002"
    ).exists()  # nothing was removed for it either


def load_damaged(rank: int, folder: str, model: str, layout: dict) -> tuple[str, bool]:
    """What was said of the damage, and whether this rank's numbers are those from before."""
    optimizer, checkpointer = build(rank, folder, model, layout)
    tensors = (optimizer.shards.flat, *optimizer.states.values(), optimizer.control)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 0.5)
    before = [tensor.clone() for tensor in tensors]
    try:
        checkpointer.load(6)
    except CheckpointError as error:
        return str(error), all(map(torch.equal, tensors, before))
    return "", False


@pytest.mark.parametrize("layout", ["tp2", "copies"])
def test_damage_that_one_rank_sees_leaves_the_numbers_of_all_ranks(pool, tmp_path, layout):
    """Also of those whose part is whole, and of those that would receive a copy."""
    layouts = {
        "tp2": {"world": 2, "tensor_parallel_size": 2},
        "copies": {"world": 2, "optimizer_shard_size": 1},
    }
    run(pool, save, tmp_path, "tied_gpt", LAYOUTS["one"] if layout == "copies" else layouts["tp2"])
    path = sorted(tmp_path.glob("checkpoints/step_00000006/*.safetensors"))[-1]  # the last rank's
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    results = run(pool, load_damaged, tmp_path, "tied_gpt", layouts[layout])
    assert all("damaged between bytes" in said and untouched for said, untouched in results), (
        results
    )


def test_what_is_rewritten_or_evaluated_from_a_damaged_checkpoint_appears_nowhere(tmp_path):
    config = checkpointed_config(tmp_path / "run")
    tiny = TinyRun(config)
    tiny.train(1)
    tiny.save()
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    flip_near_the_end(folder)
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        reshard_checkpoint(folder, tmp_path / "resharded", 2)
    deeper = checkpointed_config(tmp_path / "deeper", model={"num_layers": 3})
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        adapt_checkpoint(folder, deeper, tmp_path / "deeper" / "checkpoints")
    assert not list(tmp_path.glob("resharded/*")) + list(tmp_path.glob("deeper/*/*"))
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        load_model(folder, torch.device("cpu"), torch.float32)


def test_tensors_of_another_shape_are_refused_whatever_is_allowed(tmp_path):
    """Else what the checkpoint lacks would be whatever the memory held."""
    tiny = TinyRun(checkpointed_config(tmp_path))
    tiny.train(1)
    tiny.save()
    wider = TinyRun(
        checkpointed_config(
            tmp_path, model={"ffn_hidden_size": 32}, checkpoint={"allow_changed": ["*"]}
        )
    )
    before = wider.bits()
    with pytest.raises(CheckpointError, match=r"parameters\.layers\.0\.mlp"):
        wider.resume()
    assert wider.bits() == before
    stored = StoredCheckpoint.open(tmp_path / "checkpoints" / "step_00000001")
    masters = wider.optimizer.shards.master
    wanted = [(box, "master", masters) for box in wider.checkpointer._shard.owned["master"]]
    with pytest.raises(CheckpointError, match="holds no tensors of this model's shapes for layers"):
        stored.parts_of(wanted)


def test_a_snapshot_whose_manifest_is_damaged_is_said(tmp_path):
    config = with_snapshots(tmp_path)
    snapshot_of(config, 2)
    path = snapshots(tmp_path)[1] / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 3', 1))
    again = TinyRun(config)
    assert again.resume() and again.state.step == 1
    assert any(
        "a snapshot is not used: " in line and "changed since it was written" in line
        for line in again.messages
    )
    shutil.rmtree(tmp_path / "node")
