"""AdamW: every group, the clip coefficient, the skip flag and the rounded copy in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    # The order in which the kernel reads a row.
    columns: ClassVar[tuple[str, ...]] = ("lr_factor", "weight_decay", "eps")

    def __init__(
        self,
        shards: Shards,
        groups: Sequence[Group],
        table: Table,
        optimizer: OptimizerConfig,
    ):
        super().__init__(shards, groups, table, optimizer)
        # The table adapts the configured betas to the batch size and the duration of the run.
        self.decay_rates = table.batch.betas(optimizer.betas)

    def update(self, shards: Shards, control: Tensor, segments: Tensor) -> None:
        """One launch over all of the segments; see `kernels.adamw_`."""
        beta1, beta2 = self.decay_rates
        kernels.adamw_(
            shards.flat_shard,
            shards.master,
            self.states["exp_avg"],
            self.states["exp_avg_sq"],
            shards.grad_shard,
            segments,
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
