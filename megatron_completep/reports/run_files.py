"""Reads the files of a run leniently: torn lines and missing fields become notes, not errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_completep.config.json_text import parse_json, read_bounded
from megatron_completep.config.schema import ModelConfig
from megatron_completep.config.yaml_text import MAX_BYTES, parse_yaml
from megatron_completep.errors import DataError, UserError
from megatron_completep.files import distinct_names

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: `rows` by ascending step, each step once.

    settings: its configuration as `section.key` to value. notes: what its files lack.
    """

    name: str
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig | None = None
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps and values of one figure, at the steps at which the run has it."""
        rows = [row for row in self.rows if is_figure(row.get(key))]
        steps = [row["step"] for row in rows]
        return steps, [row[key] for row in rows]


def is_figure(value: Any) -> bool:
    """Whether a value of a row is a number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Runs from output folders or metrics files, under the shortest names that tell them apart.

    Raises DataError that lists every run that cannot be read.
    """
    runs = []
    problems = []
    # All runs are tried, so that the user can correct every path at once.
    for place, name in zip(places, short_names(places), strict=True):
        try:
            runs.append(read_run(place, name))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return runs


def read_run(place: Path, name: str) -> Run:
    """One run, from its output_dir or its metrics.jsonl.

    Raises DataError where the metrics cannot be read or hold no step.
    """
    file = place / "metrics.jsonl" if place.is_dir() else place
    try:
        data = file.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{file} cannot be read: {reason}. "
            "Give a run's folder (its training.output_dir) or its metrics.jsonl."
        ) from None
    rows, notes = _rows(data)
    if not rows:
        raise DataError(
            f"{file} holds no step yet. Wait for the run's first step, or leave it away."
        )
    settings, model = _configuration(file.with_name("config.yaml"), notes)
    return Run(name, rows, settings, model, notes)


def _rows(data: bytes) -> tuple[list[Row], list[str]]:
    """The rows by ascending step, and notes on what is wrong with the file."""
    by_step: dict[int, Row] = {}
    torn = 0
    repeated = 0
    for line in data.splitlines():
        row = _row(line)
        if row is None:
            # A line is torn where the process was killed while it wrote; empty ones lose nothing.
            torn += bool(line.strip())
            continue
        # A run that was resumed from an older checkpoint wrote some steps again.
        repeated += row["step"] in by_step
        by_step[row["step"]] = row

    notes = []
    if torn:
        notes.append(f"{_lines(torn)} not whole and left out")
    if repeated:
        notes.append(f"{_lines(repeated)} of a step that came again; the last one counts")
    steps = sorted(by_step)
    if steps:
        notes += _notes_on_steps(steps)
    return [by_step[step] for step in steps], notes


def _row(line: bytes) -> Row | None:
    """A line's object; None where it is none or has no step."""
    try:
        row = parse_json(line, "a line", finite=False)
    except UserError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row


def _lines(count: int) -> str:
    return f"{count} {'line' if count == 1 else 'lines'}"


def _notes_on_steps(steps: Sequence[int]) -> list[str]:
    """Notes on steps that the file lacks; `steps` are those it has, ascending."""
    start = steps[0]
    end = steps[-1]
    notes = []
    if start > 1:
        notes.append(f"begins at step {start}")
    missing = end - start + 1 - len(steps)
    if missing:
        subject = "1 step is" if missing == 1 else f"{missing} steps are"
        notes.append(f"{subject} missing between step {start} and {end}")
    return notes


def _configuration(path: Path, notes: list[str]) -> tuple[dict[str, Any], ModelConfig | None]:
    """The settings, and the model where this version can validate it; adds to `notes` if it cannot.

    No rule between settings is checked, for the run is over.
    """
    # An editor may have put a byte-order mark before the text.
    try:
        sections, _ = parse_yaml(read_bounded(path, MAX_BYTES).decode("utf-8-sig"), path.name)
    except (UserError, UnicodeDecodeError) as error:
        notes.append(
            f"no readable {path.name} beside its metrics ({error}): "
            "FLOPs and settings are not known"
        )
        return {}, None
    settings = flat(sections) if isinstance(sections, dict) else {}
    # Settings are shown as they stand; only FLOPs need a model that this version can compute.
    try:
        return settings, ModelConfig.model_validate(sections["model"])
    except (ValidationError, KeyError, TypeError):
        notes.append(
            f"the model in {path.name} is not one that this version knows: FLOPs are not known"
        )
        return settings, None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `section.key`; lists stay values."""
    settings: dict[str, Any] = {}
    for key, setting in values.items():
        name = f"{prefix}{key}"
        # An empty mapping is a value: flattened, it would leave no trace.
        if isinstance(setting, dict) and setting:
            settings.update(flat(setting, f"{name}."))
        else:
            settings[name] = setting
    return settings


def short_names(places: Sequence[Path]) -> list[str]:
    """As many of each path's last names as tell all paths apart; equal paths are numbered."""
    # A metrics file is named by its folder, for all of them have the same name.
    folders = [place.parent if place.name == "metrics.jsonl" else place for place in places]
    return distinct_names(folders)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which runs differ, by key: a value for each run, None where it has none.

    Without the names of runs and their folders, which always differ.
    """
    # A run without a readable configuration would differ in everything.
    configured = [run for run in runs if run.settings]
    keys: set[str] = set()
    for run in configured:
        keys.update(run.settings)
    keys -= {"training.output_dir", "logging.run_name"}

    differing = {}
    for key in sorted(keys):
        # As text, for lists cannot be members of a set.
        texts = {json.dumps(run.settings.get(key)) for run in configured}
        if len(texts) > 1:
            differing[key] = [run.settings.get(key) for run in runs]
    return differing
