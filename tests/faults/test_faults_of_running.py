"""Faults 4, 12 to 20, 34, 35 and 37: what a run meets while it trains, or before its first step."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megatron_completep.guards.replicas import bit_sum, who_differs
from megatron_completep.guards.watchdog import verdict
from megatron_completep.telemetry.metrics import read_metrics
from tests.faults.harness import (
    TORCHRUN,
    Fault,
    count_injection,
    final_state,
    losses,
    run,
    run_in_terminal,
    start,
    steps_on_disk,
    wait_for_step,
    write_corpus,
)

REPOSITORY = Path(__file__).resolve().parents[2]


# Signals.


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGUSR1, signal.SIGHUP)
        ),
    ],
)
def test_fault_4_a_signal_to_one_worker_saves_on_all_and_asks_for_a_requeue(config, oracle, number):
    outcome = run(config, Fault("signal", 1, steps=(5,), seconds=number))
    assert outcome.exit_codes == [75, 75], outcome.output
    assert steps_on_disk(config)[-1] == "step_00000006" and max(losses(config)) == 6
    assert run(config).exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == oracle


def test_fault_4_a_second_signal_leaves_at_once(config):
    ranks = start(config, Fault("hang", 1, steps=(5,)))
    wait_for_step(config, 4)
    while any(process.is_alive() for process in ranks.processes):
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGTERM) if process.is_alive() else None
        time.sleep(0.1)  # those within 2 s of the first are taken for torchrun's echo
    assert ranks.wait().exit_codes == [128 + signal.SIGTERM] * 2
    assert "step_00000003" in steps_on_disk(config)


def test_ranks_leave_together_when_their_time_is_up_and_a_node_is_described_once(config):
    outcome = run(config, overrides=["training.exit_after_minutes=0.000001"])
    assert outcome.exit_codes == [75, 75] and steps_on_disk(config) == ["step_00000001"]
    (line,) = re.findall("^node .*", outcome.output, re.MULTILINE)
    assert f"torch {torch.__version__}" in line
    assert f"{os.cpu_count()} cores" in line
    assert platform.node() in line


@pytest.mark.parametrize("world", [1, 2])
def test_fault_34_a_closed_terminal_saves_on_all_and_asks_for_a_requeue(config, oracle, world):
    """The shell that started them dies with its terminal, and whatever they print fails."""
    until_it_is_closed = Fault("wait", 0, str(config.parent / "closed"), steps=(6,))
    assert run_in_terminal(config, until_it_is_closed, steps=5, world=world) == [75] * world
    saved = int(steps_on_disk(config)[-1].removeprefix("step_"))
    assert saved == max(losses(config)) and 6 <= saved <= 8
    if world == 2:
        assert run(config).exit_codes == [0, 0]
        assert (losses(config), final_state(config)) == oracle


def test_fault_34_under_nohup_a_closed_terminal_changes_nothing(config, oracle):
    assert run_in_terminal(config, Fault(), steps=4, nohup=True) == [0, 0]
    assert (losses(config), final_state(config)) == oracle


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["none", "torchrun"])
def test_fault_34_a_closed_terminal_under_the_real_programs(config, launcher):
    count_injection()
    command = {
        "none": [
            sys.executable,
            "-m",
            "megatron_completep.pretrain",
            str(config),
            "training.train_steps=100000",
        ],
        "torchrun": [
            *TORCHRUN,
            "-m",
            "megatron_completep.pretrain",
            str(config),
            "training.train_steps=100000",
        ],
    }[launcher]
    terminal, side_of_the_program = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=side_of_the_program,
        stdout=side_of_the_program,
        stderr=side_of_the_program,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(side_of_the_program)
    threading.Thread(
        target=read_until_closed,
        args=(terminal, config.parent / "run" / "metrics.jsonl"),
        daemon=True,
    ).start()
    code = process.wait(timeout=120)
    assert code == (75 if launcher == "none" else 1)  # torchrun's own for whatever its workers said
    assert int(steps_on_disk(config)[-1].removeprefix("step_")) == max(losses(config)) >= 5


def read_until_closed(terminal: int, metrics: Path) -> None:
    """A terminal that is closed after step 5."""
    os.set_blocking(terminal, False)
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        with suppress(BlockingIOError):
            os.read(terminal, 65536)
        time.sleep(0.01)
    os.close(terminal)


def test_fault_37_a_clock_that_is_set_during_the_start_changes_no_time_limit(config):
    overrides = ["training.exit_after_minutes=600", "training.train_steps=2"]
    for seconds in (86400.0, -86400.0):
        outcome = run(config, Fault("clock", -1, seconds=seconds), overrides=overrides)
        assert outcome.exit_codes == [0, 0], outcome.output
        (row,) = [
            row
            for row in read_metrics(config.parent / "run" / "metrics.jsonl")
            if "startup_seconds" in row
        ]
        assert 0 <= row["startup_model_seconds"] <= row["startup_seconds"] < 3600
        shutil.rmtree(config.parent / "run")


# Data and configuration.


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_fault_12_a_corrupted_token_file_is_named_at_open(config, suffix):
    path = config.parent / f"corpus{suffix}"
    os.truncate(path, path.stat().st_size // 2)
    outcome = run(config, world=1)
    assert outcome.exit_codes == [2]
    assert str(path) in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("world", [1, 2])
def test_fault_13_a_token_out_of_range_is_the_same_error_at_every_tensor_size(config, world):
    outcome = run(
        config,
        world=world,
        overrides=["model.vocab_size=40", f"parallel.tensor_parallel_size={world}"],
    )
    assert outcome.exit_codes == [2] * world and "Traceback" not in outcome.output
    message = (
        r"corpus\.bin: document 0, position 1: token id 41 is outside the model's "
        r"vocabulary, 0 to 39"
    )
    assert len(re.findall(message, outcome.output)) == world


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n\tseed: 1", "tab"),
        ("model: {hidden_size: 8}\nmodel: {hidden_size: 9}", "twice"),
        ("modle: {}", "modle"),
        ("optimizer: {base_lr: .nan}", "base_lr"),
        ("optimizer: {base_lr: -1}", "base_lr"),
        ("model: !!python/object/apply:os.system ['touch exploded']", "plain values"),
        ("", "empty"),
    ],
)
def test_fault_20_a_malformed_file_gives_one_message_and_exit_code_2(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    outcome = run(path, world=1)
    assert outcome.exit_codes == [2]
    assert said in outcome.output
    assert "bad.yaml" in outcome.output
    assert "Traceback" not in outcome.output


# Numbers.


@pytest.mark.parametrize("kind", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_fault_14_a_gradient_that_is_not_finite_on_one_rank_is_named_and_the_update_skipped(
    config, oracle, kind
):
    outcome = run(
        config,
        Fault(kind, 1, steps=(5,)),
        overrides=["checkpoint.interval=1", "checkpoint.keep=20"],
    )
    assert outcome.exit_codes == [0, 0], outcome.output
    found = re.search(r"step 5: a gradient was not finite, nothing was updated.*", outcome.output)
    assert found
    assert "rank 1: layers.1.mlp.down.weight, samples 18-19" in found[0]
    assert "rank 0" not in found[0]
    folders = [config.parent / "run" / "checkpoints" / f"step_{step:08d}" for step in (4, 5)]
    before, after = (
        sorted(p.read_bytes()[-9000:] for p in folder.glob("*.safetensors")) for folder in folders
    )
    assert before == after  # weights and moments unchanged
    assert losses(config)[5] == oracle[0][5] and losses(config)[6] != oracle[0][6]


def test_fault_15_nan_at_every_step_stops_and_keeps_the_last_good_checkpoint(config):
    fault = Fault("nan", 0, steps=tuple(range(5, 13)))
    outcome = run(config, fault, overrides=["guards.max_skipped_steps=3", "checkpoint.interval=4"])
    assert outcome.exit_codes == [76, 76]
    assert "3 steps in a row without a finite gradient" in outcome.output
    assert "Traceback" not in outcome.output and steps_on_disk(config) == ["step_00000004"]


def test_fault_16_a_flipped_bit_in_one_replica_is_found_and_the_rank_named(config):
    outcome = run(config, Fault("flip", 1), overrides=["guards.replica_check_interval=4"])
    assert outcome.exit_codes == [79, 79]
    assert "step 4: replicas differ: rank 1 in weights of stage 0, tensor 0" in outcome.output
    assert "rank 0 in" not in outcome.output


def test_fault_16_healthy_replicas_pass(config):
    assert run(
        config, overrides=["guards.replica_check_interval=1", "training.train_steps=4"]
    ).exit_codes == [0, 0]


def test_any_single_flipped_bit_changes_the_hash():
    values = torch.randn(1000)
    expected = bit_sum(values)
    for bit in range(32):
        changed = values.clone()
        changed.view(torch.int32)[bit * 31] ^= (
            torch.tensor(1 << bit).to(torch.int32)
            if bit < 31
            else torch.tensor(-(1 << 31)).to(torch.int32)
        )
        assert bit_sum(changed) != expected


def test_without_an_owner_the_majority_decides_and_a_tie_names_both():
    assert who_differs([{"m": [1]}, {"m": [1]}, {"m": [2]}]) == ["rank 2 in m"]
    assert who_differs([{"m": [1]}, {"m": [2]}]) == ["rank 0, 1 in m (one of them)"]
    assert who_differs([{"m": [1]}, {"m": [1]}]) == []


def test_fault_17_a_loss_spike_is_reported_with_its_samples(config):
    outcome = run(
        config, Fault("spike", -1, steps=(11,)), overrides=["guards.straggler_interval=null"]
    )
    assert re.search(
        r"step 11: loss [\d.]+ is [\d.]+ above the median of the last 10 steps; samples 40-43",
        outcome.output,
    )
    assert "loss_spike" in (config.parent / "run" / "metrics.jsonl").read_text()


def test_fault_17_after_a_loss_spike_all_ranks_go_back_and_leave_the_data_out(config, oracle):
    overrides = ["guards.rollback_threshold=1"]
    outcome = run(config, Fault("spike_once", -1, steps=(11,)), overrides=overrides)
    assert outcome.exit_codes == [0, 0]
    assert "went back from step 11 to step 9; samples 36-43 are left out" in outcome.output
    after, undisturbed = losses(config), oracle[0]
    assert [after[step] for step in range(1, 10)] == [undisturbed[step] for step in range(1, 10)]
    assert after[10] != undisturbed[10]
    assert max(after.values()) < undisturbed[1] + 1  # the weights of before the spike


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fault_17_killed_at_random_times_the_run_leaves_out_the_same_data(
    config, tmp_path_factory, seed
):
    settings = [
        "guards.rollback_threshold=2",
        "training.train_steps=18",
        "checkpoint.interval=2",
        "checkpoint.keep=9",
    ]
    fault = Fault("bad_samples", -1, steps=(44, 58), seconds=0.05)
    undisturbed = write_corpus(tmp_path_factory.mktemp("undisturbed"))
    outcome = run(undisturbed, fault, overrides=settings)
    assert outcome.exit_codes == [0, 0] and outcome.output.count("went back") == 2, outcome.output
    generator = random.Random(seed)
    for _ in range(4):
        ranks = start(config, fault, overrides=settings)
        time.sleep(generator.uniform(0.8, 2.5))
        ranks.processes[generator.randrange(2)].kill()
        ranks.wait()
    assert run(config, fault, overrides=settings).exit_codes == [0, 0]
    assert (losses(config), final_state(config)) == (losses(undisturbed), final_state(undisturbed))


def test_fault_17_a_spike_that_comes_again_and_again_stops_the_run(config):
    overrides = ["guards.rollback_threshold=1", "guards.max_rollbacks=2"]
    outcome = run(config, Fault("spike", -1, steps=(11,)), overrides=overrides)
    assert outcome.exit_codes == [80, 80]
    assert "went back 2 times already" in outcome.output
    assert "Traceback" not in outcome.output
    assert steps_on_disk(config) == ["step_00000006", "step_00000009"]


# Ranks that hang, stop or lag.


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("hang", 5),
        pytest.param("hang", 1, marks=pytest.mark.slow),
        pytest.param("stop", 5, marks=pytest.mark.slow),
    ],
)
def test_fault_18_a_hung_rank_is_named_and_the_run_ends_within_the_bound(config, kind, step):
    outcome = run(
        config, Fault(kind, 1, steps=(step,)), overrides=["guards.hang_timeout_minutes=0.1"]
    )
    assert outcome.exit_codes[0] == 77 and not outcome.timed_out
    if kind == "hang":
        assert outcome.exit_codes[1] == 77
        assert (
            f"hung at step {step}: rank 1 holds the others up: rank 1 in injections.py"
            in outcome.output
        )
        assert "injections.py" in (config.parent / "run" / "hang_rank_00001.txt").read_text()
        waiting, hung = (
            json.loads(
                (config.parent / "run" / f"hang_rank_0000{rank}.collectives.json").read_text()
            )
            for rank in (0, 1)
        )
        # The flight recorder is on: one rank got further than the other.
        assert len(waiting["entries"]) > len(hung["entries"]) > 0
        assert re.search(
            r"rank 0: the last collective is gloo:\w+ of \[.*\] in group 0, scheduled",
            outcome.output,
        )
        assert re.search(
            (
                r"rank 1: the last collective is gloo:\w+ of \[.*\] in group \d+, finished; "
                r".*hang_rank_00001.collectives.json"
            ),
            outcome.output,
        )
    else:
        assert "rank 1 does not answer" in outcome.output


@pytest.mark.slow
def test_fault_35_a_stopped_rank_0_that_holds_the_store_is_named_with_the_code_of_a_hang(config):
    outcome = run(
        config, Fault("stop", 0, steps=(5,)), overrides=["guards.hang_timeout_minutes=0.1"]
    )
    assert outcome.exit_codes[1] == 77 and not outcome.timed_out, outcome.output
    assert (
        "hung: rank 0, which hosts the store, does not answer (stopped, or its host is down)"
        in outcome.output
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hang_early", "stop_early"])
def test_fault_35_a_hang_before_the_first_step_is_named(config, kind):
    outcome = run(
        config,
        Fault(kind, 1),
        overrides=["guards.hang_timeout_minutes=0.1", "checkpoint.timeout_minutes=0.2"],
    )
    assert outcome.exit_codes[0] == 77 and not outcome.timed_out, outcome.output
    if kind == "hang_early":
        assert outcome.exit_codes[1] == 77
        assert (
            "hung before the first step (opening the data): rank 1 holds the others up: rank 1 "
            "in injections.py"
        ) in outcome.output
    else:
        assert "hung: rank 1 does not answer" in outcome.output


def test_the_rank_that_waits_for_nobody_is_to_blame():
    waiting = {
        "step": 7,
        "phase": 5,
        "progress": "at step 7",
        "place": "collectives.py:30 wait",
        "waiting": True,
    }
    assert "rank 2 holds" in verdict({0: waiting, 1: waiting, 2: {**waiting, "waiting": False}})
    assert "at step 6: rank 1 holds" in verdict(
        {0: waiting, 1: {**waiting, "step": 6, "progress": "at step 6"}, 2: waiting}
    )
    assert "rank 1 does not answer" in verdict({0: waiting, 1: None, 2: waiting})
    assert "ranks 1, 2 do not answer (stopped, or their hosts are down)" in verdict(
        {0: waiting, 1: None, 2: None}
    )
    working = {**waiting, "waiting": False}
    assert "ranks 1, 2 hold the others up" in verdict({0: waiting, 1: working, 2: working})
    early = {
        **waiting,
        "step": 1,
        "phase": 3,
        "progress": "before the first step (opening the data)",
    }
    behind = {**early, "phase": 2, "progress": "before the first step (building the model)"}
    assert "hung before the first step (building the model): rank 1 holds" in verdict(
        {0: early, 1: behind, 2: early}
    )


def test_fault_19_a_straggler_is_named_with_its_ratio(config):
    fault = Fault("slow", 1, steps=tuple(range(1, 13)), seconds=2.0)
    outcome = run(
        config,
        fault,
        overrides=[
            "guards.straggler_interval=2",
            "guards.straggler_ratio=1.5",
            "training.train_steps=2",
        ],
    )
    assert re.search(
        r"step 2: rank 1 on \S+ is a straggler: [\d.]+ s .* [\d.]+ times the median rank's",
        outcome.output,
    ), outcome.output
    (row,) = [
        row
        for row in read_metrics(config.parent / "run" / "metrics.jsonl")
        if "slowest_rank" in row
    ]
    assert row["step"] == 2 and row["slowest_rank"] == 1 and row["slowest_rank_ratio"] > 1.5
