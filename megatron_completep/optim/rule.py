"""What an update rule is: the states that it keeps, the columns that it reads, and its launch.

A new rule is one file beside this one, registered in `RULES`, and a table of its own in
`completep/table.py`. Checkpoints, telemetry and plans ask the rule; none of them knows a state by
name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.kernels import Control
from megatron_completep.optim.groups import Group
from megatron_completep.optim.shards import Shards

MASTER = "master"  # what every rule updates; its name beside the rule's own states


class Rule(ABC):
    """An update rule over one rank's shard, with the states that it keeps for it.

    groups: one for each of the shards' parameters, in their order.

    Attributes:
        states: name -> what the rule keeps of every element, laid out like the masters and zero at
            first.
        group_table: float64 [groups, columns], what the rule reads of each group.
    """

    # Name of a state -> power: where a tensor is multiplied by c, and its gradient so by 1 / c, the
    # state is multiplied by c to this power.
    powers: ClassVar[Mapping[str, int]]
    # Fields of a group, in the order in which they stand in `group_table`.
    columns: ClassVar[tuple[str, ...]]
    # Of running means that start at 0, which the record of a step corrects; 0: no such mean.
    decay_rates: tuple[float, float] = (0.0, 0.0)

    def __init__(
        self,
        shards: Shards,
        groups: Sequence[Group],
        table: Table,
        optimizer: OptimizerConfig,
    ):
        self.states: dict[str, Tensor] = {}
        for name in self.powers:
            self.states[name] = torch.zeros_like(shards.master)
        rows = [[getattr(group, column) for column in self.columns] for group in groups]
        values = torch.tensor(rows, dtype=torch.float64).view(-1, len(self.columns))
        self.group_table = values.to(shards.context.device)

    def column(self, name: str) -> Tensor:
        """One column of `group_table`, as a view."""
        return self.group_table[:, self.columns.index(name)]

    @abstractmethod
    def update(self, shards: Shards, control: Tensor) -> None:
        """Change `shards.master` by one step.

        The gradients are `shards.grad_shard` times the clip coefficient of `control`. The new
        values go to `shards.flat_shard` too, rounded, where there is one. Nothing changes where
        `control` says that the step is skipped. Communicates nothing, and does not wait for the
        device.
        """

    @abstractmethod
    def last_update(self, weight: Tensor, part: slice, group: Group, control: Control) -> Tensor:
        """What the last step took from a part of the masters, without the group's `lr_factor`.

        It follows from the states, so that nothing has to be kept from before the step. weight: the
        part of the masters as it is now, all of it in `group`.
        """

    @classmethod
    def all_powers(cls) -> dict[str, int]:
        """`powers` with the masters: what a checkpoint holds, in the order of its files."""
        return {MASTER: 1, **cls.powers}
