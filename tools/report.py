"""Compare runs in one HTML file that needs no other file and no network.

Example:

    python tools/report.py runs/proxy runs/quickstart --out runs/comparison.html

RUN is a run's folder (training.output_dir) or its metrics.jsonl. The report shows loss by step,
tokens, FLOPs and hours, the last losses by position, gradient norm, learning rate, throughput, MFU,
parameterization telemetry, and the settings that differ. Lines that a kill left torn, steps that
came again and figures that a run does not have are noted in it. Exit code 2: a run cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, file_or_folder
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.reports.run_comparison import compare, summarize
from megatron_completep.reports.run_files import differences, read_runs


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=file_or_folder,
        metavar="RUN",
        help="a run's folder, or its metrics.jsonl",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the HTML file (default: report.html in the first run's folder)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is no report of this project"
    )
    parser.add_argument(
        "--title", default="", help="the report's title (default: the names of the runs)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the summary as one JSON object; the log goes to stderr",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # The default is the project's own name in a run's folder, which no input has.
    out: Path | None = arguments.out
    if out is None:
        first_run: Path = arguments.runs[0]
        folder = first_run if first_run.is_dir() else first_run.parent
        out = folder / "report.html"
    else:
        inputs = [run / "metrics.jsonl" if run.is_dir() else run for run in arguments.runs]
        inputs += [path.with_name("config.yaml") for path in inputs]
        check_outputs([Output("--out", out, renewed=True)], inputs, arguments.overwrite)

    runs = read_runs(arguments.runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        compare(runs, arguments.title).write_html(out)
    except OSError as error:
        raise UserError(
            f"--out = {out} cannot be written: {error.strerror}. "
            "Choose another folder or free some space."
        ) from None

    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}", file=sys.stderr)
    print(f"written: {out}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        summaries = [summarize(run) for run in runs]
        content = {"report": str(out), "runs": summaries, "differences": differences(runs)}
        print(json.dumps(content))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
