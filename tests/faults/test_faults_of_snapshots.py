"""Snapshots on each node's own disk:
what one node lost or damaged is not used, and the run goes on bit-equal from what is left.

Two ranks with a `local_dir` each stand for two nodes.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.harness import (
    COUNTS,
    Fault,
    count_injection,
    final_state,
    losses,
    run,
    start,
    steps_on_disk,
)

# Shared: 6, 12; local: 2, 4, 8, 10.
SNAPSHOTS = ("checkpoint.interval=6", "checkpoint.local_interval=2")
TO_STEP_11 = Fault("kill", 1, steps=(11,))


def nodes(config: Path) -> tuple[str, ...]:
    return (*SNAPSHOTS, f"checkpoint.local_dir={config.parent}/node_RANK")


def snapshots(config: Path, rank: int) -> dict[str, Path]:
    """This node's committed snapshots."""
    found = (config.parent / f"node_{rank}").glob("run.*/step_*")
    return {path.name: path for path in found}


@pytest.fixture
def killed(config: Path) -> Path:
    """A run on two nodes that was killed after the snapshot of step 10;
    the shared disk has step 6.
    """
    outcome = run(config, TO_STEP_11, overrides=nodes(config))
    assert outcome.exit_codes[1] == -9 and steps_on_disk(config)[-1] == "step_00000006"
    for rank in range(2):
        # Those before 6 went when it was saved.
        assert sorted(snapshots(config, rank)) == ["step_00000008", "step_00000010"]
        names = sorted(os.listdir(snapshots(config, rank)["step_00000010"]))
        assert names == ["manifest.json", f"rank_0000{rank}_of_00002.safetensors"]
    COUNTS["injections"] = 0  # this kill is not what the tests count
    return config


def resumes_from(config: Path, oracle: object, step: int, said: str = "") -> None:
    outcome = run(config, overrides=nodes(config))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert f"resumed after step {step}" in outcome.output
    assert said in outcome.output
    assert "Traceback" not in outcome.output
    assert (losses(config), final_state(config)) == oracle
    # The checkpoint of step 12 replaced them.
    assert all(not snapshots(config, rank) for rank in range(2))


def test_snapshots_are_the_newest_that_all_ranks_can_read(killed, oracle):
    """The control: nothing is lost, and the run goes on from step 10."""
    resumes_from(killed, oracle, 10)


def test_fault_5_a_node_replaced_by_an_empty_one_falls_back_to_the_shared_disk(killed, oracle):
    shutil.rmtree(killed.parent / "node_1")
    count_injection()
    resumes_from(
        killed,
        oracle,
        6,
        "the snapshot of step 10 is not used: no rank has rank_00001_of_00002.safetensors",
    )


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("missing", marks=pytest.mark.slow),
        pytest.param("truncated", marks=pytest.mark.slow),
        "manifest",
    ],
)
def test_fault_5_a_snapshot_that_one_rank_cannot_read_falls_back_to_the_one_before(
    killed, oracle, damage
):
    folder = snapshots(killed, 1)["step_00000010"]
    path = folder / "rank_00001_of_00002.safetensors"
    count_injection()
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, 100)
        case "manifest":
            os.truncate(folder / "manifest.json", 100)
    resumes_from(killed, oracle, 8, "the snapshot of step 10 is not used: no rank has rank_00001")


def test_fault_6_a_flipped_bit_on_one_node_falls_back_to_the_one_before(killed, oracle):
    path = snapshots(killed, 1)["step_00000010"] / "rank_00001_of_00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    count_injection()
    resumes_from(killed, oracle, 8, "the snapshot of step 10 is not used: rank 1: ")


@pytest.mark.slow
def test_fault_27_a_damaged_snapshot_with_nothing_else_to_load_starts_from_the_beginning_bit_equal(
    config, oracle
):
    """One node's part is whole, and would be in place before the other's proves damaged."""
    overrides = (
        f"checkpoint.local_dir={config.parent}/node_RANK",
        "checkpoint.local_interval=4",
        "checkpoint.interval=12",
    )
    assert run(config, Fault("kill", 1, steps=(7,)), overrides=overrides).exit_codes[1] == -9
    path = snapshots(config, 1)["step_00000004"] / "rank_00001_of_00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    COUNTS["injections"] = 1
    outcome = run(config, overrides=overrides)
    assert (
        outcome.exit_codes == [0, 0]
        and "the snapshot of step 4 is not used: rank 1: " in outcome.output
    ), outcome.output
    assert "resumed" not in outcome.output
    assert (losses(config), final_state(config)) == oracle


def test_fault_28_a_copied_run_and_its_original_both_go_on_bit_equal(
    killed, oracle, tmp_path_factory
):
    """With one local_dir.

    The copy has the checkpoint of step 6; the snapshots after it are the original's.
    """
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(killed.parent / "run", copy / "run")
    config = copy / "run.yaml"
    config.write_text(killed.read_text().replace(str(killed.parent / "run"), str(copy / "run")))
    count_injection()
    outcome = run(config, overrides=nodes(killed))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "resumed after step 6" in outcome.output and "is a copy of the run in " in outcome.output
    assert (losses(config), final_state(config)) == oracle
    # The original's are there.
    assert all(
        sorted(snapshots(killed, rank)) == ["step_00000008", "step_00000010"] for rank in range(2)
    )
    resumes_from(killed, oracle, 10)


