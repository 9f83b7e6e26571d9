"""Faults 23, 24, 26, 36 and 38: several runs, restarts, and what launchers do and say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import (
    TORCHRUN,
    Fault,
    count_injection,
    environment_of,
    final_state,
    free_port,
    losses,
    run,
    start,
    start_under_launcher,
    wait_for_step,
)

REPOSITORY = Path(__file__).resolve().parents[2]

# Several runs, restarts, orphans.


def test_fault_23_a_second_trainer_is_refused_naming_the_first(config, oracle):
    first = start(config, Fault("wait", 0, str(config.parent / "refused"), steps=(5,)))
    wait_for_step(config, 1)
    second = run(config, world=1, overrides=["guards.lock_wait_seconds=0.2"])
    assert second.exit_codes == [2]
    assert f"is in use by process {first.processes[0].pid} on " in second.output
    (config.parent / "refused").touch()
    assert first.wait().exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == oracle


def test_fault_24_restarts_resume_by_themselves(config, oracle):
    """Killed after each of the first three saves; the fourth start reaches the end."""
    for restart in range(3):
        outcome = run(config, Fault("kill", 0, "save.older_ones_removed"), restart_count=restart)
        assert outcome.exit_codes[0] == -signal.SIGKILL and not outcome.timed_out
    outcome = run(config, restart_count=3)
    assert outcome.exit_codes == [0, 0] and "resumed after step 9" in outcome.output
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
def test_fault_24_restarts_that_get_nowhere_stop(config):
    codes = [
        run(
            config,
            Fault("kill", 1, "save.folder_created"),
            overrides=["guards.max_restarts_without_progress=2"],
            restart_count=n,
        )
        for n in range(3)
    ]
    assert [-signal.SIGKILL in outcome.exit_codes for outcome in codes] == [True, True, False]
    assert 78 in codes[2].exit_codes
    assert "2 restarts in a row got no further than step 0" in codes[2].output
    assert run(config).exit_codes == [0, 0]  # a start by hand counts anew


def test_fault_26_workers_of_a_killed_launcher_leave(config):
    launcher, pids = start_under_launcher(config, overrides=["training.train_steps=100000"])
    wait_for_step(config, 2)
    workers = [psutil.Process(pid) for pid in json.loads(pids.read_text())]
    launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=60.0)
    # Gone, where nobody adopts orphans.
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in alive)
    overrides = [
        "training.train_steps=100000",
        "training.stop_at_step=3",
        "guards.lock_wait_seconds=0",
    ]
    assert run(config, world=1, overrides=overrides).exit_codes == [0]  # and the lock is free


def test_fault_36_workers_of_a_launcher_killed_during_the_rendezvous_leave(config):
    """One of two ranks, which waits for the other;
    tests/test_launch.py kills the launcher while its worker imports.
    """
    launcher, pids = start_under_launcher(config, of_them=1)
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (worker,) = [psutil.Process(pid) for pid in json.loads(pids.read_text())]
    while (
        not any(connection.status == psutil.CONN_LISTEN for connection in worker.net_connections())
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)  # until rank 0 holds the store
    assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    count_injection()
    launcher.kill()
    _, alive = psutil.wait_procs([worker], timeout=60.0)
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)


# What the launcher says.


def test_fault_38_a_broken_launch_environment_is_one_message_of_the_rank(config):
    """tests/test_launch.py has the table."""
    for changes in (
        {"RANK": ""},
        {"MASTER_ADDR": ""},
        {"RANK": "3"},
        {"LOCAL_RANK": "7"},
        {"WORLD_SIZE": "0", "RANK": "x"},
    ):
        count_injection()
        environment = {**environment_of(0, 2, free_port()), **changes}
        outcome = start(config, environments=[environment]).wait()
        assert outcome.exit_codes == [2]
        assert "Traceback" not in outcome.output
        assert not outcome.timed_out
        (said,) = re.findall(
            r"^error: .*: the launcher's variables cannot be used$", outcome.output, re.MULTILINE
        )
        assert (
            "a process without RANK" if changes.get("RANK") == "" else f"rank {environment['RANK']}"
        ) in said


def test_fault_38_ranks_that_do_not_fit_together_are_refused_on_both(config):
    count_injection()
    port = free_port()
    told_of_four = {**environment_of(1, 4, port), "LOCAL_WORLD_SIZE": "2"}
    outcome = start(
        config,
        environments=[environment_of(0, 2, port), told_of_four],
        overrides=["training.micro_batch_size=1"],
    ).wait()
    assert outcome.exit_codes == [2, 2] and "Traceback" not in outcome.output
    assert "was told WORLD_SIZE = 4" in outcome.output or "was told 4" in outcome.output


@pytest.mark.slow
def test_fault_38_a_rank_that_never_comes_is_named_after_a_bounded_wait(config):
    count_injection()
    port = free_port()
    three = [environment_of(rank, 3, port) for rank in (0, 2)]
    bounds = [
        "parallel.timeout_minutes=0.1",
        "guards.hang_timeout_minutes=0.1",
        "training.global_batch_size=6",
    ]
    outcome = start(config, environments=three, overrides=bounds).wait()
    assert outcome.exit_codes == [2, 2]
    assert "Traceback" not in outcome.output
    assert not outcome.timed_out
    assert "rank 1 of 3 did not start within 6 s" in outcome.output


def torchrun(config: Path, *more: str, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    program = str(Path(__file__).with_name("killed_after_each_save.py"))
    command = [*TORCHRUN, *more, program, str(config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_faults_24_and_4_under_the_real_torchrun(config, oracle):
    process = torchrun(
        config, "--max-restarts", "4", "--monitor-interval", "0.1", arguments=("progress",)
    )
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert output.count("resumed after step") == 3
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
def test_fault_24_torchrun_stops_when_there_is_no_progress(config):
    process = torchrun(
        config, "--max-restarts", "10", "--monitor-interval", "0.1", arguments=("none",)
    )
    output, _ = process.communicate(timeout=280)
    assert process.returncode != 0 and "3 restarts in a row got no further than step 0" in output
