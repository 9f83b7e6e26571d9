"""Faults 1 to 3 and 8 to 9: whatever interrupts a save,
the run continues bit-equal to one that was never interrupted.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_completep.checkpoint import checkpointer, files, save
from megatron_completep.telemetry.metrics import read_metrics
from tests.faults.harness import (
    Fault,
    count_injection,
    final_state,
    losses,
    run,
    start,
    steps_on_disk,
)
from tests.support.checkpoints import TinyRun, checkpointed_config

# In the order in which a save passes them; those that only the committing rank passes are marked.
POINTS = {
    "save.folder_created": (0, 1),
    "save.header_written": (0, 1),
    "save.values_half_written": (0, 1),
    "save.values_written": (0, 1),
    "save.file_synced": (0, 1),
    "save.hashes_exchanged": (0, 1),
    "save.manifest_half_written": (0,),
    "save.manifest_written": (0,),
    "save.before_rename": (0,),
    "save.older_one_moved": (0,),
    "save.renamed": (0,),
    "save.committed": (0, 1),
    "save.older_ones_removed": (0,),
}
QUICK = (
    "save.values_half_written",
    "save.manifest_half_written",
    "save.before_rename",
    "save.renamed",
)
KILLED = -9


def kills() -> Iterator[object]:
    for point, ranks in POINTS.items():
        for rank in ranks:
            quick = point in QUICK and rank == ranks[-1]
            yield pytest.param(
                point, rank, id=f"{point}-rank{rank}", marks=() if quick else pytest.mark.slow
            )


def test_every_fail_point_in_the_code_is_tested():
    sources = [Path(module.__file__ or "").read_text() for module in (checkpointer, files, save)]
    named = set(re.findall(r'fail_point\("([^"]+)"\)', "".join(sources)))
    assert named == set(POINTS) | {"save.staged"}  # that one is passed by asynchronous saves


@pytest.mark.parametrize(("point", "rank"), list(kills()))
def test_fault_1_killed_at_a_point_of_a_save_continues_bit_equal(config, oracle, point, rank):
    killed = run(config, Fault("kill", rank, point, nth=2))  # in the save of step 6
    assert killed.exit_codes[rank] == KILLED and not killed.timed_out
    assert "step_00000003" in steps_on_disk(config)
    resumed = run(config)
    assert resumed.exit_codes == [0, 0], resumed.output
    assert (losses(config), final_state(config)) == oracle
    # And nothing that starts with a dot.
    assert steps_on_disk(config) == ["step_00000009", "step_00000012"]


def test_fault_1_killed_between_staging_and_writing_continues_bit_equal(config, oracle):
    killed = run(
        config, Fault("kill", 1, "save.staged", nth=2), overrides=["checkpoint.async_save=true"]
    )
    assert killed.exit_codes[1] == KILLED
    assert run(config).exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == oracle


def test_fault_30_a_checkpoint_that_cannot_be_removed_and_a_folder_that_goes_do_not_stop_the_run(
    config, oracle
):
    """step_00000003 is a folder that does not let itself be renamed away;
    the folder of checkpoints goes after step 9.
    """
    outcome = run(config, Fault("stuck", 0, steps=(3,)), overrides=["training.stop_at_step=9"])
    assert outcome.exit_codes == [0, 0] and "older one could not be removed: " in outcome.output, (
        outcome.output
    )
    assert steps_on_disk(config) == ["step_00000003", "step_00000006", "step_00000009"]
    outcome = run(
        config, Fault("folder_gone", 0, str(config.parent / "run" / "checkpoints"), steps=(11,))
    )
    assert (
        outcome.exit_codes == [0, 0]
        and "checkpoints was removed under the run; it is made again" in outcome.output
    ), outcome.output
    assert steps_on_disk(config) == ["step_00000012"]
    assert (losses(config), final_state(config)) == oracle


SLOW_SAVES = (
    "checkpoint.async_save=true",
    "checkpoint.interval=4",
    "guards.hang_timeout_minutes=0.1",
)


@pytest.mark.slow
def test_fault_31_a_save_slower_than_the_watchdogs_bound_is_no_hang(config, oracle):
    """6 s without a step are a hang; the saves take far longer,
    the next one is due at once, and only rank 0's disk is slow.
    """
    outcome = run(config, Fault("slow_disk", -1, seconds=0.3), overrides=SLOW_SAVES, seconds=240.0)
    assert outcome.exit_codes == [0, 0] and "hung" not in outcome.output, outcome.output
    assert (
        max(
            row.get("checkpoint_blocked_seconds", 0)
            for row in read_metrics(config.parent / "run" / "metrics.jsonl")
        )
        > 6
    )
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
def test_fault_31_a_save_that_stands_still_is_a_hang(config):
    """The control."""
    outcome = run(
        config, Fault("slow_disk", -1, seconds=3600.0), overrides=SLOW_SAVES, seconds=120.0
    )
    assert 77 in outcome.exit_codes and not outcome.timed_out, outcome.output


def test_fault_2_a_partial_folder_of_the_same_step_is_in_nobodys_way(config, oracle):
    partial = config.parent / "run" / "checkpoints" / ".step_00000006.deadbeef"
    partial.mkdir(parents=True)
    (partial / "rank_00000_of_00002.safetensors").write_bytes(b"half")
    (
        config.parent / "run" / "checkpoints" / "step_00000009"
    ).mkdir()  # without a manifest: does not exist
    outcome = run(config)
    assert outcome.exit_codes == [0, 0] and "removed .step_00000006.deadbeef" in outcome.output
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fault_3_killed_at_random_times_resumes_every_time(config, oracle, seed):
    """In turn with a save in the background and without one."""
    random_times = random.Random(seed)
    for kill in range(2 if seed == 0 else 6):
        ranks = start(
            config,
            overrides=[
                "checkpoint.interval=1",
                f"checkpoint.async_save={'true' if kill % 2 else 'false'}",
            ],
        )
        time.sleep(random_times.uniform(0.3, 2.0))
        ranks.processes[random_times.randrange(2)].kill()
        count_injection()
        outcome = ranks.wait()
        assert not outcome.timed_out
    assert run(config).exit_codes == [0, 0]
    assert losses(config) == oracle[0] and final_state(config) == oracle[1]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_fault_8_a_full_disk_fails_the_save_on_all_ranks_together(config, oracle, policy):
    fault = Fault("disk_full", 1, "save.values_half_written", nth=2)
    outcome = run(config, fault, overrides=[f"checkpoint.on_failure={policy}"])
    message = (
        r"step 6.* rank 1: .*rank_00001_of_00002.safetensors: No space left on device "
        r"\([\d.]+ [kMGT]?B to write, [\d.]+ [kMGT]?B free\)"
    )
    assert re.search(message, outcome.output) and "Traceback" not in outcome.output
    failed = [
        row["step"]
        for row in read_metrics(config.parent / "run" / "metrics.jsonl")
        if "checkpoint_failed" in row
    ]
    # The row after the save; there is none when the run stops.
    assert failed == ([7] if policy == "continue" else [])
    if policy == "continue":
        assert outcome.exit_codes == [0, 0] and (losses(config), final_state(config)) == oracle
    else:
        assert outcome.exit_codes == [2, 2] and steps_on_disk(config) == ["step_00000003"]


def test_fault_8_a_checkpoint_that_will_not_fit_is_announced_at_the_start(monkeypatch, tmp_path):
    usage = save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    tiny = TinyRun(
        checkpointed_config(tmp_path, checkpoint={"async_save": False, "on_failure": "stop"})
    )
    assert re.search(
        (
            r"warning: .*checkpoints: a checkpoint needs [\d.]+ \wB \(including a reserve of "
            r"16\.8 MB\), but only 1\.0 kB are free"
        ),
        tiny.messages[0],
    )
    with pytest.raises(save.CheckpointError, match="needs"):
        tiny.save()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_fault_9_an_unwritable_output_folder_is_an_error_at_the_start(config):
    (config.parent / "run").write_text("a file where the folder should be")
    outcome = run(config, world=1)
    assert outcome.exit_codes == [2]
    assert "run cannot be written" in outcome.output
    assert "Traceback" not in outcome.output
