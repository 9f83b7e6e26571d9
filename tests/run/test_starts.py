"""The run's own record: which samples a step really read, whatever the configuration says later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completep.config import Config
from megatron_completep.config.derived import batch_size
from megatron_completep.config.schema import TrainingConfig
from megatron_completep.data.left_out import LeftOut, first_sample_of, past, read_left_out
from megatron_completep.data.loader import Loader
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.pretrain import pretrain
from megatron_completep.run.starts import STARTS, append_start, read_starts, samples_read, start_of
from megatron_completep.run.state import ExitCode, RunState
from megatron_completep.tools import dataset
from tests.support.commands import Programs
from tests.support.runs import tiny_config

SETTINGS: dict[str, dict[str, Any]] = {
    "checkpoint": {"interval": 2},
    "training": {"validation_interval": None},
}


@pytest.fixture
def read(monkeypatch) -> list[list[int]]:
    """The samples that each step read, in the order of the steps made:
    seen where they leave the loader.
    """
    steps: list[list[int]] = []
    original = Loader.next_step

    def next_step(self: Loader, *samples: int) -> Any:
        batches = original(self, *samples)
        if samples:  # asked for by a step; the telemetry's probe is none
            steps.append([int(number) for batch in batches for number in batch.sample_ids])
        return batches

    monkeypatch.setattr(Loader, "next_step", next_step)
    return steps


def told(config: Config, step: int) -> list[int]:
    folder = Path(config.training.output_dir)
    start = start_of(read_starts(folder), step)
    assert start is not None
    return list(samples_read(start, read_left_out(folder), step)[1])


def sample_tool(programs: Programs, *words: object) -> tuple[list[dict[str, Any]], str]:
    """What `dataset.py sample` shows, and what it says."""
    ended = programs.run(dataset.main, "sample", *words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["samples"], ended.err


def test_after_resumes_with_other_batches_every_step_names_what_it_really_read(
    folder: Path, read, programs
) -> None:
    """Steps 1 to 4 with 8 sequences, 5 to 8 with 16, 9 to 12 with 4:
    none of the three configurations alone tells the others' steps.
    """
    batches = (
        ("training.stop_at_step=4",),
        ("training.stop_at_step=8", "training.global_batch_size=16"),
        ("training.global_batch_size=4",),
    )
    for words in batches:
        config = tiny_config(folder, *words, output="batches", **SETTINGS)
        assert pretrain(config) == ExitCode.DONE
    assert len(read) == 12 and [told(config, step) for step in range(1, 13)] == read
    # The control.
    assert (
        [first_sample_of(config.training, step, []) for step in (4, 8)]
        == [12, 28]
        != [read[3][0], read[7][0]]
    )
    run = Path(config.training.output_dir)
    for step in (3, 8, 12):
        samples, said = sample_tool(programs, run / "config.yaml", "--step", step)
        assert [sample["sample"] for sample in samples] == read[step - 1] and STARTS in said
    # With another setting the question is: what would it read?
    question = ("training.global_batch_size=12", "--step", 3)
    samples, said = sample_tool(programs, run / "config.yaml", *question)
    assert [sample["sample"] for sample in samples] == list(range(24, 36))
    assert STARTS not in said


def test_a_moved_run_tells_from_where_it_is(folder: Path, read, programs) -> None:
    config = tiny_config(folder, "training.stop_at_step=4", output="moving", **SETTINGS)
    pretrain(config)
    pretrain(
        tiny_config(
            folder,
            "training.stop_at_step=6",
            "training.global_batch_size=16",
            output="moving",
            **SETTINGS,
        )
    )
    shutil.move(folder / "moving", folder / "moved")
    samples, _ = sample_tool(programs, folder / "moved" / "config.yaml", "--step", 3)
    assert [sample["sample"] for sample in samples] == read[2]


def test_another_seed_is_told_from_its_own_start(folder: Path, read, programs) -> None:
    """The numbers within the run are the same; which documents they are is another matter."""
    documents = {}
    for seed, stop in ((1, 4), (2, 6)):
        words = (
            f"data.seed={seed}",
            f"training.stop_at_step={stop}",
            "checkpoint.allow_changed=[data.seed]",
        )
        config = tiny_config(folder, *words, output="seeds", **SETTINGS)
        pretrain(config)
        saved_config = Path(config.training.output_dir) / "config.yaml"
        documents[seed], _ = sample_tool(programs, saved_config, "--step", 3)
    # Step 3 was read under the first seed, whatever config.yaml says now.
    assert documents[1] == documents[2]
    second_seed, _ = sample_tool(programs, saved_config, "--step", 3, "data.seed=2")
    assert second_seed != documents[1]


def test_a_start_from_an_earlier_step_takes_the_place_of_what_came_after(
    folder: Path, read
) -> None:
    """Going back by hand: the newest start that began before a step made it."""
    pretrain(tiny_config(folder, output="back", **SETTINGS))
    for step in range(6, 13, 2):
        shutil.rmtree(folder / "back" / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    assert [path.name for path in (folder / "back" / "checkpoints").iterdir()] == []
    read.clear()
    config = tiny_config(folder, "training.global_batch_size=16", output="back", **SETTINGS)
    pretrain(config)
    assert [told(config, step) for step in range(1, 13)] == read


def test_rollbacks_within_a_start_count_from_where_it_began() -> None:
    """Against the plain way: step by step from the start, jumping wherever an entry says so."""
    training = TrainingConfig(
        micro_batch_size=4,
        global_batch_size=12,
        train_steps=30,
        output_dir="run",
        batch_ramp={"start": 4, "increment": 4, "steps": 9},
    )
    for since, consumed in ((0, 0), (5, 40), (11, 77)):
        entries: list[LeftOut] = []
        for after in (since, since + 3, since + 3, since + 8):
            place = dict(walk(training, entries, since, consumed))[after + 1]
            entries.append(LeftOut(after, place, place + 8 + after, after + 2))
        for step, sample in walk(training, entries, since, consumed):
            assert first_sample_of(training, step, entries, since, consumed) == sample


def walk(
    training: TrainingConfig, entries: list[LeftOut], since: int, consumed: int
) -> list[tuple[int, int]]:
    found = []
    for step in range(since + 1, 31):
        consumed = past(entries, step - 1, consumed)
        found.append((step, consumed))
        consumed += batch_size(training, step)
    return found


def test_a_restart_that_found_the_same_step_adds_no_line(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for _ in range(3):
        append_start(tmp_path, config, RunState())
    append_start(tmp_path, config, RunState(6, 48, 0))
    append_start(tmp_path, config, RunState())  # back by hand
    assert [start.step for start in read_starts(tmp_path)] == [0, 6, 0]
    with (tmp_path / STARTS).open("ab") as file:
        file.write(b'{"step": 7, "consu')  # cut off by a kill
    assert [start.step for start in read_starts(tmp_path)] == [0, 6, 0]
    append_start(tmp_path, config, RunState(8, 64, 0))
    assert [start.step for start in read_starts(tmp_path)] == [0, 6, 0, 8]


@pytest.mark.parametrize(
    "line",
    ["null", "[1]", '{"step": 1}', '{"step": -1, "consumed_samples": 0, "config": {}}', "[" * 5000],
)
def test_a_line_that_is_no_start_is_named(tmp_path: Path, line: str) -> None:
    append_start(tmp_path, tiny_config(tmp_path), RunState())
    with (tmp_path / STARTS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"{STARTS}, line 2: not a start"):
        read_starts(tmp_path)


def test_a_start_that_is_refused_replaces_nothing(folder: Path) -> None:
    config = tiny_config(folder, "training.stop_at_step=2", output="refused", **SETTINGS)
    pretrain(config)
    run = Path(config.training.output_dir)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", STARTS)}
    with pytest.raises(CheckpointError, match="was trained with other settings"):
        pretrain(tiny_config(folder, "model.activation=gelu", output="refused", **SETTINGS))
    assert {name: (run / name).read_bytes() for name in before} == before
    assert yaml.safe_load(before["config.yaml"])["training"]["stop_at_step"] == 2


def test_a_finished_run_says_that_nothing_is_left(folder: Path, capsys) -> None:
    config = tiny_config(folder, "training.train_steps=4", output="done", **SETTINGS)
    pretrain(config)
    assert "nothing to do" not in capsys.readouterr().out  # the control
    checkpoints = sorted((folder / "done" / "checkpoints").rglob("*"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert pretrain(config) == ExitCode.DONE
    assert (
        "nothing to do: step 4 of 4. To go on, raise training.train_steps above 4."
        in capsys.readouterr().out
    )
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
    assert sorted((folder / "done" / "checkpoints").rglob("*")) == checkpoints
    assert (
        pretrain(tiny_config(folder, "training.train_steps=3", output="done", **SETTINGS))
        == ExitCode.DONE
    )
    assert (
        "nothing to do: step 4 of 3. To go on, raise training.train_steps above 4."
        in capsys.readouterr().out
    )
    stopped = ("training.train_steps=8", "training.stop_at_step=4")
    assert pretrain(tiny_config(folder, *stopped, output="done", **SETTINGS)) == ExitCode.DONE
    assert "nothing to do: step 4, and training.stop_at_step = 4." in capsys.readouterr().out
