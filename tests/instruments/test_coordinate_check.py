"""The coordinate check: its verdicts on made-up measurements,
and what it says of right and wrong implementations.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.config import save_config
from megatron_completep.config.schema import Config
from megatron_completep.instruments.check_report import describe_check, draw_check, write_check
from megatron_completep.instruments.coordinate_check import (
    Measurement,
    Plan,
    Sample,
    collect,
    in_turn,
    in_workers,
    jobs_of,
    measure,
    train,
)
from megatron_completep.instruments.coordinate_verdict import Verdict, exponent, judge
from megatron_completep.instruments.trial import (
    Design,
    Trial,
    for_short_runs,
    read_batches,
    reshape,
    with_seed,
)
from megatron_completep.model.stream import Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.tools.coordinate_check import main
from tests.instruments.mutations import MUTATIONS, Mutation
from tests.support.commands import Ended, Programs
from tests.support.corpora import write_markov_chain
from tests.support.models import group_of
from tests.support.runs import ARCHITECTURES, proxy_config

SINGLE = ParallelContext.single()
DEPTHS, WIDTHS = [2, 4, 8, 16], [32, 64, 128]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    write_markov_chain(path / "text")
    return path


# Verdicts on made-up measurements.


def made_up(
    rule: str, size: int, seed: int, change: Callable[[int], float], update: float = 1.0
) -> Sample:
    measured = Measurement([1.0, 1.0], [0.0, change(size)], [1.0, 1.0], [0.0, 1.0], [], {}, {}, [])
    large = (
        Measurement([], [], [], [], [], {}, {Role.HIDDEN_WEIGHT: update, Role.UNEMBEDDING: 1.0}, [])
        if rule == "model"
        else None
    )
    return Sample("depth", rule, 64, size, seed, measured, large)


def verdict_of(model: float, control: float, eps: float = 0.0) -> Verdict:
    samples = [made_up("model", d, s, lambda d: d**model, d**eps) for d in DEPTHS for s in range(2)]
    samples += [made_up("control", d, s, lambda d: d**control) for d in DEPTHS for s in range(2)]
    return judge(samples).verdict


@pytest.mark.parametrize(
    ("model", "control", "eps", "verdict"),
    [
        (0.0, 0.97, 0.0, Verdict.RIGHT),
        (-0.19, 0.55, 0.0, Verdict.RIGHT),
        (0.84, 0.97, 0.0, Verdict.WRONG),
        (0.39, 0.97, 0.0, Verdict.WRONG),
        (-0.67, 0.97, 0.0, Verdict.WRONG),
        (0.0, 0.97, -0.7, Verdict.WRONG),  # eps constant
        (-0.31, 0.97, 0.0, Verdict.WRONG),  # the margin is 0.1 on both sides
        (-0.6, 0.97, 0.0, Verdict.WRONG),
        (0.25, 0.97, 0.0, Verdict.CANNOT_TELL),  # a right model at a small width may show as much
        (0.0, 0.45, 0.0, Verdict.CANNOT_TELL),  # the control does not show what is wrong with it
        (0.19, 0.55, 0.0, Verdict.CANNOT_TELL),  # nor where it lies too near the model
        (float("nan"), 0.97, 0.0, Verdict.WRONG),
    ],
)
def test_the_verdict_follows_from_the_exponents(
    model: float, control: float, eps: float, verdict: Verdict
):
    assert verdict_of(model, control, eps) == verdict


@pytest.mark.parametrize(
    ("start", "change", "eps", "verdict"),
    [
        (-0.4, -0.4, 0.0, Verdict.CANNOT_TELL),
        (-0.4, 0.0, 0.45, Verdict.CANNOT_TELL),  # gradients grow as the stream falls
        (-0.4, -0.6, 0.0, Verdict.WRONG),  # falls faster than the stream at the start
        (-0.4, 0.4, 0.0, Verdict.WRONG),  # grows
        (-0.4, -0.4, -0.7, Verdict.WRONG),  # a constant eps beside it
        (-0.1, -0.4, 0.0, Verdict.WRONG),
        (-0.1, 0.0, 0.45, Verdict.WRONG),
        (0.5, 0.97, 0.0, Verdict.WRONG),
    ],
)
def test_what_follows_the_stream_at_the_start_proves_nothing_and_all_else_does(
    start: float, change: float, eps: float, verdict: Verdict
):
    """Over shallow models, while the blocks' random outputs outweigh the embedding."""
    own = [made_up("model", d, s, lambda d: d**change, d**eps) for d in DEPTHS for s in range(2)]
    own = [replace(s, measured=replace(s.measured, stream=[s.size**start] * 2)) for s in own]
    result = judge(own + [made_up("control", d, s, float) for d in DEPTHS for s in range(2)])
    assert result.verdict == verdict, result.reason


