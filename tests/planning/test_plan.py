"""The plan of a run:
what show_plan prints is what the optimizer uses and the weights start from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.config import load_config
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.planning.plan import describe, make_plan
from megatron_completep.roles import Role
from megatron_completep.tools.show_plan import main
from tests.support.commands import Programs
from tests.support.configs import merged, small_config
from tests.support.models import group_of

ROOT = Path(__file__).resolve().parents[2]
# m_N = 2048 / 256 = 8, m_L = 24 / 2 = 12, FFN ratio 5632 / 704 = 8
TARGET = ROOT / "configs/completep_1b.yaml"
ETA, SIGMA, LAMBDA, EPS = 3.9e-3, 0.02, 0.1, 1e-12


def planned_config(**sections: dict[str, Any]) -> Config:
    """m_N = 2, m_L = 2, and an MLP 3 times as wide as the proxy's."""
    base: dict[str, dict[str, Any]] = {
        "model": {"ffn_hidden_size": 96, "vocab_size": 50, "vocab_multiple": 128, "seq_length": 16},
        "completep": {"base_ffn_hidden_size": 32},
        "optimizer": {"base_lr": ETA},
        "training": {"micro_batch_size": 1, "global_batch_size": 4},
    }
    return small_config(**merged(base, sections))


def by_name(config: Config, parameterization: str | None = None) -> dict[str, tuple[float, ...]]:
    return {p.name: p.values for p in make_plan(config, parameterization).parameters}


def test_the_plan_of_the_target_is_what_the_paper_says() -> None:
    """Worked out by hand for m_N = 8, m_L = 12, alpha = 1."""
    config = load_config(TARGET)
    plan = make_plan(config)
    assert plan.multipliers == pytest.approx(
        {"residual": 1 / 12, "logits": 1 / 8, "attention": 128**-0.5}, rel=1e-12
    )
    found = {p.name: (p.shape, p.role, *p.values) for p in plan.parameters}
    wanted = {
        "embedding.weight": ((32000, 2048), Role.EMBEDDING, SIGMA, ETA, LAMBDA, EPS / 8),
        "layers.0.attention_norm.weight": ((2048,), Role.PRE_NORM, 0, ETA, 0, EPS / 96),
        "layers.23.attention.qkv.weight": (
            (3072, 2048),
            Role.HIDDEN_WEIGHT,
            SIGMA / 8**0.5,
            ETA / 8,
            LAMBDA * 8,
            EPS / 96,
        ),
        "layers.11.attention.output.weight": (
            (2048, 2048),
            Role.HIDDEN_WEIGHT,
            SIGMA / 8**0.5,
            ETA / 8,
            LAMBDA * 8,
            EPS / 96,
        ),
        "layers.5.mlp.up.weight": (
            (11264, 2048),
            Role.HIDDEN_WEIGHT,
            SIGMA / 8**0.5,
            ETA / 8,
            LAMBDA * 8,
            EPS / 96,
        ),
        "layers.5.mlp.down.weight": (
            (2048, 5632),
            Role.HIDDEN_WEIGHT,
            SIGMA / 8**0.5,
            ETA / 8,
            LAMBDA * 8,
            EPS / 96,
        ),
        "final_norm.weight": ((2048,), Role.FINAL_NORM, 0, ETA, 0, EPS / 8),
        "unembedding.weight": ((32000, 2048), Role.UNEMBEDDING, SIGMA, ETA, LAMBDA, EPS / 8),
    }
    for name, values in wanted.items():
        assert found[name][:2] == values[:2]
        assert found[name][2:] == pytest.approx(values[2:], rel=1e-12), name
    assert len(found) == 3 + 6 * 24


