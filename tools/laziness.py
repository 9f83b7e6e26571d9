"""Measure over depth how far the first update of each block is from linear in its parameters.

Example:

    python tools/laziness.py configs/quickstart_proxy.yaml --depths 2,4,8,16,32 --out runs/laziness

The configured parameterization ("own") is compared with alpha = 0.5, which becomes lazy with depth
and must be seen to, and with muP. Exit code 0: not lazy, and the control is. 1: lazy. 2: bad input.
3: cannot tell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, file_to_read, list_of, whole
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error, when_interrupted
from megatron_completep.instruments import laziness
from megatron_completep.instruments.check_report import describe_laziness, finite, write_laziness
from megatron_completep.instruments.trial import with_base
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.run.precision import use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "config", type=file_to_read, metavar="CONFIG", help="a run's YAML file; its data is read"
    )
    parser.add_overrides()
    parser.add_argument(
        "--depths",
        type=list_of(whole(1, 10**5)),
        default=[2, 4, 8, 16, 32],
        metavar="L,L,...",
        help="default: 2,4,8,16,32",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1, 1000),
        default=3,
        help="repetitions with other weights and data; one gives no verdict (default: 3)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write laziness.json, .png and .html there"
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    config = with_base(load_config(arguments.config, arguments.overrides))
    # Exponents are fitted over depths beyond the proxy's; without a proxy the run is its own.
    base = config.completep.base_num_layers or config.model.num_layers
    use_threads(config.training.cpu_threads, 1)
    # Checked before the work, whose result would otherwise be lost.
    if arguments.out is not None:
        check_outputs([Output("--out", arguments.out, folder=True)])
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    if arguments.seeds == 1:
        say("one seed gives no interval, and so no verdict (exit code 3): --seeds 3 gives both")
    depths = sorted(set(arguments.depths))
    with when_interrupted(
        "a measurement is all or nothing, so nothing was written; start it again."
    ):
        samples = laziness.collect(config, depths, arguments.seeds, say=say)
    result = laziness.judge(samples, base)
    say(describe_laziness(result, base))
    if arguments.out is not None:
        settings = {
            "config": config.model_dump(mode="json"),
            "depths": arguments.depths,
            "seeds": arguments.seeds,
        }
        write_laziness(result, arguments.out, settings)
        say(f"written: {arguments.out / 'laziness.json'}, .png, .html")
    if arguments.json:
        print(json.dumps(finite(result.to_json())))
    return int(result.verdict)


if __name__ == "__main__":
    exit_on_user_error(main)
