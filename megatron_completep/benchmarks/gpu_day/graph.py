"""Steps of small models as launched and as one CUDA graph: equal, and how much faster.

Example:

    python -m megatron_completep.benchmarks.gpu_day.graph --out gpu_day
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting
from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    random_batch,
    run_config,
)
from megatron_completep.config.schema import ModelConfig
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.run.static_step import LAUNCHED_STEPS

COMPARED_STEPS = LAUNCHED_STEPS + 3  # some of them replayed
TIMED_STEPS = 30


@dataclass(frozen=True)
class Case:
    """A model, and what is expected of its step in milliseconds: launched, and replayed."""

    layers: int
    hidden: int
    sequence: int
    vocabulary: int
    launched: float | None = None
    replayed: float | None = None
    at_least: float | None = None  # times that the launched step takes


CASES = (
    Case(2, 256, 256, 4096),
    Case(8, 256, 256, 4096),
    # The goal: proxies of width 256, whose sweeps are what users wait for.
    Case(32, 256, 256, 4096, launched=22.0, replayed=4.0, at_least=4.0),
    Case(12, 768, 1024, 50_304),
    Case(24, 1024, 1024, 50_304),
)
TRIAL = (Case(1, 16, 16, 128),)


def measure(setting: Setting) -> None:
    """Every model, the smallest first."""
    for case in TRIAL if setting.trial else CASES:
        name = f"graph {case.layers} x {case.hidden}"
        with setting.attempt(name):
            _measure_case(setting, case, name)


def _measure_case(setting: Setting, case: Case, name: str) -> None:
    # The fast kernels for attention add in any order: their runs differ with and without a graph.
    with sdpa_kernel(SDPBackend.MATH):
        launched, replayed = _trained(setting, case)
    different = _different(launched.assembly, replayed.assembly)
    setting.say(Figure(f"{name}, states that differ", different, "", 0, at_most=0))

    launched, replayed = _trained(setting, case)
    launched_ms = launched.milliseconds()
    replayed_ms = replayed.milliseconds()
    setting.say(Figure(f"{name}, launched", launched_ms, "ms", case.launched))
    setting.say(Figure(f"{name}, replayed", replayed_ms, "ms", case.replayed))
    expected = None
    if case.launched is not None and case.replayed is not None:
        expected = case.launched / case.replayed
    gain = launched_ms / replayed_ms
    setting.say(Figure(f"{name}, gain", gain, "times", expected, at_least=case.at_least))


def _trained(setting: Setting, case: Case) -> tuple[_Run, _Run]:
    """The same steps as launched, and replayed from the fourth on."""
    launched = _Run(setting, case, cuda_graph=False)
    replayed = _Run(setting, case, cuda_graph=True)
    for step in range(1, COMPARED_STEPS + 1):
        launched.step(step)
        replayed.step(step)
    return launched, replayed


def _different(one: Assembly, other: Assembly) -> int:
    """How many of the optimizer's states are not equal to the bit."""
    pairs = zip(one.optimizer.states.values(), other.optimizer.states.values(), strict=True)
    return sum(not torch.equal(*pair) for pair in pairs)


class _Run:
    """A model in training, whose batch and seed are always the same."""

    def __init__(self, setting: Setting, case: Case, cuda_graph: bool):
        model = ModelConfig(
            hidden_size=case.hidden,
            num_layers=case.layers,
            num_attention_heads=max(1, case.hidden // 64),
            ffn_hidden_size=4 * case.hidden,
            vocab_size=case.vocabulary,
            seq_length=case.sequence,
            bias=False,
        )
        self.setting = setting
        settings = BenchmarkSettings(model, batch_size=2 if setting.trial else 8)
        config = run_config(settings, "bf16")
        training = config.training.model_copy(update={"cuda_graph": cuda_graph})
        config = config.model_copy(update={"training": training})
        self.assembly = assemble(config, ParallelContext.single(setting.device))
        batch = random_batch(settings)
        self.batch = batch.pin_memory() if setting.on_gpu else batch
        self.next_step = COMPARED_STEPS + 1

    def step(self, number: int) -> None:
        self.assembly.step.run([self.batch], number)

    def milliseconds(self) -> float:
        """Of a step, back to back."""
        count = 2 if self.setting.trial else TIMED_STEPS
        self.setting.synchronize()
        start = time.perf_counter()
        for number in range(self.next_step, self.next_step + count):
            self.step(number)
        self.setting.synchronize()
        self.next_step += count
        return 1e3 * (time.perf_counter() - start) / count


if __name__ == "__main__":
    figures.main(measure, __doc__)
