"""Our training step against a plain torch model of the same shape, with and without compilation.

All programs run in turn in one process, so that they see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_completep.benchmarks.plain_model import PlainGPT
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import ModelConfig
from megatron_completep.data.loader import Batch
from megatron_completep.model.flops import peak_flops, training_flops_per_token
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.run.precision import DTYPES

Times = tuple[float, float]  # seconds on the clock, seconds of this process's processors
Say = Callable[[str], None]

# The two kinds of decoder: options of `model`.
KINDS: dict[str, dict[str, Any]] = {
    "gelu": {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
    "swiglu": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False},
}
OURS = "ours"
PLAIN = "plain"
COMPILED = ", compiled"  # behind the name of a program
PROGRAMS = (OURS, OURS + COMPILED, PLAIN, PLAIN + COMPILED)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed: a model shape, a batch in sequences, and how often.

    plain_bf16: how the plain model computes in bf16. "autocast": float32 parameters under autocast;
    "pure": everything in bf16, AdamW's moments too.
    """

    model: ModelConfig
    batch_size: int = 8
    rounds: int = 20
    warmup: int = 3
    compile: bool = False
    overlap_update: bool = False
    plain_bf16: str = "autocast"
    base: dict[str, int] = field(
        default_factory=lambda: {"base_hidden_size": 256, "base_num_layers": 2}
    )


