"""Our data-parallel step against torch's DistributedDataParallel with ZeRO-1, and FSDP2.

The baselines are DistributedDataParallel with ZeroRedundancyOptimizer, and `fully_shard`. All have
the same shape of model, the same batch and one process group; the programs take turns step by step,
so that all see the same machine.
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
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
Times = tuple[float, float]  # seconds on the clock, seconds of the rank's processor
RankResult = tuple[dict[str, int], dict[str, list[Times]]]  # peak bytes and step times by program
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.1}
OURS = "ours"


@dataclass(frozen=True)
class ProgramFigures:
    """One program on the slowest (time) and the fullest (memory) rank.

    peak_bytes: resident memory of a rank, above what the process had before the program was built.
    ratio: our median over this one's, with its 95 % bootstrap interval. cpu_time_ratio: the same of
    the processor time of all ranks together, which other work on the machine disturbs little.
    """

    seconds: float  # median of the step times
    lower_quartile: float
    upper_quartile: float
    peak_bytes: int
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_time_ratio: float


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
    """Start `processes` ranks over gloo; measure each program's memory, then time them in turn."""
    with tempfile.TemporaryDirectory() as folder:
        results = get_context("spawn").SimpleQueue()
        store = str(Path(folder) / "store")
        arguments = (processes, store, settings, precision, results)
        start: Callable[..., Any] = spawn  # torch gives it no types
        context = start(_rank, arguments, nprocs=processes, join=False)
        context.join()
        return summarize(results.get(), settings, precision, processes)


def _rank(
    rank: int, processes: int, store: str, settings: BenchmarkSettings, precision: str, results: Any
) -> None:
    """One process of the comparison; rank 0 puts a list of every rank's RankResult in `results`."""
    torch.set_num_threads(1)  # the ranks share the cores of one machine
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    peaks = peak_memories(settings, precision)
    times = alternate(settings, precision)
    gathered: list[Any] = [None] * processes
    dist.all_gather_object(gathered, (peaks, times))
    if rank == 0:
        results.put(gathered)
    dist.destroy_process_group()