def spread(rule: str, exponents: list[float], axis: str = "depth") -> list[Sample]:
    """Seeds whose change grows with these exponents."""
    samples = [
        made_up(rule, d, s, lambda d, p=p: d**p) for s, p in enumerate(exponents) for d in DEPTHS
    ]
    return samples if axis == "depth" else [over_width(sample) for sample in samples]


def over_width(sample: Sample) -> Sample:
    """The same of models of one depth;
    their logits at the start fall with the square root of the width, as they must.
    """
    measured = replace(sample.measured, logits=[sample.size**-0.5, 1.0])
    return replace(sample, axis="width", hidden_size=sample.size, num_layers=4, measured=measured)


def test_an_interval_wider_than_the_band_cannot_tell():
    """As two seeds of four steps over three depths came out:
    +0.09 [-2.08, +2.27], band -0.20 to +0.20.
    """
    result = judge(spread("model", [-0.08, 0.26]) + spread("control", [1.0, 1.01]))
    (finding,) = [f for f in result.findings if f.band.quantity == "stream change"]
    assert finding.model.value == pytest.approx(0.09) and finding.model.high > 2.2
    assert result.verdict == Verdict.CANNOT_TELL
    assert (
        "stream change over depth +0.090 [-2.070, +2.250], band -0.20 to +0.20: with other seeds"
        in result.reason
    )
    assert finding.mark == "too wide" and "too wide" in describe_check(result)
    narrow = judge(spread("model", [0.08, 0.10]) + spread("control", [1.0, 1.01]))
    assert narrow.verdict == Verdict.RIGHT, narrow.reason
    wide = judge(spread("model", [-0.08, 0.26], "width") + spread("control", [1.0, 1.01], "width"))
    assert wide.verdict == Verdict.CANNOT_TELL and "stream change over width" in wide.reason


@pytest.mark.parametrize("rule", ["model", "control"])
def test_one_seed_has_no_interval_and_proves_nothing(rule: str):
    exponents = {"model": [0.0, 0.01], "control": [1.0, 1.01]}
    exponents[rule] = exponents[rule][:1]
    result = judge(spread("model", exponents["model"]) + spread("control", exponents["control"]))
    assert result.verdict == Verdict.CANNOT_TELL
    assert judge(spread("model", [0.9]) + spread("control", [1.0])).verdict == Verdict.CANNOT_TELL
    # No seed excuses what is no number.
    assert judge(spread("model", [math.nan]) + spread("control", [1.0])).verdict == Verdict.WRONG


def test_an_exponent_beyond_the_band_is_wrong_only_where_its_whole_interval_is():
    control = spread("control", [1.0, 1.01])
    assert judge(spread("model", [0.60, 0.64]) + control).verdict == Verdict.WRONG
    open_ended = judge(spread("model", [0.3, 0.9]) + control)
    assert open_ended.verdict == Verdict.CANNOT_TELL
    assert "with other seeds it may be in its band or outside" in open_ended.reason


def test_a_control_whose_interval_reaches_into_the_band_proves_nothing():
    result = judge(spread("model", [0.0, 0.01]) + spread("control", [0.8, 1.2]))
    assert result.verdict == Verdict.CANNOT_TELL
    assert (
        "the control's stream change over depth has the exponent +1.000 [-1.541, +3.541], "
        "whose interval reaches"
    ) in result.reason


