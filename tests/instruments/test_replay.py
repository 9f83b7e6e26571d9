"""E10: recorded runs of the authors' implementation, replayed;
and traces of every kind the format allows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_completep.completep import Table, parameterization
from megatron_completep.completep import table as page
from megatron_completep.config.derived import head_dim
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.instruments.replay import Trace, relative_error, replay
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.tools.replay_trace import main
from tests.instruments.reference_run import record
from tests.support.commands import Programs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
NAMES = ["completep", "alpha_half", "mup", "completep_base"]
# From the traces' README.
TOLERANCES = {"float64": (1e-12, 1e-12, 1e-12), "float32": (1e-5, 1e-3, 1e-5)}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_authors_recorded_runs_are_reproduced(name: str, precision: str) -> None:
    trace = Trace.load(str(GOLDEN / name))
    result = replay(trace, precision)
    errors = (
        result.max_relative_loss_error,
        result.max_relative_grad_norm_error,
        result.max_relative_weight_norm_error,
    )
    assert all(
        error <= bound for error, bound in zip(errors, TOLERANCES[precision], strict=True)
    ), errors
    assert result.passed
    assert len(result.loss) == trace.record["steps"] == 20
    recomputed = max(abs(a - b) / b for a, b in zip(result.loss, trace.record["loss"], strict=True))
    assert recomputed == result.max_relative_loss_error


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_authors_recorded_runs_are_reproduced_on_a_gpu(name: str) -> None:
    context = ParallelContext.single("cuda:0")
    result = replay(Trace.load(str(GOLDEN / name)), "float32", context)
    assert result.passed, result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU"):
        main([str(GOLDEN / "completep"), "--device", "cuda"])


def first_steps(trace: Trace, steps: int) -> Trace:
    """The trace cut after a few steps; the norms of its final weights no longer fit."""
    record = {**trace.record, **{key: trace.record[key][:steps] for key in ("loss", "grad_norm")}}
    return Trace(
        record,
        {**trace.arrays, **{key: trace.arrays[key][:steps] for key in ("inputs", "targets")}},
    )


def with_cell(
    role: Role, cell: str, change: Callable[[float, float, float, float], float]
) -> Callable[[pytest.MonkeyPatch], None]:
    """A table with one wrong factor: times change(m_N, m_L, alpha, ratio)."""
    original = page.RULES["adamw"]

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(*arguments: float) -> dict[Role, page.Row]:
            rows = original(*arguments)
            value = getattr(rows[role], cell) * change(*arguments[:4])  # no shape of a matrix
            return {**rows, role: dataclasses.replace(rows[role], **{cell: value})}

        monkeypatch.setitem(page.RULES, "adamw", wrong)

    return apply


def with_property(name: str, value: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(Table, name, property(lambda self: value))


def with_attention_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda model, base_head_dim, scale_width: 1 / math.sqrt(head_dim(model))  # noqa: E731
    monkeypatch.setattr(parameterization, "_attention_scale", wrong)


# What is wrong: (the trace that tells, what makes it so).
WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "residual multiplier missing": ("completep", with_property("residual_multiplier", 1.0)),
    "residual multiplier with alpha 1 at alpha 0.5": (
        "alpha_half", with_property("residual_multiplier", 0.25)),
    "logit multiplier missing": ("completep", with_property("logit_multiplier", 1.0)),
    "attention scale 1/sqrt(head_dim)": ("completep", with_attention_scale),
    "hidden lr not divided by width": (
        "completep", with_cell(Role.HIDDEN_WEIGHT, "lr", lambda m_N, m_L, a, r: r)),
    "hidden lr divided by depth at alpha 1": (
        "completep", with_cell(Role.HIDDEN_WEIGHT, "lr", lambda m_N, m_L, a, r: 1 / m_L)),
    "hidden decay not multiplied": (
        "completep", with_cell(Role.HIDDEN_WEIGHT, "weight_decay", lambda m_N, m_L, a, r: 1 / r)),
    "hidden lr without its depth factor": (
        "alpha_half", with_cell(Role.HIDDEN_WEIGHT, "lr", lambda m_N, m_L, a, r: m_L ** (1 - a))),
    "pre-norm lr without its depth factor": (
        "alpha_half", with_cell(Role.PRE_NORM, "lr", lambda m_N, m_L, a, r: m_L ** (1 - a))),
    "bias lr without its depth factor": (
        "alpha_half", with_cell(Role.HIDDEN_BIAS, "lr", lambda m_N, m_L, a, r: m_L ** (1 - a))),
    "final norm lr with a depth factor": (
        "alpha_half", with_cell(Role.FINAL_NORM, "lr", lambda m_N, m_L, a, r: m_L ** (a - 1))),
    "embedding lr with a depth factor": (
        "alpha_half", with_cell(Role.EMBEDDING, "lr", lambda m_N, m_L, a, r: m_L ** (a - 1))),
    "embedding lr divided by width": (
        "completep", with_cell(Role.EMBEDDING, "lr", lambda m_N, m_L, a, r: 1 / m_N)),
    "embedding not decayed": (
        "completep", with_cell(Role.EMBEDDING, "weight_decay", lambda m_N, m_L, a, r: 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(WRONG))
def test_a_wrong_implementation_fails_the_replay(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, apply = WRONG[mistake]
    trace = first_steps(Trace.load(str(GOLDEN / name)), 3)
    assert replay(trace).max_relative_loss_error < 1e-14
    apply(monkeypatch)
    assert replay(trace).max_relative_loss_error > 1e-9


def test_the_replay_takes_the_reference_s_single_eps_and_another_is_told_apart() -> None:
    trace = Trace.load(str(GOLDEN / "completep"))
    assert trace.single_eps == pytest.approx(1e-12 / 2 / 4, rel=1e-12)
    result = replay(Trace({**trace.record, "groups": [{"eps": 1e-12 / 2}]}, trace.arrays))
    assert 1e-12 < result.max_relative_loss_error < 1e-5
    assert not result.passed


@pytest.mark.parametrize("change", ["loss", "grad_norm", "param_norm_final"])
def test_each_figure_decides_on_its_own(change: str) -> None:
    trace = Trace.load(str(GOLDEN / "completep_base"))
    record = json.loads(json.dumps(trace.record))
    if change == "param_norm_final":
        record[change]["transformer.ln_f.bias"] *= 1 + 1e-11
    else:
        record[change][7] *= 1 + 1e-11
    assert replay(trace).passed
    assert not replay(Trace(record, trace.arrays)).passed


def test_relative_error_of_figures_that_are_not_finite_or_too_few_is_infinite() -> None:
    assert relative_error([1.0, 2.0], [1.0, 1.0]) == 1.0
    assert relative_error([1.0, float("nan")], [1.0, 1.0]) == math.inf
    assert relative_error([float("nan"), 1.0], [1.0, 1.0]) == math.inf
    assert relative_error([1.0], [1.0, 1.0]) == math.inf
    assert relative_error([1e-3], [0.0]) == 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5, None])
def test_traces_of_every_kind_are_reproduced(
    tmp_path: Path, alpha: float | None, bias: bool, tied: bool
) -> None:
    """Recorded here by an independent implementation,
    with m_N = 2 and m_L = 3 (so that muP's unscaled decay shows).
    """
    record(tmp_path / "trace", alpha, bias, tied)
    result = replay(Trace.load(str(tmp_path / "trace.npz")))
    assert result.passed, result.to_json()
    assert replay(Trace.load(str(tmp_path / "trace")), "float32").max_relative_loss_error < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": "alibi"}, "position = alibi"),
        ({"activation": "ReLU squared"}, "activation = ReLU squared"),
        ({"lr_schedule": "cosine"}, "lr_schedule = cosine"),
        ({"alpha": 0.1}, "alpha"),
        ({"num_layers": 3}, r"transformer\.h\.2\.ln_1\.weight: not in the \.npz"),
        ({"bias": False}, r"transformer\.h\.0\.ln_1\.bias: no such weight"),
        ({"vocab_size": 64}, r"\(65, 16\) in the \.npz, \(64, 16\) in the \.json"),
        ({"tied_embeddings": False}, r"lm_head\.weight: not in the \.npz"),
        ({"lr": None}, "lr"),
    ],
    ids=str,
)
def test_a_trace_that_cannot_be_replayed_says_why(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = json.loads((GOLDEN / "completep_base.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps({**settings, **change}))
    shutil.copy(GOLDEN / "completep_base.npz", tmp_path / "trace.npz")
    with pytest.raises(DataError, match=message):
        replay(Trace.load(str(tmp_path / "trace")))


def test_missing_and_broken_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Trace.load(str(tmp_path / "nothing"))
    shutil.copy(GOLDEN / "completep_base.json", tmp_path / "half.json")
    with pytest.raises(DataError, match=r"half\.npz"):
        Trace.load(str(tmp_path / "half"))
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataError, match="not a trace"):
        Trace.load(str(tmp_path / "half"))
    np.savez(tmp_path / "half.npz", inputs=np.zeros(1))
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=r"(?s)keys missing in the \.json: num_layers.*arrays missing in the \.npz: targets",
    ):
        Trace.load(str(tmp_path / "half"))
    (tmp_path / "half.json").write_text("[1")
    with pytest.raises(DataError, match="not a trace"):
        Trace.load(str(tmp_path / "half"))


# The tool.


def test_the_tool_prints_one_json_object_and_leaves_with_0(programs: Programs) -> None:
    words = (GOLDEN / "completep_base.npz", "--json", "--precision", "float32")
    report = json.loads(programs.output(main, *words))
    assert list(report) == [
        "loss",
        "recorded_loss",
        "max_relative_loss_error",
        "max_relative_grad_norm_error",
        "max_relative_weight_norm_error",
        "pass",
    ]
    assert report["pass"] is True and report["max_relative_loss_error"] <= 1e-5
    recorded = json.loads((GOLDEN / "completep_base.json").read_text())
    assert report["recorded_loss"] == recorded["loss"]


def test_the_tool_leaves_with_1_when_the_numbers_disagree(
    tmp_path: Path, programs: Programs
) -> None:
    settings = json.loads((GOLDEN / "completep_base.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**settings, "lr": 0.0101}))
    shutil.copy(GOLDEN / "completep_base.npz", tmp_path / "t.npz")
    ended = programs.run(main, tmp_path / "t")
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert len([line for line in lines if line.split()[0].isdigit()]) == 20
    assert lines[-1].startswith("fail (float64, 20 steps)")


def test_the_tool_leaves_with_2_and_one_message_when_the_trace_is_missing(
    programs: Programs,
) -> None:
    ended = programs.run(main, "no/such/trace")
    assert ended.code == 2 and not ended.out
    assert ended.err.startswith("error: no/such/trace: not a trace")
    assert "Traceback" not in ended.err
