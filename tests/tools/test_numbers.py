"""Numbers outside their range are refused with the range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tools.usages import USAGES

# Numbers that ran into a traceback, into nothing at all, or for ever.
NUMBERS = [
    (
        "tools.show_plan",
        "{config} --world-size 0",
        "--world-size = 0: give a whole number from 1 to",
    ),
    (
        "tools.show_plan",
        "{config} --world-size 99999999999999999999",
        "--world-size = 99999999999999999999: give a whole number from 1 to",
    ),
    (
        "tools.show_plan",
        "{config} --world-size 8 --gpu h10",
        "--gpu = h10: not known. Did you mean h100? Use one of: a100, h100, ",
    ),
    (
        "tools.show_plan",
        "{config} --gpu h100",
        "--gpu = h100: says nothing without a number of GPUs. Add --world-size N",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr=-8",
        "--lr = -8: -8: give a finite number above 0 and of at most 1024.",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7:0",
        "--lr = -8:-7:0: give a whole number from 1 to 100.",
    ),
    ("tools.lr_transfer", "sweep {config} --out x --lr -7:-8", "LOW = -7 is above HIGH = -8"),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:nan",
        "--lr = -8:nan: give a finite number",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr 0,1e-3",
        "--lr = 0,1e-3: 0: give a finite number above 0",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7 --seeds 0",
        "--seeds = 0: give a whole number from 1 to 1000.",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7 --depths 2,-4,0",
        "--depths = 2,-4,0: -4, 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --steps 0",
        "--steps = 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --seeds 0",
        "--seeds = 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 0,2",
        "--depths = 0,2: 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --beside mup,m",
        "--beside = mup,m: m: not known.",
    ),
    ("tools.laziness", "{config} --seeds 0", "--seeds = 0: give a whole number from 1 to"),
    ("tools.draw_step", "--ranks 0", "--ranks = 0: give a whole number from 1 to 256."),
    (
        "tools.draw_step",
        "--ranks 1000000000",
        "--ranks = 1000000000: give a whole number from 1 to 256.",
    ),
    (
        "tools.draw_step",
        "--ranks 5 --micro-batches 4",
        "--micro-batches = 4: fewer than --ranks = 5.",
    ),
    ("tools.draw_step", "--micro-batches 3", "--micro-batches = 3: fewer than --ranks = 4."),
    (
        "tools.draw_step",
        "--micro-batches 0 --bucket-megabytes inf",
        "2 problems in this command line",
    ),
    (
        "tools.generate",
        "{folder} --temperature -1",
        "--temperature = -1: give a finite number of at least 0.",
    ),
    (
        "tools.generate",
        "{folder} --top-p 1.5",
        "--top-p = 1.5: give a finite number above 0 and of at most 1.",
    ),
    (
        "tools.evaluate_model",
        "{folder} --token-file x --limit 0",
        "--limit = 0: give a whole number from 1 to",
    ),
    (
        "tools.dataset",
        "split {prefix} --shares 50,nan --output-prefix a b",
        "--shares = 50,nan: nan: give a finite number of at least 0.",
    ),
    (
        "tools.train_tokenizer",
        "--input {text} --output x --vocab-size -1",
        "--vocab-size = -1: give a whole number from 1 to",
    ),
    (
        "tools.preprocess_data",
        "--input {text} --output-prefix x --tokenizer-type bytes --workers 0",
        "--workers = 0: give a whole number",
    ),
    (
        "tools.preprocess_data",
        "--input {text} --output-prefix x --tokenizer-type bytes --max-document-megabytes 1e300",
        "--max-document-megabytes = 1e300: give a finite number above 0 and of at most",
    ),
    ("tools.benchmark_training", "--layers 0", "--layers = 0: give a whole number from 1 to"),
    (
        "tools.benchmark_kernels",
        "--device cpu --rows 0 5",
        "--rows = 0: give a whole number from 1 to",
    ),
    (
        "tools.tune_kernels",
        "--dry-run --arch sm_9000",
        "--arch = sm_9000: not known. Did you mean sm_90?",
    ),
    ("tools.tune_kernels", "--dry-run --hidden 0", "--hidden = 0: give a whole number from 1 to"),
    (
        "tools.import_hf",
        "{folder} x --seq-length 0",
        "--seq-length = 0: give a whole number from 1 to",
    ),
    ("tools.checkpoint", "prune {folder} --keep 0", "--keep = 0: give a whole number from 1 to"),
]


@pytest.mark.parametrize(
    ("tool", "words", "message"), NUMBERS, ids=[f"{tool} {words}" for tool, words, _ in NUMBERS]
)
def test_a_number_outside_its_range_is_refused(
    tool: str, words: str, message: str, place: dict[str, Path], call: Any
) -> None:
    usage = next(usage for usage in USAGES if usage.tool == tool)
    code, text = call(usage, [word.format(**place) for word in words.split()])
    assert code == 2 and message in text