def test_an_update_whose_interval_is_wider_than_its_band_cannot_tell():
    samples = spread("model", [0.0, 0.01]) + spread("control", [1.0, 1.01])
    updates = {0: -0.2, 1: 0.2}  # exponents of the update with a large eps, by seed

    def with_update(s: Sample) -> Sample:
        large = Measurement(
            [],
            [],
            [],
            [],
            [],
            {},
            {Role.HIDDEN_WEIGHT: s.size ** updates[s.seed], Role.UNEMBEDDING: 1.0},
            [],
        )
        return replace(s, with_large_eps=large) if s.rule == "model" else s

    assert judge([with_update(s) for s in samples]).verdict == Verdict.CANNOT_TELL
    updates = {0: 0.01, 1: 0.02}
    assert judge([with_update(s) for s in samples]).verdict == Verdict.RIGHT


@pytest.mark.parametrize("name", ["coordinate_check", "coordinate_check_width_128"])
def test_the_published_checks_keep_their_verdict(name: str):
    """Their figures were written with the samples that they came from."""
    published = json.loads(
        (Path(__file__).parents[2] / "docs/results" / name / "coordinate_check.json").read_text()
    )

    def measured(values: dict[str, Any] | None) -> Measurement | None:
        return None if values is None else Measurement(**values)

    samples = [
        Sample(
            **{
                **s,
                "measured": measured(s["measured"]),
                "with_large_eps": measured(s["with_large_eps"]),
            }
        )
        for s in published["samples"]
    ]
    result = judge(samples)
    assert result.verdict == Verdict.RIGHT, describe_check(result)
    assert published["verdict"] == "right"


def test_without_two_sizes_the_check_cannot_tell():
    assert judge([]).verdict == Verdict.CANNOT_TELL


# What is measured.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_measured_stream_and_logits_are_those_of_the_model(folder: Path, architecture: str):
    """Against the model taken apart by hand:
    embedding, blocks, the last sum, final norm, unembedding.
    """
    config = for_short_runs(reshape(proxy_config(folder, architecture), num_layers=4), 2, "float64")
    trial = Trial.build(config, SINGLE)
    model = trial.chunks[0]
    batches = read_batches(config, SINGLE, 2)
    with torch.no_grad():
        tokens = batches[1][0].tokens
        embedded = model._embed(tokens, None, None)
        inputs = model._attention_inputs(embedded, tokens.shape[1], None, None, None)
        handed_on = Stream(embedded, 0)
        for _, block in model.blocks():
            handed_on = block(handed_on, inputs)
        out, bias = handed_on.pending
        stream = handed_on.residual + trial.table.residual_multiplier * (
            out if bias is None else out + bias
        )
        logits = model(tokens)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    measured = measure(trial, batches[:1], batches[1])
    assert measured.stream[0] == pytest.approx(stream.square().mean().sqrt().item(), rel=1e-12)
    assert measured.logits[0] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-12)
    assert measured.stream_change[0] == measured.logits_change[0] == 0.0
    assert measured.stream_change[1] > 0
    assert next(iter(measured.blocks[0])) == "layers.0.attention_norm"
    assert list(measured.blocks[0])[-1] == "final_norm"
    assert len(measured.blocks[0]) == 9
    groups = {name: group_of(trial.optimizer.groups, name) for name in before}
    moved = [
        (
            (p.detach() - before[n]).square().sum().item()
            / (groups[n].lr_factor * config.optimizer.base_lr) ** 2,
            p.numel(),
        )
        for n, p in model.named_parameters()
        if groups[n].role == Role.HIDDEN_WEIGHT
    ]
    expected = (sum(total for total, _ in moved) / sum(count for _, count in moved)) ** 0.5
    assert measured.updates[Role.HIDDEN_WEIGHT] == pytest.approx(expected, rel=1e-9)
    # The first Adam step moves everything by its learning rate.
    assert expected == pytest.approx(1.0, abs=0.05)


