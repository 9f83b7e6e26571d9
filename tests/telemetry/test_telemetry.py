"""Telemetry: each figure against the same thing computed directly,
alarms where a rule is wrong, and every layout alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.errors import DataError
from megatron_completep.kernels.ops.adamw import block_table
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.pretrain import pretrain
from megatron_completep.roles import Role
from megatron_completep.run.assemble import assemble
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.measure import role_rms
from megatron_completep.telemetry.metrics import read_metrics
from megatron_completep.telemetry.telemetry import (
    FINAL,
    LOGITS,
    Telemetry,
    alarms,
    nearest,
    read_reference,
    update_ratios,
)
from tests.support.configs import small_config
from tests.support.models import group_of
from tests.support.ranks import context_on
from tests.support.runs import tiny_config


def config_of(
    layers: int = 4,
    parameterization: str = "completep",
    parallel: dict[str, Any] | None = None,
    **model: Any,
) -> Config:
    return small_config(
        model={"num_layers": layers, **model},
        completep={"base_head_dim": 4, "parameterization": parameterization},
        parallel=parallel or {},
        optimizer={"base_lr": 2**-8, "base_init_std": 0.02, "schedule": "constant"},
        training={"global_batch_size": 4, "train_steps": 8, "precision": "float64"},
    )


def batch(config: Config, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        config.model.vocab_size, (2, config.model.seq_length + 1), generator=generator
    )
    ones = torch.ones(2, config.model.seq_length)
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        ones,
        ones.long(),
        ones.int(),
        torch.arange(2),
    )


def telemetry_of(
    config: Config, context: ParallelContext, steps: int
) -> tuple[Telemetry, TrainingStep]:
    """After `steps` steps.

    The data rank reads its own half of the micro-batches where there are two ranks.
    """
    step = assemble(config, context).step
    for number in range(1, steps + 1):
        own = range(context.data.rank, 2, context.data.size)
        step.run([batch(config, 2 * number + half) for half in own], number).read()
    return Telemetry(step, [batch(config, 1000)], 1, 8, None, lambda text: None), step


@pytest.mark.parametrize(
    "shape", [{}, {"qk_norm": True, "num_query_groups": 2}, {"position": "alibi"}], ids=str
)
def test_every_figure_is_what_the_model_really_computes(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
):
    config = config_of(**shape)
    telemetry, step = telemetry_of(config, ParallelContext.single(), 2)
    figures = telemetry.figures()
    model, tokens = step.forward_backward.chunks[0], batch(config, 1000).tokens
    seen: list[torch.Tensor] = []
    plain = F.scaled_dot_product_attention

    def look(q, k, v, *arguments, scale, **options):
        grouped = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = scale * q[:1] @ grouped[:1].transpose(-1, -2)
        seen.append(
            scores.masked_fill(
                torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
            ).max()
        )
        return plain(q, k, v, *arguments, scale=scale, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    streams: list[torch.Tensor] = []
    model.final_norm.register_forward_hook(
        lambda module, inputs, output: streams.append(output[0].residual)
    )
    with torch.no_grad():
        model(tokens)
    assert figures[LOGITS] == pytest.approx(torch.stack(seen).max().item(), rel=1e-6)
    assert figures[FINAL] == pytest.approx(streams[0].square().mean().sqrt().item(), rel=1e-12)
    assert [name for name in figures if name.startswith("activation_rms")] == [
        *(f"activation_rms/layers.{i}.attention_norm" for i in range(4)),
        FINAL,
    ]


def test_the_update_ratio_is_the_last_update_over_the_weights_with_the_tables_factors_divided_out():
    config = config_of()
    telemetry, step = telemetry_of(config, ParallelContext.single(), 2)
    optimizer = step.optimizer
    before = optimizer.shards.master.clone()
    step.run([batch(config, 50), batch(config, 51)], 3).read()
    moved = role_rms(optimizer, optimizer.shards.master - before, by_learning_rate=True)
    figures = telemetry.figures()
    group = next(g for g in optimizer.groups.values() if g.role == Role.HIDDEN_WEIGHT)
    parameters = optimizer.shards.parameters
    groups = {name: group_of(optimizer.groups, name) for name in parameters}
    held = {name: g for name, g in groups.items() if g.role == Role.HIDDEN_WEIGHT}
    weights = sum(
        (optimizer.shards.parameters[n] / (g.init_std / config.optimizer.base_init_std))
        .square()
        .sum()
        .item()
        for n, g in held.items()
    )
    weight_rms = (weights / sum(optimizer.shards.parameters[n].numel() for n in held)) ** 0.5
    # Weight decay acts on the weights before the step, the figure on those after it.
    assert figures["update_ratio/hidden_weight"] == pytest.approx(
        moved[Role.HIDDEN_WEIGHT] / weight_rms, rel=0.02
    )
    assert group.lr_factor != 1.0


class CountOperators(TorchDispatchMode):
    """Counts what is dispatched to a device: on a GPU each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators_of_sums_by_role(hidden: int) -> tuple[int, int, int]:
    """Operators of both sums by role, and rows of the table, where it is cut as on a GPU."""
    _, step = telemetry_of(config_of(hidden_size=hidden), ParallelContext.single(), 1)
    optimizer = step.optimizer
    shards = optimizer.shards
    shards.counted_table = block_table(shards.counted_table, 64)
    counts = []
    for measure in (lambda: role_rms(optimizer, shards.master), lambda: update_ratios(optimizer)):
        with CountOperators() as operators:
            measure()
        counts.append(operators.count)
    return counts[0], counts[1], len(shards.counted_table)


