"""A second update rule is one class:
it trains, saves, resumes bit for bit and reshards, and nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.examine import (
    compare_checkpoints,
    reshard_checkpoint,
    verify_checkpoint,
)
from megatron_completep.completep import table, table_of
from megatron_completep.errors import CheckpointError, ConfigError
from megatron_completep.kernels import Control, read_control
from megatron_completep.optim.adamw import AdamW
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.groups import Group
from megatron_completep.optim.rule import Rule
from megatron_completep.optim.rules import RULES
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.telemetry.telemetry import update_ratios
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.configs import small_config
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    group_of,
    model_config,
    optimizer_config,
    train_step,
)
from tests.support.ranks import context_on

MU = 0.9


class Momentum(Rule):
    """Gradient descent with momentum and decoupled weight decay."""

    powers: ClassVar[Mapping[str, int]] = {"momentum": -1}
    columns: ClassVar[tuple[str, ...]] = ("lr_factor", "weight_decay")

    def update(self, shards: Shards, control: Tensor, tables: Sequence[Tensor]) -> None:
        step = read_control(control)  # waits for the device, which is well on a CPU
        if step.skip:
            return
        columns = self.group_table.tolist()
        (table,) = tables
        for start, size, group in table.tolist():
            part, (lr_factor, weight_decay) = slice(start, start + size), columns[group]
            momentum, weight = self.states["momentum"][part], shards.master[part]
            momentum.mul_(MU).add_(shards.grad_shard[part], alpha=step.clip)
            weight.sub_(step.learning_rate * lr_factor * (momentum + weight_decay * weight))
            if shards.flat_shard is not None:
                shards.flat_shard[part].copy_(weight)

    def last_update(self, weight: Tensor, part: slice, group: Group, control: Control) -> Tensor:
        return control.learning_rate * (self.states["momentum"][part] + group.weight_decay * weight)


def momentum_run(
    folder: Path | str, context: ParallelContext | None = None, **changes: Any
) -> TinyRun:
    return TinyRun(checkpointed_config(folder, **changes), context, rule=Momentum)


def test_a_rule_without_an_epsilon_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may then have 0 in that column; AdamW's, which divides by it, may not."""

    def rows_without_eps(*sizes: Any) -> Mapping[Role, table.Row]:
        rows = table.adamw_rows(*sizes)
        return {role: replace(row, eps=0.0) for role, row in rows.items()}

    config = small_config(model={"num_layers": 2})
    for name, rule in (("momentum", Momentum), ("divided", AdamW)):
        monkeypatch.setitem(RULES, name, rule)
        monkeypatch.setitem(table.RULES, name, rows_without_eps)
    check_parameters(config, replace(table_of(config), rule="momentum"))
    with pytest.raises(ConfigError, match="the AdamW epsilon is 0 for"):
        check_parameters(config, replace(table_of(config), rule="divided"))