@pytest.mark.parametrize(
    "parameterization, alpha", [("completep", 1.0), ("completep", 0.5), ("mup", 1.0), ("sp", 1.0)]
)
def test_the_plan_is_what_the_optimizer_uses_and_the_weights_start_from(
    parameterization: str, alpha: float
) -> None:
    config = planned_config(
        completep={"parameterization": parameterization, "alpha": alpha},
        model={"bias": True, "norm": "layernorm"},
    )
    plan = make_plan(config)
    context = ParallelContext.single()
    gpt = GPT(config.model, plan.table, context)
    initialize(gpt, plan.table, config.optimizer, 1)
    named = dict(gpt.named_parameters())
    stds = {name: p.detach().std().item() for name, p in named.items()}
    sizes = {name: p.numel() for name, p in named.items()}
    optimizer = DistributedOptimizer([gpt], plan.table, config.optimizer, context)
    rows = dict(zip(optimizer.groups, optimizer.rule.group_table.tolist(), strict=True))
    assert [p.name for p in plan.parameters] == list(named)
    for parameter in plan.parameters:
        factor, decay, eps = group_of(rows, parameter.name)
        assert (parameter.lr, parameter.weight_decay, parameter.eps) == (ETA * factor, decay, eps)
        measured = stds[parameter.name]
        if "embedding" in parameter.name:  # the padded rows are zero
            measured = named[parameter.name][: config.model.vocab_size].std().item()
        assert measured == pytest.approx(
            parameter.init_std, rel=5 / (2 * sizes[parameter.name]) ** 0.5
        ), parameter.name


def test_the_plan_beside_that_of_mup_and_sp() -> None:
    config = planned_config(completep={"alpha": 0.5})
    own, mup, sp = (by_name(config, p) for p in (None, "mup", "sp"))
    name = "layers.3.mlp.down.weight"  # its own ratio is 3; m_N = 2, m_L = 2
    assert own[name] == pytest.approx(
        (SIGMA / 3**0.5, ETA / 3 * 2**-0.5, LAMBDA * 3, EPS / 2 / 2**0.5), rel=1e-12
    )
    assert mup[name] == pytest.approx((SIGMA / 3**0.5, ETA / 3, LAMBDA * 3, EPS / 2), rel=1e-12)
    assert sp[name] == (SIGMA, ETA, LAMBDA, EPS)
    assert (
        make_plan(config, "mup").multipliers["residual"]
        == make_plan(config, "sp").multipliers["logits"]
        == 1.0
    )