@dataclass(frozen=True)
class Timing:
    """One program's steps, in seconds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    tokens_per_second: float
    model_flops_per_second: float
    mfu: float | None  # None where the device's peak is not known


@dataclass(frozen=True)
class Comparison:
    """Our program and a plain one in one precision.

    names: of the two, out of PROGRAMS. ratio: our median over the plain one's, with its 95 %
    bootstrap interval. cpu_time_ratio: the same of the processor time, which other work on the
    machine disturbs little (CPU only).
    """

    precision: str
    names: tuple[str, str]
    ours: Timing
    plain: Timing
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_time_ratio: float | None
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    settings: BenchmarkSettings, precision: str, device: torch.device, say: Say = lambda line: None
) -> Comparison:
    """Time ours and the plain program, both compiled where the settings say so."""
    suffix = COMPILED if settings.compile else ""
    (comparison,) = compare_all(settings, precision, device, (OURS + suffix, PLAIN + suffix), say)
    return comparison


def compare_all(
    settings: BenchmarkSettings,
    precision: str,
    device: torch.device,
    names: Sequence[str] = PROGRAMS,
    say: Say = lambda line: None,
) -> list[Comparison]:
    """Time programs step by step in turn, and compare each of ours with each plain one.

    names: of the programs, out of PROGRAMS; `settings.compile` is not asked. The order in which
    they run turns around every round.
    """
    table = table_of(run_config(settings, precision))
    batch = random_batch(settings)
    programs = []
    for name in names:
        own_settings = replace(settings, compile=name.endswith(COMPILED))
        make_step = our_step if name.startswith(OURS) else plain_step
        programs.append((name, make_step(own_settings, precision, device, table, batch)))

    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(settings.warmup + settings.rounds):
        round_seconds = 0.0
        # A later program may find warmer caches, so they change places every round.
        for name, step in programs if number % 2 == 0 else reversed(programs):
            step_times = time_once(step, device)
            round_seconds += step_times[0]
            if number >= settings.warmup:
                times[name].append(step_times)
        # The last round of the warm-up is the first that tells how long the rounds will take.
        if number == settings.warmup - 1:
            say(f"{precision}: {settings.rounds} rounds of about {round_seconds:.2f} s")

    comparisons = []
    for ours in (name for name in names if name.startswith(OURS)):
        for plain in (name for name in names if name.startswith(PLAIN)):
            pair = {ours: times[ours], plain: times[plain]}
            comparisons.append(summarize(settings, precision, device, pair))
    return comparisons


def time_once(step: Callable[[], Any], device: torch.device) -> Times:
    """Seconds on the clock and of this process's processors for one step.

    The device is idle at the beginning and at the end.
    """
    # A GPU runs behind the host: without waiting for it, the clock would measure launches only.
    synchronize(device)
    clock_start = time.perf_counter()
    processor_start = time.process_time()
    step()
    synchronize(device)
    return time.perf_counter() - clock_start, time.process_time() - processor_start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_step(
    settings: BenchmarkSettings, precision: str, device: torch.device, table: Table, batch: Batch
) -> Callable[[], None]:
    """The step of `pretrain`: inputs to the device, forward, backward, clipping, update."""
    config = run_config(settings, precision)
    context = ParallelContext.single(device)
    step = assemble(config, context, table).step

    def run() -> None:
        step.run([batch], 1)

    return run


def plain_step(
    settings: BenchmarkSettings, precision: str, device: torch.device, table: Table, batch: Batch
) -> Callable[[], None]:
    """The same step with nn modules, clip_grad_norm_ and torch.optim.AdamW, fused."""
    model = PlainGPT(settings.model, table).to(device)
    # Either autocast casts the float32 parameters at each use, or the parameters are bf16.
    pure_bf16 = precision == "bf16" and settings.plain_bf16 == "pure"
    autocast = precision == "bf16" and not pure_bf16
    if pure_bf16:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if settings.compile else model

    def step() -> None:
        tokens = batch.tokens.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = forward(tokens, labels)
        loss.backward()
        # As ours: clipping reads the norm on the device, so that nothing waits for the host.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_config(settings: BenchmarkSettings, precision: str) -> Config:
    """The configuration of a run of this shape; no file of it is opened."""
    # The schema wants a corpus and a folder, which a benchmark does not have.
    training = {
        "micro_batch_size": settings.batch_size,
        "global_batch_size": settings.batch_size,
        "train_steps": 1000,
        "precision": precision,
        "compile": settings.compile,
        "overlap_update": settings.overlap_update,
        "output_dir": "none",
    }
    sections = {
        "model": settings.model.model_dump(),
        "completep": settings.base,
        "optimizer": {"base_lr": 1e-3},
        "data": {"train": [{"prefix": "none"}]},
        "training": training,
    }
    return config_from_mapping(sections, name="benchmark")


def random_batch(settings: BenchmarkSettings) -> Batch:
    """Random tokens; timing does not depend on them."""
    samples = settings.batch_size
    length = settings.model.seq_length
    shape = (samples, length)
    generator = torch.Generator().manual_seed(1)
    # A label is the next token, so a row needs one token more than a sample has.
    rows = torch.randint(settings.model.vocab_size, (samples, length + 1), generator=generator)
    tokens = rows[:, :-1].contiguous()
    labels = rows[:, 1:].contiguous()
    positions = torch.arange(length).expand(shape)
    documents = torch.zeros(shape, dtype=torch.int32)
    return Batch(tokens, labels, torch.ones(shape), positions, documents, torch.arange(samples))


def summarize(
    settings: BenchmarkSettings,
    precision: str,
    device: torch.device,
    times: dict[str, list[Times]],
) -> Comparison:
    """Medians, quartiles, and how sure the ratio of the medians is.

    times: of our program and of the plain one, by their names and in this order.
    """
    ours, plain = times
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(device_name, DTYPES[precision])
    our_clock, our_processor = zip(*times[ours], strict=True)
    plain_clock, plain_processor = zip(*times[plain], strict=True)
    ratio_low, ratio_high = bootstrap_ratio(our_clock, plain_clock)

    # On a GPU the processor only launches kernels and waits, so its time says nothing there.
    cpu_time_ratio = None
    if device.type == "cpu":
        cpu_time_ratio = statistics.median(our_processor) / statistics.median(plain_processor)

    return Comparison(
        precision=precision,
        names=(ours, plain),
        ours=_timing(our_clock, settings, peak),
        plain=_timing(plain_clock, settings, peak),
        ratio=statistics.median(our_clock) / statistics.median(plain_clock),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        cpu_time_ratio=cpu_time_ratio,
        rounds=len(our_clock),
    )


def _timing(seconds: Sequence[float], settings: BenchmarkSettings, peak: float | None) -> Timing:
    """The figures of one program. peak: FLOP/s of the device in this precision, where known."""
    lower_quartile, median, upper_quartile = statistics.quantiles(seconds, n=4, method="inclusive")
    tokens = settings.batch_size * settings.model.seq_length
    flops = tokens * training_flops_per_token(settings.model)
    flops_per_second = flops / median
    return Timing(
        median=median,
        lower_quartile=lower_quartile,
        upper_quartile=upper_quartile,
        tokens_per_second=tokens / median,
        model_flops_per_second=flops_per_second,
        mfu=flops_per_second / peak if peak else None,
    )


def bootstrap_ratio(
    our_seconds: Sequence[float], plain_seconds: Sequence[float], draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the ratio of medians, drawing rounds with replacement.

    The two times of a round stay together: what slows a round down slows both.
    """
    seconds = np.array([our_seconds, plain_seconds])
    rounds = seconds.shape[1]
    drawn_rounds = np.random.default_rng(0).integers(rounds, size=(draws, rounds))
    our_medians, plain_medians = np.median(seconds[:, drawn_rounds], axis=2)
    low, high = np.quantile(our_medians / plain_medians, (0.025, 0.975))
    return float(low), float(high)