def test_the_sums_by_role_launch_as_much_for_a_wide_model_as_for_a_narrow_one():
    *narrow, narrow_rows = operators_of_sums_by_role(32)
    *wide, wide_rows = operators_of_sums_by_role(64)
    assert narrow == wide
    assert wide_rows > 2 * narrow_rows  # the control: the table of a GPU grows


def test_update_ratios_of_pieces_are_those_of_whole_segments():
    _, step = telemetry_of(config_of(), ParallelContext.single(), 2)
    whole = update_ratios(step.optimizer)
    assert update_ratios(step.optimizer, piece_elements=100) == pytest.approx(whole, rel=1e-12)


def said_of(proxy: Config, target: Config) -> list[str]:
    reference, _ = telemetry_of(proxy, ParallelContext.single(), 6)
    telemetry, _ = telemetry_of(target, ParallelContext.single(), 6)
    return alarms(telemetry.figures(), reference.figures())


def test_a_deep_target_raises_no_alarm_under_completep_and_does_under_mup():
    assert said_of(config_of(2), config_of(32)) == []
    said = said_of(config_of(2, "mup"), config_of(32, "mup"))
    assert any(line.startswith(FINAL) for line in said), said


def layout_figures(rank: int, parallel: dict[str, Any]) -> dict[str, float]:
    config = config_of(parallel=parallel)
    context = context_on(rank, config.parallel)
    return telemetry_of(config, context, 2)[0].figures()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
        (2, {}),
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_the_figures_are_those_of_one_process_in_every_layout(
    pool, world_size: int, parallel: dict[str, Any]
):
    expected = telemetry_of(config_of(), ParallelContext.single(), 2)[0].figures()
    for figures in pool.run(world_size, layout_figures, parallel):
        assert list(figures) == list(expected)
        assert figures == pytest.approx(expected, rel=1e-8)


def trained(
    folder: Path, name: str, layers: int, rule: str, reference: str | None = None
) -> list[dict[str, Any]]:
    """The rows with telemetry of a whole run of 12 steps."""
    config = tiny_config(
        folder,
        *("optimizer.base_lr=0.02", "data.validation=null", "training.validation_interval=null"),
        output=name,
        model={"num_layers": layers},
        completep={"base_hidden_size": 16, "base_num_layers": 2, "parameterization": rule},
        logging={
            "interval": 6,
            "tensorboard": False,
            "parameterization_interval": 5,
            "parameterization_reference": reference,
        },
    )
    pretrain(config)
    return [
        row
        for row in read_metrics(Path(config.training.output_dir) / "metrics.jsonl")
        if FINAL in row
    ]


def test_a_run_writes_its_telemetry_and_warns_where_it_leaves_the_proxys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    proxy = trained(tmp_path, "proxy", 2, "completep")
    assert [row["step"] for row in proxy] == [5, 10, 12]  # every 5 steps, and the last
    assert {"activation_rms/layers.1.attention_norm", LOGITS, "update_ratio/hidden_weight"} <= set(
        proxy[0]
    )
    capsys.readouterr()
    deep = trained(tmp_path, "deep", 16, "completep", str(tmp_path / "proxy"))
    assert deep[-1][FINAL] == pytest.approx(proxy[-1][FINAL], rel=0.5)
    assert "warning: step" not in capsys.readouterr().out
    trained(tmp_path, "wrong", 16, "mup", str(tmp_path / "proxy"))
    assert f"warning: step 12: {FINAL} = " in capsys.readouterr().out


def test_the_proxys_row_is_the_one_of_the_same_part_of_its_run(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            f'{{"step": {s}, "loss": 1.0' + (f', "{FINAL}": {s}.0' if s % 10 == 0 else "") + "}\n"
            for s in range(1, 41)
        )
    )
    reference = read_reference(str(tmp_path))
    assert reference is not None
    assert nearest(reference, 0.5)[FINAL] == 20.0
    assert nearest(reference, 1.0)[FINAL] == 40.0
    assert read_reference(None) is None


def test_a_reference_without_telemetry_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(DataError, match="has no telemetry"):
        read_reference(str(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        read_reference(str(tmp_path / "nothing"))


def test_an_alarm_names_figure_factor_and_band():
    said = alarms({FINAL: 5.0, LOGITS: 2.0, "loss": 9.0}, {FINAL: 1.0, LOGITS: 1.0, "loss": 1.0})
    assert said == [
        f"{FINAL} = 5 is 5.00 times the proxy's 1; the table predicts 1, alarm beyond 2"
    ]
