"""A training step with experts beside that of a dense model with as many active FLOPs.

The dense model's MLP is as wide as the experts that a token goes to, and the shared one, together.
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
from megatron_completep.config.derived import expert_ffn_hidden_size, expert_layers
from megatron_completep.config.moe_rules import BASE_KEYS
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.trial import change
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble


@dataclass(frozen=True)
class ExpertCost:
    """Median processor seconds of both steps, and the ratio with its 95 % interval.

    flops_ratio: of the model FLOPs of a step, which differ by those of the router.
    """

    step_seconds: float
    dense_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    flops_ratio: float
    tokens: int
    rounds: int

    def __str__(self) -> str:
        return (
            f"processor time of a step of {self.tokens} tokens: {1000 * self.step_seconds:.1f} ms, "
            f"dense {1000 * self.dense_seconds:.1f} ms, ratio {self.ratio:.3f} "
            f"(95 % of {self.rounds} rounds: {self.ratio_low:.3f} to {self.ratio_high:.3f}) "
            f"at {self.flops_ratio:.3f} times the FLOPs"
        )


def dense_of(config: Config) -> Config:
    """The configuration with an MLP of equal active FLOPs in place of the experts.

    Raises ConfigError where not all layers have experts.
    """
    model = config.model
    moe = model.moe
    if moe is None or len(expert_layers(model)) < model.num_layers:
        raise ConfigError(
            "model.moe: all layers must have experts, to be compared with a dense model. "
            "Give model.moe, with first_dense_layers = 0 and every = 1."
        )
    active = moe.top_k * expert_ffn_hidden_size(model) + (moe.shared_ffn_hidden_size or 0)
    return change(
        config,
        model={"moe": None, "ffn_hidden_size": active},
        completep={**dict.fromkeys(BASE_KEYS), "base_ffn_hidden_size": None},
    )


def measure(config: Config, device: torch.device, rounds: int = 20, warmup: int = 3) -> ExpertCost:
    """Time both steps in turn, on random tokens, in one process.

    On a CPU processor time counts, which other work on the machine disturbs little; on a GPU the
    clock. Raises ConfigError where not all layers have experts.
    """
    dense = dense_of(config)
    training = config.training
    batch = random_batch(BenchmarkSettings(config.model, training.micro_batch_size))
    batches = [batch] * (training.global_batch_size // training.micro_batch_size)
    steps = {}
    for name, shape in (("experts", config), ("dense", dense)):
        steps[name] = assemble(shape, ParallelContext.single(device)).step
    programs: list[tuple[str, Callable[[], Any]]] = [
        ("experts", lambda: steps["experts"].run(batches, 1)),
        ("dense", lambda: steps["dense"].run(batches, 1)),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in programs}
    for number in range(warmup + rounds):
        # A later program may find warmer caches, so they change places every round.
        for name, program in programs if number % 2 == 0 else reversed(programs):
            clock, processor = time_once(program, device)
            if number >= warmup:
                seconds[name].append(processor if device.type == "cpu" else clock)
    expert_seconds = statistics.median(seconds["experts"])
    plain = statistics.median(seconds["dense"])
    low, high = bootstrap_ratio(seconds["experts"], seconds["dense"])
    return ExpertCost(
        step_seconds=expert_seconds,
        dense_seconds=plain,
        ratio=expert_seconds / plain,
        ratio_low=low,
        ratio_high=high,
        flops_ratio=training_flops_per_token(config.model) / training_flops_per_token(dense.model),
        tokens=training.global_batch_size * config.model.seq_length,
        rounds=rounds,
    )
