"""Time every kernel beside its baselines and a plain copy of as many bytes, in one run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_completep.benchmarks.kernel_cases import (
    Case,
    Prepare,
    Setting,
    cross_entropy_cases,
    norm_and_add_cases,
    optimizer_cases,
    pointwise_cases,
    residual_norm_cases,
    rotary_cases,
)

# Memory bandwidth in GB/s by the makers' data sheets. The first name counts that the name of the
# device contains, so GH200 has to stand before H200.
DATA_SHEET = {
    "H100 80GB HBM3": 3352,
    "H100 PCIe": 2039,
    "H100 NVL": 3938,
    "GH200": 4000,
    "H200": 4800,
    "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935,
    "A100-SXM4-40GB": 1555,
    "B200": 8000,
    "MI300X": 5300,
}


@dataclass(frozen=True)
class Measurement:
    """One implementation of one kernel at one shape.

    Times are in microseconds: the median and the 20th and 80th percentile.
    """

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
    max_error: float | None  # of ours, against float64, relative to the largest entry


@dataclass(frozen=True)
class Plan:
    """What to measure: the sweep of rows x hidden, and how long it may take in all."""

    rows: tuple[int, ...] = (2048, 4096, 8192, 16384)
    hidden: tuple[int, ...] = (768, 1024, 2048, 4096, 5120, 8192)
    vocabularies: tuple[int, ...] = (50_432, 131_072)
    parameters: int = 1 << 28
    dtype: torch.dtype = torch.bfloat16
    milliseconds: int = 40  # of repetitions of one implementation
    seconds: float = 190.0  # for everything; what does not fit is left out and reported
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


@dataclass(frozen=True)
class _Costs:
    """What one implementation takes. The last three are None on a CPU."""

    p50: float  # microseconds, as the two below
    p20: float
    p80: float
    launches: int | None
    host_microseconds: float | None
    peak_megabytes: float | None


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
    count = len(times)
    return times[count // 2], times[count // 5], times[count * 4 // 5]


def _host_microseconds(
    work: Callable[[], Any], device: torch.device, calls: int = 20
) -> float | None:
    """What a call costs the host; None on a CPU.

    So few calls are made that the device's queue never fills: a full queue would block the host.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / calls


def _launches_and_peak(
    work: Callable[[], Any], device: torch.device
) -> tuple[int | None, float | None]:
    """(kernel launches of a call, MB that it allocates beyond its inputs); None on a CPU."""
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize()
    allocated_before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()

    launches = 0
    for event in trace.key_averages():
        if event.device_type.name == "CUDA":
            launches += event.count
    peak_bytes = torch.cuda.max_memory_allocated() - allocated_before
    return launches, peak_bytes / 1e6


def _max_error(case: Case) -> float | None:
    """Largest error of our outputs relative to each answer's largest entry; None without answer."""
    if case.answer is None:
        return None
    outputs = case.implementations["ours"]()()
    answers = case.answer()
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
        answers = (answers,)

    errors = []
    for output, answer in zip(outputs, answers, strict=True):
        difference = output.detach().double() - answer
        errors.append(float(difference.abs().max() / answer.abs().max()))
    return max(errors)