def alternate(settings: BenchmarkSettings, precision: str) -> dict[str, list[Times]]:
    """Times of each step on this rank.

    The program that goes first changes every round; a step begins when all ranks are there.
    """
    steps = {name: build_program(settings, precision) for name, build_program in PROGRAMS.items()}
    times_by_program: dict[str, list[Times]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(settings.warmup + settings.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times = _time_step(steps[name])
            if number >= settings.warmup:
                times_by_program[name].append(times)
    return times_by_program


def _time_step(step: Step) -> Times:
    # Without the barrier a rank's time would hold the delay of the others' last step.
    dist.barrier()
    clock_start = time.perf_counter()
    processor_start = time.process_time()
    step()
    return time.perf_counter() - clock_start, time.process_time() - processor_start


def summarize(
    gathered: Sequence[RankResult],
    settings: BenchmarkSettings,
    precision: str,
    processes: int,
) -> ParallelComparison:
    """Medians over rounds of the slowest rank's time and of all ranks' processor time.

    Of the memory, the fullest rank's. `gathered` holds what every rank measured.
    """
    slowest_seconds = {}
    processor_seconds = {}
    for name in PROGRAMS:
        slowest = []
        processor_sums = []
        # One element a round: the (clock, processor) of each rank.
        for rank_times in zip(*(times[name] for _, times in gathered), strict=True):
            slowest.append(max(clock for clock, _ in rank_times))
            processor_sums.append(sum(processor for _, processor in rank_times))
        slowest_seconds[name] = slowest
        processor_seconds[name] = statistics.median(processor_sums)

    programs = {}
    our_seconds = slowest_seconds[OURS]
    for name, seconds in slowest_seconds.items():
        lower_quartile, median, upper_quartile = statistics.quantiles(seconds, n=4)
        ratio_low, ratio_high = bootstrap_ratio(our_seconds, seconds)
        programs[name] = ProgramFigures(
            seconds=median,
            lower_quartile=lower_quartile,
            upper_quartile=upper_quartile,
            peak_bytes=max(peaks[name] for peaks, _ in gathered),
            ratio=statistics.median(our_seconds) / median,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            cpu_time_ratio=processor_seconds[OURS] / processor_seconds[name],
        )
    return ParallelComparison(processes, precision, settings.rounds, programs)


def our_program(settings: BenchmarkSettings, precision: str) -> Step:
    """The step of `pretrain` over data ranks."""
    world_size = dist.get_world_size()
    config = run_config(settings, precision)
    global_batch = {"global_batch_size": settings.batch_size * world_size}
    training = config.training.model_copy(update=global_batch)
    config = config.model_copy(update={"training": training})
    context = ParallelContext.over_world(
        config.parallel, torch.device("cpu"), dist.get_rank(), world_size, world_size
    )
    assembly = assemble(config, context)
    step = assembly.step
    optimizer = assembly.optimizer
    batch = random_batch(settings)

    def run() -> None:
        # The gathering of parameters runs on into the next step of a real run. It has to end
        # inside the clock here, or another program's step would pay for it.
        step.run([batch], 1).read()
        optimizer.wait_for_parameters()

    return run


def ddp_program(settings: BenchmarkSettings, precision: str) -> Step:
    """DistributedDataParallel with gradients as views of its buckets.

    AdamW's state is divided over the ranks by ZeroRedundancyOptimizer.
    """
    model = DistributedDataParallel(_plain(settings, precision), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **ADAMW)
    return _plain_step(model, optimizer, random_batch(settings), autocast=precision == "bf16")


def fsdp_program(settings: BenchmarkSettings, precision: str) -> Step:
    """FSDP2: every block, then the model; parameters, gradients and state are sharded."""
    model = _plain(settings, precision)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:
        policy = MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return _plain_step(model, optimizer, random_batch(settings), autocast=False)


PROGRAMS: dict[str, Callable[[BenchmarkSettings, str], Step]] = {
    OURS: our_program,
    "DDP + ZeroRedundancyOptimizer": ddp_program,
    "FSDP2": fsdp_program,
}


def _plain(settings: BenchmarkSettings, precision: str) -> PlainGPT:
    torch.manual_seed(1)  # the same parameters on every rank
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


def peak_memory(
    build_program: Callable[[BenchmarkSettings, str], Step],
    settings: BenchmarkSettings,
    precision: str,
) -> int:
    """Most resident bytes of this process while a program is built and makes two steps (Linux).

    What was resident before is subtracted.
    """
    give_back_freed_memory()
    resident_before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    step = build_program(settings, precision)
    # The optimizer's state is created in the first step, so only the second has all of it.
    step()
    step()
    peak = resident("VmHWM") - resident_before
    del step
    give_back_freed_memory()
    return peak


def peak_memories(settings: BenchmarkSettings, precision: str) -> dict[str, int]:
    """`peak_memory` of each program, one after the other."""
    # What a process needs once, such as code and threads, must not count for the program that
    # happens to come first: each runs once with a small model before it is measured.
    small_model = settings.model.model_copy(update={"num_layers": 1})
    small_settings = replace(settings, model=small_model, batch_size=1)
    for build_program in PROGRAMS.values():
        peak_memory(build_program, small_settings, precision)

    peaks = {}
    for name, build_program in PROGRAMS.items():
        peaks[name] = peak_memory(build_program, settings, precision)
    return peaks


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            kibibytes = int(line.split()[1])
            return kibibytes * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def give_back_freed_memory() -> None:
    """Collect garbage, return free heap to the system, and map every larger tensor on its own.

    The last lasts: from the first call on, glibc maps allocations of 64 KiB and more separately, so
    that freeing them lowers the resident memory.
    """
    gc.collect()
    glibc = ctypes.CDLL(None)
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    glibc.mallopt(mmap_threshold, 1 << 16)
    glibc.malloc_trim(0)
