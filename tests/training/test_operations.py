"""Batches that grow, steps that are skipped, a time to leave,
garbage, profiles, and what is said of nodes.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.config import Config
from megatron_completep.config.schema import ParallelConfig, ProfilingConfig
from megatron_completep.guards.hooks import GarbageCollection
from megatron_completep.parallel.context import ParallelContext, flight_recorder
from megatron_completep.planning.plan import make_plan
from megatron_completep.pretrain import pretrain
from megatron_completep.run.hook import StepRecord
from megatron_completep.run.signals import StopSignals
from megatron_completep.run.state import ExitCode, RunState
from megatron_completep.run.step import StepFigures, Stopwatch, TrainingStep
from megatron_completep.telemetry import node, profiling
from megatron_completep.telemetry.node import (
    RankReport,
    attention_kernel,
    cudnn_version,
    differing,
    driver_version,
    lines_of,
)
from megatron_completep.telemetry.profiling import ALLOCATIONS, Profiler
from megatron_completep.telemetry.startup import StartupClock
from tests.support.models import model_config
from tests.support.ranks import launched_as
from tests.support.runs import rows_of, tiny_config

BARE = (
    "data.validation=null",
    "training.validation_interval=null",
    "logging.parameterization_interval=null",
)
RAMP = (
    *BARE,
    "training.global_batch_size=16",
    "training.batch_ramp={start: 8, increment: 4, steps: 6}",
)
SIZES = [8, 8, 8, 12, 12, 12, 16, 16, 16, 16, 16, 16]


def record(step: int) -> StepRecord:
    return StepRecord(
        RunState(step, 8 * step, 128 * step), StepFigures(4.0, 1.0, 128, False, False), 8, 0.1, 0.0
    )


# A batch that grows.


@pytest.fixture(scope="module")
def ramp(folder: Path) -> Config:
    config = tiny_config(folder, *RAMP, output="ramp")
    assert pretrain(config) == ExitCode.DONE
    return config


def test_a_growing_batch_reads_the_same_data_in_the_same_order(
    folder: Path, ramp: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, read = TrainingStep.run, []

    def run(self: TrainingStep, batches: Any, step: int, stop: bool = False) -> Any:
        read.append([int(number) for batch in batches for number in batch.sample_ids])
        return original(self, batches, step, stop)

    monkeypatch.setattr(TrainingStep, "run", run)
    config = tiny_config(folder, *RAMP, "data.prefetch=3", output="ids")
    pretrain(config)
    assert [len(numbers) for numbers in read] == SIZES
    assert [number for numbers in read for number in numbers] == list(range(sum(SIZES)))
    assert rows_of(config) == rows_of(ramp)
    assert [row["tokens"] for row in rows_of(ramp)] == [
        16 * sum(SIZES[:step]) for step in range(1, 13)
    ]


def test_the_learning_rate_goes_by_steps_whatever_the_batch(folder: Path, ramp: Config) -> None:
    config = tiny_config(folder, *BARE, output="level")
    pretrain(config)
    assert [row["lr"] for row in rows_of(ramp)] == [row["lr"] for row in rows_of(config)]
    # Batches of 8 each.
    assert [row["loss"] for row in rows_of(ramp)][:3] == [row["loss"] for row in rows_of(config)][
        :3
    ]
    assert [row["loss"] for row in rows_of(ramp)][3:] != [row["loss"] for row in rows_of(config)][
        3:
    ]


def test_a_run_stopped_inside_the_ramp_goes_on_bit_for_bit(folder: Path, ramp: Config) -> None:
    config = tiny_config(folder, *RAMP, "training.stop_at_step=5", output="halves_of_a_ramp")
    pretrain(config)
    assert len(rows_of(config)) == 5
    resumed = tiny_config(folder, *RAMP, output="halves_of_a_ramp")
    pretrain(resumed)
    assert rows_of(resumed) == rows_of(ramp)


def train_as_rank(rank: int, world_size: int, config: Config) -> int:
    launched_as(rank, world_size)
    return int(pretrain(config))


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_a_growing_batch_trains_alike_in_every_layout(
    folder: Path, ramp: Config, pool: Any, layout: str
) -> None:
    changes = {
        "data": ("training.micro_batch_size=2",),
        "pipeline": ("parallel.pipeline_parallel_size=2",),
    }[layout]
    profile = (
        ("profiling.first_step=3", "profiling.steps=1", "profiling.ranks=[1]")
        if layout == "data"
        else ()
    )
    config = tiny_config(
        folder,
        *RAMP,
        *changes,
        *profile,
        "guards.hang_timeout_minutes=null",
        output=f"ramp_{layout}",
    )
    assert pool.run(2, train_as_rank, 2, config) == [0, 0]
    written = [path.name for path in Path(config.training.output_dir).glob("profile/*")]
    # By the ranks that were named.
    assert written == (["trace_rank_00001_steps_3_3.json.gz"] if profile else [])
    losses, expected = ([row["loss"] for row in rows_of(run)] for run in (config, ramp))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def test_completep_scales_from_the_final_batch_and_all_tokens(folder: Path) -> None:
    scaled = ("completep.base_batch_tokens=64", "training.global_batch_size=16")
    level, ramped = (make_plan(tiny_config(folder, *scaled, *more)) for more in ((), RAMP[-1:]))
    assert [p.lr for p in level.parameters] == [p.lr for p in ramped.parameters]
    durations = (*scaled, "completep.base_total_tokens=1024")
    level, ramped = (make_plan(tiny_config(folder, *durations, *more)) for more in ((), RAMP[-1:]))
    # Fewer tokens in the whole run.
    assert [p.lr for p in level.parameters] != [p.lr for p in ramped.parameters]


# Steps to skip.


def test_skipped_steps_read_their_data_and_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*BARE, "checkpoint.interval=2", "checkpoint.keep=9")
    config = tiny_config(
        folder, *changes, "training.skip_steps=[{first: 3, last: 5}, {first: 12}]", output="skips"
    )
    assert pretrain(config) == ExitCode.DONE
    rows = rows_of(config)
    assert (
        [row["step"] for row in rows if row.get("passed_over")]
        == [3, 4, 5, 12]
        == [row["step"] for row in rows if row["skipped"]]
    )
    assert [row["consumed_samples"] for row in rows] == [8 * step for step in range(1, 13)]
    assert all(
        row["loss"] is None and row["lr"] > 0 for row in rows if row["skipped"] and row["step"] < 12
    )

    # The same by hand: after step 2 comes step 6.
    first = tiny_config(folder, *changes, "training.stop_at_step=2", output="by_hand")
    pretrain(first)
    original = Checkpointer.load_latest
    monkeypatch.setattr(
        Checkpointer,
        "load_latest",
        lambda self: replace(original(self), step=5, consumed_samples=40),
    )
    by_hand = tiny_config(folder, *changes, output="by_hand")
    pretrain(by_hand)
    figures = [
        {row["step"]: (row["loss"], row["grad_norm"]) for row in rows_of(run)}
        for run in (config, by_hand)
    ]
    assert [figures[0][step] for step in range(6, 12)] == [
        figures[1][step] for step in range(6, 12)
    ]
    monkeypatch.undo()
    plain = tiny_config(folder, *changes, output="none_skipped")
    pretrain(plain)
    assert rows_of(plain)[5]["loss"] != rows[5]["loss"]


# Leaving by the clock.


def test_a_run_whose_time_is_up_saves_and_asks_for_a_requeue(folder: Path) -> None:
    whole = tiny_config(folder, *BARE, output="all_the_time")
    assert pretrain(whole) == ExitCode.DONE  # without the setting nothing stops it
    short = tiny_config(folder, *BARE, "training.exit_after_minutes=0.000001", output="short")
    assert pretrain(short) == ExitCode.REQUEUE == 75
    assert [row["step"] for row in rows_of(short)] == [1]
    assert (Path(short.training.output_dir) / "checkpoints" / "step_00000001").is_dir()
    assert pretrain(tiny_config(folder, *BARE, output="short")) == ExitCode.DONE
    assert rows_of(short) == rows_of(whole)


def test_the_time_to_leave_counts_from_the_start_of_the_process() -> None:
    said: list[str] = []
    assert not StopSignals(said.append, 600.0, elapsed_seconds=30.0).asked
    assert not StopSignals(said.append, None, 1e9).asked
    late = StopSignals(said.append, 1.0, elapsed_seconds=61.0)
    assert late.asked and late.asked and len(said) == 1 and "the time is up" in said[0]
    assert StartupClock.from_process_start().elapsed > StartupClock().elapsed >= 0


# Garbage.


def test_garbage_is_collected_after_the_same_steps_and_never_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: list[int] = []
    steps = range(1, 11)
    hook = GarbageCollection(4)
    try:
        assert not gc.isenabled()
        for step in steps:
            monkeypatch.setattr(gc, "collect", lambda step=step: collected.append(step))
            hook.after_step(record(step))
    finally:
        monkeypatch.undo()
        hook.close()
    assert collected == [4, 8] and gc.isenabled()


# Profiles.


def test_a_window_of_steps_is_profiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TrainingStep.run

    def run(self: TrainingStep, batches: Any, step: int, stop: bool = False) -> Any:
        with torch.profiler.record_function(f"marked_step_{step}"):
            return original(self, batches, step, stop)

    monkeypatch.setattr(TrainingStep, "run", run)
    changes = (
        *BARE,
        "training.train_steps=6",
        "profiling.first_step=3",
        "profiling.steps=2",
        "profiling.memory=true",
    )
    config = tiny_config(folder, *changes, output="profiled")
    pretrain(config)
    profile = Path(config.training.output_dir) / "profile"
    assert sorted(path.name for path in profile.iterdir()) == [
        "memory_rank_00000_steps_3_4.txt",
        "trace_rank_00000_steps_3_4.json.gz",
    ]
    events = json.loads(
        gzip.decompress((profile / "trace_rank_00000_steps_3_4.json.gz").read_bytes())
    )["traceEvents"]
    names = {event.get("name") for event in events}
    assert {name for name in names if str(name).startswith("marked_step")} == {
        "marked_step_3",
        "marked_step_4",
    }
    assert "aten::mm" in names
    assert "aten::mm" in (profile / "memory_rank_00000_steps_3_4.txt").read_text()
    assert "profile of steps 3 to 4" in capsys.readouterr().out


def test_other_ranks_and_a_run_that_ends_early(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = Profiler(
        ProfilingConfig(first_step=3, steps=5), ParallelContext.single(), tmp_path, said.append
    )
    for step in (1, 2, 3):
        profiler.before_step(step)
        torch.ones(2) + 1
        profiler.after_step(record(step))
    assert not (tmp_path / "profile").exists()
    profiler.close()
    profiler.close()
    assert len(said) == 1 and len(list((tmp_path / "profile").iterdir())) == 1
    assert [step for step in range(1, 10) if profiler.due(step)] == [2, 7]


def test_on_a_gpu_the_memory_snapshot_and_the_streams_time_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the GPU: what is called, and in which order."""
    calls: list[Any] = []
    window = {
        name: lambda *a, name=name, **k: calls.append(name)
        for name in ("start", "stop", "export_chrome_trace")
    }
    monkeypatch.setattr(
        profiling,
        "profile",
        lambda activities, **_: calls.append(len(activities)) or SimpleNamespace(**window),
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name)
    )
    gpu = ParallelContext.single("cuda")
    profiler = Profiler(
        ProfilingConfig(first_step=3, steps=1, memory=True), gpu, tmp_path, lambda text: None
    )
    profiler.before_step(3)
    profiler.after_step(record(3))
    snapshot = "memory_rank_00000_steps_3_3.pickle"
    assert calls == [
        {"max_entries": ALLOCATIONS},
        2,
        "start",
        "stop",
        "export_chrome_trace",
        snapshot,
        {"enabled": None},
    ]

    events: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append(id(self))

        def elapsed_time(self, other: Any) -> float:
            return 250.0 if events == [id(self), id(other)] else -1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(gpu.device)
    watch.stop()
    assert watch.seconds == 0.25


