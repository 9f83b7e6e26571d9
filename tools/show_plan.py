"""Show what a configuration means for every parameter, beside what muP and SP would give. Opens no data.

Example:

    python tools/show_plan.py configs/quickstart.yaml model.num_layers=32

prints the forward multipliers and, for parameters that share them, role, initial standard deviation, peak learning rate, weight
decay and epsilon. --json prints {"multipliers": {"residual", "logits", "attention"}, "parameters": [{"name", "shape", "role",
"init_std", "lr", "weight_decay", "eps"}]} with this run's values, one entry a parameter.
"""

import argparse
import json

from megatron_completep.analysis.plan import describe, make_plan
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as completep.alpha=0.5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args()


def main() -> int | None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    print(json.dumps(make_plan(config).to_json()) if arguments.json else describe(config))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
