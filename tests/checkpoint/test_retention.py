"""What stays of the older checkpoints,
and what happens to a run whose folder of checkpoints is tampered with.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_completep.checkpoint import retention
from megatron_completep.checkpoint.manifest import committed_steps
from megatron_completep.tools import checkpoint as tool
from tests.support.checkpoints import TinyRun, checkpointed_config


def saved(folder: Path, steps: int, **checkpoint: object) -> TinyRun:
    tiny = TinyRun(checkpointed_config(folder, checkpoint={"async_save": False, **checkpoint}))
    for _ in range(steps):
        tiny.train(1)
        tiny.save()
    return tiny


def steps_in(folder: Path) -> list[int]:
    return list(committed_steps(folder / "checkpoints"))


@pytest.fixture
def stuck(monkeypatch):
    """Renaming a checkpoint of these steps fails, as on a folder that is not the user's."""
    steps: set[int] = set()
    rename = os.rename

    def refuse(source, target):
        if Path(source).name in {f"step_{step:08d}" for step in steps} and Path(
            target
        ).name.startswith(".removing"):
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(retention.os, "rename", refuse)
    return steps


def test_one_checkpoint_that_cannot_be_removed_does_not_keep_the_others(tmp_path, stuck):
    stuck.add(1)
    tiny = saved(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == [1, 4, 5]
    said = [line for line in tiny.messages if "could not be removed" in line]
    assert len(said) == 3 and all("step_00000001: Permission denied" in line for line in said)
    stuck.clear()
    tiny.train(1)
    tiny.save()
    assert steps_in(tmp_path) == [5, 6]  # the control: nothing else stood in the way


def test_files_that_remain_of_a_removed_checkpoint_are_said(tmp_path, monkeypatch):
    tiny = saved(tmp_path, 2, keep=2)
    # An immutable file inside.
    monkeypatch.setattr(retention.shutil, "rmtree", lambda folder, ignore_errors: None)
    tiny.train(1)
    tiny.save()
    assert steps_in(tmp_path) == [2, 3]
    assert any(
        "step_00000001 is no checkpoint any more, but files of it remain in " in line
        for line in tiny.messages
    )
    monkeypatch.undo()
    again = TinyRun(tiny.config)
    assert any("removed .removing.step_00000001." in line for line in again.messages)


def test_a_remainder_that_stays_is_not_called_removed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000009.deadbeef").mkdir()
    monkeypatch.setattr(
        "megatron_completep.checkpoint.save.shutil.rmtree", lambda folder, ignore_errors: None
    )
    again = TinyRun(checkpointed_config(tmp_path))
    assert any(".step_00000009.deadbeef cannot be removed" in line for line in again.messages)


def test_the_tool_removes_what_it_can_and_names_the_rest(tmp_path, programs, stuck):
    saved(tmp_path, 4, keep=9)
    stuck.add(2)
    ended = programs.run(tool.main, "prune", tmp_path, "--keep", 1)
    assert ended.code == 1 and "not removed: " in ended.out
    assert "step_00000002: Permission denied" in ended.out
    assert steps_in(tmp_path) == [2, 4]
    stuck.clear()
    printed = programs.output(tool.main, "prune", tmp_path, "--keep", 1, "--json")
    assert json.loads(printed)["problems"] == [] and steps_in(tmp_path) == [4]


@pytest.mark.parametrize("local", [False, True])
def test_a_folder_of_checkpoints_that_is_removed_under_the_run_is_made_again(tmp_path, local):
    settings = {"async_save": False, "local_dir": str(tmp_path / "node"), "local_interval": 1}
    tiny = TinyRun(checkpointed_config(tmp_path / "run", checkpoint=settings))
    tiny.train(1)
    tiny.checkpointer.save(tiny.state, local=local)
    shutil.rmtree(tmp_path / "node" if local else tmp_path / "run" / "checkpoints")
    tiny.train(1)
    tiny.checkpointer.save(tiny.state, local=local)
    assert any("was removed under the run; it is made again" in line for line in tiny.messages)
    assert not any("failed" in line for line in tiny.messages)
    again = TinyRun(tiny.config)
    assert again.resume() and again.state.step == 2 and again.bits() == tiny.bits()


def test_a_link_a_file_and_an_incomplete_folder_named_like_checkpoints_are_said(tmp_path, programs):
    tiny = saved(tmp_path / "run", 1)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step_00000001", tmp_path / "elsewhere")
    (checkpoints / "step_00000007").symlink_to(tmp_path / "elsewhere")
    (checkpoints / "step_00000008").write_text("no folder")
    (checkpoints / "step_00000009").mkdir()
    again = TinyRun(tiny.config)
    assert again.resume() and again.state.step == 1
    expected = {
        7: "step_00000007 is a symbolic link, which is not followed: it does not count",
        8: "step_00000008 is not a folder: it does not count",
        9: "step_00000009 holds no manifest.json: it does not count",
    }
    assert all(any(text in line for line in again.messages) for text in expected.values())
    listed = json.loads(programs.output(tool.main, "list", tmp_path / "run", "--json"))
    rows = {row["step"]: row["problem"] for row in listed["checkpoints"]}
    assert rows[1] is None
    assert all(words in rows[step] for step, words in expected.items())
