"""What an update rule is: the states that it keeps, the columns that it reads, and its update.

A new rule is one file beside this one, registered in `RULES` (rules.py), and a table of its own in
`completep/table.py`. Checkpoints, telemetry and plans ask the rule for its states; none of them
knows a state by its name. `adamw.py` is the example to start from; `muon.py` is one that tells
parameters apart, has AdamW update some of them, and communicates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.kernels import Control
from megatron_completep.optim.groups import Group
from megatron_completep.optim.layout import Segment
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.parameter import Spec

MASTER = "master"  # the name of the parameters themselves, beside the names of a rule's states


class Range(NamedTuple):
    """A run of the shard that a rule updates, and where its states have it."""

    shard_start: int
    state_start: int
    size: int

    @property
    def in_shard(self) -> slice:
        return slice(self.shard_start, self.shard_start + self.size)

    @property
    def in_state(self) -> slice:
        return slice(self.state_start, self.state_start + self.size)

    def holds(self, segment: Segment) -> bool:
        """Whether a segment lies in it."""
        return self.shard_start <= segment.shard_start < self.shard_start + self.size


class LastUpdate(NamedTuple):
    """What the last step subtracted from some elements, divided by the group's `lr_factor`."""

    segment: Segment  # of the logical part that they belong to
    group: Group
    update: Tensor
    weight: Tensor  # the same elements of the masters, as they are now


