"""Times our training step on the target model, and that of a plain torch model, in turn.

Example:

    python -m megatron_completep.benchmarks.gpu_day.step --out gpu_day

The plain model is what a user would write instead: compiled as a whole, under autocast, with fused
AdamW, clip_grad_norm_, and the same torch attention (SDPA) as ours. Both models together are more
than one GPU holds. So they run in turn, and ours runs again after the plain one: the change between
its two runs is the error of the comparison. Profiles are written to the folder of --out.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.expected import Shape, StepModel, rates_of, total
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting
from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    our_step,
    plain_step,
    random_batch,
    run_config,
)
from megatron_completep.completep import table_of
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.planning.scaling import rank_memory

Step = Callable[[], None]

TARGET_MODEL = ModelConfig(
    hidden_size=2048,
    num_layers=24,
    num_attention_heads=16,
    ffn_hidden_size=8192,
    vocab_size=50_304,
    seq_length=2048,
    norm="layernorm",
    activation="gelu",
    position="rope",
    bias=False,
)
TRIAL = TARGET_MODEL.model_copy(
    update={
        "hidden_size": 16,
        "num_layers": 1,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
        "vocab_size": 128,
        "seq_length": 16,
    }
)
SEQUENCES = 4  # per micro-batch: 8,192 tokens of the target model
PRECISION = "bf16"
RATIO_GOAL = 1.05  # of the time of the compiled plain model's step to that of ours
MFU_GOAL = 50.0  # percent, measured with 2 * SEQUENCES
WARMUP = 3
STEPS = 8
SECONDS_A_RUN = 25.0  # a model is not built with less time left
SECONDS_TO_COMPILE = 60.0
PROFILED_KERNELS = 25


@dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    streamed: back to back, as training runs. alone: with the device idle before and after. host:
    until the call returns; the device is still working then.
    """

    streamed: float
    alone: float
    host: float
    first: float  # compilation included


def measure(setting: Setting) -> None:
    """The comparison first, then what explains it, as far as the time goes."""
    model = TRIAL if setting.trial else TARGET_MODEL
    settings = BenchmarkSettings(model, SEQUENCES, compile=not setting.trial)
    comparison = _Comparison(setting, settings)
    first = comparison.ours("ours", profiled=True)
    plain = comparison.plain("plain, compiled, autocast", "autocast")
    again = comparison.ours("ours again")
    _say_ratio(setting, comparison.cost_model, first, plain, again)

    twice = replace(settings, batch_size=2 * SEQUENCES)
    _Comparison(setting, twice).ours("ours, twice the tokens", mfu_goal=MFU_GOAL)
    comparison.plain("plain, compiled, pure bf16", "pure")
    comparison.ours("ours, update under forward", overlap_update=True)
    for name in ("cudnn", "flash"):
        comparison.ours_with(name)


def _say_ratio(
    setting: Setting,
    cost_model: StepModel | None,
    first: Timing | None,
    plain: Timing | None,
    again: Timing | None,
) -> None:
    """The figure that all others explain."""
    if first is None or plain is None or again is None:
        setting.say(Figure("plain over ours", failed="one of the three runs is missing"))
        return
    ours = (first.streamed + again.streamed) / 2
    drift = again.streamed / first.streamed
    expected = None
    if cost_model is not None:
        expected = 1 + total(cost_model.plain_differences()) / total(cost_model.ours())
    figure = Figure(
        "plain over ours",
        plain.streamed / ours,
        "times",
        expected,
        at_least=None if setting.trial else RATIO_GOAL,
        details={"ours again over ours": drift},
    )
    setting.say(figure)


