"""Our training step against a plain torch model of the same shape, alternating in one run, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is timed: a model shape, a batch in sequences, and how often."""

    model: ModelConfig
    batch_size: int = 8
    rounds: int = 20
    warmup: int = 3
    compile: bool = False
    plain_bf16: str = "autocast"  # float32 parameters under autocast, or "pure": everything in bf16, AdamW's moments too
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
    """Both programs in one precision; `ratio` is our median over the plain one's, with its 95 % bootstrap interval.

    `cpu_time_ratio` compares the processor time of the two instead, which other work on the machine disturbs little (CPU only).
    """

    precision: str
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
    settings: BenchmarkSettings,
    precision: str,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Time both programs step by step in turn; which goes first changes every round."""
    table = table_of(run_config(settings, precision))
    batch = random_batch(settings)
    ours = our_step(settings, precision, device, table, batch)
    plain = plain_step(settings, precision, device, table, batch)
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    programs = [("ours", ours), ("plain", plain)]
    for number in range(settings.warmup + settings.rounds):
        for name, step in programs if number % 2 == 0 else reversed(programs):
            taken = time_once(step, device)
            if number >= settings.warmup:
                seconds[name].append(taken)
        if number == settings.warmup - 1:
            say(f"{precision}: {settings.rounds} rounds of about {taken[0] * 2:.2f} s")
    return summarize(settings, precision, device, seconds["ours"], seconds["plain"])


def time_once(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds on the clock and of this process's processors for one step, from an idle device to an idle device."""
    synchronize(device)
    started, used = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return time.perf_counter() - started, time.process_time() - used


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_step(
    settings: BenchmarkSettings, precision: str, device: torch.device, table: Table, batch: Batch
) -> Callable[[], None]:
    """The step of `pretrain`: inputs to the device, forward, backward, clipping, update."""
    config, context = run_config(settings, precision), ParallelContext.single(device)
    step = assemble(config, context, table).step
    return lambda: (step.run([batch], 1), None)[1]


def plain_step(
    settings: BenchmarkSettings, precision: str, device: torch.device, table: Table, batch: Batch
) -> Callable[[], None]:
    """The same with nn modules, clip_grad_norm_ and torch.optim.AdamW (fused where the device has it)."""
    model = PlainGPT(settings.model, table).to(device)
    pure = precision == "bf16" and settings.plain_bf16 == "pure"
    if pure:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if settings.compile else model
    autocast = precision == "bf16" and not pure

    def step() -> None:
        tokens, labels = (
            batch.tokens.to(device, non_blocking=True),
            batch.labels.to(device, non_blocking=True),
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = forward(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_config(settings: BenchmarkSettings, precision: str) -> Config:
    """The configuration of a run of this shape; no file of it is opened."""
    return config_from_mapping(
        {
            "model": settings.model.model_dump(),
            "completep": settings.base,
            "optimizer": {"base_lr": 1e-3},
            "data": {"train": [{"prefix": "none"}]},
            "training": {
                "micro_batch_size": settings.batch_size,
                "global_batch_size": settings.batch_size,
                "train_steps": 1000,
                "precision": precision,
                "compile": settings.compile,
                "output_dir": "none",
            },
        },
        name="benchmark",
    )


def random_batch(settings: BenchmarkSettings) -> Batch:
    """Random tokens; timing does not depend on them."""
    shape = settings.batch_size, settings.model.seq_length
    rows = torch.randint(
        settings.model.vocab_size,
        (shape[0], shape[1] + 1),
        generator=torch.Generator().manual_seed(1),
    )
    positions = torch.arange(shape[1]).expand(shape)
    documents = torch.zeros(shape, dtype=torch.int32)
    return Batch(
        rows[:, :-1].contiguous(),
        rows[:, 1:].contiguous(),
        torch.ones(shape),
        positions,
        documents,
        torch.arange(shape[0]),
    )


def summarize(
    settings: BenchmarkSettings,
    precision: str,
    device: torch.device,
    ours: list[tuple[float, float]],
    plain: list[tuple[float, float]],
) -> Comparison:
    """Medians, quartiles, and how sure the ratio of the medians is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, DTYPES[precision])
    tokens = settings.batch_size * settings.model.seq_length
    flops = tokens * training_flops_per_token(settings.model)

    def timing(seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(
            median,
            low,
            high,
            tokens / median,
            flops / median,
            flops / median / peak if peak else None,
        )

    (our_clock, our_cpu), (plain_clock, plain_cpu) = (
        zip(*ours, strict=True),
        zip(*plain, strict=True),
    )
    return Comparison(
        precision,
        timing(our_clock),
        timing(plain_clock),
        statistics.median(our_clock) / statistics.median(plain_clock),
        *bootstrap_ratio(our_clock, plain_clock),
        statistics.median(our_cpu) / statistics.median(plain_cpu) if device.type == "cpu" else None,
        len(ours),
    )


def bootstrap_ratio(
    ours: Sequence[float], plain: Sequence[float], draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the ratio of medians, drawing rounds with replacement (a round's two times stay together)."""
    pairs = np.array([ours, plain])
    chosen = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
    medians = np.median(pairs[:, chosen], axis=2)
    low, high = np.quantile(medians[0] / medians[1], (0.025, 0.975))
    return float(low), float(high)
