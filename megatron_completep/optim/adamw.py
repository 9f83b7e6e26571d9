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
    """Means of the gradient and of its square; decoupled weight decay (arXiv 1711.05101)."""

    powers: ClassVar[Mapping[str, int]] = {"exp_avg": -1, "exp_avg_sq": -2}
    columns: ClassVar[tuple[str, ...]] = ("lr_factor", "weight_decay", "eps")

    def __init__(
        self, shards: Shards, groups: Sequence[Group], table: Table, optimizer: OptimizerConfig
    ):
        super().__init__(shards, groups, table, optimizer)
        self.decay_rates = table.batch.betas(optimizer.betas)

    def update(self, shards: Shards, control: Tensor) -> None:
        """One launch over the shard; see `kernels.adamw_`."""
        kernels.adamw_(
            shards.flat_shard,
            shards.master,
            self.states["exp_avg"],
            self.states["exp_avg_sq"],
            shards.grad_shard,
            shards.segment_table,
            self.group_table,
            control,
            *self.decay_rates,
        )

    def last_update(self, weight: Tensor, part: slice, group: Group, control: Control) -> Tensor:
        """The learning rate times the corrected mean over its root mean square, and the decay."""
        root = (self.states["exp_avg_sq"][part] / control.correction2).sqrt()
        direction = (self.states["exp_avg"][part] / control.correction1) / (root + group.eps)
        return control.learning_rate * (direction + group.weight_decay * weight)
