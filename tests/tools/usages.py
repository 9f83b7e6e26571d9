"""A right command line of every program and command, and what tests change in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["pretrain", *sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py"))]


@dataclass(frozen=True)
class Usage:
    """A right command line.

    words: over the names of the fixture `place`. work: the function that begins the work, at which
    a test breaks in.
    """

    tool: str
    words: str
    work: str
    output: str = ""  # of `words`, what is written: "file" or "folder" ({out}); "" where nothing is

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"megatron_completep.{self.tool}")


USAGES = [
    Usage("pretrain", "{config}", "pretrain"),
    Usage("tools.benchmark_checkpoint", "--folder {out}", "benchmark_checkpoints", "folder"),
    Usage("tools.benchmark_data", "reading --folder {out}", "benchmark_reading", "folder"),
    Usage("tools.benchmark_data", "preprocessing", "benchmark_preprocessing"),
    Usage("tools.benchmark_experts", "{config}", "measure"),
    Usage("tools.benchmark_kernels", "--device cpu --out {out}", "run", "folder"),
    Usage("tools.benchmark_muon", "{config}", "measure"),
    Usage("tools.benchmark_parallel", "", "compare_parallel"),
    Usage("tools.benchmark_telemetry", "{config}", "measure"),
    Usage("tools.benchmark_training", "--device cpu", "compare_all"),
    Usage("tools.checkpoint", "list {folder}", "list_checkpoints"),
    Usage("tools.checkpoint", "verify {folder}", "checkpoint_at"),
    Usage("tools.checkpoint", "reshard {folder} --output {out}", "checkpoint_at", "folder"),
    Usage(
        "tools.checkpoint",
        "adapt {folder} {config} training.output_dir={out}",
        "checkpoint_at",
        "folder",
    ),
    Usage(
        "tools.compile_kernels", "{config} --arch sm_90 --cache-dir {out}", "compile_run", "folder"
    ),
    Usage("tools.config_reference", "", "configuration_reference"),
    Usage("tools.configs", "--copy {out}", "copy_files", "folder"),
    Usage(
        "tools.coordinate_check",
        "{config} --depths 1,2 --out {out}",
        "coordinate_check.collect",
        "folder",
    ),
    Usage("tools.dataset", "inspect {prefix}", "describe_files"),
    Usage("tools.dataset", "merge --input {prefix} --output-prefix {out}", "merge", "file"),
    Usage("tools.dataset", "split {prefix} --shares 1 --output-prefix {out}", "split", "file"),
    Usage("tools.dataset", "sample {config} --step 1", "describe_step"),
    Usage("tools.draw_step", "--config {config} --output {out}.png", "schedule_actions", "file"),
    Usage("tools.evaluate_model", "{folder} --token-file {prefix} --device cpu", "run_config"),
    Usage("tools.export_hf", "{folder} {out}", "export_model", "folder"),
    Usage("tools.generate", "{folder} --device cpu", "run_config"),
    Usage("tools.gpu_report", "--cpu --out {out}", "run_parts", "folder"),
    Usage("tools.import_hf", "{folder} {out}", "import_model", "folder"),
    Usage("tools.ladder", "plan {config} --out {out} --to-flops 1e15", "ladders.plan", "folder"),
    Usage("tools.ladder", "run {folder}", "ladders.load"),
    Usage("tools.ladder", "fit {folder}", "ladder_report.report"),
    Usage("tools.ladder", "predict {folder} --depth 4", "ladder_report.predict"),
    Usage("tools.laziness", "{config} --out {out}", "laziness.collect", "folder"),
    Usage(
        "tools.lr_transfer",
        "sweep {config} --out {out} --lr -8:-7:1 --workers 1",
        "sweep.run_local",
        "folder",
    ),
    Usage("tools.lr_transfer", "report {folder}", "make_report"),
    Usage("tools.lr_transfer", "plan {folder} {config} --to {out}", "make_plan", "file"),
    Usage("tools.new_run", "{config} --depth 4 --to {out}", "new_run.new_run", "file"),
    Usage(
        "tools.preprocess_data",
        "--input {text} --output-prefix {out} --tokenizer-type bytes",
        "preprocess",
        "file",
    ),
    Usage("tools.quickstart", "--config {config}", "Quickstart.run"),
    Usage("tools.replay_trace", "{text}", "Trace.load"),
    Usage("tools.report", "{folder} --out {out}.html", "read_runs", "file"),
    Usage("tools.show_plan", "{config}", "describe"),
    Usage(
        "tools.train_tokenizer",
        "--input {text} --output {out} --vocab-size 300",
        "train_tokenizer",
        "file",
    ),
    Usage("tools.tune_kernels", "--dry-run", "tune"),
    Usage(
        "tools.tune_proxy",
        "search {config} --out {out} --over base_lr=1e-3:1e-2 --workers 1",
        "proxy_search.prepare",
        "folder",
    ),
    Usage("tools.tune_proxy", "report {folder} --to {out}", "proxy_search.Search.load", "file"),
]


def usage_name(usage: Usage) -> str:
    return f"{usage.tool} {usage.words}"


def only(wanted: Callable[[Usage], object]) -> Any:
    """Parametrizes a test over the usages for which `wanted` holds."""
    return pytest.mark.parametrize(
        "usage", [usage for usage in USAGES if wanted(usage)], ids=usage_name
    )


def fill(usage: Usage, place: dict[str, Path], out: object, **instead: object) -> list[str]:
    """The words of a usage; a name in `instead` stands for another file."""
    values = {**place, "out": out, **instead}
    return [word.format(**values) for word in usage.words.split()]


def break_in(usage: Usage, error: type[BaseException]) -> Any:
    """Raise `error` where the work begins."""
    *owners, name = usage.work.split(".")
    target: Any = usage.module
    for owner in owners:
        target = getattr(target, owner)
    return mock.patch.object(target, name, mock.Mock(side_effect=error))