def test_shapes_are_logical_whatever_the_layout_and_the_padding() -> None:
    config = planned_config(parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    shapes = {p.name: p.shape for p in make_plan(config).parameters}
    assert shapes["embedding.weight"] == (50, 32)
    assert shapes["layers.0.mlp.up.weight"] == (192, 32)
    assert shapes["layers.3.mlp.down.weight"] == (32, 96)
    one_process = make_plan(planned_config()).parameters
    assert [p.shape for p in one_process] == list(shapes.values())


def test_own_factors_overrides_and_batch_scaling_are_in_the_plan() -> None:
    # m_B = 4, m_D = 1: S = 2, and 1 - beta1 = 0.4
    config = planned_config(
        completep={
            "factors": {"embedding": {"lr": 5.0, "init_std": 2.0}},
            "base_batch_tokens": 16,
            "base_total_tokens": 640,
        },
        optimizer={"overrides": [{"pattern": "layers.0.*", "lr": 0.5}]},
    )
    plain, changed = by_name(planned_config()), by_name(config)
    for name, (std, lr, decay, eps) in plain.items():
        embedding, first = name.startswith("embedding."), name.startswith("layers.0.")
        wanted = (
            std * (2 if embedding else 1),
            lr * 2 * (5 if embedding else 1) * (0.5 if first else 1),
            decay * 2,
            eps / 2,
        )
        assert changed[name] == pytest.approx(wanted, rel=1e-12), name
    assert "m_B = 4, m_D = 1: S = 2, betas 0.6 and 0.8" in describe(config)


def test_a_plan_that_no_run_could_follow_is_an_error() -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        make_plan(planned_config(optimizer={"overrides": [{"pattern": "layer.0.*"}]}))
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        make_plan(planned_config(completep={"base_batch_tokens": 1}))


def test_a_plan_takes_no_memory_for_weights() -> None:
    """A trillion elements: only on the meta device."""
    config = load_config(
        TARGET,
        [
            "model.hidden_size=65536",
            "model.num_attention_heads=512",
            "model.ffn_hidden_size=262144",
        ],
    )
    elements = sum(torch.Size(p.shape).numel() for p in make_plan(config).parameters)
    assert elements > 1e12


def test_the_description_puts_like_parameters_together() -> None:
    text = describe(
        planned_config(optimizer={"overrides": [{"pattern": "layers.1.mlp.up.weight", "lr": 2.0}]})
    )
    assert "layers.0,2-3.mlp.up.weight (192, 32) x 3" in text
    assert "layers.1.mlp.up.weight (192, 32) x 1" in text
    assert "layers.0-3.attention.qkv.weight (96, 32) x 4" in text
    assert text.count("completep (this run)") == text.count("  mup ") == text.count("  sp ")


# The tool.


def test_the_tool_prints_one_json_object(programs: Programs) -> None:
    words = ("--json", TARGET, "model.num_layers=4", "completep.alpha=0.5")
    plan = json.loads(programs.output(main, *words))
    assert list(plan) == ["multipliers", "parameters", "active_elements", "export"]
    assert plan["export"]["architectures"][:2] == ["granite", "llama"]
    assert "learned" in str(plan["export"]["reasons_against"]["gpt2"])
    assert list(plan["multipliers"]) == ["residual", "logits", "attention"]
    assert plan["multipliers"]["residual"] == pytest.approx(2**-0.5)
    assert all(
        list(p) == ["name", "shape", "role", "init_std", "lr", "weight_decay", "eps"]
        for p in plan["parameters"]
    )
    assert plan["parameters"][0]["role"] == "embedding"
    assert plan["parameters"][0]["shape"] == [
        32000,
        2048,
    ]
    assert len(plan["parameters"]) == 3 + 6 * 4


def test_a_balance_bias_is_planned_with_its_own_rate_and_none_of_the_tables() -> None:
    config = planned_config(model={"moe": {"num_experts": 4, "top_k": 1, "bias_rate": 0.02}})
    (row,) = [block for block in describe(config).split("\n\n") if "balance_bias: " in block]
    assert "moves by model.moe.bias_rate = 0.02 a step" in row and "peak lr" not in row
    (bias, *_) = [p for p in make_plan(config).parameters if p.role is Role.BALANCE_BIAS]
    assert (bias.lr, bias.eps) == (0.02, 0.0)


def test_the_tool_opens_no_data_and_prints_a_table(programs: Programs) -> None:
    text = programs.output(main, TARGET, "data.train=[{prefix: there/is/no/such/file}]")
    assert all(
        f"\n{role}: " in text
        for role in ("embedding", "pre_norm", "hidden_weight", "final_norm", "unembedding")
    )


def test_the_tool_refuses_an_unknown_key_with_2(programs: Programs) -> None:
    refused = programs.run(main, TARGET, "model.layers=4")
    assert refused.code == 2 and not refused.out and "Did you mean num_layers" in refused.err


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    command = (
        f"{sys.executable} {ROOT / 'tools/show_plan.py'} {TARGET} --json "
        "model.num_layers=400 | head -c 10"
    )
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True
    )
    assert run.stdout == '{"multipli' and not run.stderr


def test_another_broken_pipe_is_not_taken_for_a_reader_that_left() -> None:
    def main_with_a_dead_worker() -> int:
        raise BrokenPipeError("a worker process died")

    with pytest.raises(BrokenPipeError, match="a worker process died"):
        exit_on_user_error(main_with_a_dead_worker)
