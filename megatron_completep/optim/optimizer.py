"""The optimizer of a run: shards of the masters, and the rule that updates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig, ParallelConfig
from megatron_completep.kernels.control import CLIP, GRAD_NORM, LEARNING_RATE, SKIP
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.optim.rule import MASTER, Rule
from megatron_completep.optim.rules import RULES
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; reading one waits for the device."""

    grad_norm: Tensor  # before clipping, of the token average, over the whole model
    loss: Tensor  # mean over the tokens that count, over all data ranks
    tokens: Tensor  # tokens that counted
    skipped: Tensor  # 1.0 when a gradient was not finite and nothing was updated
    terms: Tensor  # float64 [n]: means of what was handed in as terms of the loss


class DistributedOptimizer:
    """Updates the parameters of this rank's chunks, whose buffers it takes over (see `Shards`).

    rule: how masters are updated; None: the rule that the table's columns belong to.

    Attributes:
        shards: the buffers, and what is sent of them.
        rule: the update rule, with its states.
        groups: parameter -> what the rule needs to know of it, in the order of the shards.
        states: all that training goes on from, each a flat shard: the masters and the rule's own.
        control: the record of a step on the device (kernels/control.py).
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        table: Table,
        optimizer: OptimizerConfig,
        context: ParallelContext,
        parallel: ParallelConfig | None = None,
        precision: torch.dtype = torch.float32,
        rule: type[Rule] | None = None,
    ):
        self.context = context
        self.config = optimizer
        self.shards = Shards(chunks, context, parallel or ParallelConfig(), precision)
        named = self.shards.parameters.items()
        self.groups: dict[str, Group] = build_groups(named, table, optimizer)
        make_rule = rule or RULES[table.rule]
        self.rule = make_rule(self.shards, list(self.groups.values()), table, optimizer)
        self.states: dict[str, Tensor] = {MASTER: self.shards.master, **self.rule.states}
        self.control = kernels.new_control(context.device)

    def begin_step(self, micro_batches: int) -> None:
        """Before the first forward of a step of `micro_batches` forward-backward passes."""
        self.shards.begin_step(micro_batches)

    def step(
        self,
        learning_rate: float,
        loss_sum: Tensor,
        tokens: Tensor,
        term_sums: Tensor | None = None,
    ) -> StepResult:
        """Update the parameters.

        loss_sum, tokens: this data rank's sums over the step (zero where this rank has no loss).
        term_sums [n]: this rank's shares of further sums over tokens, which are reported as means.

        Communicates over data (gradients, parameters), tensor (partial gradients) and the whole
        mesh (norm, loss, tokens). Nothing here waits for the device.
        """
        shards, control = self.shards, self.control
        # Whatever no forward waited for: the buffers that parameters are sent from change below.
        shards.wait_for_parameters()
        shards.finish_gradients()
        speaks = self.context.tensor.rank == 0
        sums = [
            shards.sum_of_squares(),
            loss_sum.detach().double() * speaks,
            tokens.to(self.context.device).double() * speaks,
            *(() if term_sums is None else term_sums.double().unbind()),
        ]
        sum_sq, loss_total, token_total, *term_totals = all_reduce(
            torch.stack(sums), self.context.world
        ).unbind()
        # Gradients are sums over tokens: it is the norm of their average that is clipped, and
        # 1 / tokens joins the coefficient.
        control[LEARNING_RATE] = learning_rate
        kernels.begin_step_(
            control, sum_sq / token_total.square(), self.config.grad_clip, *self.rule.decay_rates
        )
        control[CLIP] /= token_total
        self.rule.update(shards, control)
        shards.start_gathering()
        record = control.clone()
        terms = torch.stack(term_totals) / token_total if term_totals else loss_total.new_empty(0)
        return StepResult(
            record[GRAD_NORM], loss_total / token_total, token_total, record[SKIP], terms
        )

    def wait_for_parameters(self) -> None:
        """Every parameter is the new one from here on."""
        self.shards.wait_for_parameters()
