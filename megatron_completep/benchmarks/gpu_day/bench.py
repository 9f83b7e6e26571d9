"""Every kernel beside a copy of as many bytes and beside plain torch, at a few shapes.

Example:

    python -m megatron_completep.benchmarks.gpu_day.bench --out gpu_day

Needs torch and Triton alone. The pages are those of tools/benchmark_kernels.py.
"""

from __future__ import annotations

import dataclasses
import sys

from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting
from megatron_completep.benchmarks.kernel_benchmark import SMOKE, Measurement, Plan, run
from megatron_completep.benchmarks.kernel_report import versions, write_report

# What is compiled by torch.compile costs 5 to 15 s a case, and is left out; AdamW, cross-entropy
# and the rest come behind the norms of the first width, so that a short run has them.
DAY = Plan(
    rows=(8192,), hidden=(2048, 4096, 1024), milliseconds=25, with_compile=False, seconds=45.0
)
# Per cent of a copy: predicted from bytes, residency and reductions, by (kernel, columns).
EXPECTED: dict[tuple[str, int], float] = {
    ("residual layernorm forward", 4096): 96,
    ("residual rmsnorm forward", 4096): 96,
    ("residual layernorm forward", 2048): 94,
    ("residual rmsnorm forward", 2048): 94,
    ("residual layernorm forward", 1024): 88,
    ("residual rmsnorm forward", 1024): 88,
    ("residual layernorm backward", 4096): 84,
    ("residual rmsnorm backward", 4096): 84,
    ("residual layernorm backward", 2048): 71,
    ("residual rmsnorm backward", 2048): 79,
    ("residual layernorm backward", 1024): 65,
    ("residual rmsnorm backward", 1024): 65,
}
# The same by kernel, at any shape.
EXPECTED_ANYWHERE = {
    "adamw": 92,
    "gradient norm": 82,
    "cross-entropy forward": 92,
    "cross-entropy backward": 90,
    "swiglu forward": 88,
    "swiglu backward": 90,
    "rotary": 87,
}
# Goals, in per cent of a copy (docs/kernels.md): a cross-entropy in 1.2 x its floor is 83 %.
GOALS = {
    ("residual layernorm forward", 4096): 97,
    ("residual rmsnorm forward", 4096): 97,
    ("residual layernorm backward", 4096): 85,
    ("residual rmsnorm backward", 4096): 85,
}
GOALS_ANYWHERE = {"adamw": 93, "cross-entropy forward + backward": 83}


def measure(setting: Setting) -> None:
    """Run the kernel benchmark and say the figure of each of our kernels."""
    plan = SMOKE if setting.trial else DAY
    # Its pages are written when it is done: some seconds are left for that.
    plan = dataclasses.replace(plan, seconds=max(1.0, min(plan.seconds, setting.seconds_left - 5)))

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    measurements, left_out = run(plan, setting.device, log)
    dtype = str(plan.dtype).removeprefix("torch.")
    page = {"device": setting.device_name, "dtype": dtype, **versions()}
    write_report(measurements, left_out, page, setting.folder)
    for measurement in measurements:
        if measurement.implementation == "ours":
            setting.say(_figure(measurement, measurements, setting.trial))
    if left_out:
        setting.say(Figure("cases left out", len(left_out), "cases", 0))


def _figure(ours: Measurement, measurements: list[Measurement], trial: bool) -> Figure:
    """Our kernel's share of a copy, and how many times as long the baselines take."""
    shape = (ours.kernel, ours.rows, ours.columns)
    details: dict[str, float | None] = {
        "us": ours.graph_microseconds or ours.p50,
        "launched_us": ours.p50,
        "max_error": ours.max_error,
    }
    for other in measurements:
        same_shape = (other.kernel, other.rows, other.columns) == shape
        if same_shape and other.implementation != "ours":
            details[f"{other.implementation}_over_ours"] = other.p50 / ours.p50
    expected: float | None = None
    goal: float | None = None
    if not trial:
        by_shape = (ours.kernel, ours.columns)
        expected = EXPECTED.get(by_shape, EXPECTED_ANYWHERE.get(ours.kernel))
        goal = GOALS.get(by_shape, GOALS_ANYWHERE.get(ours.kernel))
    return Figure(
        f"{ours.kernel} {ours.rows} x {ours.columns}",
        ours.percent_of_copy,
        "% of a copy",
        expected,
        at_least=goal,
        details=details,
    )


if __name__ == "__main__":
    figures.main(measure, __doc__)
