"""Time every kernel beside its baselines and a plain copy of as many bytes, in one run on one device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_completep.benchmarks.kernel_cases import (
    Case,
    Setting,
    cross_entropy_cases,
    norm_and_add_cases,
    optimizer_cases,
    pointwise_cases,
    residual_norm_cases,
    rotary_cases,
)

# Memory bandwidth by the makers' data sheets, GB/s; the first name that the device's name contains counts.
DATA_SHEET = {
    "H100 80GB HBM3": 3352, "H100 PCIe": 2039, "H100 NVL": 3938, "H200": 4800, "GH200": 4000, "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935, "A100-SXM4-40GB": 1555, "B200": 8000, "MI300X": 5300,
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One implementation of one kernel at one shape. Times in microseconds, median and the 20th and 80th percentile."""

    kernel: str
    implementation: str
    rows: int
    columns: int
    p50: float
    p20: float
    p80: float
    floor_bytes: int
    gigabytes_per_second: float  # of the floor's bytes
    percent_of_copy: float
    percent_of_data_sheet: float | None
    launches: int | None  # on a GPU
    host_microseconds: float | None  # until the call returns, on a GPU
    peak_megabytes: float | None  # allocated beyond the inputs, on a GPU
    max_error: float | None  # of ours, against float64, relative to the largest value


@dataclass(frozen=True)
class Plan:
    """What to measure: the sweep of rows x hidden, and how long it may take in all."""

    rows: tuple[int, ...] = (2048, 4096, 8192, 16384)
    hidden: tuple[int, ...] = (768, 1024, 2048, 4096, 5120, 8192)
    vocabularies: tuple[int, ...] = (50_432, 131_072)
    parameters: int = 1 << 28
    dtype: torch.dtype = torch.bfloat16
    milliseconds: int = 40  # of repetitions of one implementation
    seconds: float = 190.0  # for everything; what does not fit is left out and said so
    with_compile: bool = True


SMOKE = Plan(
    rows=(8,),
    hidden=(64,),
    vocabularies=(128,),
    parameters=4096,
    milliseconds=2,
    seconds=60.0,
    with_compile=False,
)


def _quantiles(
    work: Callable[[], Any], milliseconds: int, device: torch.device
) -> tuple[float, float, float]:
    """(p50, p20, p80) in microseconds; on a GPU with the cache cleared before each repetition."""
    if device.type == "cuda":
        from triton.testing import do_bench

        p50, p20, p80 = do_bench(work, warmup=10, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
        return 1e3 * p50, 1e3 * p20, 1e3 * p80
    times: list[float] = []
    end = time.perf_counter() + milliseconds / 1e3
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return times[len(times) // 2], times[len(times) // 5], times[len(times) * 4 // 5]


def _host_microseconds(
    work: Callable[[], Any], device: torch.device, calls: int = 20
) -> float | None:
    """What a call costs the host; so few calls that the device's queue never fills."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / calls


def _launches_and_peak(
    work: Callable[[], Any], device: torch.device
) -> tuple[int | None, float | None]:
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    launches = sum(
        event.count
        for event in trace.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return launches, (torch.cuda.max_memory_allocated() - before) / 1e6


def _max_error(case: Case) -> float | None:
    if case.answer is None:
        return None
    found, expected = case.implementations["ours"]()(), case.answer()
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return max(float((f.detach().double() - e).abs().max() / e.abs().max()) for f, e in pairs)


def measure(
    case: Case, plan: Plan, device: torch.device, log: Callable[[str], None]
) -> Iterator[Measurement]:
    """Every implementation of a case, after a copy of the same number of bytes. One that fails is reported and left out."""
    source = torch.randn(max(1, case.floor_bytes // 8), device=device)
    target = torch.empty_like(source)
    copy, _, _ = _quantiles(lambda: target.copy_(source), plan.milliseconds, device)
    copy_rate = 8 * source.numel() / copy / 1e3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sheet = next((rate for part, rate in DATA_SHEET.items() if part in name), None)
    for implementation, prepare in case.implementations.items():
        try:
            work = prepare()
            work()
            p50, p20, p80 = _quantiles(work, plan.milliseconds, device)
            launches, peak = _launches_and_peak(work, device)
            host = _host_microseconds(work, device)
        except Exception as error:  # a baseline's own trouble must not end the run
            if implementation == "ours":
                raise
            log(
                f"{case.kernel}, {implementation}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        rate = case.floor_bytes / p50 / 1e3
        yield Measurement(
            case.kernel, implementation, case.rows, case.columns, p50, p20, p80, case.floor_bytes, rate, 100 * rate / copy_rate,
            None if sheet is None else 100 * rate / sheet, launches, host, peak, _max_error(case) if implementation == "ours" else None,
        )  # fmt: skip


def cases(plan: Plan, setting: Setting) -> Iterator[Case]:
    """All cases, the most telling first: a run that is cut short has measured those."""
    by_interest = sorted(plan.rows, key=lambda rows: abs(rows - 8192))
    for rows in by_interest:
        for hidden in plan.hidden:
            for rms in (True, False):
                yield from residual_norm_cases(rows, hidden, rms, setting)
        if rows != by_interest[0]:
            continue
        yield from optimizer_cases(plan.parameters, setting)
        for vocabulary in plan.vocabularies:
            yield from cross_entropy_cases(rows, vocabulary, setting)
        for hidden in plan.hidden:
            yield from pointwise_cases(rows, 4 * hidden, setting)
            for rms in (True, False):
                yield from norm_and_add_cases(rows, hidden, rms, setting)
        yield from rotary_cases(rows, 16, 128, setting)


def run(
    plan: Plan, device: torch.device, log: Callable[[str], None]
) -> tuple[list[Measurement], list[str]]:
    """(measurements, what was left out for want of time)."""
    end = time.perf_counter() + plan.seconds
    found: list[Measurement] = []
    left_out: list[str] = []
    torch.manual_seed(0)
    said: dict[str, None] = {}  # a library's trouble, once

    def say(line: str) -> None:
        if line not in said:
            said[line] = None
            log(line)

    for case in cases(plan, Setting(plan.dtype, device, plan.with_compile, say)):
        what = f"{case.kernel} {case.rows} x {case.columns}"
        if time.perf_counter() > end:
            left_out.append(what)
            continue
        rows = list(measure(case, plan, device, log))
        found += rows
        log(f"{what}: " + ", ".join(f"{row.implementation} {row.p50:.1f} us" for row in rows))
    return found, left_out


def as_json(measurements: list[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]


def speedup(
    measurements: list[Measurement], kernel: str, baseline: str
) -> tuple[float, float] | None:
    """(geometric mean, smallest) over the shapes of baseline time over our time; None when the baseline was not measured."""
    times = {
        (m.rows, m.columns, m.implementation): m.p50 for m in measurements if m.kernel == kernel
    }
    ratios = [
        times[rows, columns, baseline] / time_ours
        for (rows, columns, implementation), time_ours in times.items()
        if implementation == "ours" and (rows, columns, baseline) in times
    ]
    if not ratios:
        return None
    return float(Tensor(ratios).log().mean().exp()), min(ratios)