def samples_of(
    mutation: Mutation | None,
    axis: str,
    folder: Path,
    architecture: str = "gpt2",
    alpha: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """A model's part of the check, without the control, whose place other tests take."""
    design = mutation.design if mutation else Design()
    config = with_seed(proxy_config(folder, architecture, completep={"alpha": alpha}), seed)
    plan = Plan(DEPTHS, [32], seeds=1) if axis == "depth" else Plan([2], WIDTHS, seeds=1)
    eps = mutation is None or mutation.quantity.startswith("update")
    samples = []
    for _, width, depth, _ in plan.shapes():
        shaped = reshape(config, width, depth)
        own, large = (job for job in jobs_of(shaped, plan, design, axis) if job.rule == "model")
        samples.append(
            Sample(
                axis,
                "model",
                width,
                depth,
                seed,
                train(own, SINGLE),
                train(large, SINGLE) if eps else None,
            )
        )
    return samples


def over_seeds(samples: list[Sample]) -> list[Sample]:
    """The same models once more, as if another seed had given the same:
    what one seed measures, with an interval.
    """
    return samples + [replace(s, seed=s.seed + 1) for s in samples]


def control_of(samples: list[Sample], folder: Path, architecture: str = "gpt2") -> list[Sample]:
    plan = Plan(DEPTHS, WIDTHS)
    controls = []
    for s in samples:
        shaped = with_seed(
            reshape(proxy_config(folder, architecture), s.hidden_size, s.num_layers), s.seed
        )
        (job,) = (job for job in jobs_of(shaped, plan, Design(), s.axis) if job.rule == "control")
        controls.append(
            Sample(s.axis, "control", s.hidden_size, s.num_layers, s.seed, train(job, SINGLE))
        )
    return controls


@pytest.mark.parametrize(("axis", "alpha"), [("depth", 1.0), ("depth", 0.5), ("width", 1.0)])
def test_the_right_implementation_passes_and_the_control_does_not(
    folder: Path, axis: str, alpha: float
):
    samples = samples_of(None, axis, folder, alpha=alpha)
    result = judge(over_seeds(samples + control_of(samples, folder)), alpha)
    assert result.verdict == Verdict.RIGHT, describe_check(result)
    gradients = {
        f.band.quantity: f.model.value
        for f in result.findings
        if f.band.quantity.startswith("gradient")
    }
    expected = {"gradient, hidden matrices": -alpha, "gradient, outside": 0.0}
    if axis == "width":
        expected = {"gradient, hidden matrices": -1.15, "gradient, outside": -1.1}
    assert gradients == pytest.approx(expected, abs=0.3), describe_check(result)


FAST = (
    "multiplier missing on the MLP branch",
    "multiplier before the norm",
    "eps constant over depth",
    "hidden init not divided by m_N",
    "output multiplier twice",
)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name in FAST], ids=lambda m: m.name)
def test_a_wrong_implementation_is_called_wrong(folder: Path, mutation: Mutation):
    result = judge(
        over_seeds(samples_of(mutation, mutation.axis, folder, alpha=mutation.alpha)),
        mutation.alpha,
    )
    (finding,) = [f for f in result.findings if f.band.quantity == mutation.quantity]
    assert finding.wrong, describe_check(result)
    assert mutation.shows(finding.model.value), describe_check(result)
    assert result.verdict == Verdict.WRONG


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", ["gpt2", "paper"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_wrong_implementation_is_called_wrong_on_two_architectures(
    folder: Path, mutation: Mutation, architecture: str
):
    samples = [
        s
        for seed in range(3)
        for s in samples_of(mutation, mutation.axis, folder, architecture, mutation.alpha, seed)
    ]
    result = judge(samples, mutation.alpha)
    assert result.verdict == Verdict.WRONG, describe_check(result)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_seed_of_any_architecture_raises_an_alarm(folder: Path, architecture: str):
    for seed in range(20):
        for axis in ("depth", "width"):
            result = judge(samples_of(None, axis, folder, architecture, seed=seed))
            assert not [f for f in result.findings if f.beyond], (
                f"seed {seed}: {describe_check(result)}"
            )


# The program.


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, programs: Programs, tmp_path: Path
) -> Callable[..., Ended]:
    """Runs the program in this process, as its command line would."""

    def run(config: Config, *words: str) -> Ended:
        path = tmp_path / "config.yaml"
        save_config(config, path)
        monkeypatch.setattr(sys, "path", list(sys.path))  # the program puts its folder there
        return programs.run(main, path, "training.cpu_threads=1", *words)

    return run