class Rule(ABC):
    """An update rule over one rank's shard, with the states that it keeps for it.

    A subclass sets `powers` and `columns`, and defines `update` and `last_update`. Where it needs
    hyperparameters, its constructor reads them from the table and the configuration.

    Args:
        shards: the buffers that the rule updates.
        groups: by name on this rank, one for each logical part of the parameters, in their order.
        table: the parameterization of the run, which adapts the betas to batch size and duration.
        optimizer: the configuration's base values.
        kinds: the rule updates the buckets of these kinds (`layout.Entry`); None: all.

    Attributes:
        ranges: the runs of the shard that the rule updates.
        states: name -> flat tensor with one element for each of the ranges, zero at first.
        group_table: float64 [groups, columns], what the rule reads of each group.
    """

    # Name of a state -> power. Where a tensor is multiplied by c, its gradient is multiplied by
    # 1 / c, and this state by c to this power; tools that rewrite checkpoints apply it.
    powers: ClassVar[Mapping[str, int]]
    # Names of the states that are running means of gradients: of these, another rule that has such
    # a mean can take it over (checkpoint/adapt.py).
    means: ClassVar[frozenset[str]] = frozenset()
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
        groups: Mapping[str, Group],
        table: Table,
        optimizer: OptimizerConfig,
        kinds: Collection[str] | None = None,
    ):
        self.shards = shards
        self.groups = groups
        self.ranges = _ranges(shards, kinds)
        elements = sum(run.size for run in self.ranges)
        self._bucket_tables: dict[int, list[Tensor]] = {}  # bucket -> its tables
        self.states: dict[str, Tensor] = {}
        for name in self.powers:
            self.states[name] = shards.master.new_zeros(elements)

        self._rows: list[list[float]] = []
        for group in groups.values():
            self._rows.append([getattr(group, column) for column in self.columns])
        # The shape is given, as no row says how many columns there are where a rank has no group.
        host_table = torch.tensor(self._rows, dtype=torch.float64).view(-1, len(self.columns))
        self.group_table = host_table.to(shards.context.device)

    def column(self, name: str) -> Tensor:
        """One column of `group_table`, as a view of it, float64 [groups]."""
        return self.group_table[:, self.columns.index(name)]

    # Built when it is asked for: construction never reads tensor values, so fake tensors work.
    @cached_property
    def segment_tables(self) -> list[Tensor]:
        """For each of `ranges`, int64 [n, 3]: start in the range, length, number of the group.

        Parts that lie side by side and have the same columns are one row, with the number of the
        first. On a GPU long rows are split, so that all programs of a kernel have equal work.
        """
        return self._tables_of(self.shards.part_segments)

    def bucket_tables(self, number: int) -> list[Tensor]:
        """`segment_tables` with the rows of one bucket."""
        if number not in self._bucket_tables:
            start, stop = self.shards.layout.buckets[number].in_shard
            segments = [s for s in self.shards.part_segments if start <= s.shard_start < stop]
            self._bucket_tables[number] = self._tables_of(segments)
        return self._bucket_tables[number]

    def _tables_of(self, segments: Sequence[Segment]) -> list[Tensor]:
        tables = []
        for run in self.ranges:
            rows = self._segment_rows(run, segments)
            table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
            tables.append(kernels.device_segments(table, self.shards.context.device))
        return tables

    def _segment_rows(self, run: Range, segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
        numbers = {name: number for number, name in enumerate(self.groups)}
        rows: list[tuple[int, int, int]] = []
        previous: Segment | None = None
        for segment in segments:
            if not run.holds(segment):
                continue
            number = numbers[segment.group]
            joins = previous is not None and previous.name == segment.name
            if joins and self._rows[rows[-1][2]] == self._rows[number]:
                start, size, first_number = rows[-1]
                rows[-1] = (start, size + segment.size, first_number)
            else:
                rows.append((segment.shard_start - run.shard_start, segment.size, number))
            previous = segment
        return rows

    def segments_of(self, state: str) -> tuple[Segment, ...]:
        """The parameters of a state, each with its place in the state's tensor, in order."""
        return self._moved(self.shards.segments)

    def _moved(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """The segments in the ranges, with their places in the states in place of the shard."""
        moved = []
        for run in self.ranges:
            for segment in segments:
                if run.holds(segment):
                    start = segment.shard_start - run.shard_start + run.state_start
                    moved.append(replace(segment, shard_start=start))
        return tuple(moved)

    @abstractmethod
    def update(self, shards: Shards, control: Tensor, tables: Sequence[Tensor]) -> None:
        """Change `shards.master` by one step, and the states with it, in the given segments.

        The gradients are `shards.grad_shard` times the clip coefficient in `control`. Where
        `shards.flat_shard` is a tensor, the new parameters are written there too, rounded to its
        type. Nothing may change where `control` says that the step is skipped. An update does not
        wait for the device. Where it communicates, its calls are the same on every rank of
        `context.stage`.

        control: the step's record on the device, see `kernels/control.py`.
        tables: `segment_tables`, which say which group each element belongs to, or
            `bucket_tables` of one bucket.
        """

    @abstractmethod
    def last_update(self, weight: Tensor, segment: slice, group: Group, control: Control) -> Tensor:
        """What the last step subtracted from a segment of the masters, divided by `lr_factor`.

        It is computed from the states, so that nothing has to be kept from before the step.

        Args:
            weight: the segment of the masters as it is now.
            segment: where it lies in the states; all of it belongs to `group`.
            control: the record of the last step, on the host.
        """

    def last_updates(self, control: Control, piece_elements: int) -> Iterator[LastUpdate]:
        """The last update of all elements that this rank counts (`Shards.counted_parts`).

        Called after a step and before the next one begins. Communicates where `update` does; the
        iterator must be exhausted.

        piece_elements: at most so many elements come together, which bounds the memory.
        """
        shard_parts = self.shards.counted_parts
        for run in self.ranges:
            for segment in filter(run.holds, shard_parts):
                group = self.groups[segment.group]
                stop = segment.shard_start + segment.size
                for start in range(segment.shard_start, stop, piece_elements):
                    end = min(start + piece_elements, stop)
                    to_state = run.state_start - run.shard_start
                    weight = self.shards.master[start:end]
                    piece = slice(start + to_state, end + to_state)
                    update = self.last_update(weight, piece, group, control)
                    yield LastUpdate(segment, group, update, weight)

    @classmethod
    def kind_of(cls, spec: Spec) -> str:
        """The kind of a parameter, see `layout.Entry`. This rule does not tell them apart."""
        return ""

    @classmethod
    def states_of_kind(cls, kind: str) -> tuple[str, ...]:
        """The states that parameters of a kind have."""
        return tuple(cls.all_powers())[1:]

    @classmethod
    def reads(cls, column: str) -> bool:
        """Whether the rule reads a column of the table for any parameter."""
        return column in cls.columns

    @classmethod
    def all_powers(cls) -> dict[str, int]:
        """`powers` and the masters' own, in the order in which a checkpoint stores the states."""
        return {MASTER: 1, **cls.powers}

    @classmethod
    def stored_states(cls, spec: Spec) -> tuple[str, ...] | None:
        """The names in `all_powers` that a checkpoint has of a parameter; None: all."""
        states = (MASTER, *cls.states_of_kind(cls.kind_of(spec)))
        return None if len(states) == len(cls.all_powers()) else states


def _ranges(shards: Shards, kinds: Collection[str] | None) -> tuple[Range, ...]:
    """The runs of a rank's shard that buckets of these kinds make up."""
    ranges: list[Range] = []
    state_start = 0
    for bucket in shards.layout.buckets:
        if kinds is not None and bucket.kind not in kinds:
            continue
        start, stop = bucket.in_shard
        if ranges and ranges[-1].in_shard.stop == start:
            ranges[-1] = ranges[-1]._replace(size=stop - ranges[-1].shard_start)
        else:
            ranges.append(Range(start, state_start, stop - start))
        state_start += stop - start
    return tuple(ranges)