def test_fault_1_killed_when_one_node_has_committed_and_the_other_has_not(config, oracle):
    # The snapshots of 2 and 4, then those of 8 and 10.
    fault = Fault("kill", 1, "save.before_rename", nth=4)
    outcome = run(config, fault, overrides=nodes(config))
    assert outcome.exit_codes[1] == -9
    assert "step_00000010" in snapshots(config, 0) and "step_00000010" not in snapshots(config, 1)
    resumes_from(config, oracle, 8, "the snapshot of step 10 is not used: no rank has rank_00001")


@pytest.mark.slow
def test_fault_10_snapshots_of_two_nodes_load_where_one_process_reaches_both(killed, oracle):
    """Files may have moved: what counts is that some rank can read each."""
    first, second = (snapshots(killed, rank)["step_00000010"] for rank in range(2))
    shutil.copy(second / "rank_00001_of_00002.safetensors", first)
    outcome = run(
        killed, world=1, overrides=[*SNAPSHOTS, f"checkpoint.local_dir={killed.parent}/node_0"]
    )
    assert outcome.exit_codes == [0] and "resumed after step 10" in outcome.output
    assert all(abs(losses(killed)[step] - loss) < 1e-5 for step, loss in oracle[0].items())


@pytest.mark.slow
def test_fault_3_killed_at_random_times_with_snapshots_at_every_step_resumes_every_time(
    config, oracle
):
    random_times = random.Random(11)
    overrides = [
        f"checkpoint.local_dir={config.parent}/node_RANK",
        "checkpoint.local_interval=1",
        "checkpoint.interval=4",
    ]
    for kill in range(6):
        ranks = start(
            config,
            overrides=[*overrides, f"checkpoint.async_save={'true' if kill % 2 else 'false'}"],
        )
        time.sleep(random_times.uniform(0.4, 2.0))
        ranks.processes[random_times.randrange(2)].kill()
        count_injection()
        if kill == 4:
            shutil.rmtree(config.parent / "node_0", ignore_errors=True)
        assert not ranks.wait().timed_out
    assert run(config, overrides=overrides).exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
def test_what_a_lost_node_held_twice_is_not_lost(config, oracle):
    """With one shard for each replica,
    rank 0 writes everything and rank 1 nothing: its node may go.
    """
    overrides = [*nodes(config), "parallel.optimizer_shard_size=1"]
    run(config, TO_STEP_11, overrides=overrides)
    shutil.rmtree(config.parent / "node_1")
    count_injection()
    outcome = run(config, overrides=overrides)
    assert outcome.exit_codes == [0, 0] and "resumed after step 10" in outcome.output, (
        outcome.output
    )
    assert all(abs(losses(config)[step] - loss) < 1e-5 for step, loss in oracle[0].items())


def test_fault_9_a_local_folder_that_one_node_cannot_write_is_an_error_at_the_start(config):
    (config.parent / "node_1").write_text("a file where the folder should be")
    count_injection()
    outcome = run(config, overrides=nodes(config))
    assert outcome.exit_codes == [2, 2] and "Traceback" not in outcome.output
    assert "rank 1: " in outcome.output
    assert "node_1" in outcome.output
    assert "Choose another checkpoint.local_dir, or null." in outcome.output
    # Nothing is left behind.
    assert not [path for path in (config.parent / "node_0").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_fault_8_a_full_disk_of_one_node_fails_the_snapshot_on_all(config, oracle):
    # 2, 4, 6 on the shared disk, 8, 10
    fault = Fault("disk_full", 1, "save.values_half_written", nth=5)
    outcome = run(
        config,
        fault,
        overrides=[*nodes(config), "training.stop_at_step=11", "checkpoint.interval=6"],
    )
    assert outcome.exit_codes == [0, 0]
    assert "checkpoint of step 10 failed: step 10 is not saved: rank 1: " in outcome.output
    assert run(config, overrides=nodes(config)).exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
def test_snapshots_of_another_run_are_not_this_ones(killed, oracle):
    shutil.rmtree(killed.parent / "run")
    outcome = run(killed, overrides=nodes(killed))
    assert outcome.exit_codes == [0, 0] and "resumed" not in outcome.output
    assert (losses(killed), final_state(killed)) == oracle


@pytest.mark.slow
def test_a_run_that_must_not_resume_is_refused_by_its_snapshots_too(config):
    run(config, Fault("kill", 1, steps=(4,)), overrides=nodes(config))
    assert steps_on_disk(config) == [] and snapshots(config, 0)
    outcome = run(config, overrides=[*nodes(config), "checkpoint.resume=false"])
    assert outcome.exit_codes == [2, 2]
    assert "holds a snapshot of step 2, but checkpoint.resume = false" in outcome.output


def test_ranks_that_share_a_disk_share_a_folder(config, oracle):
    overrides = (*SNAPSHOTS, f"checkpoint.local_dir={config.parent}/node")
    run(config, TO_STEP_11, overrides=overrides)
    (folder,) = (config.parent / "node").glob("run.*/step_00000010")
    assert len(os.listdir(folder)) == 3
    outcome = run(config, overrides=overrides)
    assert outcome.exit_codes == [0, 0] and "resumed after step 10" in outcome.output
    assert (losses(config), final_state(config)) == oracle
