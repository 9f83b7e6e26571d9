"""After a loss spike the run goes back and leaves the data out, once and for all:
whoever passes there again does the same.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.config import Config
from megatron_completep.data.left_out import LeftOut, first_sample_of, read_left_out, write_left_out
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.guards.spikes import recent_losses
from megatron_completep.pretrain import pretrain
from megatron_completep.run.hook import Hook
from megatron_completep.run.state import ExitCode, RunStopped
from megatron_completep.run.step import PendingFigures, TrainingStep
from megatron_completep.training.hooks import Metrics
from tests.support.runs import rows_of, tiny_config

SETTINGS = (
    *(
        "training.train_steps=18",
        "checkpoint.interval=4",
        "guards.rollback_threshold=2",
        "checkpoint.keep=9",
        "data.validation=null",
    ),
    *("logging.parameterization_interval=null", "training.validation_interval=null"),
)
BAD = 108  # read in step 14, of samples 104 to 111


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of any step that reads one of these samples jump by 5 nats,
    as it is reported.
    """

    def apply(*samples: int) -> None:
        original = TrainingStep.run

        def run(self: TrainingStep, batches: Any, step: int, stop: bool = False) -> PendingFigures:
            pending = original(self, batches, step, stop)
            if any(int(number) in samples for batch in batches for number in batch.sample_ids):
                read = pending.read
                pending.read = lambda: replace(read(), loss=read().loss + 5.0)  # type: ignore[method-assign]
            return pending

        monkeypatch.setattr(TrainingStep, "run", run)

    return apply


@pytest.fixture(scope="module")
def calm(folder: Path) -> Config:
    """The run that no spike comes to."""
    config = tiny_config(folder, *SETTINGS, output="calm")
    assert pretrain(config) == ExitCode.DONE
    return config


def copy_of(config: Config, folder: Path, output: str, after: int) -> Config:
    """A run that stands after step `after` of another one."""
    target = folder / output
    shutil.copytree(config.training.output_dir, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > after:
            shutil.rmtree(checkpoint)
    return tiny_config(folder, *SETTINGS, output=output)


def consumed(config: Config) -> dict[int, int]:
    return {row["step"]: row["consumed_samples"] for row in rows_of(config)}


def test_a_spike_takes_the_run_back_and_its_data_are_left_out(
    folder: Path, calm: Config, poison: Any, monkeypatch: Any
) -> None:
    poison(BAD)
    config = copy_of(calm, folder, "back", after=8)
    assert pretrain(config) == ExitCode.DONE
    rows, undisturbed = rows_of(config), rows_of(calm)
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert not any("loss_spike" in row for row in rows)
    assert rows[:12] == undisturbed[:12]
    # 96-111 are left out
    assert consumed(config) == {step: 8 * step + (16 if step > 12 else 0) for step in range(1, 19)}
    entries = read_left_out(Path(config.training.output_dir))
    assert entries == [LeftOut(12, 96, 112, 14)]

    # The same by hand: a run that resumes there and is told where the data go on.
    original = Checkpointer.load_latest
    monkeypatch.setattr(
        Checkpointer, "load_latest", lambda self: replace(original(self), consumed_samples=112)
    )
    by_hand = copy_of(calm, folder, "by_hand", after=12)
    assert pretrain(by_hand) == ExitCode.DONE
    assert rows_of(by_hand) == rows
    assert rows[12:] != undisturbed[12:]  # which the same data would have given


class Killed(Exception):
    pass


def test_a_kill_after_the_rollback_changes_nothing(
    folder: Path, calm: Config, poison: Any, monkeypatch: Any
) -> None:
    poison(BAD)
    whole = copy_of(calm, folder, "not_killed", after=8)
    pretrain(whole)
    config = copy_of(calm, folder, "killed", after=8)
    again = copy_of(calm, folder, "forgets", after=8)

    def kill(self: Hook, record: Any) -> None:
        original(self, record)
        if record.state.step == 13 and record.state.consumed_samples != 104:
            raise Killed

    original = Metrics.after_step
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "after_step", kill)
        for run in (config, again):
            with pytest.raises(Killed):
                pretrain(run)
    assert pretrain(config) == ExitCode.DONE
    assert rows_of(config) == rows_of(whole)
    monkeypatch.undo()  # the second time nobody sees a spike: only the file knows
    (Path(again.training.output_dir) / "rollbacks.json").unlink()
    assert pretrain(again) == ExitCode.DONE
    assert rows_of(again) == rows_of(calm) != rows_of(whole)


