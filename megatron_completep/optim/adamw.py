"""AdamW: every group, the clip coefficient, the skip flag and the rounded copy in one launch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.kernels import Control
from megatron_completep.optim.groups import Group
from megatron_completep.optim.rule import Rule
from megatron_completep.optim.shards import Shards


class AdamW(Rule):
    """Running means of the gradient and of its square, with decoupled decay (arXiv 1711.05101)."""

    # A gradient scales as 1 / c where its tensor is multiplied by c, and its square as 1 / c^2.
    powers: ClassVar[Mapping[str, int]] = {"exp_avg": -1, "exp_avg_sq": -2}
    means: ClassVar[frozenset[str]] = frozenset({"exp_avg"})
    # The order in which the kernel reads a row.
    columns: ClassVar[tuple[str, ...]] = ("lr_factor", "weight_decay", "eps")

    def __init__(
        self,
        shards: Shards,
        groups: Mapping[str, Group],
        table: Table,
        optimizer: OptimizerConfig,
        kinds: Collection[str] | None = None,
    ):
        super().__init__(shards, groups, table, optimizer, kinds)
        # The table adapts the configured betas to the batch size and the duration of the run.
        self.decay_rates = table.batch.betas(optimizer.betas)

    def update(self, shards: Shards, control: Tensor, tables: Sequence[Tensor]) -> None:
        """One launch over each range, which is the whole shard; see `kernels.adamw_`."""
        beta1, beta2 = self.decay_rates
        for run, segment_table in zip(self.ranges, tables, strict=True):
            rounded = shards.flat_shard
            kernels.adamw_(
                None if rounded is None else rounded[run.in_shard],
                shards.master[run.in_shard],
                self.states["exp_avg"][run.in_state],
                self.states["exp_avg_sq"][run.in_state],
                shards.grad_shard[run.in_shard],
                segment_table,
                self.group_table,
                control,
                beta1,
                beta2,
            )

    def last_update(self, weight: Tensor, segment: slice, group: Group, control: Control) -> Tensor:
        """The learning rate times the sum of Adam's direction and the weight decay."""
        mean = self.states["exp_avg"][segment] / control.correction1
        mean_square = self.states["exp_avg_sq"][segment] / control.correction2
        direction = mean / (mean_square.sqrt() + group.eps)
        return control.learning_rate * (direction + group.weight_decay * weight)
