"""Which run a snapshot belongs to: a moved run finds its own,
a copy has none of the original's, and neither is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_completep.checkpoint.run_number import identify_run, renumber
from megatron_completep.config.schema import Config
from tests.support.checkpoints import TinyRun, checkpointed_config


def config_of(folder: Path, node: Path) -> Config:
    return checkpointed_config(
        folder,
        checkpoint={
            "async_save": False,
            "local_dir": str(node),
            "local_interval": 1,
            "local_keep": 3,
        },
    )


def a_run(folder: Path, node: Path, shared: int = 2, local: int = 2) -> TinyRun:
    """A run in `folder` with a checkpoint of step `shared` and snapshots of the steps after it."""
    tiny = TinyRun(config_of(folder, node))
    tiny.train(shared)
    tiny.save()
    for _ in range(local):
        tiny.train(1)
        tiny.checkpointer.save(tiny.state, local=True)
    return tiny


def number_of(folder: Path) -> str:
    return json.loads((folder / ".run_id").read_text())["number"]


def test_a_copied_run_goes_on_from_its_own_checkpoint_and_leaves_the_originals_snapshots_alone(
    tmp_path,
):
    a, b, node = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "node"
    original = a_run(a, node)
    shutil.copytree(a, b)
    copy = TinyRun(config_of(b, node))
    assert copy.resume() and copy.state.step == 2  # and not 4, which the original's snapshots have
    assert any(f"{b} is a copy of the run in {a}" in line for line in copy.messages)
    assert number_of(a) != number_of(b)
    copy.optimizer.shards.master.mul_(2.0)  # from here on they are different runs
    for _ in range(3):
        copy.train(1)
        copy.checkpointer.save(copy.state, local=True)
    again = TinyRun(config_of(a, node))
    assert again.resume() and again.state.step == 4 and again.bits() == original.bits()
    once_more = TinyRun(config_of(b, node))
    assert once_more.resume() and once_more.state.step == 5 and once_more.bits() == copy.bits()
    assert not any("copy" in line for line in once_more.messages)  # it is said once


def test_a_moved_run_finds_its_snapshots(tmp_path):
    """The control: what tells copies apart does not take a run's own snapshots from it."""
    original = a_run(tmp_path / "a", tmp_path / "node")
    for before, after in (("a", "b"), ("b", "deep/c"), ("deep/c", "a")):
        (tmp_path / after).parent.mkdir(exist_ok=True)
        (tmp_path / before).rename(tmp_path / after)
        moved = TinyRun(config_of(tmp_path / after, tmp_path / "node"))
        assert moved.resume() and moved.state.step == 4 and moved.bits() == original.bits(), after


def test_a_run_whose_original_is_gone_is_a_moved_one_even_over_file_systems(tmp_path):
    """Copied and then removed, as `mv` does between two disks."""
    original = a_run(tmp_path / "a" / "run", tmp_path / "node")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    moved = TinyRun(config_of(tmp_path / "b" / "run", tmp_path / "node"))
    assert moved.resume() and moved.state.step == 4 and moved.bits() == original.bits()


def test_of_two_copies_of_a_run_that_is_gone_the_second_takes_another_number(tmp_path):
    """Nothing tells the two apart before one of them has written snapshots;
    those name the folder that they are of.
    """
    node = tmp_path / "node"
    a_run(tmp_path / "a" / "run", node, local=0)
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    shutil.rmtree(tmp_path / "a")
    first = TinyRun(config_of(tmp_path / "b" / "run", node))
    assert first.resume()
    first.optimizer.shards.master.mul_(2.0)
    first.train(1)
    first.checkpointer.save(first.state, local=True)
    shutil.rmtree(tmp_path / "b" / "run" / "checkpoints")  # even if it cannot be asked
    (tmp_path / "b" / "run" / ".run_id").rename(tmp_path / "b_run_id")
    second = TinyRun(config_of(tmp_path / "c" / "run", node))
    assert second.resume() and second.state.step == 2
    assert any(
        "left out: " in line and f"is a snapshot of the run in {tmp_path}/b/run" in line
        for line in second.messages
    )
    (tmp_path / "b_run_id").rename(tmp_path / "b" / "run" / ".run_id")
    assert number_of(tmp_path / "b" / "run") != number_of(tmp_path / "c" / "run")
    again = TinyRun(config_of(tmp_path / "b" / "run", node))
    assert again.resume() and again.state.step == 3 and again.bits() == first.bits()


def test_a_run_that_moved_away_from_a_folder_where_another_began_keeps_its_snapshots(tmp_path):
    """As when a run is put aside under another name and begun anew."""
    original = a_run(tmp_path / "a", tmp_path / "node")
    (tmp_path / "a").rename(tmp_path / "aside")
    anew = a_run(tmp_path / "a", tmp_path / "node", shared=1, local=1)
    assert anew.state.step == 2
    aside = TinyRun(config_of(tmp_path / "aside", tmp_path / "node"))
    assert aside.resume() and aside.state.step == 4 and aside.bits() == original.bits()


def test_a_copy_of_a_run_that_took_another_number_since_is_still_a_copy(tmp_path):
    a, b, node = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "node"
    a_run(a, node)
    shutil.copytree(a, b)
    renumber(a)
    copy = TinyRun(config_of(b, node))
    assert copy.resume()
    assert copy.state.step == 2
    assert any("is a copy of the run in" in line for line in copy.messages)


def test_a_link_to_the_folder_is_the_folder(tmp_path):
    original = a_run(tmp_path / "disk" / "run", tmp_path / "node")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    linked = TinyRun(config_of(tmp_path / "link" / "run", tmp_path / "node"))
    assert linked.resume() and linked.state.step == 4 and linked.bits() == original.bits()
    assert number_of(tmp_path / "disk" / "run") == original.checkpointer._run.number


def test_a_run_that_begins_without_snapshots_is_numbered_all_the_same(tmp_path):
    """So that a copy made before is known for one when snapshots are switched on later,
    the original being gone by then.
    """
    a, b, node = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "node"
    a_run(a, node)
    shutil.copytree(a, b)
    TinyRun(checkpointed_config(b))
    shutil.rmtree(a)
    copy = TinyRun(config_of(b, node))
    assert copy.resume() and copy.state.step == 2


@pytest.mark.parametrize("content", [b"0123456789abcdef", b"0123456789abcdef\n", b"", b"\n"])
def test_numbers_of_earlier_runs_are_taken_over_and_an_empty_file_is_none(tmp_path, content):
    (tmp_path / ".run_id").write_bytes(content)
    run, said = identify_run(tmp_path)
    assert said is None and (run.number == "0123456789abcdef") == bool(content.strip())
    assert identify_run(tmp_path) == (run, None) and number_of(tmp_path) == run.number
