"""Wrong implementations of the parameterization,
each one entry of the table or one line of the model away from the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from megatron_completep import kernels
from megatron_completep.completep import Factors, Table, table_of
from megatron_completep.completep.table import Matrix
from megatron_completep.config.schema import Config
from megatron_completep.instruments.trial import Design
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.model.norm import Norm, StreamNorm
from megatron_completep.model.stream import Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from tests.support.models import as_class


def table_of_class(kind: type[Table], config: Config) -> Table:
    return as_class(kind, table_of(config))


def with_table(kind: type[Table]) -> Design:
    return Design(make_table=partial(table_of_class, kind))


class NoResidualMultiplier(Table):
    """Branches join the stream as they are."""

    @property
    def residual_multiplier(self) -> float:
        return 1.0


class WithoutDepthInLearningRate(Table):
    def factors(self, role: Role, width_ratio: float = 1.0, *matrix: Matrix | None) -> Factors:
        right = super().factors(role, width_ratio, *matrix)
        in_block = role in (Role.PRE_NORM, Role.HIDDEN_WEIGHT, Role.HIDDEN_BIAS)
        return (
            replace(right, lr=right.lr * self.depth_multiplier ** (1 - self.alpha))
            if in_block
            else right
        )


class ExtraDepthInLearningRate(Table):
    def factors(self, role: Role, width_ratio: float = 1.0, *matrix: Matrix | None) -> Factors:
        right = super().factors(role, width_ratio, *matrix)
        return (
            replace(right, lr=right.lr / self.depth_multiplier)
            if role == Role.HIDDEN_WEIGHT
            else right
        )


class WithoutWidthInLearningRate(Table):
    def factors(self, role: Role, width_ratio: float = 1.0, *matrix: Matrix | None) -> Factors:
        right = super().factors(role, width_ratio, *matrix)
        return replace(right, lr=right.lr * width_ratio) if role == Role.HIDDEN_WEIGHT else right


class WithoutWidthInInit(Table):
    def factors(self, role: Role, width_ratio: float = 1.0, *matrix: Matrix | None) -> Factors:
        right = super().factors(role, width_ratio, *matrix)
        return (
            replace(right, init_std=right.init_std * width_ratio**0.5)
            if role == Role.HIDDEN_WEIGHT
            else right
        )


class NoLogitMultiplier(Table):
    @property
    def logit_multiplier(self) -> float:
        return 1.0


class LogitMultiplierTwice(Table):
    @property
    def logit_multiplier(self) -> float:
        return super().logit_multiplier ** 2


class ConstantEps(Table):
    def factors(self, role: Role, width_ratio: float = 1.0, *matrix: Matrix | None) -> Factors:
        return replace(super().factors(role, width_ratio, *matrix), eps=1.0)


def build(config: Config, table: Table, context: ParallelContext) -> GPT:
    model = GPT(config.model, table, context)
    initialize(model, table, config.optimizer, config.training.seed)
    return model


def without_multiplier_on_mlp(config: Config, table: Table, context: ParallelContext) -> nn.Module:
    """The norms that close an MLP branch add it unscaled."""
    model = build(config, table, context)

    for norm in [block.attention_norm for _, block in model.blocks()] + [model.final_norm]:
        norm.join = kernels.Join()
    return model


def multiplier_before_the_norm(config: Config, table: Table, context: ParallelContext) -> nn.Module:
    """Each branch's input is scaled in place of its output; the norm undoes that, up to its eps."""
    model = build(config, table, context)

    def scaled_input(norm: StreamNorm, stream: Stream):
        residual = stream.add_pending(kernels.Join(), norm.queue)
        factor = 1.0 if norm is model.final_norm else table.residual_multiplier
        return stream.joined(residual), Norm.forward(norm, residual * factor)

    for norm in [
        norm for _, block in model.blocks() for norm in (block.attention_norm, block.mlp_norm)
    ] + [model.final_norm]:
        norm.forward = partial(scaled_input, norm)
    return model


@torch.no_grad()
def folded_into_init(config: Config, table: Table, context: ParallelContext) -> nn.Module:
    """Output projections start small by the multiplier that their branch does not get."""
    model = build(config, table, context)
    for _, block in model.blocks():
        block.attention.output.weight.mul_(1 / table.depth_multiplier)
        block.mlp.down.weight.mul_(1 / table.depth_multiplier)
    return model


@dataclass(frozen=True)
class Mutation:
    """A wrong implementation, the axis that shows it,
    and the range in which its exponent of the decisive quantity was expected.
    """

    name: str
    axis: str
    design: Design
    quantity: str
    shows: Callable[[float], bool]
    alpha: float = 1.0


MUTATIONS = [
    Mutation(
        "multiplier missing on the MLP branch",
        "depth",
        Design(make_model=without_multiplier_on_mlp),
        "stream change",
        lambda s: s > 0.5,
    ),
    Mutation(
        "multiplier missing on both branches",
        "depth",
        with_table(NoResidualMultiplier),
        "stream change",
        lambda s: s > 0.5,
    ),
    Mutation(
        "multiplier before the norm",
        "depth",
        Design(make_model=multiplier_before_the_norm),
        "stream change",
        lambda s: s > 0.5,
    ),
    Mutation(
        "multiplier folded into the init only",
        "depth",
        replace(with_table(NoResidualMultiplier), make_model=folded_into_init),
        "stream change",
        lambda s: s > 0.5,
    ),
    Mutation(
        "alpha 0.5 without its lr factor",
        "depth",
        with_table(WithoutDepthInLearningRate),
        "stream change",
        lambda s: s > 0.2,
        0.5,
    ),
    Mutation(
        "extra 1/m_L on the hidden lr",
        "depth",
        with_table(ExtraDepthInLearningRate),
        "stream change",
        lambda s: s < -0.3,
    ),
    Mutation(
        "eps constant over depth",
        "depth",
        with_table(ConstantEps),
        "update with large eps, in blocks",
        lambda s: -1.2 < s < -0.4,
    ),
    Mutation(
        "hidden lr not divided by m_N",
        "width",
        with_table(WithoutWidthInLearningRate),
        "stream change",
        lambda s: s > 1.0,
    ),
    Mutation(
        "hidden init not divided by m_N",
        "width",
        with_table(WithoutWidthInInit),
        "stream at init",
        lambda s: s > 0.5,
    ),
    Mutation(
        "output multiplier missing",
        "width",
        with_table(NoLogitMultiplier),
        "logits at init",
        lambda s: s > 0.25,
    ),
    Mutation(
        "output multiplier twice",
        "width",
        with_table(LogitMultiplierTwice),
        "logits at init",
        lambda s: s < -1.2,
    ),
    Mutation(
        "eps constant over width",
        "width",
        with_table(ConstantEps),
        "update with large eps, in blocks",
        lambda s: -1.4 < s < -0.4,
    ),
]
