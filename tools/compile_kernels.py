"""Compile every kernel of a run before it starts, so that its ranks need not. Needs no GPU.

Example:

    python tools/compile_kernels.py configs/completep_1b.yaml --arch sm_90
    python tools/compile_kernels.py configs/completep_1b.yaml training.micro_batch_size=4 \\
        --arch gfx942 --cache-dir /shared/triton

Without it, a thousand ranks would compile the same kernels at once. They are written into Triton's
cache (--cache-dir, else where Triton keeps it): let the run have the same folder as
TRITON_CACHE_DIR.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from megatron_completep.command_line import Parser, file_to_read
from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.kernels.ahead_of_time import ARCHITECTURES
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.planning.precompile import compile_run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("config", type=file_to_read, help="the YAML file of the run")
    parser.add_overrides()
    parser.add_argument("--arch", required=True, choices=ARCHITECTURES, help="the GPUs of the run")
    parser.add_argument(
        "--cache-dir", type=Path, help="folder for the compiled kernels (default: Triton's own)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set: the interpreter compiles nothing. Unset it.")
    cache_dir: Path | None = arguments.cache_dir
    if cache_dir is not None:
        check_outputs([Output("--cache-dir", cache_dir, folder=True)])
        cache_dir.mkdir(parents=True, exist_ok=True)
        triton.knobs.cache.dir = str(cache_dir)

    config = load_config(arguments.config, arguments.overrides)
    # With --json, stdout holds one object and nothing else.
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    start = time.perf_counter()
    count = compile_run(config, arguments.arch, say)
    seconds = time.perf_counter() - start

    cache = triton.knobs.cache.dir
    if not arguments.json:
        print(f"{count} kernels for {arguments.arch} in {seconds:.1f} s, in {cache}")
        return 0
    result = {
        "architecture": arguments.arch,
        "kernels": count,
        "seconds": seconds,
        "cache": cache,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