def _copy_rate(case: Case, plan: Plan, device: torch.device) -> float:
    """GB/s of a device-to-device copy that reads and writes as many bytes as the case's floor."""
    # A float32 entry is read and written once: 8 bytes.
    source = torch.randn(max(1, case.floor_bytes // 8), device=device)
    target = torch.empty_like(source)
    microseconds, _, _ = _quantiles(lambda: target.copy_(source), plan.milliseconds, device)
    return 8 * source.numel() / microseconds / 1e3


def _data_sheet_rate(device: torch.device) -> float | None:
    """GB/s by the maker's data sheet; None on a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    rates = (rate for name, rate in DATA_SHEET.items() if name in device_name)
    return next(rates, None)


def _costs(prepare: Prepare, plan: Plan, device: torch.device) -> _Costs:
    """Prepare one implementation, run it once, then measure it."""
    work = prepare()
    work()  # compiles kernels and fills the allocator's cache
    p50, p20, p80 = _quantiles(work, plan.milliseconds, device)
    launches, peak_megabytes = _launches_and_peak(work, device)
    host = _host_microseconds(work, device)
    return _Costs(p50, p20, p80, launches, host, peak_megabytes)


def measure(
    case: Case, plan: Plan, device: torch.device, log: Callable[[str], None]
) -> Iterator[Measurement]:
    """Every implementation of a case, after a copy of the same number of bytes.

    A baseline that fails is reported and left out; an error of our own implementation is raised.
    """
    copy_rate = _copy_rate(case, plan, device)
    data_sheet_rate = _data_sheet_rate(device)
    for implementation, prepare in case.implementations.items():
        is_ours = implementation == "ours"
        try:
            costs = _costs(prepare, plan, device)
        except Exception as error:  # whatever a library raises must not end the run
            if is_ours:
                raise
            message = str(error).splitlines()[0] if str(error) else ""
            log(f"{case.kernel}, {implementation}: {type(error).__name__}: {message}")
            continue

        rate = case.floor_bytes / costs.p50 / 1e3  # bytes a microsecond to GB/s
        yield Measurement(
            kernel=case.kernel,
            implementation=implementation,
            rows=case.rows,
            columns=case.columns,
            p50=costs.p50,
            p20=costs.p20,
            p80=costs.p80,
            floor_bytes=case.floor_bytes,
            gigabytes_per_second=rate,
            percent_of_copy=100 * rate / copy_rate,
            percent_of_data_sheet=None if data_sheet_rate is None else 100 * rate / data_sheet_rate,
            launches=costs.launches,
            host_microseconds=costs.host_microseconds,
            peak_megabytes=costs.peak_megabytes,
            max_error=_max_error(case) if is_ours else None,
        )


def cases(plan: Plan, setting: Setting) -> Iterator[Case]:
    """All cases, the most telling first: a run that is cut short has measured those."""
    by_interest = sorted(plan.rows, key=lambda rows: abs(rows - 8192))
    for rows in by_interest:
        for hidden in plan.hidden:
            for rms in (True, False):
                yield from residual_norm_cases(rows, hidden, rms, setting)

        # Only the residual norms are swept over rows; everything else is measured at one number.
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
    """(measurements, the cases that were left out because the time was up)."""
    end = time.perf_counter() + plan.seconds
    torch.manual_seed(0)

    # A library that cannot be used says so for every case; the log shall say it once.
    logged_lines: set[str] = set()

    def log_once(line: str) -> None:
        if line not in logged_lines:
            logged_lines.add(line)
            log(line)

    measurements: list[Measurement] = []
    left_out: list[str] = []
    for case in cases(plan, Setting(plan.dtype, device, plan.with_compile, log_once)):
        title = f"{case.kernel} {case.rows} x {case.columns}"
        if time.perf_counter() > end:
            left_out.append(title)
            continue
        case_measurements = list(measure(case, plan, device, log))
        measurements += case_measurements
        times = [f"{row.implementation} {row.p50:.1f} us" for row in case_measurements]
        log(f"{title}: {', '.join(times)}")
    return measurements, left_out


def as_json(measurements: list[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]


def speedup(
    measurements: list[Measurement], kernel: str, baseline: str
) -> tuple[float, float] | None:
    """(geometric mean, smallest) over the shapes of baseline time over our time.

    None when the baseline was not measured at any shape.
    """
    our_times = _times_by_shape(measurements, kernel, "ours")
    baseline_times = _times_by_shape(measurements, kernel, baseline)
    ratios = [
        baseline_times[shape] / our_time
        for shape, our_time in our_times.items()
        if shape in baseline_times
    ]
    if not ratios:
        return None
    geometric_mean = Tensor(ratios).log().mean().exp()
    return float(geometric_mean), min(ratios)


def _times_by_shape(
    measurements: list[Measurement], kernel: str, implementation: str
) -> dict[tuple[int, int], float]:
    """{(rows, columns): median microseconds} of one implementation of one kernel."""
    times = {}
    for measurement in measurements:
        if (measurement.kernel, measurement.implementation) == (kernel, implementation):
            times[measurement.rows, measurement.columns] = measurement.p50
    return times