class _Comparison:
    """Programs of one shape; each is built, timed and freed before the next."""

    def __init__(self, setting: Setting, settings: BenchmarkSettings):
        self.setting = setting
        # `training.compile` compiles parts of our step; the plain model is compiled as a whole.
        self.settings = settings
        self.ours_settings = replace(settings, compile=False)
        self.config = run_config(self.ours_settings, PRECISION)
        self.table = table_of(self.config)
        batch = random_batch(settings)
        # From pageable memory every copy of a batch would wait for the device.
        self.batch = batch.pin_memory() if setting.on_gpu else batch
        rates = rates_of(setting.device_name)
        self.cost_model = None
        if rates is not None:
            self.cost_model = StepModel(_shape(settings), rates)

    def ours(
        self,
        name: str,
        profiled: bool = False,
        mfu_goal: float | None = None,
        overlap_update: bool = False,
    ) -> Timing | None:
        """Time our step.

        profiled: also report its longest kernels, and its peak memory next to the planned one.
        """
        expected_ms = None if self.cost_model is None else total(self.cost_model.ours())
        device = self.setting.device

        settings = replace(self.ours_settings, overlap_update=overlap_update)
        if overlap_update and self.cost_model is not None and expected_ms is not None:
            expected_ms -= self.cost_model.hidden_update()

        def make() -> Step:
            return our_step(settings, PRECISION, device, self.table, self.batch)

        timing = self._timed(name, make, expected_ms, SECONDS_A_RUN, profiled, mfu_goal)
        if profiled and timing is not None:
            self._say_memory(name)
        return timing

    def plain(self, name: str, arithmetic: str) -> Timing | None:
        """Time the plain model's step. arithmetic: `BenchmarkSettings.plain_bf16`."""
        expected_ms = None
        if self.cost_model is not None:
            differences = self.cost_model.plain_differences(pure=arithmetic == "pure")
            expected_ms = total(self.cost_model.ours()) + total(differences)
        settings = replace(self.settings, plain_bf16=arithmetic)
        device = self.setting.device

        def make() -> Step:
            return plain_step(settings, PRECISION, device, self.table, self.batch)

        profiled = arithmetic == "autocast"
        return self._timed(name, make, expected_ms, SECONDS_TO_COMPILE, profiled)

    def ours_with(self, backend: str) -> None:
        """Time our step with a fixed SDPA backend; by default torch chooses one."""
        if not self.setting.on_gpu:
            return
        kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        with sdpa_kernel(kernels[backend]):
            self.ours(f"ours, {backend} attention")

    def _timed(
        self,
        name: str,
        make: Callable[[], Step],
        expected_ms: float | None,
        seconds_needed: float,
        profiled: bool = False,
        mfu_goal: float | None = None,
    ) -> Timing | None:
        """Build a program, time and profile it, and free it; None where that failed."""
        setting = self.setting
        if setting.seconds_left < seconds_needed:
            setting.say(Figure(name, failed="not started: the time is up"))
            return None
        timing = None
        with setting.attempt(name):
            timing = self._run(name, make, profiled)
            self._say_timing(name, timing, expected_ms, mfu_goal)
        # Cycles of modules and hooks hold the memory that the next program needs.
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
        return timing

    def _run(self, name: str, make: Callable[[], Step], profiled: bool) -> Timing:
        """Time a program, of which nothing is left when this returns."""
        if self.setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step = make()
        timing = time_steps(self.setting, step)
        if profiled:
            _profile(self.setting, step, name)
        return timing

    def _say_timing(
        self, name: str, timing: Timing, expected_ms: float | None, mfu_goal: float | None
    ) -> None:
        setting = self.setting
        model = self.settings.model
        tokens = self.settings.batch_size * model.seq_length
        details = {
            "alone_ms": 1e3 * timing.alone,
            "host_ms": 1e3 * timing.host,
            "first_s": timing.first,
            "tokens": tokens,
            "tokens_a_second": round(tokens / timing.streamed),
        }
        if setting.on_gpu:
            details["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            details["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        setting.say(
            Figure(f"{name}, step", 1e3 * timing.streamed, "ms", expected_ms, details=details)
        )
        rates = rates_of(setting.device_name)
        if rates is None:
            return
        flops = tokens * training_flops_per_token(model)
        seconds_at_peak = flops / rates.peak
        mfu = 100 * seconds_at_peak / timing.streamed
        expected_mfu = None if expected_ms is None else 100 * seconds_at_peak / (1e-3 * expected_ms)
        setting.say(Figure(f"{name}, MFU", mfu, "%", expected_mfu, at_least=mfu_goal))

    def _say_memory(self, name: str) -> None:
        """The peak beside what the plan says of this configuration."""
        plan = rank_memory(self.config, pipeline_rank=0, gradient_size=1, micro_batches=1)
        measured = None
        if self.setting.on_gpu:
            measured = torch.cuda.max_memory_allocated() / 1e9
        self.setting.say(Figure(f"{name}, peak memory", measured, "GB", plan.total / 1e9))


def _shape(settings: BenchmarkSettings) -> Shape:
    """The shape of the benchmark's model as input for the cost model."""
    model = settings.model
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        groups=num_query_groups(model),
        head_dim=head_dim(model),
        ffn=model.ffn_hidden_size,
        vocabulary=model.vocab_size,
        sequence=model.seq_length,
        sequences=settings.batch_size,
        gated=model.activation == "swiglu",
        rotary=model.position == "rope",
    )


def time_steps(setting: Setting, step: Step) -> Timing:
    """Warm up, then time single steps and steps back to back."""
    start = time.perf_counter()
    step()
    setting.synchronize()
    first = time.perf_counter() - start
    warmup, count = (0, 2) if setting.trial else (WARMUP, STEPS)
    for _ in range(warmup):
        step()
    setting.synchronize()

    alone = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        setting.synchronize()
        alone.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(count):
        step()
    host = (time.perf_counter() - start) / count
    setting.synchronize()
    streamed = (time.perf_counter() - start) / count
    return Timing(streamed, statistics.median(alone), host, first)


def _profile(setting: Setting, step: Step, name: str) -> None:
    """Write the trace of a step, and say its longest kernels (operators on a CPU)."""
    activities = [ProfilerActivity.CPU]
    if setting.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        step()
        setting.synchronize()
    column = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda event: -getattr(event, column))
    program = name.partition(",")[0]
    for event in events[: 3 if setting.trial else PROFILED_KERNELS]:
        milliseconds = getattr(event, column) / 1e3
        kernel = f"{program}, kernel {event.key[:90]}"
        setting.say(Figure(kernel, milliseconds, "ms", details={"calls": event.count}))
    trace.export_chrome_trace(str(setting.folder / f"{program}.trace.json.gz"))


if __name__ == "__main__":
    figures.main(measure, __doc__)
