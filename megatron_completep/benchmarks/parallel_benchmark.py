"""Our data-parallel step against torch's: DistributedDataParallel with ZeroRedundancyOptimizer, and FSDP2 (`fully_shard`).

The same shape of model, the same batch, one process group; the programs take turns step by step, so that all see the same machine.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megatron_completep.benchmarks.plain_model import PlainGPT
from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    bootstrap_ratio,
    random_batch,
    run_config,
)
from megatron_completep.completep import table_of
from megatron_completep.data.loader import Batch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble

Step = Callable[[], None]
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.1}
OURS = "ours"


@dataclass(frozen=True)
class ProgramFigures:
    """One program on the slowest (time) and the fullest (memory) rank."""

    seconds: float  # median of the step times
    lower_quartile: float
    upper_quartile: float
    peak_bytes: (
        int  # resident memory of a rank, above what the process had before the program was built
    )
    ratio: float  # our median over this one's, with its 95 % bootstrap interval
    ratio_low: float
    ratio_high: float
    cpu_time_ratio: float  # the same of the processor time of all ranks together, which other work on the machine disturbs little


@dataclass(frozen=True)
class ParallelComparison:
    """All programs of one run."""

    processes: int
    precision: str
    rounds: int
    programs: dict[str, ProgramFigures]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_parallel(
    settings: BenchmarkSettings, precision: str, processes: int
) -> ParallelComparison:
    """Start `processes` ranks over gloo, measure the memory of each program alone, then time them in turn."""
    with tempfile.TemporaryDirectory() as folder:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        arguments = processes, str(Path(folder) / "store"), settings, precision, results
        context = multiprocessing.spawn(_rank, arguments, nprocs=processes, join=False)
        context.join()
        return summarize(results.get(), settings, precision, processes)


def _rank(
    rank: int, processes: int, store: str, settings: BenchmarkSettings, precision: str, results: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    peaks = peak_memories(settings, precision)
    seconds = alternate(settings, precision)
    gathered: list[Any] = [None] * processes
    dist.all_gather_object(gathered, (peaks, seconds))
    if rank == 0:
        results.put(gathered)
    dist.destroy_process_group()


def alternate(settings: BenchmarkSettings, precision: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step on the clock and of this rank's processor. Which program goes first changes every round; a step begins
    when all ranks are there."""
    steps = {name: build_program(settings, precision) for name, build_program in PROGRAMS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(settings.warmup + settings.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            steps[name]()
            if number >= settings.warmup:
                seconds[name].append((time.perf_counter() - started, time.process_time() - used))
    return seconds


def summarize(
    gathered: Sequence[tuple[dict[str, int], dict[str, list[tuple[float, float]]]]],
    settings: BenchmarkSettings,
    precision: str,
    processes: int,
) -> ParallelComparison:
    """Medians over rounds of the slowest rank's time and of all ranks' processor time, and the fullest rank's memory."""
    slowest, used = {}, {}
    for name in PROGRAMS:
        rounds = list(
            zip(*(seconds[name] for _, seconds in gathered), strict=True)
        )  # a round's (clock, processor) by rank
        slowest[name] = [max(clock for clock, _ in ranks) for ranks in rounds]
        used[name] = statistics.median(sum(processor for _, processor in ranks) for ranks in rounds)
    programs = {}
    for name, times in slowest.items():
        low, median, high = statistics.quantiles(times, n=4)
        peak = max(peaks[name] for peaks, _ in gathered)
        ratio = statistics.median(slowest[OURS]) / median
        programs[name] = ProgramFigures(
            median,
            low,
            high,
            peak,
            ratio,
            *bootstrap_ratio(slowest[OURS], times),
            used[OURS] / used[name],
        )
    return ParallelComparison(processes, precision, settings.rounds, programs)


# --- the programs -------------------------------------------------------------------------------------------------------------


def our_program(settings: BenchmarkSettings, precision: str) -> Step:
    """The step of `pretrain` over data ranks."""
    config = run_config(settings, precision)
    config = config.model_copy(
        update={
            "training": config.training.model_copy(
                update={"global_batch_size": settings.batch_size * dist.get_world_size()}
            )
        }
    )
    world_size = dist.get_world_size()
    context = ParallelContext.over_world(
        config.parallel, torch.device("cpu"), dist.get_rank(), world_size, world_size
    )
    assembly, batch = assemble(config, context), random_batch(settings)
    step, optimizer = assembly.step, assembly.optimizer

    def run() -> None:
        step.run([batch], 1).read()
        optimizer.wait_for_parameters()

    return run


def ddp_program(settings: BenchmarkSettings, precision: str) -> Step:
    """DistributedDataParallel, gradients as views of its buckets; AdamW's state shared by ZeroRedundancyOptimizer."""
    model = DistributedDataParallel(_plain(settings, precision), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **ADAMW)
    return _plain_step(model, optimizer, random_batch(settings), autocast=precision == "bf16")


def fsdp_program(settings: BenchmarkSettings, precision: str) -> Step:
    """FSDP2: every block, then the whole; parameters, gradients and state are sharded."""
    model = _plain(settings, precision)
    mixed = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return _plain_step(model, optimizer, random_batch(settings), autocast=False)


PROGRAMS: dict[str, Callable[[BenchmarkSettings, str], Step]] = {
    OURS: our_program,
    "DDP + ZeroRedundancyOptimizer": ddp_program,
    "FSDP2": fsdp_program,
}


def _plain(settings: BenchmarkSettings, precision: str) -> PlainGPT:
    torch.manual_seed(1)
    return PlainGPT(settings.model, table_of(run_config(settings, precision)))


def _plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, autocast: bool
) -> Step:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch.tokens, batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


# --- memory -------------------------------------------------------------------------------------------------------------------


def peak_memory(
    build_program: Callable[[BenchmarkSettings, str], Step],
    settings: BenchmarkSettings,
    precision: str,
) -> int:
    """Most resident bytes of this process while a program is built and makes two steps, above what was there before (Linux)."""
    give_back_freed_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step = build_program(settings, precision)
    step()
    step()
    peak = resident("VmHWM") - before
    del step
    give_back_freed_memory()
    return peak


def peak_memories(settings: BenchmarkSettings, precision: str) -> dict[str, int]:
    """`peak_memory` of each program, one after the other."""
    small = replace(
        settings, model=settings.model.model_copy(update={"num_layers": 1}), batch_size=1
    )
    for (
        program
    ) in PROGRAMS.values():  # what a process needs once, such as code and threads, is nobody's
        peak_memory(program, small, precision)
    return {name: peak_memory(program, settings, precision) for name, program in PROGRAMS.items()}


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def give_back_freed_memory() -> None:
    """Collect garbage, return free heap to the system, and have glibc map every larger tensor on its own from now on."""
    gc.collect()
    glibc = ctypes.CDLL(None)
    mmap_threshold = -3
    glibc.mallopt(mmap_threshold, 1 << 16)
    glibc.malloc_trim(0)