# What is said and handed over at the start.


def test_the_flight_recorder_is_on_by_default_and_its_environment_is_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "runs/x/nccl_",
    }
    assert flight_recorder(ParallelConfig(), "runs/x/nccl_") == expected
    assert flight_recorder(ParallelConfig(flight_recorder_entries=0), "runs/x/nccl_") == {}
    for name in expected:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")  # a user's own
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "not.used",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, Any] = {}

    def init(backend: str, **options: Any) -> None:
        seen.update(
            {name: os.environ.get(name) for name in expected},
            timeout=options["timeout"].total_seconds(),
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(KeyboardInterrupt):
        ParallelContext.create(
            ParallelConfig(timeout_minutes=0.5),
            "cpu",
            "runs/x/nccl_",
            torch.distributed.HashStore(),
        )
    assert seen == {**expected, "TORCH_FR_BUFFER_SIZE": "7", "timeout": 30.0}
    for name in expected:  # monkeypatch did not set all of them
        os.environ.pop(name, None)


def test_every_node_is_described_once_with_the_gpus_of_its_ranks() -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    versions = {"torch": "2.13.0"}
    reports = [
        RankReport("a", gpu, "x86_64, 96 cores", versions),
        RankReport("a", gpu),
        RankReport("b", gpu, "x86_64, 90 cores", versions),
        RankReport("b", gpu),
    ]
    assert lines_of(reports) == [
        f"node {host}: 2 ranks on 2 x {gpu}; x86_64, {cores} cores; torch 2.13.0"
        for host, cores in (("a", 96), ("b", 90))
    ]
    assert lines_of([RankReport("a", None, "x86_64, 2 cores", versions)]) == [
        "node a: 1 rank; x86_64, 2 cores; torch 2.13.0"
    ]


def test_a_version_that_differs_between_nodes_is_said() -> None:
    same = {"torch": "2.13.0", "driver": "550.54.15"}
    other = {"torch": "2.13.0", "driver": "570.1.2"}
    assert list(differing([("a", same), ("b", same)])) == []
    (line,) = differing([("a", same), ("b", other), ("c", same)])
    assert line == "warning: driver differs between nodes: 550.54.15 on a, c; 570.1.2 on b"


def test_the_driver_version_is_read_off_the_kernel_module() -> None:
    classic = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 "
        "UTC 2024\nGCC version: gcc 11.4.0\n"
    )
    opened = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release "
        "Build  (dvs-builder)\n"
    )
    assert [driver_version(text) for text in (classic, opened, "")] == [
        "550.54.15",
        "570.124.06",
        "unknown",
    ]


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [({}, "flash"), ({"num_query_groups": 2}, "flash"), ({"position": "alibi"}, "flash")],
    ids=str,
)
def test_the_kernel_that_serves_attention_is_read_off_a_call(
    changes: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where torch has one kernel besides plain products."""
    cpu = torch.device("cpu")
    assert attention_kernel(model_config(**changes), torch.float32, cpu) == kernel
    with sdpa_kernel(SDPBackend.MATH):  # the control
        assert attention_kernel(model_config(**changes), torch.float32, cpu) == "math"

    def refused(*_: Any) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(node, "attend", refused)
    assert attention_kernel(model_config(**changes), torch.float32, cpu) == "none"


def test_cudnn_s_number_is_written_as_a_version() -> None:
    assert cudnn_version(91900) == "9.19.0" and cudnn_version(91501) == "9.15.1"
    assert cudnn_version(None) == "none"
