"""Checkpoints of Muon: each parameter with its own states, in any layout, and from rule to rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.examine import (
    compare_checkpoints,
    reshard_checkpoint,
    verify_checkpoint,
)
from megatron_completep.errors import CheckpointError
from megatron_completep.parallel.context import ParallelContext
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.ranks import context_on

MUON: dict[str, Any] = {"type": "muon", "muon": {"base_lr": 0.02, "precision": "master"}}
MATRIX = "layers.1.attention.qkv.weight"


def run_in(folder: Path | str, context: ParallelContext | None = None, **sections: Any) -> TinyRun:
    sections = {"optimizer": MUON, **sections}
    return TinyRun(checkpointed_config(folder, **sections), context)


def step_folder(folder: Path, step: int = 2) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def trained(folder: Path, **sections: Any) -> StoredCheckpoint:
    """The checkpoint of a run of two steps."""
    run = run_in(folder, **sections)
    run.train(2)
    run.save()
    return StoredCheckpoint.open(step_folder(folder))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    training = {"precision": precision}
    whole = run_in(tmp_path, training=training)
    whole.train(2)
    whole.save()
    expected = whole.train(2)
    resumed = run_in(tmp_path, training=training)
    assert resumed.resume() and resumed.train(2) == expected
    assert resumed.bits() == whole.bits()
    without = run_in(tmp_path, training=training)
    without.resume()
    without.optimizer.states["momentum"].zero_()
    assert without.train(2) != expected  # the control: the momentum matters


def test_a_parameter_is_stored_with_the_states_that_it_has(tmp_path: Path) -> None:
    stored = trained(tmp_path / "run")
    manifest = stored.manifest
    assert manifest.states == {"master": 1, "momentum": -1, "exp_avg": -1, "exp_avg_sq": -2}
    assert manifest.states_of(MATRIX) == ["master", "momentum"]
    assert manifest.states_of("embedding.weight") == ["master", "exp_avg", "exp_avg_sq"]
    assert stored.tensor(MATRIX, "momentum").any()
    with pytest.raises(CheckpointError, match=f"no tensor exp_avg/{MATRIX}"):
        stored.tensor(MATRIX, "exp_avg")
    written = sum(path.stat().st_size for path in stored.folder.glob("*.safetensors"))
    assert manifest.stored_bytes <= written < manifest.stored_bytes + 30_000
    again = reshard_checkpoint(stored.folder, tmp_path / "again", 3)
    assert verify_checkpoint(again) == []
    assert compare_checkpoints(stored.folder, again)[1] == []


LAYOUTS: dict[str, dict[str, Any]] = {
    "data 4": {"bucket_megabytes": 0.002},
    "tensor 2, data 2": {"tensor_parallel_size": 2},
}


def resumed_states(rank: int, folder: str, layout: dict[str, Any], steps: int) -> list[float]:
    """Resume in the process group at hand, train some steps and save."""
    training = {"micro_batch_size": 1}
    config = checkpointed_config(folder, parallel=layout, training=training, optimizer=MUON)
    run = TinyRun(config, context_on(rank, config.parallel))
    run.resume()
    losses = run.train(steps)
    run.save()
    run.checkpointer.close()
    return losses


def test_checkpoints_move_between_layouts(pool: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    pool.run(4, resumed_states, str(folder), LAYOUTS["data 4"], 2)
    first = StoredCheckpoint.open(step_folder(folder))
    # Loaded in another layout and saved again after no step, every number is the same.
    other = tmp_path / "other"
    reshard_checkpoint(first.folder, other / "checkpoints", 3)
    pool.run(4, resumed_states, str(other), LAYOUTS["tensor 2, data 2"], 0)
    assert compare_checkpoints(first.folder, step_folder(other))[1] == []
    # And the next steps are those of one process.
    alone = run_in(tmp_path / "alone")
    expected = [alone.train(2), alone.train(2)]
    seen = pool.run(4, resumed_states, str(folder), LAYOUTS["tensor 2, data 2"], 2)
    assert seen[0] == pytest.approx(expected[1], rel=1e-4)


def test_a_checkpoint_of_the_other_rule_is_refused_with_one_message(tmp_path: Path) -> None:
    trained(tmp_path / "adamw", optimizer={})
    trained(tmp_path / "muon")
    for name, optimizer, keeps in (
        ("adamw", MUON, "exp_avg, exp_avg_sq, master, momentum"),
        ("muon", {}, "exp_avg, exp_avg_sq, master"),
    ):
        with pytest.raises(CheckpointError, match=rf"keeps {keeps}\..*checkpoint.py adapt"):
            run_in(tmp_path / name, optimizer=optimizer).resume()


def adapted(stored: StoredCheckpoint, folder: Path, optimizer: dict[str, Any]) -> StoredCheckpoint:
    config = checkpointed_config(folder, optimizer=optimizer)
    made, _ = adapt_checkpoint(stored.folder, config, folder / "checkpoints")
    return StoredCheckpoint.open(made)


def test_adapt_makes_the_first_moment_the_momentum(tmp_path: Path) -> None:
    stored = trained(tmp_path / "adamw", optimizer={})
    made = adapted(stored, tmp_path / "muon", MUON)
    assert torch.equal(made.tensor(MATRIX, "momentum"), stored.tensor(MATRIX, "exp_avg"))
    for state in ("master", "exp_avg", "exp_avg_sq"):
        name = "embedding.weight"
        assert torch.equal(made.tensor(name, state), stored.tensor(name, state))
    assert made.manifest.updates == 2
    run = run_in(tmp_path / "muon")
    assert run.resume() and run.state.step == 2
    run.train(1)


def test_adapt_begins_the_moments_anew_where_the_second_one_is_missing(tmp_path: Path) -> None:
    stored = trained(tmp_path / "muon")
    made = adapted(stored, tmp_path / "adamw", {})
    assert torch.equal(made.tensor(MATRIX), stored.tensor(MATRIX))
    for name in (MATRIX, "embedding.weight"):
        assert not made.tensor(name, "exp_avg").any() and not made.tensor(name, "exp_avg_sq").any()
    # The corrections of the bias begin anew with them, while the run goes on where it was.
    assert (made.manifest.updates, made.manifest.step) == (0, 2)
    run = run_in(tmp_path / "adamw", optimizer={})
    assert run.resume()
    before = run.model.state_dict()[MATRIX].clone()
    run.train(1)
    rate = 1e-2 * 9 / 10 / 2  # the schedule's third step, at m_N = 2
    moved = (run.model.state_dict()[MATRIX] - before).abs().max().item()
    assert moved == pytest.approx(rate, rel=0.2)


def test_a_state_that_the_manifest_does_not_list_for_a_parameter_is_damage(tmp_path: Path) -> None:
    stored = trained(tmp_path / "muon")
    parameters = dict(stored.manifest.parameters)
    parameters[MATRIX] = parameters[MATRIX].model_copy(update={"states": ["master"]})
    wrong = stored.manifest.model_copy(update={"parameters": parameters})
    boxes = [box for group in stored._by_name.values() for box in group]
    with pytest.raises(CheckpointError, match=f"momentum/{MATRIX}: stored, but not listed"):
        StoredCheckpoint.checked(stored.folder, wrong, boxes)
