"""Write the kernel benchmark's result: .json, .md and .png under a folder named by the device."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_completep.benchmarks.kernel_benchmark import Measurement, as_json, speedup


def folder_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _number(figure: float | None, digits: int = 1) -> str:
    return "" if figure is None else f"{figure:,.{digits}f}"


def _times(m: Measurement) -> str:
    return f"{m.p50:,.1f} [{m.p20:,.1f}, {m.p80:,.1f}]"


def _error(m: Measurement) -> str:
    return "" if m.max_error is None else f"{m.max_error:.1e}"


# The columns of a kernel's table: title, and the cell of a measurement.
COLUMNS: dict[str, Callable[[Measurement], object]] = {
    "implementation": lambda m: m.implementation,
    "rows": lambda m: m.rows,
    "columns": lambda m: m.columns,
    "us p50 [p20, p80]": _times,
    "us in a graph": lambda m: _number(m.graph_microseconds),
    "GB/s": lambda m: _number(m.gigabytes_per_second, 0),
    "% of copy": lambda m: _number(m.percent_of_copy),
    "% of data sheet": lambda m: _number(m.percent_of_data_sheet),
    "launches": lambda m: _number(m.launches, 0),
    "host us": lambda m: _number(m.host_microseconds),
    "peak MB": lambda m: _number(m.peak_megabytes),
    "max error": _error,
}


def _table(measurements: list[Measurement]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for measurement in measurements:
        cells = [str(cell_of(measurement)) for cell_of in COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(measurements: list[Measurement], left_out: list[str], setting: dict[str, Any]) -> str:
    """One section a kernel: the speed-up over each baseline, then every row."""
    lines = [f"# Kernel benchmark: {setting['device']}", ""]
    for key, entry in setting.items():
        lines.append(f"- {key}: {entry}")
    lines += [
        "",
        "GB/s counts the floor's bytes only; "
        "the copy is a device-to-device copy of as many bytes in the same run. "
        "Both are those of a CUDA graph where the call can be captured, else as launched.",
        "",
    ]

    for kernel in _kernels(measurements):
        of_kernel = [m for m in measurements if m.kernel == kernel]
        lines += [f"## {kernel}", ""]
        for baseline in _implementations(of_kernel):
            # None where the baseline and ours have no shape in common.
            ratio = speedup(measurements, kernel, baseline) if baseline != "ours" else None
            if ratio is not None:
                mean, worst = ratio
                lines.append(
                    f"- {mean:.2f}x as fast as {baseline} "
                    f"(geometric mean; worst shape {worst:.2f}x)"
                )
        lines += ["", *_table(of_kernel), ""]

    if left_out:
        lines += ["## Left out: the time was up", "", *(f"- {case}" for case in left_out), ""]
    return "\n".join(lines)


def _kernels(measurements: list[Measurement]) -> list[str]:
    """Every kernel once, in the order in which they were measured."""
    return list(dict.fromkeys(m.kernel for m in measurements))


def _implementations(measurements: list[Measurement]) -> list[str]:
    """Every implementation once, in the order in which they were measured."""
    return list(dict.fromkeys(m.implementation for m in measurements))


def picture(measurements: list[Measurement], path: Path) -> bool:
    """Draw GB/s over the hidden size at the largest number of rows, beside what a copy reaches.

    Returns False, and draws nothing, without residual norms or without matplotlib.
    """
    kernels = [name for name in _kernels(measurements) if name.startswith("residual")]
    if not kernels or importlib.util.find_spec("matplotlib") is None:
        return False
    # The canvas for files: pyplot would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines_of_axes = (len(kernels) + 1) // 2
    figure = Figure(figsize=(11, 3.6 * lines_of_axes), layout="constrained")
    FigureCanvasAgg(figure)
    for position, kernel in enumerate(kernels, start=1):
        axes = figure.add_subplot(lines_of_axes, 2, position)
        of_kernel = [m for m in measurements if m.kernel == kernel]
        # The largest number of rows keeps the whole GPU busy at every hidden size.
        rows = max(m.rows for m in of_kernel)
        for implementation in _implementations(of_kernel):
            points = [m for m in of_kernel if (m.implementation, m.rows) == (implementation, rows)]
            _draw_implementation(axes, implementation, points)
        axes.set(
            title=f"{kernel}, {rows} rows",
            xlabel="hidden size",
            ylabel="GB/s of the floor's bytes",
            xscale="log",
            ylim=(0, None),
        )
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _draw_implementation(axes: Any, implementation: str, points: list[Measurement]) -> None:
    """The rates of one implementation; those of the copy are drawn once, together with ours."""
    hidden_sizes = [m.columns for m in points]
    rates = [m.gigabytes_per_second for m in points]
    axes.plot(hidden_sizes, rates, marker="o", label=implementation)
    # A measurement holds its share of the copy's rate, from which that rate follows.
    if implementation == "ours":
        copy_rates = [100 * m.gigabytes_per_second / m.percent_of_copy for m in points]
        axes.plot(hidden_sizes, copy_rates, color="black", linestyle="--", label="copy")


def write_report(
    measurements: list[Measurement], left_out: list[str], setting: dict[str, Any], folder: Path
) -> list[Path]:
    """Write kernels.json, kernels.md and (where matplotlib is installed) kernels.png.

    They go into `folder`, which is created. Returns the paths of what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    json_path = folder / "kernels.json"
    page_path = folder / "kernels.md"
    picture_path = folder / "kernels.png"

    rows = as_json(measurements)
    content = {"setting": setting, "measurements": rows, "left_out": left_out}
    json_path.write_text(json.dumps(content, indent=1) + "\n")
    page_path.write_text(markdown(measurements, left_out, setting))
    if not picture(measurements, picture_path):
        return [json_path, page_path]
    return [json_path, page_path, picture_path]


def versions() -> dict[str, str]:
    """What the figures depend on besides the device."""
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
    }