def test_it_updates_as_torch_s_own_and_keeps_its_state_alone() -> None:
    model, settings = model_config(), optimizer_config(base_weight_decay=0.0, grad_clip=0.0)
    gpt = build_model(model, optimizer=settings)
    optimizer = build_optimizer(gpt, gpt.table, settings, rule=Momentum)
    assert list(optimizer.states) == ["master", "momentum"]
    pieces = optimizer.shards.layout.pieces
    copies = {
        p.name: torch.nn.Parameter(optimizer.shards.parameters[p.name].detach().clone())
        for p in pieces
    }
    groups = [
        {"params": [copy], "lr": 0.1 * group_of(optimizer.groups, name).lr_factor}
        for name, copy in copies.items()
    ]
    twin = torch.optim.SGD(groups, lr=0.1, momentum=MU)
    for step in range(4):
        batch = batch_of(model, step)
        train_step(gpt, optimizer, 0.1, batch)
        for name, copy in copies.items():
            copy.grad = optimizer.shards.parameters[name].main_grad / (batch[1] != -100).sum()
        twin.step()
    for name, copy in copies.items():
        torch.testing.assert_close(
            optimizer.shards.parameters[name].detach(), copy.detach(), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_with_it_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole = momentum_run(tmp_path, training={"precision": precision})
    whole.train(2)
    whole.save()
    expected = whole.train(2)
    resumed = momentum_run(tmp_path, training={"precision": precision})
    assert resumed.resume() and resumed.train(2) == expected
    assert resumed.bits() == whole.bits() and "momentum" in resumed.bits()
    without = momentum_run(tmp_path, training={"precision": precision})
    without.resume()
    without.optimizer.states["momentum"].zero_()
    assert without.train(2) != expected  # the control: the state matters


def test_its_checkpoint_is_verified_rewritten_and_adapted_by_tools_that_have_no_optimizer(
    tmp_path: Path,
) -> None:
    run = momentum_run(tmp_path / "run")
    run.train(2)
    run.save()
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    stored = StoredCheckpoint.open(folder)
    assert stored.manifest.states == {"master": 1, "momentum": -1}
    assert verify_checkpoint(folder) == []
    assert compare_checkpoints(folder, reshard_checkpoint(folder, tmp_path / "again", 3))[1] == []
    config = checkpointed_config(tmp_path / "adapted", model={"input_multiplier": 2.0})
    adapted = StoredCheckpoint.open(
        adapt_checkpoint(folder, config, tmp_path / "adapted" / "checkpoints")[0]
    )
    for state, factor in (("master", 0.5), ("momentum", 2.0)):
        assert torch.equal(
            adapted.tensor("embedding.weight", state),
            stored.tensor("embedding.weight", state) * factor,
        )


def test_every_rule_has_a_table_and_every_table_a_rule() -> None:
    assert RULES.keys() == table.RULES.keys()


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    run = momentum_run(tmp_path)
    run.train(1)
    run.save()
    with pytest.raises(
        CheckpointError,
        match=r"holds the states master, momentum, but .* keeps exp_avg, exp_avg_sq, master",
    ):
        TinyRun(checkpointed_config(tmp_path)).resume()


def test_telemetry_asks_it_for_its_last_update(tmp_path: Path) -> None:
    run = momentum_run(tmp_path, optimizer={"base_weight_decay": 0.0})
    run.train(1)
    ratios = update_ratios(run.optimizer)
    for state in run.optimizer.rule.states.values():
        state.mul_(2.0)
    doubled = update_ratios(run.optimizer)
    assert ratios and doubled == {role: pytest.approx(2 * ratio) for role, ratio in ratios.items()}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "data": {"bucket_megabytes": 0.002},
}


def train_in_layout(rank: int, folder: str, layout: dict[str, Any], resume: bool) -> list[float]:
    """Resume where asked to, train two steps and save, in the process group at hand."""
    training = {"micro_batch_size": 1}
    config = checkpointed_config(folder, parallel=layout, training=training)
    context = context_on(rank, config.parallel)
    run = momentum_run(folder, context, parallel=layout, training=training)
    assert run.resume() == resume
    losses = run.train(2)
    run.save()
    run.checkpointer.close()
    return losses


def test_its_checkpoints_move_between_layouts(pool: Any, tmp_path: Path) -> None:
    alone = momentum_run(tmp_path / "alone", training={"micro_batch_size": 1})
    expected = [alone.train(2), alone.train(2), alone.train(2)]
    folder = str(tmp_path / "moved")
    seen = [
        pool.run(2, train_in_layout, folder, LAYOUTS["tensor"], False)[0],
        pool.run(2, train_in_layout, folder, LAYOUTS["data"], True)[0],
    ]
    last = momentum_run(folder, training={"micro_batch_size": 1})
    assert last.resume() and last.state.step == 4
    seen.append(last.train(2))
    for here, there in zip(seen, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    for name, parameter in last.model.named_parameters():
        torch.testing.assert_close(
            parameter, dict(alone.model.named_parameters())[name], rtol=1e-4, atol=1e-6
        )
