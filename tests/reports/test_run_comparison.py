"""Runs beside each other: what is read from their files,
whatever state those are in, and what the report says of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import DataError
from megatron_completep.reports.run_comparison import (
    _draw,
    _expert_panels,
    compare,
    flops_at,
    hours_at,
    steps_at,
    summarize,
    tokens_at,
)
from megatron_completep.reports.run_files import Run, differences, read_run, read_runs, short_names
from megatron_completep.tools.report import main
from tests.support.commands import Programs

SHAPE = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 1,
    "ffn_hidden_size": 16,
    "vocab_size": 10,
    "seq_length": 3,
}
MODEL = {**SHAPE, "activation": "gelu"}
# By hand: layer 2*8*24 + 2*8*8 + 2*2*8*(3+1)/2 + 4*8*16 = 1088; unembedding 2*8*10 = 160; forward
# and backward three times that.
FLOPS_A_TOKEN = 3 * (1088 + 160)


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "loss": 4.0 - 0.1 * step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "skipped": False,
        "tokens": 100 * step,
        "mfu": None,
    }
    return {**values, "tokens_per_second": 1000.0 + step, "step_seconds": 36.0, **changes}


def write_run(
    folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any] | None = None, torn: str = ""
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    if settings is not None:
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"model": MODEL, "training": {"output_dir": str(folder)}, **settings})
        )
    return folder


def test_torn_repeated_and_missing_steps_are_noted_and_the_last_of_a_step_counts(
    tmp_path: Path,
) -> None:
    rows = [row(1), row(2), row(3, loss=9.0), row(3, loss=3.0), row(6)]
    run = read_run(write_run(tmp_path / "a", rows, {}, torn='{"step": 7, "lo'), "a")
    assert [r["step"] for r in run.rows] == [1, 2, 3, 6] and run.series("loss")[1][2] == 3.0
    assert run.notes == [
        "1 line not whole and left out",
        "1 line of a step that came again; the last one counts",
        "2 steps are missing between step 1 and 6",
    ]
    assert read_run(write_run(tmp_path / "b", [row(1), row(2)], {}), "b").notes == []


@pytest.mark.parametrize("line", ["null", "[1]", '{"loss": 1}', '{"step": "1"}', "\x00\x00", "{"])
def test_a_line_that_is_no_row_is_counted_and_left_out(tmp_path: Path, line: str) -> None:
    run = read_run(
        write_run(tmp_path / "a", [row(1)], {}, torn=line + "\n" + json.dumps(row(2)) + "\n"), "a"
    )
    assert [r["step"] for r in run.rows] == [1, 2]
    assert run.notes == ["1 line not whole and left out"]


def test_a_line_of_a_thousand_brackets_is_left_out_like_any_other(tmp_path: Path) -> None:
    deep = '{"step": 2, "a": ' + "[" * 1024 + "]" * 1024 + "}\n"
    run = read_run(
        write_run(
            tmp_path / "a", [row(1)], {}, torn=deep + json.dumps(row(3, loss=float("nan"))) + "\n"
        ),
        "a",
    )
    assert [r["step"] for r in run.rows] == [1, 3]
    assert run.notes[0] == "1 line not whole and left out"


def test_a_configuration_of_nested_aliases_is_noted_and_ends(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    folder = write_run(tmp_path / "a", [row(1)])
    for text in ("\n".join(lines), "model: &m {model: *m}", "[" * 5000, "\xff", "model: [1"):
        (folder / "config.yaml").write_bytes(text.encode("latin-1"))
        run = read_run(folder, "a")
        assert run.settings == {} and "no readable config.yaml" in run.notes[0], text[:40]


def test_the_axes_are_those_of_the_rows(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [row(1), row(2), row(3)], {}), "a")
    assert list(steps_at(run)) == [1, 2, 3] and list(tokens_at(run)) == [100, 200, 300]
    assert list(flops_at(run)) == pytest.approx([100 * FLOPS_A_TOKEN * n for n in (1, 2, 3)])
    assert list(hours_at(run)) == pytest.approx([0.01, 0.02, 0.03])  # 36 s a step
    assert hours_at(Run("late", [row(2)])) is None  # the hours before its first row are not known
    assert tokens_at(Run("old", [row(1), {"step": 2}])) is None
    assert flops_at(Run("old", [row(1)])) is None


def test_the_summary_has_each_figure_that_the_run_has(tmp_path: Path) -> None:
    rows = [row(n, skipped=n == 7) for n in range(1, 31)]
    rows[9]["validation_loss"], rows[19]["validation_loss"], rows[6]["loss"] = 2.5, 2.75, None
    found = summarize(read_run(write_run(tmp_path / "a", rows, {}), "a"))
    assert found["training_loss"] == pytest.approx(sum(4.0 - 0.1 * n for n in range(11, 31)) / 20)
    assert (found["best_validation_loss"], found["best_validation_step"]) == (2.5, 10)
    assert found["validation_loss"] == 2.75
    assert (found["steps"], found["tokens"], found["skipped_steps"]) == (30, 3000, 1)
    assert found["tokens_per_second"] == 1015.5
    assert found["mfu"] is None
    assert found["flops"] == pytest.approx(3000 * FLOPS_A_TOKEN)
    assert found["hours"] == pytest.approx(0.3)


def test_a_run_with_hardly_any_field_is_still_compared(tmp_path: Path) -> None:
    full = read_run(
        write_run(
            tmp_path / "full",
            [row(n, mfu=0.4, **{"update_ratio/embedding": 0.1}) for n in range(1, 600)],
            {},
        ),
        "full",
    )
    bare = read_run(
        write_run(tmp_path / "bare", [{"step": 5, "loss": 3.0}, {"step": 6, "loss": None}]), "bare"
    )
    page = compare([full, bare]).as_html()
    for title in ("Summary", "Loss", "Optimizer", "Speed", "Parameterization"):
        assert f"<h2>{title}</h2>" in page
    assert len(re.findall(r'<img alt="[^"]*" src="data:image/png', page)) == 4 + 2 + 2 + 1
    assert "begins at step 5" in page
    assert "FLOPs and settings are not known" in page
    assert "Not known of bare." in page
    assert "<h2>Parameterization</h2>" not in compare([bare]).as_html()
    assert "No run recorded a loss." in compare([Run("none", [{"step": 1}])]).as_html()


def test_routing_is_drawn_of_three_layers_and_only_where_there_are_experts() -> None:
    loads = {f"expert_load/layers.{layer}": 1.5 for layer in (1, 3, 5, 9, 11)}
    sparse = Run("sparse", [row(n, dead_experts=0, **loads) for n in range(1, 9)])
    dense = Run("dense", [row(n) for n in range(1, 9)])
    assert [key for key, _, _ in _expert_panels([dense, sparse])] == [
        "dead_experts",
        *(f"expert_load/layers.{layer}" for layer in (1, 5, 11)),
    ]
    assert "<h2>Experts</h2>" in compare([dense, sparse]).as_html()
    assert "<h2>Experts</h2>" not in compare([dense]).as_html()


def test_a_long_curve_is_drawn_as_means_over_the_band_of_its_values() -> None:
    run = Run("long", [row(n, loss=float(n % 2)) for n in range(1, 4001)])
    (axes,) = _draw([run], "loss", "loss", steps_at, "step", (4, 3)).axes
    (line,) = axes.get_lines()
    assert len(line.get_xdata()) == 400 and set(line.get_ydata()) == {0.5}
    (band,) = axes.collections
    assert {0.0, 1.0} == set(band.get_paths()[0].vertices[:, 1])


def test_only_settings_that_differ_are_shown_and_never_the_folders(tmp_path: Path) -> None:
    one = read_run(
        write_run(tmp_path / "a", [row(1)], {"optimizer": {"base_lr": 0.1, "betas": [0.9, 0.95]}}),
        "a",
    )
    two = read_run(
        write_run(
            tmp_path / "b",
            [row(1)],
            {"optimizer": {"base_lr": 0.2, "betas": [0.9, 0.95]}, "logging": {"x": 1}},
        ),
        "b",
    )
    assert differences([one, two]) == {"logging.x": [None, 1], "optimizer.base_lr": [0.1, 0.2]}
    assert differences([one, one]) == {} == differences([one, Run("bare", [row(1)])])


def test_the_loss_by_position_is_that_of_each_runs_last_validation_of_it() -> None:
    early = {"validation_loss_at/0-1": 3.5, "validation_loss_at/2-3": 3.25}
    late = {"validation_loss_at/0-1": 3.4, "validation_loss_at/10-11": 2.5}
    one = Run("one", [row(1, **early), row(2, **late), row(3)])
    two = Run("two", [row(1, **early)])
    page = compare([one, two]).as_markdown()
    _, table = page.split("## Validation by position")
    # A part that a run's last validation did not have is empty.
    expected = "| 0-1 | 3.4000 | 3.5000 |\n| 2-3 |  | 3.2500 |\n| 10-11 | 2.5000 |  |\n"
    assert expected in table
    assert "Validation by position" not in compare([Run("none", [row(1)])]).as_markdown()


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("/a/x/run"), Path("/a/y/run/metrics.jsonl")]) == ["x/run", "y/run"]
    assert short_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert short_names([Path("/x"), Path("/x")]) == ["//x (1)", "//x (2)"]


def test_every_run_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "empty", [], torn='{"step"')
    with pytest.raises(DataError) as error:
        read_runs([tmp_path / "none", tmp_path / "empty"])
    first, second = str(error.value).splitlines()
    assert "none cannot be read: No such file or directory. Give a run's folder" in first
    assert "holds no step yet" in second


def test_a_model_that_this_version_does_not_know_costs_only_the_flops(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [row(1)], {"model": {**MODEL, "new_key": 1}}), "a")
    assert run.model is None and run.settings["model.new_key"] == 1 and len(run.notes) == 1
    assert read_run(
        write_run(tmp_path / "b", [row(1)], {}), "b"
    ).model == ModelConfig.model_validate(MODEL)


def test_the_tool_writes_one_page_and_a_json_summary(tmp_path: Path, programs: Programs) -> None:
    runs = [
        write_run(tmp_path / name, [row(1), row(2)], {"optimizer": {"base_lr": lr}})
        for name, lr in (("a", 0.1), ("b", 0.2))
    ]
    summary = json.loads(programs.output(main, *runs, "--out", tmp_path / "out.html", "--json"))
    assert [run["name"] for run in summary["runs"]] == ["a", "b"]
    assert summary["differences"] == {"optimizer.base_lr": [0.1, 0.2]}
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere/metrics.jsonl|nowhere cannot be read"),
        (["a", "--out", "a/metrics.jsonl/x.html"], "--out = .*is no folder"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path,
    programs: Programs,
    words: list[str],
    message: str,
) -> None:
    write_run(tmp_path / "a", [row(1)], {})
    placed = [word if word.startswith("--") else tmp_path / word for word in words]
    refused = programs.run(main, *placed)
    assert refused.code == 2
    assert re.search(message, refused.err) and "Traceback" not in refused.err