@pytest.mark.parametrize(
    ("function", "verdict"), [("right", Verdict.RIGHT), ("forgets_the_multiplier", Verdict.WRONG)]
)
def test_the_program_checks_a_users_own_model_and_writes_its_files(
    run_tool, folder: Path, tmp_path: Path, function: str, verdict: Verdict
):
    out = tmp_path / "out"
    words = [
        "--depths",
        "2,4,8",
        "--steps",
        "8",
        "--seeds",
        "2",
        "--no-eps",
        "--json",
        "--out",
        str(out),
    ]
    ran = run_tool(
        proxy_config(folder, "gpt2"), *words, "--model", f"tests.instruments.own_model:{function}"
    )
    assert ran.code == verdict, ran.err
    assert json.loads(ran.out)["verdict"] == verdict.name.lower()
    assert (
        json.loads((out / "coordinate_check.json").read_text())["verdict"] == verdict.name.lower()
    )
    assert (out / "coordinate_check_depth.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "coordinate_check.html").exists()


def test_a_check_that_shows_nothing_exits_with_3(run_tool, folder: Path):
    """The embedding moves so much more than the blocks
    that the control grows no more than the model does.
    """
    words = [
        "--depths",
        "2,4",
        "--steps",
        "1",
        "--seeds",
        "2",
        "--no-eps",
        "completep.factors={embedding: {lr: 1000.0}}",
    ]
    ran = run_tool(proxy_config(folder), *words)
    assert ran.code == Verdict.CANNOT_TELL == 3, ran.err
    assert "cannot tell: the control's stream change" in ran.out
    assert "depth: 2 layers x 32" in ran.out  # without --widths the configuration's own


def test_missing_token_files_useless_axes_and_unknown_models_are_refused_clearly(
    run_tool, tmp_path: Path
):
    config = proxy_config(tmp_path)
    ran = run_tool(config, "--depths", "2,4")
    assert ran.code == 2
    assert f"{tmp_path / 'text'}" in ran.err
    assert "nothing to compare" in run_tool(config, "--depths", "4").err
    assert (
        "--model tests.instruments.own_model:nothing"
        in run_tool(config, "--depths", "2,4", "--model", "tests.instruments.own_model:nothing").err
    )
    assert (
        "--model no_such_module:f"
        in run_tool(config, "--depths", "2,4", "--model", "no_such_module:f").err
    )


@pytest.mark.slow
def test_several_workers_measure_what_one_process_does(folder: Path):
    plan = Plan([2, 4], [32], steps=2, seeds=2)
    config = proxy_config(folder, training={"cpu_threads": 1})
    alone, together = (
        collect(config, plan, run) for run in (in_turn(SINGLE), in_workers(2, "cpu"))
    )
    assert alone == together
    # No two of them alike.
    assert len({(s.rule, s.num_layers, s.seed, s.measured.stream_change[-1]) for s in alone}) == 8


def test_the_report_has_a_panel_a_parameterization_and_a_line_a_step(folder: Path, tmp_path: Path):
    plan = Plan([2, 4], [32], steps=2, seeds=1, check_eps=False, beside=["alpha_0.5"])
    result = judge(collect(proxy_config(folder), plan, in_turn(SINGLE)))
    assert exponent(result.samples, result.findings[0].band, "control") is not None
    update = next(f for f in result.findings if f.band.quantity == "update, hidden matrices")
    # Shown, and not judged: it is outside the model's band.
    assert update.beside["alpha_0.5"].value == pytest.approx(-0.5, abs=0.05)
    assert "alpha_0.5" in describe_check(result).splitlines()[0]
    panels = draw_check(
        result, "depth", {"model": "completep", "alpha_0.5": "alpha 0.5", "control": "muP"}
    ).axes
    assert len(panels) == 6
    assert len(panels[0].lines) == 3  # steps 0, 1 and 2
    write_check(result, tmp_path, "completep", {})
    page = (tmp_path / "coordinate_check.html").read_text()
    assert "stream change" in page
    assert "image/png" in page
