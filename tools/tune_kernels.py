"""Choose the launch shapes of the optimizer and loss kernels on the GPU at hand, and write them into the launch table.

Example:

    python tools/tune_kernels.py                  # print what was found
    python tools/tune_kernels.py --write          # and put it into kernels/tuned.py, to be committed

Nothing is tuned while training: every rank and every restart reads the same table, so all launch the same reduction order.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from megatron_completep.analysis.tune_kernels import tune, write_table
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.kernels import launch, tuned


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args()


def main() -> int | None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is visible to torch: launch shapes can only be chosen on the GPU they are for.")
    device = torch.device("cuda", torch.cuda.current_device())
    found = tune(device, say=lambda line: print(line, file=sys.stderr, flush=True))
    architecture, name = launch.architecture(device), torch.cuda.get_device_name(device)
    if arguments.write:
        write_table(Path(tuned.__file__), architecture, found, f"{name}, torch {torch.__version__}")
    if arguments.json:
        print(json.dumps({"device": name, "architecture": architecture, "shapes": found}))
        return 0
    for operation, (block, warps) in found.items():
        print(f"{operation}: {block} elements, {warps} warps")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
