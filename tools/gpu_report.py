"""The day with a GPU: test and time what this project promises on one.

Example, what `make gpu-report` runs, then a first call of five and a half minutes:

    python tools/gpu_report.py
    python tools/gpu_report.py --parts facts kernels step --seconds 330 --out /tmp/report

Stdout has one JSON object a figure, with what was expected beside what was measured; its last line
says what to do now. report.json, report.md, log.txt, kernels.{json,md,png} and two traces land in
--out. No network is needed; docs/kernels.md names the packages that a part needs. `--cpu` tries
every part on tiny shapes: its times mean nothing.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_completep.benchmarks.gpu_day.report import (
    PARTS,
    TOTAL_SECONDS,
    run_parts,
    what_now,
    write_report,
)
from megatron_completep.benchmarks.kernel_report import folder_name, versions
from megatron_completep.command_line import Parser, real
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = Parser(__doc__)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=names,
        metavar="PART",
        help=f"of {', '.join(names)}, which run in this order (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=real(at_least=1, at_most=10**6),
        default=TOTAL_SECONDS,
        help=f"for all parts together (default: {TOTAL_SECONDS:.0f})",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: docs/benchmarks/<device>)"
    )
    parser.add_argument("--cpu", action="store_true", help="try the parts on tiny shapes")
    return parser.parse_args(argv)


def describe_device(trial: bool) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": "cpu, a trial" if trial else torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        **versions(),
        "python": platform.python_version(),
    }


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if not arguments.cpu and not torch.cuda.is_available():
        raise ConfigError(
            "no GPU is visible to torch: this report is for a machine with one. "
            "Try its parts with --cpu."
        )
    setting = describe_device(arguments.cpu)
    # A trial's times mean nothing, so they do not lie beside those that are committed.
    reports = ROOT / "runs" / "gpu-report" if arguments.cpu else ROOT / "docs" / "benchmarks"
    folder = arguments.out or reports / folder_name(setting["device"])
    # Parts run in another working folder.
    folder = folder.absolute()
    # Checked before the minutes of work whose result would be lost.
    check_outputs([Output("--out", folder, folder=True)])
    folder.mkdir(parents=True, exist_ok=True)

    # The parts are modules of this checkout, which need not be installed; wheels that somebody has
    # unpacked stay on the path behind it. Unbuffered, a part that is stopped has said everything.
    path = os.pathsep.join(word for word in (str(ROOT), os.environ.get("PYTHONPATH", "")) if word)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def say(line: str) -> None:
        print(line, flush=True)

    parts = [part for part in PARTS if part.name in arguments.parts]
    outcomes = run_parts(parts, folder, arguments.seconds, environment, ROOT, say, arguments.cpu)
    write_report(outcomes, folder, setting)
    say(json.dumps({"results": str(folder), "do_now": what_now(outcomes, arguments.cpu)}))
    return 1 if any(outcome.problem or outcome.missed for outcome in outcomes) else 0


if __name__ == "__main__":
    exit_on_user_error(main)