def test_a_spike_just_after_a_checkpoint_goes_back_further_and_removes_it(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(97)  # read in step 13: the weights after step 12 may be to blame
    config = copy_of(calm, folder, "further", after=8)
    assert pretrain(config) == ExitCode.DONE
    # 64-103 are left out
    assert consumed(config) == {step: 8 * step + (40 if step > 8 else 0) for step in range(1, 19)}
    entries = read_left_out(Path(config.training.output_dir))
    assert entries == [LeftOut(8, 64, 104, 13)]


def test_the_save_under_way_is_waited_for_and_a_damaged_checkpoint_removes_none(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(BAD)
    config = tiny_config(folder, *SETTINGS, "checkpoint.async_save=true", output="async")
    slow = {"save.before_rename"}
    shutil.copytree(
        calm.training.output_dir,
        config.training.output_dir,
        ignore=shutil.ignore_patterns("step_0000001*"),
    )
    assert pretrain(config, lambda name: time.sleep(0.3) if name in slow else None) == ExitCode.DONE
    # Step 14 went back to step 12, whose files were not yet there.
    assert consumed(config)[13] == 8 * 13 + 16

    poison(97)
    damaged = copy_of(calm, folder, "damaged", after=12)
    for file in (Path(damaged.training.output_dir) / "checkpoints" / "step_00000008").glob(
        "*.safetensors"
    ):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="step_00000008"):
        pretrain(damaged)
    assert (Path(damaged.training.output_dir) / "checkpoints" / "step_00000012").is_dir()
    assert not (Path(damaged.training.output_dir) / "rollbacks.json").exists()


def test_rollbacks_are_counted_over_the_whole_run_and_bounded(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(BAD, 120)
    config = copy_of(calm, folder, "bounded", after=8)
    assert pretrain(config) == ExitCode.DONE  # both spikes went back to step 12
    assert consumed(config)[13] == 8 * 13 + 32
    entries = read_left_out(Path(config.training.output_dir))
    assert [(e.after_step, e.first_sample, e.next_sample) for e in entries] == [
        (12, 96, 112),
        (12, 112, 128),
    ]
    # The tool that shows what a step read knows it, too.
    assert [first_sample_of(config.training, step, entries) for step in (1, 12, 13, 18)] == [
        0,
        88,
        128,
        168,
    ]
    assert first_sample_of(config.training, 18, []) == 136
    once = copy_of(calm, folder, "once", after=8)
    with pytest.raises(RunStopped, match="went back 1 times already") as stopped:
        pretrain(
            once.model_copy(update={"guards": once.guards.model_copy(update={"max_rollbacks": 1})})
        )
    assert stopped.value.exit_code == ExitCode.SPIKES == 80


def test_a_spike_in_the_last_step_does_not_end_the_run(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(140)  # read in step 18 of 18
    config = copy_of(calm, folder, "last", after=12)
    assert pretrain(config) == ExitCode.DONE
    assert consumed(config)[18] == 8 * 18 + 16 and max(consumed(config)) == 18
    assert (Path(config.training.output_dir) / "checkpoints" / "step_00000018").is_dir()


def test_more_data_are_left_out_on_request_and_none_without_a_checkpoint(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(BAD)
    config = copy_of(calm, folder, "more", after=12)
    assert (
        pretrain(
            config.model_copy(
                update={"guards": config.guards.model_copy(update={"rollback_skip_steps": 3})}
            )
        )
        == ExitCode.DONE
    )
    assert consumed(config)[13] == 8 * 13 + 40
    none = tiny_config(
        folder, *SETTINGS, "checkpoint.interval=13", "checkpoint.keep_every=null", output="none"
    )
    assert pretrain(none) == ExitCode.DONE  # the only checkpoint is of the step before the spike
    assert consumed(none)[18] == 8 * 18 and "loss_spike" in rows_of(none)[13]


def test_a_resumed_run_compares_with_the_losses_of_the_run_before(
    folder: Path, calm: Config, poison: Any
) -> None:
    poison(BAD)
    config = copy_of(calm, folder, "window", after=12)
    metrics = Path(config.training.output_dir) / "metrics.jsonl"
    assert recent_losses(metrics, 12) == [row["loss"] for row in rows_of(calm)[:12]]
    metrics.unlink()  # then two steps are too few for a judgement
    assert pretrain(config) == ExitCode.DONE
    assert consumed(config)[18] == 8 * 18
    assert recent_losses(metrics, 12) == []


def test_what_is_left_out_follows_from_the_file_alone(
    folder: Path, calm: Config, tmp_path: Path
) -> None:
    assert read_left_out(tmp_path) == []
    write_left_out(tmp_path, [LeftOut(12, 96, 112, 14)])
    assert read_left_out(tmp_path) == [LeftOut(12, 96, 112, 14)]
    damaged = copy_of(calm, folder, "no_list", after=12)
    for text in (
        "{",
        "[1]",
        '[{"after_step": 3}]',
        '[{"after_step": 3, "first_sample": 1, "next_sample": "x", "spike_step": 3}]',
    ):
        (tmp_path / "rollbacks.json").write_text(text)
        with pytest.raises(DataError, match=r"rollbacks\.json: not a list of rollbacks"):
            read_left_out(tmp_path)
    shutil.copy(tmp_path / "rollbacks.json", damaged.training.output_dir)
    with pytest.raises(CheckpointError, match="remove it to leave out none"):
        pretrain(damaged)
