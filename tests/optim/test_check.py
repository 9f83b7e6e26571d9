"""A run's own factors and values are checked once, against the whole model:
what names nothing, never acts or does not survive.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.trial import Trial
from megatron_completep.optim.check import check_parameters
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import declare
from megatron_completep.planning.plan import describe
from megatron_completep.roles import Role
from tests.support.configs import small_config
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    model_config,
    optimizer_config,
    plain_table,
    table_for,
    train_step,
)

PIPELINE = ["parallel.pipeline_parallel_size=2", "parallel.tensor_parallel_size=2"]


def config_with(*words: str) -> Config:
    return small_config(*words, model={"ffn_hidden_size": 64, "vocab_size": 64, "seq_length": 16})


def check(*words: str) -> list[str]:
    config = config_with(*words)
    return check_parameters(config, table_of(config))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        check(*words)
    return str(raised.value)


def override(pattern: str, **factors: float) -> str:
    settings = ", ".join(f"{name}: {factor!r}" for name, factor in factors.items())
    return f"optimizer.overrides=[{{pattern: '{pattern}', {settings}}}]"


def test_a_run_as_it_should_be_passes_without_a_word():
    assert check() == []
    assert (
        check(
            override("layers.0.*", lr=0.5, init_std=2.0),
            "completep.factors.pre_norm.lr=2.0",
            *PIPELINE,
        )
        == []
    )


# What names nothing, or never acts.


@pytest.mark.parametrize("layout", [[], PIPELINE])
@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("layer.0.*", []),
        ("Embedding.*", []),
        ("layers.4.*", []),
        ("unembedding.*", ["model.tied_embeddings=true"]),
    ],
)
def test_an_override_that_matches_nothing_is_refused_with_the_names_there_are(
    pattern, more, layout
):
    message = refusal(override(pattern, lr=2.0), *more, *layout)
    assert f"optimizer.overrides: {pattern!r} matches no parameter" in message
    assert "embedding.weight" in message
    assert message.startswith("1 setting cannot"), "the hint at names of parts is none of its own"
    assert message == refusal(override(pattern, lr=2.0), *more)  # the layout has no say


NEVER_ACT = [
    (
        "completep.factors.pre_norm.init_std=2.0",
        "completep.factors.pre_norm: init_std = 2 can never act",
    ),
    (
        "completep.factors.final_norm.weight_decay=3.0",
        "completep.factors.final_norm: weight_decay = 3 can never act",
    ),
    (
        "completep.factors.qk_norm.init_std=0.5",
        "completep.factors.qk_norm: init_std = 0.5 can never act",
    ),
    (
        "completep.factors.hidden_bias.init_std=0.5",
        "completep.factors.hidden_bias: init_std = 0.5 can never act",
    ),
    (
        override("*_norm.weight", init_std=2.0),
        "optimizer.overrides.0 ('*_norm.weight'): init_std = 2 can never act",
    ),
    (
        override("final_norm.*", weight_decay=2.0),
        "optimizer.overrides.0 ('final_norm.*'): weight_decay = 2 can never act",
    ),
]


@pytest.mark.parametrize(("word", "message"), NEVER_ACT)
def test_a_factor_that_can_never_act_is_refused(word, message):
    assert message in refusal(word)


@pytest.mark.parametrize(
    "word",
    ["completep.factors.hidden_weight.eps=2.0", override("*.qkv.weight.k", eps=2.0)],
)
def test_a_factor_on_the_epsilon_of_a_matrix_acts_under_adamw_and_is_refused_under_muon(word):
    muon = ["optimizer.type=muon", "optimizer.muon={base_lr: 0.02}"]
    assert "eps = 2 can never act: an orthogonal update" in refusal(word, *muon)
    assert check(word) == []
    # Beside what AdamW updates it acts somewhere.
    assert check(override("layers.0.*", eps=2.0), *muon) == []


@pytest.mark.parametrize(
    "word",
    [
        override("layers.0.*", init_std=2.0),  # acts on the matrices among them
        override("*_norm.weight", weight_decay=0.0),  # asks for what is so
        "completep.factors.pre_norm.weight_decay=0.0",
        override("*_norm.weight", lr=2.0, eps=3.0),
    ],
)
def test_a_factor_that_acts_somewhere_or_asks_for_what_is_so_is_not(word):
    assert check(word) == []


def test_a_factor_that_reaches_no_parameter_of_this_model_is_a_warning_in_every_layout():
    """A proxy and its target may share a file."""
    words = ["completep.factors.qk_norm.lr=2.0", "completep.factors.hidden_bias.eps=3.0"]
    found = check(*words)
    assert found == [
        (
            "completep.factors.qk_norm reaches no parameter of this model; it acts where "
            "model.qk_norm = true."
        ),
        (
            "completep.factors.hidden_bias reaches no parameter of this model; it acts where "
            "model.bias = true or model.qkv_bias = true."
        ),
    ]
    assert check(*words, *PIPELINE) == found
    assert check(*words, "model.qk_norm=true", "model.bias=true") == []


def test_a_callers_own_model_is_checked_by_its_own_names():
    config, table = config_with(override("mine.*", lr=2.0)), plain_table()
    named = [("mine.weight", declare(nn.Parameter(torch.ones(2, 2)), Role.HIDDEN_WEIGHT, 2, 2))]
    assert check_parameters(config, table, named) == []
    with pytest.raises(ConfigError, match=r"'mine\.\*' matches no parameter"):
        check_parameters(config, table)


# What does not survive.

# setting -> (a value that its type cannot hold, part of the message)
LOST = {
    "optimizer.base_eps": ("1e-46", "the AdamW epsilon is 5e-47 for embedding (embedding.weight)"),
    "optimizer.base_init_std": (
        "1e-40",
        "7.07e-41 for hidden_weight (layers.0.attention.qkv.weight and 15 more)",
    ),
    "optimizer.base_lr": ("1e-44", "the peak learning rate is 1e-44 for embedding"),
    "optimizer.base_weight_decay": ("1e-37", "weight decay times the peak learning rate is 1e-39"),
    "model.norm_eps": ("1e-46", "the epsilon of the norms is 1e-46"),
    "model.input_multiplier": ("1e-39", "the factor on the embedding output is 1e-39"),
    "model.residual_multiplier": ("2e-38", "the factor on a branch's output is 1e-38"),
    "model.attention_multiplier": ("1e-320", "the scale of the attention logits is 3.54e-321"),
    "model.logit_multiplier": ("2e-38", "the factor on the logits is 1e-38"),
    "training.z_loss": ("1e-44", "the coefficient of the z-loss is 1e-44"),
    "training.label_smoothing": ("1e-37", "the smoothed probability of a token is 1.56e-39"),
    "optimizer.grad_clip": ("1e-37", "the clipping bound a token is 7.81e-40"),
}
TOO_LARGE = {
    "optimizer.base_eps": ("1e39", "the AdamW epsilon is 5e+38 for embedding"),
    "optimizer.base_init_std": ("1e38", "the initial standard deviation is 1e+38"),
    # Over 1 - beta1 at the first step.
    "optimizer.base_lr": ("1e38", "the peak learning rate is 1e+38"),
    "model.logit_multiplier": ("1e39", "the factor on the logits is 5e+38"),
}


@pytest.mark.parametrize(
    ("setting", "direction"), [(s, "least") for s in LOST] + [(s, "most") for s in TOO_LARGE]
)
def test_a_value_that_its_type_cannot_hold_is_refused_with_the_nearest_that_it_can(
    setting, direction
):
    value, part = (LOST if direction == "least" else TOO_LARGE)[setting]
    message = refusal(f"{setting}={value}")
    assert message.startswith("1 setting cannot") and part in message, message
    suggested = re.search(rf"Use {re.escape(setting)} of at {direction} (\S+)\.$", message)
    assert suggested is not None, message
    assert check(f"{setting}={suggested[1]}") == []
    beyond = float(suggested[1]) * (0.98 if direction == "least" else 1.02)
    assert "here. Use " in refusal(f"{setting}={beyond!r}")
    assert refusal(f"{setting}={value}", *PIPELINE) == message


def test_a_coefficient_of_routers_that_its_type_cannot_hold_is_refused_and_others_are_planned():
    losses = "balance_loss: 1e-45, router_z_loss: 0.5"
    message = refusal(f"model.moe={{num_experts: 4, top_k: 2, {losses}}}")
    assert "model.moe.balance_loss = 1e-45" in message  # halved by the depth
    assert "the coefficient of a layer's balance loss is 5e-46" in message
    assert "router_z_loss" not in message
    fitting = "model.moe={num_experts: 4, top_k: 2, router_z_loss: 0.5}"
    planned = "coefficients in each layer with experts: router z-loss 0.25"
    assert planned in describe(config_with(fitting))
    assert "coefficients in" not in describe(config_with("model.moe={num_experts: 4, top_k: 2}"))


def test_float64_holds_what_float32_does_not():
    assert (
        check("training.precision=float64", "optimizer.base_eps=1e-46", "model.norm_eps=1e-46")
        == []
    )
    assert "float64 holds" in refusal("training.precision=float64", "optimizer.base_eps=1e-308")
    # Masters are float32.
    assert "float32 holds" in refusal("training.precision=bf16", "optimizer.base_eps=1e-46")
    # Initial weights are drawn in float32 whatever the precision.
    assert "base_init_std" in refusal("training.precision=float64", "optimizer.base_init_std=1e-40")


def test_factors_that_leave_the_range_of_numbers_are_refused_without_a_traceback():
    twice = (
        "optimizer.overrides=[{pattern: '*.up.*', eps: 1e-300}, {pattern: '*.up.weight', "
        "eps: 1e-300}]"
    )
    assert (
        "the AdamW epsilon is 0 for hidden_weight (layers.0.mlp.up.weight and 3 more)"
        in refusal(twice)
    )
    assert "No base value serves" in refusal(twice)
    assert "the peak learning rate is inf" in refusal(twice.replace("eps: 1e-300", "lr: 1e300"))


@pytest.mark.parametrize(
    "word", ["completep.factors.hidden_weight.eps=1e-40", override("*.up.weight", eps=1e-40)]
)
def test_what_ones_own_factor_makes_too_small_is_not_blamed_on_the_base_value(word):
    """A base epsilon of 471 would keep the values, and nothing would train."""
    message = refusal(word)
    assert "bring the factors in completep.factors and optimizer.overrides nearer to 1" in message
    assert "at least" not in message
    assert check(word.replace("1e-40", "0.5")) == []
    # Where the base value is too small by itself, it is what has to change.
    assert "Use optimizer.base_eps of at least" in refusal(
        word.replace("1e-40", "0.5"), "optimizer.base_eps=1e-46"
    )


@pytest.mark.parametrize(
    "word", ["optimizer.base_weight_decay=0.0", "training.z_loss=0.0", "optimizer.grad_clip=0.0"]
)
def test_what_is_switched_off_does_not_underflow(word):
    assert check(word) == []
    assert check(override("*", weight_decay=0.0)) == []


def test_betas_that_would_not_move_their_moments_are_refused():
    assert "optimizer.betas.1 = 0.99999999: the moment takes in 1e-08" in refusal(
        "optimizer.betas=[0.9, 0.99999999]"
    )
    assert check("optimizer.betas=[0.9, 0.99999999]", "training.precision=float64") == []
    # 1 - beta scales with m_B: to less than a rounding of 1
    scaled = refusal("completep.base_batch_tokens=1000000000000000000")
    assert "optimizer.betas.0 = 0.9" in scaled and "completep.base_batch_tokens" in scaled


def test_a_batch_scale_that_is_no_number_is_refused():
    assert "completep.batch_exponent = 100000" in refusal(
        "completep.base_batch_tokens=127", "completep.batch_exponent=100000.0"
    )
    assert "completep.batch_exponent = 100000" in refusal(
        "completep.base_batch_tokens=129", "completep.batch_exponent=100000.0"
    )


def test_an_epsilon_below_the_bound_makes_weights_that_are_no_numbers_and_one_above_does_not():
    """Why it is refused: rows of the embedding that no token hits have zero moments,
    and 0 / (0 + 0) is NaN.
    """
    model = model_config()
    table = table_for(model)
    smallest = torch.finfo(torch.float32).tiny / 0.25  # the table's smallest factor at this shape
    for base_eps, finite in ((1e-46, False), (smallest, True)):
        settings = optimizer_config(base_eps=base_eps)
        gpt = build_model(model, table, torch.float32, optimizer=settings)
        optimizer = build_optimizer(gpt, table, settings, torch.float32)
        train_step(gpt, optimizer, 1e-2, batch_of(model, batch=1))
        optimizer.wait_for_parameters()
        assert all(bool(p.isfinite().all()) for p in gpt.parameters()) == finite


def test_the_plan_of_a_run_says_and_refuses_the_same():
    """Another tool: tools/show_plan.py."""
    warning = "completep.factors.qk_norm reaches no parameter of this model"
    assert f"warning: {warning}" in describe(config_with("completep.factors.qk_norm.lr=2.0"))
    assert "warning" not in describe(config_with())
    with pytest.raises(ConfigError, match=r"Use optimizer\.base_eps of at least"):
        describe(config_with("optimizer.base_eps=1e-46"))


UNLIKE_PROXY = [
    *("model.moe={num_experts: 8, top_k: 2}", "completep.base_hidden_size=16"),
    *("completep.base_num_layers=2", "completep.base_num_experts=4"),
    *("completep.base_expert_ffn_hidden_size=64", "completep.allow_sparsity_change=true"),
    "completep.allow_granularity_change=true",
]


def test_what_experts_are_not_known_to_transfer_over_is_named_by_runs_and_plans():
    config = config_with(*UNLIKE_PROXY)
    share, width = check_parameters(config, table_of(config))
    assert share.startswith("unproven: ") and "(2 / 8 here, 2 / 4 in the proxy)" in share
    assert width.startswith("unproven: ") and "(64 / 32 here, 64 / 16 in the proxy)" in width
    for line in (share, width):
        assert f"warning: {line}" in describe(config)
    # A proxy of the same shares needs no word, whatever is allowed.
    alike = ["completep.base_top_k=1", "completep.base_expert_ffn_hidden_size=32"]
    assert check(*UNLIKE_PROXY, *alike) == []


def test_a_rate_of_a_balance_bias_that_is_not_there_is_a_warning():
    experts = "num_experts: 4, top_k: 2, balance: none"
    (warning,) = check(f"model.moe={{{experts}, bias_rate: 0.01}}")
    assert warning == "model.moe.bias_rate = 0.01 moves no bias: model.moe.balance = none."
    assert check(f"model.moe={{{experts}}}") == []


def test_a_trial_of_an_instrument_refuses_the_same():
    """Coordinate check, sweep and laziness train through it."""
    for word in ("optimizer.base_eps=1e-46", override("layer.0.*", lr=2.0)):
        with pytest.raises(ConfigError, match="cannot have the effect asked for"):
            Trial.build(config_with(word), ParallelContext.single())
