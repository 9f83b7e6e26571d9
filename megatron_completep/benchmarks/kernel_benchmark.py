"""Time every kernel beside its baselines and a plain copy of as many bytes, in one run."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_completep.benchmarks.head_cases import head_cases
from megatron_completep.benchmarks.kernel_cases import (
    Case,
    Prepare,
    Setting,
    cross_entropy_cases,
    float8_cases,
    norm_and_add_cases,
    optimizer_cases,
    pointwise_cases,
    residual_norm_cases,
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

GRAPHED_CALLS = 10  # of one implementation in a captured graph


@dataclass(frozen=True)
class Measurement:
    """One implementation of one kernel at one shape.

    Times are in microseconds: the median and the 20th and 80th percentile, of calls from the host
    with the caches cleared before each. graph_microseconds: of one call among several in a CUDA
    graph, where no launch is waited for. A short backward by autograd takes the host longer than
    the device, so shares of a copy are those of the graph where there is one.
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
    graph_microseconds: float | None = None  # on a GPU, where the call can be captured


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
    # Each case takes torch.compile 5 to 15 s, so it is compared at these hidden sizes alone.
    compiled_hidden: tuple[int, ...] = (2048, 4096)

    def compiles(self, hidden: int) -> bool:
        """Whether torch.compile is a baseline at this hidden size."""
        return self.with_compile and hidden in self.compiled_hidden


SMOKE = Plan(
    rows=(8,),
    hidden=(64,),
    vocabularies=(128,),
    parameters=4096,
    milliseconds=2,
    seconds=60.0,
    with_compile=False,
    compiled_hidden=(64,),
)


@dataclass(frozen=True)
class _Costs:
    """What one implementation takes. The last four are None on a CPU."""

    p50: float  # microseconds, as the two below
    p20: float
    p80: float
    launches: int | None
    host_microseconds: float | None
    peak_megabytes: float | None
    graph_microseconds: float | None


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


def _graph_microseconds(
    prepare: Prepare, milliseconds: int, device: torch.device, log: Callable[[str], None]
) -> float | None:
    """Median of a call among others in a captured graph; None where it cannot be captured.

    Nothing clears the caches between the calls: what is smaller than they are is read from them.
    """
    if device.type != "cuda":
        return None
    try:
        graph = _captured(prepare)
    # Whatever a library does that a capture refuses must not end the run.
    except Exception as error:
        log(f"no graph: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None
    times: list[float] = []
    end = time.perf_counter() + milliseconds / 1e3
    while len(times) < 3 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / GRAPHED_CALLS)
    return statistics.median(times)


def _captured(prepare: Prepare) -> torch.cuda.CUDAGraph:
    """Some calls of one implementation as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs a backward on the stream of its forward: that must be the one of the capture.
    with torch.cuda.stream(stream):
        work = prepare()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPHED_CALLS):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


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


def _copy_rates(
    case: Case, plan: Plan, device: torch.device, log: Callable[[str], None]
) -> tuple[float, float | None]:
    """GB/s of a copy on the device that moves as many bytes as the case's floor.

    As launched, and in a graph.
    """
    # A float32 entry is read and written once: 8 bytes.
    source = torch.randn(max(1, case.floor_bytes // 8), device=device)
    target = torch.empty_like(source)
    moved = 8 * source.numel()

    def copy() -> Tensor:
        return target.copy_(source)

    microseconds, _, _ = _quantiles(copy, plan.milliseconds, device)
    in_graph = _graph_microseconds(lambda: copy, plan.milliseconds, device, log)
    return moved / microseconds / 1e3, None if in_graph is None else moved / in_graph / 1e3


def _data_sheet_rate(device: torch.device) -> float | None:
    """GB/s by the maker's data sheet; None on a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    rates = (rate for name, rate in DATA_SHEET.items() if name in device_name)
    return next(rates, None)


def _costs(
    prepare: Prepare, plan: Plan, device: torch.device, log: Callable[[str], None]
) -> _Costs:
    """Prepare one implementation, run it once, then measure it."""
    work = prepare()
    work()  # compiles kernels and fills the allocator's cache
    p50, p20, p80 = _quantiles(work, plan.milliseconds, device)
    launches, peak_megabytes = _launches_and_peak(work, device)
    host = _host_microseconds(work, device)
    in_graph = _graph_microseconds(prepare, plan.milliseconds, device, log)
    return _Costs(p50, p20, p80, launches, host, peak_megabytes, in_graph)


def measure(
    case: Case, plan: Plan, device: torch.device, log: Callable[[str], None]
) -> Iterator[Measurement]:
    """Every implementation of a case, after a copy of the same number of bytes.

    A baseline that fails is reported and left out; an error of our own implementation is raised.
    """
    copy_rate, copy_rate_in_graph = _copy_rates(case, plan, device, log)
    data_sheet_rate = _data_sheet_rate(device)
    for implementation, prepare in case.implementations.items():
        is_ours = implementation == "ours"
        try:
            costs = _costs(prepare, plan, device, log)
        except Exception as error:  # whatever a library raises must not end the run
            if is_ours:
                raise
            message = str(error).splitlines()[0] if str(error) else ""
            log(f"{case.kernel}, {implementation}: {type(error).__name__}: {message}")
            continue

        rate = case.floor_bytes / costs.p50 / 1e3  # bytes a microsecond to GB/s
        share_of_copy = rate / copy_rate
        if costs.graph_microseconds is not None and copy_rate_in_graph is not None:
            rate = case.floor_bytes / costs.graph_microseconds / 1e3
            share_of_copy = rate / copy_rate_in_graph
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
            percent_of_copy=100 * share_of_copy,
            percent_of_data_sheet=None if data_sheet_rate is None else 100 * rate / data_sheet_rate,
            launches=costs.launches,
            host_microseconds=costs.host_microseconds,
            peak_megabytes=costs.peak_megabytes,
            max_error=_max_error(case) if is_ours else None,
            graph_microseconds=costs.graph_microseconds,
        )


def cases(plan: Plan, setting: Setting) -> Iterator[Case]:
    """All cases, the most telling first: a run that is cut short has measured those."""
    by_interest = sorted(plan.rows, key=lambda rows: abs(rows - 8192))
    first_rows = by_interest[0]
    for rows in by_interest:
        for hidden in plan.hidden:
            compared = replace(setting, with_compile=plan.compiles(hidden))
            for rms in (True, False):
                yield from residual_norm_cases(rows, hidden, rms, compared)
            # Behind the norms of one width: a run that is short has something of everything.
            if (rows, hidden) == (first_rows, plan.hidden[0]):
                yield from _cases_of_one_size(rows, plan, setting)
        # Only the residual norms are swept over rows.
        if rows == first_rows:
            for hidden in plan.hidden:
                compared = replace(setting, with_compile=plan.compiles(hidden))
                yield from pointwise_cases(rows, 4 * hidden, compared)
                yield from float8_cases(rows, hidden, compared)
                for rms in (True, False):
                    yield from norm_and_add_cases(rows, hidden, rms, compared)


def _cases_of_one_size(rows: int, plan: Plan, setting: Setting) -> Iterator[Case]:
    """What does not depend on the hidden size."""
    yield from optimizer_cases(plan.parameters, setting)
    for vocabulary in plan.vocabularies:
        yield from cross_entropy_cases(rows, vocabulary, setting)
    yield from head_cases(rows, 16, 4, 128, setting)


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
