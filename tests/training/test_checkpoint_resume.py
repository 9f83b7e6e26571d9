"""A run that was saved and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import pytest
import torch
from checkpoint_helpers import TinyRun, tiny_config
from safetensors import safe_open

from megatron_completep.errors import CheckpointError
from megatron_completep.training.checkpoint import StoredCheckpoint


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
@pytest.mark.parametrize("async_save", [False, True])
def test_resumed_run_continues_bit_for_bit(tmp_path, precision, async_save):
    config = tiny_config(tmp_path, training={"precision": precision}, checkpoint={"async_save": async_save})
    whole = TinyRun(config)
    expected = whole.train(3)
    whole.save()
    expected += whole.train(3)  # while an asynchronous save may still be writing
    whole.checkpointer.close()
    resumed = TinyRun(config)
    assert resumed.resume() and resumed.state.step == 3 and resumed.state.consumed_samples == 12
    assert expected[3:] == resumed.train(3)
    assert resumed.bits() == whole.bits()


def test_without_the_moments_the_resumed_run_differs(tmp_path):
    """The negative control: the comparison above can fail."""
    config = tiny_config(tmp_path)
    whole = TinyRun(config)
    whole.train(3)
    whole.save()
    expected = whole.train(3)
    resumed = TinyRun(config)
    resumed.resume()
    resumed.optimizer.exp_avg.mul_(1 + 1e-6)
    assert expected != resumed.train(3)


def test_files_are_ordinary_safetensors_of_logical_tensors(tmp_path):
    config = tiny_config(tmp_path)
    run = TinyRun(config)
    run.train(1)
    run.save()
    folder = tmp_path / "checkpoints" / "step_00000001"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank_00000_of_00001.safetensors"]
    with safe_open(folder / "rank_00000_of_00001.safetensors", "pt") as file:
        embedding = file.get_tensor("master/embedding.weight@0,0")
        gain = file.get_tensor("exp_avg/final_norm.weight@0")
    assert embedding.shape == (61, 16)  # padding rows are not stored
    assert torch.equal(embedding, run.model.embedding.weight[:61])
    assert gain.shape == (16,) and gain.abs().sum() > 0
    assert torch.equal(StoredCheckpoint.open(folder).tensor("embedding.weight"), embedding)


def test_newest_is_the_highest_step_and_retention_keeps_what_it_should(tmp_path):
    config = tiny_config(tmp_path, checkpoint={"async_save": False, "interval": 1, "keep": 2, "keep_every": 3})
    run = TinyRun(config)
    for _ in range(7):
        run.train(1)
        run.save()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000007"]
    (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").touch()  # times mean nothing
    resumed = TinyRun(config)
    resumed.resume()
    assert resumed.state.step == 7


def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path):
    run = TinyRun(tiny_config(tmp_path))
    assert not run.resume() and run.state.step == 0


def test_resume_false_refuses_a_folder_that_holds_checkpoints(tmp_path):
    run = TinyRun(tiny_config(tmp_path))
    run.train(1)
    run.save()
    other = TinyRun(tiny_config(tmp_path, checkpoint={"async_save": False, "resume": False}))
    with pytest.raises(CheckpointError, match=r"step 1.*resume = false"):
        other.resume()


def test_saving_a_step_again_replaces_it(tmp_path):
    config = tiny_config(tmp_path)
    run = TinyRun(config)
    run.train(2)
    run.save()
    run.optimizer.master.mul_(2.0)
    run.save()
    again = TinyRun(config)
    again.resume()
    assert torch.equal(again.optimizer.master, run.optimizer.master)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002"]


def test_a_checkpoint_is_saved_even_where_older_ones_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    config = tiny_config(tmp_path, checkpoint={"async_save": False, "keep": 1, "on_failure": "stop"})
    run = TinyRun(config)
    for _ in range(2):
        run.train(1)
        monkeypatch.setattr("megatron_completep.training.checkpoint.retention.remove_checkpoint", refuse)
        run.save()
    assert any("the checkpoint of step 2 is saved, but older ones could not be removed: " in line for line in run.said)
    again = TinyRun(config)
    assert again.resume() and again.state.step == 2
