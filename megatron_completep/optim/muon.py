"""Muon: momentum whose matrices are made orthogonal; everything that is no matrix is AdamW's.

    m = momentum m + (1 - momentum) g              g: the clipped mean gradient
    u = momentum m + (1 - momentum) g              nesterov; otherwise u = m
    w -= learning_rate lr_factor (orthogonal(u) + weight_decay w)

The factor sqrt(d_out / d_in) of an update is a part of `lr_factor` (completep/table.py). The clip
coefficient enters the momentum, so that a spike is damped for as long as it lasts there; on the
update itself it would have no meaning, as an orthogonal factor does not know the size of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import MuonConfig, OptimizerConfig
from megatron_completep.errors import ConfigError
from megatron_completep.kernels import Control, read_control
from megatron_completep.kernels.control import CLIP, LEARNING_RATE, SKIP
from megatron_completep.optim.adamw import AdamW
from megatron_completep.optim.groups import Group
from megatron_completep.optim.layout import Segment
from megatron_completep.optim.matrices import Division, Holding, Matrix, divide
from megatron_completep.optim.matrix_exchange import MatrixExchange
from megatron_completep.optim.newton_schulz import polynomials
from megatron_completep.optim.rule import LastUpdate, Rule
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.bf16_units import has_bf16_units
from megatron_completep.parallel.parameter import Spec
from megatron_completep.roles import Role

MATRIX = "matrix"  # the kind of parameters that Muon updates
CHUNK = 1 << 20  # elements of the momentum that are advanced at a time, which bounds the memory


@dataclass(frozen=True)
class _Step:
    """The numbers of a step: on a CPU as numbers, on a GPU as tensors, so that nothing waits.

    applies: on a GPU, whether the step is not skipped; None: it is not.
    """

    learning_rate: float | Tensor
    clip: float | Tensor
    applies: Tensor | None = None

    def sum(self, x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
        """x + y * factor, in place of x."""
        if isinstance(factor, Tensor):
            return x.add_(y.to(x.dtype) * factor)
        return x.add_(y, alpha=factor)

    def subtract(self, x: Tensor, y: Tensor, factor: float | Tensor) -> None:
        """Take y * factor off x, unless the step is skipped."""
        if isinstance(factor, Tensor):
            x.sub_(self.keep_finite(y.to(x.dtype) * factor, 0.0))
        # A pass over the weights is saved where nothing decays.
        elif factor:
            x.add_(y, alpha=-factor)

    def keep_finite(self, new: Tensor, old: Tensor | float) -> Tensor:
        """`new`, or `old` where the step is skipped: a product with 0 would keep a NaN."""
        return new if self.applies is None else torch.where(self.applies, new, old)


class Muon(Rule):
    """Orthogonal momentum for matrices of hidden weights (arXiv 2502.16982, 2512.05620)."""

    # A gradient scales as 1 / c where its tensor is multiplied by c.
    powers: ClassVar[Mapping[str, int]] = {"momentum": -1, **AdamW.powers}
    means: ClassVar[frozenset[str]] = frozenset({"momentum", "exp_avg"})
    columns: ClassVar[tuple[str, ...]] = ("lr_factor", "weight_decay")
    # A bucket may hold a part of a matrix only.
    by_bucket: ClassVar[bool] = False

    def __init__(
        self,
        shards: Shards,
        groups: Mapping[str, Group],
        table: Table,
        optimizer: OptimizerConfig,
        kinds: Collection[str] | None = None,
    ):
        assert kinds is None, "Muon hands on what it does not update itself"
        # Two rules over one shard: each has its states for the buckets of its own kind alone.
        super().__init__(shards, groups, table, optimizer, {MATRIX})
        self._adamw = AdamW(shards, groups, table, optimizer, {""})
        self.states = {"momentum": self.states["momentum"], **self._adamw.states}
        # The corrections of bias in the step's record are those of AdamW's moments. The momentum
        # begins at 0, too, but an orthogonal factor does not know the size of its matrix.
        self.decay_rates = self._adamw.decay_rates
        self._muon = section_of(optimizer)
        self._momentum = table.batch.momentum(self._muon.momentum)

    @classmethod
    def reads(cls, column: str) -> bool:
        """AdamW's columns too, for what Muon does not update itself."""
        return column in cls.columns or AdamW.reads(column)

    @cached_property
    def exchange(self) -> MatrixExchange:
        """Where matrices are made orthogonal. The first call is collective (`context.stage`)."""
        shards = self.shards
        context = shards.context
        dtype = iteration_dtype(self._muon, shards.master.dtype, context.device)
        division = division_of(self._muon, shards, dtype.itemsize)
        sequence = polynomials(self._muon.coefficients, self._muon.iterations)
        return MatrixExchange(division, context.stage, sequence, dtype, context.device)

    def update(self, shards: Shards, control: Tensor, tables: Sequence[Tensor]) -> None:
        """AdamW's launch first, so that its parameters are gathered while matrices are exchanged.

        Communicates over the shard axis, and twice a batch over `context.stage`.
        """
        self._adamw.update(shards, control, self._adamw.segment_tables)
        shards.start_gathering({""})
        step = self._step(control)
        # All ranks have the same record, so that all of them leave here, or none.
        if step is None:
            return
        # All of the momentum first: the factors below are those of the momentum after the step.
        self._advance(step)
        for matrix, holding, factor in self.exchange.factors(self._pack_for(step)):
            group = self.groups[matrix.group]
            rate = step.learning_rate * group.lr_factor
            weight = _elements(shards.master, holding, holding.start)
            # Decay goes first, since the factor must not be a part of what decays.
            step.subtract(weight, weight, rate * group.weight_decay)
            step.subtract(weight, factor, rate)
            # Parameters below the precision of the masters are gathered from a buffer of their own.
            if shards.flat_shard is not None:
                _elements(shards.flat_shard, holding, holding.start).copy_(weight)

    def last_update(self, weight: Tensor, segment: slice, group: Group, control: Control) -> Tensor:
        raise AssertionError("a matrix has no update by segments")

    def last_updates(self, control: Control, piece_elements: int) -> Iterator[LastUpdate]:
        """The orthogonal factors are computed again, from the momentum and the step's gradients.

        Communicates over `context.stage`.
        """
        yield from self._adamw.last_updates(control, piece_elements)
        # The momentum is that after the step, from which the step's own update was made.
        step = _Step(control.learning_rate, control.clip)
        for matrix, holding, factor in self.exchange.factors(self._pack_for(step)):
            spec = self.shards.specs[matrix.name]
            # Several ranks may hold the same elements, which count once. Every rank still takes
            # part in all exchanges.
            if not spec.is_primary(matrix.name, self.shards.context):
                continue
            group = self.groups[matrix.group]
            weight = _elements(self.shards.master, holding, holding.start)
            update = control.learning_rate * (factor.to(weight.dtype) + group.weight_decay * weight)
            segment = Segment(matrix.name, holding.start, 0, holding.numel, matrix.part)
            yield LastUpdate(segment, group, update, weight)

    def segments_of(self, state: str) -> tuple[Segment, ...]:
        """The momentum has matrices, the moments of AdamW have all else."""
        if state in AdamW.powers:
            return self._adamw.segments_of(state)
        return super().segments_of(state)

    @classmethod
    def kind_of(cls, spec: Spec) -> str:
        """Whether Muon updates a parameter; it is what the table has rows of Muon's for."""
        return MATRIX if spec.role is Role.HIDDEN_WEIGHT and len(spec.shape) > 1 else ""

    @classmethod
    def states_of_kind(cls, kind: str) -> tuple[str, ...]:
        return ("momentum",) if kind == MATRIX else tuple(AdamW.powers)

    # --- the parts of a step --------------------------------------------------------------------

    def _step(self, control: Tensor) -> _Step | None:
        """The numbers of the step; None where it is known to be skipped."""
        if control.is_cuda:
            return _Step(control[LEARNING_RATE], control[CLIP], control[SKIP] == 0)
        numbers = read_control(control)
        return None if numbers.skip else _Step(numbers.learning_rate, numbers.clip)

    def _advance(self, step: _Step) -> None:
        """Let the gradients of the step into the momentum."""
        share = 1 - self._momentum
        for run in self.ranges:
            momenta = self.states["momentum"][run.in_state].split(CHUNK)
            gradients = self.shards.grad_shard[run.in_shard].split(CHUNK)
            for momentum, gradient in zip(momenta, gradients, strict=True):
                mean = step.sum(momentum * self._momentum, gradient, step.clip * share)
                # Only the GPU knows whether the step is skipped; if so, this changes nothing.
                momentum.copy_(step.keep_finite(mean, momentum))

    def _pack_for(self, step: _Step) -> Callable[[Matrix, Holding, Tensor], None]:
        """What writes the elements of a matrix that are made orthogonal."""
        share = 1 - self._momentum

        def pack(_: Matrix, holding: Holding, out: Tensor) -> None:
            momentum = _elements(self.states["momentum"], holding, self._state_start(holding))
            if not self._muon.nesterov:
                out.copy_(momentum)
                return
            # In a skipped step what is packed may not be finite; `subtract` leaves its factor out.
            gradient = _elements(self.shards.grad_shard, holding, holding.start)
            out.copy_(step.sum(momentum * self._momentum, gradient, step.clip * share))

        return pack

    def _state_start(self, holding: Holding) -> int:
        """Where elements of the shard lie in the momentum."""
        # States have only the matrices' buckets, so that places in them are not those in the shard.
        for run in self.ranges:
            if run.shard_start <= holding.start < run.shard_start + run.size:
                return holding.start - run.shard_start + run.state_start
        raise AssertionError("the elements are no matrix's")


