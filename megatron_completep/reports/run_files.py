"""What a run left behind, read leniently: torn lines, missing fields and old configurations are noted, not fatal."""

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

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: `rows` by ascending step, each step once; `settings` is its configuration as `section.key` to value."""

    name: str
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig | None = None
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where the run has it."""
        found = [(row["step"], row[key]) for row in self.rows if is_figure(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]


def is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Runs from output folders or metrics files, under the shortest names that tell them apart. UserError lists every one that fails."""
    runs, problems = [], []
    for place, name in zip(places, short_names(places), strict=True):
        try:
            runs.append(read_run(place, name))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return runs


def read_run(place: Path, name: str) -> Run:
    """One run, from its output_dir or its metrics.jsonl."""
    file = place / "metrics.jsonl" if place.is_dir() else place
    try:
        data = file.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{file} cannot be read: {reason}. Give a run's folder (its training.output_dir) or its metrics.jsonl."
        ) from None
    rows, notes = _rows(data)
    if not rows:
        raise DataError(
            f"{file} holds no step yet. Wait for the run's first step, or leave it away."
        )
    settings, model = _configuration(file.with_name("config.yaml"), notes)
    return Run(name, rows, settings, model, notes)


def _rows(data: bytes) -> tuple[list[Row], list[str]]:
    """Rows by step (the last one of a step counts) and what had to be said of them."""
    by_step: dict[int, Row] = {}
    torn = again = 0
    for line in data.splitlines():
        try:
            row = parse_json(line, "a line", finite=False)
        except UserError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            torn += bool(line.strip())
            continue
        again += row["step"] in by_step
        by_step[row["step"]] = row
    steps = sorted(by_step)
    missing = steps[-1] - steps[0] + 1 - len(steps) if steps else 0
    counts = {
        "not whole and left out": torn,
        "of a step that came again; the last one counts": again,
    }
    notes = [
        f"{count} {'line' if count == 1 else 'lines'} {words}"
        for words, count in counts.items()
        if count
    ]
    if steps and steps[0] > 1:
        notes.append(f"begins at step {steps[0]}")
    if missing:
        notes.append(
            f"{missing} {'step is' if missing == 1 else 'steps are'} missing between step {steps[0]} and {steps[-1]}"
        )
    return [by_step[step] for step in steps], notes


def _configuration(path: Path, notes: list[str]) -> tuple[dict[str, Any], ModelConfig | None]:
    """Settings, and the model where it is one that this version knows. No other rule is asked: the run is over."""
    try:
        values, _ = parse_yaml(read_bounded(path, MAX_BYTES).decode("utf-8-sig"), path.name)
    except (UserError, UnicodeDecodeError) as error:
        notes.append(
            f"no readable {path.name} beside its metrics ({error}): FLOPs and settings are not known"
        )
        return {}, None
    settings = flat(values) if isinstance(values, dict) else {}
    try:
        return settings, ModelConfig.model_validate(values["model"])
    except (ValidationError, KeyError, TypeError):
        notes.append(
            f"the model in {path.name} is not one that this version knows: FLOPs are not known"
        )
        return settings, None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `section.key`; lists stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
        found.update(inner)
    return found


def short_names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart; equal paths are numbered."""
    parts = [
        (place.parent if place.name == "metrics.jsonl" else place).absolute().parts
        for place in places
    ]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which runs differ, by key: a value for each run, `None` where it has none. Without output folders."""
    known = [run for run in runs if run.settings]
    keys = sorted(
        {key for run in known for key in run.settings} - {"training.output_dir", "logging.run_name"}
    )
    found = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len({json.dumps(run.settings.get(key)) for run in known}) > 1
    }
