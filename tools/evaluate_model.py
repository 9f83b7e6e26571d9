"""Evaluate a model: lm-eval's tasks, and bits per byte of token files.

Example:

    python tools/evaluate_model.py runs/quickstart \\
        --token-file data/quickstart/validation_text_document
    python tools/evaluate_model.py runs/quickstart --tasks lambada_openai,arc_easy --limit 200
    torchrun --nproc-per-node 8 -m megatron_completep.tools.evaluate_model runs/quickstart \\
        --tasks mine --include-path tasks/

CHECKPOINT is a run's folder (its newest checkpoint) or one of its checkpoints/step_NNNNNNNN. Tasks
need lm-eval (pip install 'megatron-completep[eval]'); those over local files need no network. Under
torchrun the processes share the work.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.command_line import (
    Parser,
    folder_to_read,
    token_files,
    tokenizer_model,
    whole,
)
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import exit_on_user_error
from megatron_completep.inference.generation import load_model, run_config, tokenizer_of_run
from megatron_completep.inference.lm_eval_tasks import TaskSettings, evaluate_tasks
from megatron_completep.inference.scoring import Scorer, score_token_file
from megatron_completep.launch import Launch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.precision import name_of, precision_of_run, use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    _add_what_is_evaluated(parser)
    _add_how_it_is_computed(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    # Either of the two is enough, which argparse cannot say of optional arguments.
    if not arguments.tasks and not arguments.token_file:
        parser.error("nothing to evaluate: give --tasks or --token-file.")
    return arguments


def _add_what_is_evaluated(parser: Parser) -> None:
    parser.add_argument(
        "checkpoint",
        type=folder_to_read,
        metavar="CHECKPOINT",
        help="a run's folder, or one checkpoint's",
    )
    parser.add_argument("--tasks", default="", metavar="NAME,NAME", help="lm-eval's, or yours")
    parser.add_argument(
        "--include-path",
        type=folder_to_read,
        metavar="FOLDER",
        help="of your own tasks' .yaml files",
    )
    parser.add_argument(
        "--num-fewshot",
        type=whole(0, 10**4),
        metavar="N",
        help="examples in the context (default: the task's own number)",
    )
    parser.add_argument(
        "--limit", type=whole(), metavar="N", help="documents a task, or of a token file"
    )
    parser.add_argument(
        "--token-file",
        type=token_files,
        action="append",
        default=[],
        metavar="PREFIX",
        help="of PREFIX.bin and PREFIX.idx; repeatable",
    )


def _add_how_it_is_computed(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size",
        type=whole(1, 10**6),
        default=16,
        metavar="N",
        help="sequences at once (default: 16)",
    )
    parser.add_argument(
        "--max-length",
        type=whole(1, 10**8),
        metavar="N",
        help="tokens the model sees at once (default: model.seq_length)",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="FILE",
        help="instead of the run's own copy of its tokenizer",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "float64"),
        default="auto",
        help="auto: that of the run, where the device can",
    )


def evaluate(arguments: argparse.Namespace, context: ParallelContext) -> dict[str, Any]:
    """{"token_files": {prefix: scores}, "tasks": {task: metrics}}.

    The documents are divided over all processes, and their sums reduced over the world.
    """

    def say(line: str) -> None:
        if context.is_first:
            print(line, file=sys.stderr)

    # The configuration alone decides the precision, before the weights are read in it.
    precision_of_training = run_config(arguments.checkpoint).training.precision
    precision = precision_of_run(arguments.precision, precision_of_training, context.device, say)
    config, model = load_model(arguments.checkpoint, context.device, precision)
    tokenizer = build_tokenizer(
        tokenizer_of_run(arguments.checkpoint, config, arguments.tokenizer_model)
    )
    scorer = Scorer(
        model,
        tokenizer,
        context.world,
        arguments.batch_size,
        arguments.max_length,
        config.export.end_tokens(),
    )

    results: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "precision": name_of(precision),
        "token_files": {},
        "tasks": {},
    }
    for prefix in arguments.token_file:
        score = score_token_file(scorer, IndexedDataset(prefix), arguments.limit)
        results["token_files"][prefix] = score.to_json()
    if arguments.tasks:
        results["tasks"] = evaluate_tasks(scorer, task_settings(arguments))
    return results


def task_settings(arguments: argparse.Namespace) -> TaskSettings:
    names = (name.strip() for name in arguments.tasks.split(","))
    folder: Path | None = arguments.include_path
    return TaskSettings(
        tuple(name for name in names if name),
        None if folder is None else str(folder),
        arguments.num_fewshot,
        arguments.limit,
    )


def show(results: dict[str, Any]) -> str:
    """A few lines for each token file and task."""
    lines = []
    for prefix, score in results["token_files"].items():
        bits = f"{score['bits_per_byte']:.6f} bits per byte"
        lines.append(f"{prefix}: {bits}, {score['loss']:.6f} nats per token")
        counts = f"{score['documents']:,} documents, {score['tokens']:,} tokens"
        lines.append(f"  {counts}, {score['bytes']:,} bytes")
    for task, metrics in results["tasks"].items():
        lines.append(task)
        # Among the metrics lm-eval has texts, such as the task's alias.
        for name, metric in metrics.items():
            if isinstance(metric, float):
                lines.append(f"  {name:<32} {metric:.6f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # The processes of a node share its cores.
    use_threads(None, Launch.from_environment().local_world_size)
    # Whatever the layout of training was, every process holds the whole model here.
    context = ParallelContext.create(ParallelConfig(), arguments.device)
    try:
        results = evaluate(arguments, context)
    finally:
        context.close()
    if context.is_first:
        # lm-eval may return values of types that json does not know.
        print(json.dumps(results, default=str) if arguments.json else show(results))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
