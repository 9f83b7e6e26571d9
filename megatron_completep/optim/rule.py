"""What an update rule is: the states that it keeps, the columns that it reads, and its update.

A new rule is one file beside this one, registered in `RULES` (rules.py), and a table of its own in
`completep/table.py`. Checkpoints, telemetry and plans ask the rule for its states; none of them
knows a state by its name. `adamw.py` is the example to start from.
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

MASTER = "master"  # the name of the parameters themselves, beside the names of a rule's states


class Rule(ABC):
    """An update rule over one rank's shard, with the states that it keeps for it.

    A subclass sets `powers` and `columns`, and defines `update` and `last_update`. Where it needs
    hyperparameters, its constructor reads them from the table and the configuration.

    Args:
        shards: the buffers that the rule updates.
        groups: one for each parameter of the shards, in their order.
        table: the parameterization of the run, which adapts the betas to batch size and duration.
        optimizer: the configuration's base values.

    Attributes:
        states: name -> flat tensor with one element for each of `shards.master`, zero at first.
        group_table: float64 [groups, columns], what the rule reads of each group.
    """

    # Name of a state -> power. Where a tensor is multiplied by c, its gradient is multiplied by
    # 1 / c, and this state by c to this power; tools that rewrite checkpoints apply it.
    powers: ClassVar[Mapping[str, int]]
    # Names of the fields of a group, in the order of the columns of `group_table`.
    columns: ClassVar[tuple[str, ...]]
    # Whether one bucket can be updated before another: not where a matrix is needed as a whole.
    by_bucket: ClassVar[bool] = True
    # Decay rates of two running means that start at 0: the step's record holds the corrections of
    # their bias as `correction1` and `correction2`. 0 means that there is no such mean.
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

        rows = []
        for group in groups:
            rows.append([getattr(group, column) for column in self.columns])
        # The shape is given, as no row says how many columns there are where a rank has no group.
        host_table = torch.tensor(rows, dtype=torch.float64).view(-1, len(self.columns))
        self.group_table = host_table.to(shards.context.device)

    def column(self, name: str) -> Tensor:
        """One column of `group_table`, as a view of it, float64 [groups]."""
        return self.group_table[:, self.columns.index(name)]

    @abstractmethod
    def update(self, shards: Shards, control: Tensor, segments: Tensor) -> None:
        """Change `shards.master` by one step, and the states with it, in the given segments.

        The gradients are `shards.grad_shard` times the clip coefficient in `control`. Where
        `shards.flat_shard` is a tensor, the new parameters are written there too, rounded to its
        type. Nothing may change where `control` says that the step is skipped. An update
        communicates nothing and does not wait for the device.

        control: the step's record on the device, see `kernels/control.py`.
        segments: `shards.segment_table`, which says which group each element belongs to, or its
            rows of one bucket.
        """

    @abstractmethod
    def last_update(self, weight: Tensor, segment: slice, group: Group, control: Control) -> Tensor:
        """What the last step subtracted from a segment of the masters, divided by `lr_factor`.

        It is computed from the states, so that nothing has to be kept from before the step.

        Args:
            weight: the segment of the masters as it is now.
            segment: where it lies in the shard; all of it belongs to `group`.
            control: the record of the last step, on the host.
        """

    @classmethod
    def all_powers(cls) -> dict[str, int]:
        """`powers` and the masters' own, in the order in which a checkpoint stores the states."""
        return {MASTER: 1, **cls.powers}
