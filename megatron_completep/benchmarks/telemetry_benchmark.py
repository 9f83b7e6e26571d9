"""What telemetry costs: one look at the parameterization beside one training step.

The two run in turn, so that both see the same machine.
"""

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
    """Median seconds of a step and of a look, and what looks add to the training time.

    percent: the looks' share of the training time at this interval, with its 95 % interval.
    """

    step_seconds: float
    look_seconds: float
    interval: int  # steps between two looks
    percent: float
    percent_low: float
    percent_high: float
    rounds: int

    def __str__(self) -> str:
        step_milliseconds = 1000 * self.step_seconds
        look_milliseconds = 1000 * self.look_seconds
        sure = f"{self.percent_low:.3f} to {self.percent_high:.3f}"
        return (
            f"a step {step_milliseconds:.1f} ms, a look {look_milliseconds:.1f} ms; "
            f"every {self.interval} steps {self.percent:.3f} % of the step time "
            f"(95 % of {self.rounds} rounds: {sure})"
        )


def measure(
    config: Config, device: torch.device, rounds: int = 20, warmup: int = 3
) -> TelemetryCost:
    """Time a configuration's step and Telemetry.figures() in turn.

    A step has all its micro-batches, on random tokens; no file is opened. One process. Raises
    ConfigError where the configuration switches telemetry off.
    """
    interval = config.logging.parameterization_interval
    if interval is None:
        raise ConfigError(
            "logging.parameterization_interval is null: there is no telemetry to measure. "
            "Give the interval in steps."
        )

    training = config.training
    step = assemble(config, ParallelContext.single(device)).step
    batch = random_batch(BenchmarkSettings(config.model, training.micro_batch_size))
    # Only the shape of a micro-batch costs time, so one stands for all.
    batches = [batch] * (training.global_batch_size // training.micro_batch_size)
    telemetry = Telemetry(
        step, batches[:1], interval, training.train_steps, None, lambda text: None
    )
    programs: list[tuple[str, Callable[[], Any]]] = [
        ("step", lambda: step.run(batches, 1)),
        ("look", telemetry.figures),
    ]

    seconds: dict[str, list[float]] = {name: [] for name, _ in programs}
    for number in range(warmup + rounds):
        # The program that goes first changes, so that neither always finds warmer caches.
        for name, program in programs if number % 2 == 0 else reversed(programs):
            clock_seconds, _ = time_once(program, device)
            if number >= warmup:
                seconds[name].append(clock_seconds)

    step_seconds = statistics.median(seconds["step"])
    look_seconds = statistics.median(seconds["look"])
    ratio_low, ratio_high = bootstrap_ratio(seconds["look"], seconds["step"])
    to_percent = 100 / interval  # one look comes with `interval` steps
    return TelemetryCost(
        step_seconds=step_seconds,
        look_seconds=look_seconds,
        interval=interval,
        percent=to_percent * look_seconds / step_seconds,
        percent_low=to_percent * ratio_low,
        percent_high=to_percent * ratio_high,
        rounds=rounds,
    )
