"""What telemetry costs: one look at the parameterization beside one training step, in turn, so that both see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    bootstrap_ratio,
    random_batch,
    time_once,
)
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.telemetry.telemetry import Telemetry


@dataclass(frozen=True)
class TelemetryCost:
    """Median seconds of a step and of a look, and the looks' share of the training time at an interval, with its 95 % interval."""

    step_seconds: float
    look_seconds: float
    interval: int  # steps between two looks
    percent: float
    percent_low: float
    percent_high: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"a step {1000 * self.step_seconds:.1f} ms, a look {1000 * self.look_seconds:.1f} ms; every {self.interval} steps "
            f"{self.percent:.3f} % of the step time (95 % of {self.rounds} rounds: {self.percent_low:.3f} to {self.percent_high:.3f})"
        )


def measure(
    config: Config, device: torch.device, rounds: int = 20, warmup: int = 3
) -> TelemetryCost:
    """Time a configuration's step (all its micro-batches, on random tokens; no file is opened) and Telemetry.figures() in turn.

    One process. Raises ConfigError where the configuration switches telemetry off.
    """
    interval = config.logging.parameterization_interval
    if interval is None:
        raise ConfigError(
            "logging.parameterization_interval is null: there is no telemetry to measure. Give the interval in steps."
        )
    context = ParallelContext.single(device)
    step = assemble(config, context).step
    batch = random_batch(BenchmarkSettings(config.model, config.training.micro_batch_size))
    batches = [batch] * (config.training.global_batch_size // config.training.micro_batch_size)
    telemetry = Telemetry(
        step, batches[:1], interval, config.training.train_steps, None, lambda text: None
    )
    programs: list[tuple[str, Callable[[], Any]]] = [
        ("step", lambda: step.run(batches, 1)),
        ("look", telemetry.figures),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in programs}
    for number in range(warmup + rounds):
        for name, program in programs if number % 2 == 0 else reversed(programs):
            taken, _ = time_once(program, device)
            if number >= warmup:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    low, high = bootstrap_ratio(seconds["look"], seconds["step"])
    to_percent = 100 / interval
    share = to_percent * medians["look"] / medians["step"]
    return TelemetryCost(
        medians["step"],
        medians["look"],
        interval,
        share,
        to_percent * low,
        to_percent * high,
        rounds,
    )