def section_of(optimizer: OptimizerConfig) -> MuonConfig:
    """Muon's settings. Raises ConfigError where there are none."""
    if optimizer.muon is None:
        raise ConfigError(
            "optimizer.type = muon has no base_lr for its matrices: optimizer.muon is null. "
            "Give optimizer.muon.base_lr, tuned at the proxy."
        )
    return optimizer.muon


def iteration_dtype(muon: MuonConfig, master: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which the iterations run and matrices travel.

    auto: bf16 where the hardware multiplies it, except for masters in float64, which a run has for
    its digits.
    """
    wants_bf16 = muon.precision == "bf16"
    if muon.precision == "auto" and master != torch.float64:
        wants_bf16 = has_bf16_units(device)
    return torch.bfloat16 if wants_bf16 else master


def division_of(muon: MuonConfig, shards: Shards, item_bytes: int) -> Division:
    """The division of the matrices of a rank's shards."""
    names = [name for name, spec in shards.specs.items() if Muon.kind_of(spec) == MATRIX]
    context = shards.context
    return divide(
        shards.layout,
        shards.specs,
        names,
        context.shard.size,
        context.tensor.size,
        muon.parts == "per_head",
        batch_elements(muon, item_bytes),
    )


def batch_elements(muon: MuonConfig, item_bytes: int) -> int:
    """Elements of a batch that a rank sends, and that it receives, at most."""
    return int(muon.exchange_megabytes * 2**20 / item_bytes)


def _elements(flat: Tensor, holding: Holding, start: int) -> Tensor:
    """A view [rows, columns] of a rank's elements of a matrix, in a flat tensor."""
    # as_strided counts from the start of the storage, and a flat tensor may be a view into it.
    return torch.as_strided(flat, holding.sizes, holding.strides, flat.storage_offset() + start)
