"""Write the kernel benchmark's result: .json, .md and .png under a folder named by the device."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_completep.benchmarks.kernel_benchmark import Measurement, as_json, speedup


def folder_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(measurements: list[Measurement]) -> list[str]:
    columns = [
        "implementation",
        "rows",
        "columns",
        "us p50 [p20, p80]",
        "GB/s",
        "% of copy",
        "% of data sheet",
        "launches",
    ]
    columns += ["host us", "peak MB", "max error"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for m in measurements:
        error = "" if m.max_error is None else f"{m.max_error:.1e}"
        cells = [
            m.implementation,
            m.rows,
            m.columns,
            f"{m.p50:,.1f} [{m.p20:,.1f}, {m.p80:,.1f}]",
            _number(m.gigabytes_per_second, 0),
        ]
        cells += [
            _number(m.percent_of_copy),
            _number(m.percent_of_data_sheet),
            _number(m.launches, 0),
            _number(m.host_microseconds),
        ]
        cells += [_number(m.peak_megabytes), error]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def markdown(measurements: list[Measurement], left_out: list[str], setting: dict[str, Any]) -> str:
    """One section a kernel: the speed-up over each baseline, then every row."""
    lines = [
        f"# Kernel benchmark: {setting['device']}",
        "",
        *(f"- {key}: {value}" for key, value in setting.items()),
        "",
    ]
    lines += [
        "GB/s counts the floor's bytes only; the copy is a device-to-device copy of as many bytes in the same run.",
        "",
    ]
    for kernel in dict.fromkeys(m.kernel for m in measurements):
        mine = [m for m in measurements if m.kernel == kernel]
        lines += [f"## {kernel}", ""]
        for baseline in dict.fromkeys(m.implementation for m in mine if m.implementation != "ours"):
            ratio = speedup(measurements, kernel, baseline)
            if ratio is not None:
                lines.append(
                    f"- {ratio[0]:.2f}x as fast as {baseline} (geometric mean; worst shape {ratio[1]:.2f}x)"
                )
        lines += ["", *_table(mine), ""]
    if left_out:
        lines += ["## Left out: the time was up", "", *(f"- {what}" for what in left_out), ""]
    return "\n".join(lines)


def picture(measurements: list[Measurement], path: Path) -> bool:
    """GB/s over the hidden size at the largest number of rows, beside what a copy reaches; False without norms or matplotlib."""
    names = [
        name
        for name in dict.fromkeys(m.kernel for m in measurements)
        if name.startswith("residual")
    ]
    if not names or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * ((len(names) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot((len(names) + 1) // 2, 2, position)
        rows = max(m.rows for m in measurements if m.kernel == name)
        for implementation in dict.fromkeys(
            m.implementation for m in measurements if m.kernel == name
        ):
            line = [
                m
                for m in measurements
                if (m.kernel, m.implementation, m.rows) == (name, implementation, rows)
            ]
            axes.plot(
                [m.columns for m in line],
                [m.gigabytes_per_second for m in line],
                marker="o",
                label=implementation,
            )
            if implementation == "ours":
                copy = [100 * m.gigabytes_per_second / m.percent_of_copy for m in line]
                axes.plot(
                    [m.columns for m in line], copy, color="black", linestyle="--", label="copy"
                )
        axes.set(
            title=f"{name}, {rows} rows",
            xlabel="hidden size",
            ylabel="GB/s of the floor's bytes",
            xscale="log",
            ylim=(0, None),
        )
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def write_report(
    measurements: list[Measurement], left_out: list[str], setting: dict[str, Any], folder: Path
) -> list[Path]:
    """Write kernels.json, kernels.md and (where matplotlib is installed) kernels.png into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"kernels.{suffix}" for suffix in ("json", "md", "png")]
    content = {"setting": setting, "measurements": as_json(measurements), "left_out": left_out}
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    paths[1].write_text(markdown(measurements, left_out, setting))
    return paths if picture(measurements, paths[2]) else paths[:2]


def versions() -> dict[str, str]:
    """What the figures depend on besides the device."""
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
    }
