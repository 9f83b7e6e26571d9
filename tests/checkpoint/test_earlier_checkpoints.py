"""Checkpoints of earlier versions,
which did not list the states of their update rule, go on to work.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.examine import (
    compare_checkpoints,
    reshard_checkpoint,
    verify_checkpoint,
)
from megatron_completep.checkpoint.manifest import MANIFEST, read_manifest, seal
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from tests.support.checkpoints import TinyRun, checkpointed_config

EARLIER = Path(__file__).parent / "fixtures" / "earlier_run" / "checkpoints" / "step_00000003"
SHAPE = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "ffn_hidden_size": 8,
    "vocab_size": 13,
    "seq_length": 8,
}
PROXY = {"base_hidden_size": 4, "base_num_layers": 1}
# Of the three steps that the earlier version made next.
LOSSES = [2.566470146179199, 2.5656139850616455, 2.5543344020843506]
WEIGHTS_AND_ADAMW = {"master": 1, "exp_avg": -1, "exp_avg_sq": -2}


def config_in(folder: Path, **changes: dict) -> Config:
    return checkpointed_config(folder, **{"model": SHAPE, "completep": PROXY, **changes})


def copied_to(folder: Path) -> Path:
    """The earlier checkpoint as the newest of a run in `folder`."""
    return Path(shutil.copytree(EARLIER, folder / "checkpoints" / EARLIER.name))


def test_a_checkpoint_without_a_list_of_states_holds_those_of_adamw() -> None:
    assert '"states"' not in (EARLIER / MANIFEST).read_text()
    assert read_manifest(EARLIER).states == WEIGHTS_AND_ADAMW
    assert verify_checkpoint(EARLIER) == []
    checkpoint = StoredCheckpoint.open(EARLIER)
    for state in WEIGHTS_AND_ADAMW:
        assert checkpoint.tensor("embedding.weight", state).abs().sum() > 0
    with pytest.raises(CheckpointError, match=r"no tensor momentum/embedding\.weight"):
        checkpoint.tensor("embedding.weight", "momentum")


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    copied_to(tmp_path)
    run = TinyRun(config_in(tmp_path))
    assert run.resume() and run.state.step == 3
    changed = [line for line in run.messages if "resuming with" in line]
    # The default of one setting is another one since.
    assert [line for line in changed if "output_dir" not in line] == [
        'resuming with model.attention_backend = "auto", the checkpoint has "sdpa"'
    ]
    assert run.train(3) == pytest.approx(LOSSES, rel=1e-5)


def test_a_resume_without_the_earlier_moments_goes_elsewhere(tmp_path: Path) -> None:
    """Negative control: the losses tell whether the states arrived."""
    copied_to(tmp_path)
    run = TinyRun(config_in(tmp_path))
    run.resume()
    for state in run.optimizer.rule.states.values():
        state.zero_()
    assert run.train(3) != pytest.approx(LOSSES, rel=1e-5)


def test_the_next_checkpoint_lists_its_states_and_holds_the_same_values(tmp_path: Path) -> None:
    copied_to(tmp_path / "old")
    run = TinyRun(config_in(tmp_path / "old"))
    run.resume()
    shutil.rmtree(tmp_path / "old" / "checkpoints" / EARLIER.name)
    run.save()
    written = tmp_path / "old" / "checkpoints" / EARLIER.name
    assert '"states"' in (written / MANIFEST).read_text()
    assert read_manifest(written).states == WEIGHTS_AND_ADAMW
    assert compare_checkpoints(EARLIER, written)[1] == []


def test_an_earlier_checkpoint_is_resharded_and_adapted(tmp_path: Path) -> None:
    resharded = reshard_checkpoint(EARLIER, tmp_path / "resharded", 3)
    assert compare_checkpoints(EARLIER, resharded)[1] == []
    config = config_in(tmp_path / "adapted", model={**SHAPE, "input_multiplier": 2.0})
    adapted, _ = adapt_checkpoint(EARLIER, config, tmp_path / "adapted" / "checkpoints")
    before, after = StoredCheckpoint.open(EARLIER), StoredCheckpoint.open(adapted)
    for state, power in WEIGHTS_AND_ADAMW.items():
        scaled = before.tensor("embedding.weight", state) * 0.5**power
        assert torch.equal(after.tensor("embedding.weight", state), scaled)


def test_a_manifest_with_states_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    folder = copied_to(tmp_path)
    for states, said in (
        ({"master": 1, "momentum": -1}, "momentum/embedding.weight: parts of 0 of"),
        ({"master": 1}, "state exp_avg: stored, but not listed in the manifest"),
    ):
        changed = read_manifest(EARLIER).model_copy(update={"states": states})
        (folder / MANIFEST).write_bytes(seal(changed))
        with pytest.raises(CheckpointError, match=said):
            StoredCheckpoint.open(folder)
    (folder / MANIFEST).write_bytes(
        seal(read_manifest(EARLIER).model_copy(update={"states": {"exp_avg": -1}}))
    )
    with pytest.raises(CheckpointError, match="without master there are no weights"):
        read_manifest(folder)
