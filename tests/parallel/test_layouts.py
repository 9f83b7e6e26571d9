"""One process is the truth; every layout equals it: per parameter, per step, per learning rate."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_completep.model.initialize import fingerprint
from tests.parallel.layouts import (
    GLOBAL_BATCH,
    Case,
    Outcome,
    config_of,
    joined,
    relative_error,
    replay_trace,
    train,
)
from tests.support.configs import PAPER, TIED_GPT2
from tests.support.models import group_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

LAYOUTS = {
    "tensor 2": {"world_size": 2, "tensor_parallel_size": 2},
    "tensor 4": {"world_size": 4, "tensor_parallel_size": 4},
    "tensor 2 with sequence": {
        "world_size": 2,
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
    },
    "pipeline 2, gpipe": {"world_size": 2, "pipeline_parallel_size": 2, "schedule": "gpipe"},
    "pipeline 2, 1f1b": {"world_size": 2, "pipeline_parallel_size": 2, "schedule": "1f1b"},
    "pipeline 2, zero-bubble": {
        "world_size": 2,
        "pipeline_parallel_size": 2,
        "schedule": "zero_bubble",
    },
    "pipeline 2, uneven": {"world_size": 2, "pipeline_parallel_size": 2, "pipeline_split": [3, 1]},
    "pipeline 4, gpipe": {"world_size": 4, "pipeline_parallel_size": 4, "schedule": "gpipe"},
    "pipeline 4, 1f1b": {"world_size": 4, "pipeline_parallel_size": 4, "schedule": "1f1b"},
    "pipeline 4, zero-bubble": {
        "world_size": 4,
        "pipeline_parallel_size": 4,
        "schedule": "zero_bubble",
    },
    "pipeline 2, virtual 2": {
        "world_size": 2,
        "pipeline_parallel_size": 2,
        "virtual_pipeline_size": 2,
        "schedule": "interleaved_1f1b",
    },
    "pipeline 2, virtual 2, zero-bubble": {
        "world_size": 2,
        "pipeline_parallel_size": 2,
        "virtual_pipeline_size": 2,
        "schedule": "zero_bubble",
    },
    "data 2": {"world_size": 2, "bucket_megabytes": 0.03},
    "data 4": {"world_size": 4, "bucket_megabytes": 0.03},
    "data 4, optimizer shared by 2": {
        "world_size": 4,
        "optimizer_shard_size": 2,
        "bucket_megabytes": 0.03,
    },
    "tensor 2, pipeline 2, data 2": {
        "world_size": 8,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "bucket_megabytes": 0.03,
    },
}
MODELS = {
    "rmsnorm, swiglu, rope": {},
    "layernorm, gelu, learned, biases, tied, qk-norm": {**TIED_GPT2, "qk_norm": True},
}
GROUPED = {**PAPER, "num_query_groups": 2}
# The key biases' true gradient is zero: what is there is rounding noise, which Adam amplifies.
NOISE = "qkv.bias"


def world_size(layout: dict) -> int:
    return layout.get("world_size", 1)


def micro_batches(layout: dict) -> int:
    """4 a step, so that accumulation and every pipeline schedule are exercised;
    as many as there are samples on each data rank.
    """
    data = (
        world_size(layout)
        // layout.get("tensor_parallel_size", 1)
        // layout.get("pipeline_parallel_size", 1)
    )
    return min(4, GLOBAL_BATCH // data)


@cache
def truth(case_key: tuple) -> Outcome:
    return train(
        0,
        Case(
            **{name: dict(value) if isinstance(value, tuple) else value for name, value in case_key}
        ),
    )


def truth_for(case: Case) -> Outcome:
    """The same case in one process, with the whole batch at once."""
    settings = {
        "model": case.model,
        "optimizer": case.optimizer,
        "steps": case.steps,
        "precision": case.precision,
    }
    return truth(
        tuple(
            (name, tuple(value.items()) if isinstance(value, dict) else value)
            for name, value in settings.items()
        )
    )


def spread(pool, case: Case) -> list[Outcome]:
    return pool.run(world_size(case.layout), train, case)


def above(bound: float, errors: dict[str, float]) -> dict[str, float]:
    """The errors above a bound, without those that are rounding noise."""
    names = [name for name in errors if NOISE not in name and not errors[name] <= bound]
    return {name: errors[name] for name in names}


def last_losses(outcomes: list[Outcome]) -> list[float]:
    """Every rank reports the same loss."""
    assert all(o.losses == outcomes[0].losses for o in outcomes)
    return outcomes[0].losses


# The test in float64 below takes the other model through every layout.
FAST_IN_FLOAT32 = {(layout, "rmsnorm, swiglu, rope") for layout in LAYOUTS}
FAST_IN_FLOAT32.add(("tensor 2, pipeline 2, data 2", list(MODELS)[1]))


def slow_unless(fast: bool) -> tuple:
    """The marks of a case."""
    return () if fast else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("layout", "model", "steps"),
    [
        pytest.param(layout, model, steps, marks=slow_unless(steps == 4 and fast))
        for layout in LAYOUTS
        for model in MODELS
        for fast in [(layout, model) in FAST_IN_FLOAT32]
        for steps in (4, 10)
    ],
)
def test_every_layout_equals_one_process_in_float32(pool, layout, model, steps):
    case = Case(
        LAYOUTS[layout], MODELS[model], steps=steps, micro_batches=micro_batches(LAYOUTS[layout])
    )
    outcomes, expected = spread(pool, case), truth_for(case)
    gradients = relative_error(outcomes, expected, "gradients")
    assert above(1e-5, gradients) == {}
    assert last_losses(outcomes) == pytest.approx(expected.losses, rel=1e-5)
    assert outcomes[-1].grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-5)
    for name in expected.initial:
        initial = joined(outcomes, "initial", name)
        assert fingerprint(initial) == fingerprint(joined([expected], "initial", name)), name


def accumulations(layout: str) -> list[int]:
    """One micro-batch a step where nothing needs more, and four."""
    several = micro_batches(LAYOUTS[layout])
    return [several] if "pipeline" in layout and "gpipe" not in layout else [1, several]


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [(layout, count) for layout in LAYOUTS for count in accumulations(layout)],
)
def test_every_layout_equals_one_process_in_float64_with_a_large_epsilon(
    pool, layout, accumulation
):
    model = {**MODELS["layernorm, gelu, learned, biases, tied, qk-norm"], "num_query_groups": 4}
    case = Case(
        LAYOUTS[layout], model, {"base_eps": 1e-3}, accumulation, steps=3, precision="float64"
    )
    outcomes, expected = spread(pool, case), truth_for(case)
    assert above(1e-11, relative_error(outcomes, expected, "parameters")) == {}
    assert above(1e-11, relative_error(outcomes, expected, "gradients")) == {}
    assert last_losses(outcomes) == pytest.approx(expected.losses, rel=1e-11)


@pytest.mark.parametrize(
    "layout",
    ["tensor 2", "tensor 2 with sequence", "pipeline 2, 1f1b", "tensor 2, pipeline 2, data 2"],
)
def test_grouped_queries_alibi_and_biases_equal_one_process(pool, layout):
    case = Case(
        LAYOUTS[layout],
        GROUPED,
        {"base_eps": 1e-3},
        micro_batches(LAYOUTS[layout]),
        steps=2,
        precision="float64",
    )
    errors = relative_error(spread(pool, case), truth_for(case), "parameters")
    assert above(1e-11, errors) == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_tensor_moves_by_its_groups_learning_rate_in_every_layout(pool, layout):
    """E3 and E8: weight decay 0 and eps next to 0 make the first AdamW step a sign step.

    Rows that no token hit do not move.
    """
    settings = {"base_weight_decay": 0.0, "base_eps": 1e-30, "grad_clip": 0.0}
    case = Case(
        LAYOUTS[layout],
        {"vocab_size": 16},
        settings,
        micro_batches(LAYOUTS[layout]),
        precision="float64",
    )
    base_lr = config_of(case).optimizer.base_lr
    expected = truth_for(case).groups
    seen = set()
    for outcome in spread(pool, case):
        for name, moved in outcome.moved.items():
            factor = group_of(expected, name).lr_factor
            assert moved == pytest.approx(base_lr * factor, rel=1e-9)
        for name, group in outcome.groups.items():
            assert group == expected[name]
            seen.add(name)
    assert seen == set(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_with_zero_gradients_shrinks_every_decayed_tensor_by_the_base_rates(pool, layout):
    """E4: at alpha 1 lr * wd is eta * lambda for every decayed tensor.

    All labels ignored but one, whose loss is scaled away.
    """
    case = Case(
        LAYOUTS[layout], {}, {"base_eps": 1e30}, micro_batches(LAYOUTS[layout]), precision="float64"
    )
    outcomes = spread(pool, case)
    groups = {name: group for outcome in outcomes for name, group in outcome.groups.items()}
    for name in truth_for(case).parameters:
        group = group_of(groups, name)
        before, after = joined(outcomes, "initial", name), joined(outcomes, "parameters", name)
        shrink = 1 - 1e-2 * 0.1 if group.weight_decay > 0 else 1.0
        assert (after - before * shrink).abs().max().item() <= 1e-12


TRACED = [
    "tensor 2",
    "tensor 2 with sequence",
    "pipeline 2, 1f1b",
    "pipeline 2, zero-bubble",
    "data 2",
]
TRACES = ["completep", "alpha_half", "mup", "completep_base"]


# The base model has one head, which tensor ranks cannot share. One trace goes through every layout
# here, the others through one; the slow suite takes them all.
@pytest.mark.parametrize(
    ("trace", "layout"),
    [
        pytest.param(
            trace, layout, marks=slow_unless(trace == "completep" or layout == "pipeline 2, 1f1b")
        )
        for trace in TRACES
        for layout in TRACED
        if trace != "completep_base" or "tensor" not in layout
    ],
)
def test_golden_traces_pass_in_every_layout(pool, layout, trace):
    results = pool.run(2, replay_trace, str(GOLDEN / trace), "float64", LAYOUTS[layout])
    assert [r.passed for r in results] == [True, True], results[0]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "pipeline" in name])
def test_every_schedule_runs_each_weight_gradient_once_a_micro_batch(pool, layout):
    case = Case(LAYOUTS[layout], micro_batches=micro_batches(LAYOUTS[layout]))
    for outcome in spread(pool, case):
        assert outcome.runs == case.micro_batches * len(outcome.parameters)


def test_full_and_selective_recomputation_change_no_bit():
    runs = [
        train(0, Case(steps=2, recompute=recompute)) for recompute in ("none", "selective", "full")
    ]
    assert runs[0].losses == runs[1].losses == runs[2].losses
    assert all(
        fingerprint(runs[0].parameters[name]) == fingerprint(run.parameters[name])
        for run in runs
        for name in run.parameters
    )


# Negative controls.


def test_a_forgotten_sum_of_norm_gradients_is_caught(pool):
    layout = LAYOUTS["tensor 2 with sequence"]
    mutation = "forget the tensor-parallel sum of norm gradients"
    case = Case(
        layout,
        {},
        {"base_eps": 1e-3},
        micro_batches=4,
        steps=3,
        precision="float64",
        mutation=mutation,
    )
    errors = relative_error(spread(pool, case), truth_for(case), "parameters")
    assert errors["layers.0.mlp_norm.weight"] > 1e-4


def test_a_replicated_parameter_counted_twice_in_the_norm_is_caught(pool):
    layout = LAYOUTS["tensor 2 with sequence"]
    case = Case(layout, micro_batches=4, mutation="count replicated parameters on every rank")
    found, expected = spread(pool, case)[0].grad_norms[0], truth_for(case).grad_norms[0]
    assert abs(found / expected - 1) > 1e-5


def test_a_depth_multiplier_taken_from_the_stage_is_caught(pool):
    case = Case(LAYOUTS["pipeline 2, 1f1b"], micro_batches=4, mutation="take m_L from the stage")
    found, expected = last_losses(spread(pool, case))[0], truth_for(case).losses[0]
    assert abs(found / expected - 1) > 1e-4
