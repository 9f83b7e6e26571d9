"""The optimizer of a run: shards of the masters, and the rule that updates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig, ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.kernels.control import CLIP, GRAD_NORM, LEARNING_RATE, SKIP
from megatron_completep.optim.balance import Loads, move_biases, take_loads
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.optim.rule import MASTER, Rule
from megatron_completep.optim.rules import RULES
from megatron_completep.optim.shards import Shards
from megatron_completep.optim.update_stream import UpdateStream
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step. Reading one on the host waits for the device."""

    grad_norm: Tensor  # of the average over tokens, before clipping, over the whole model
    loss: Tensor  # mean over the tokens that count, over all data ranks
    tokens: Tensor  # number of tokens that count
    skipped: Tensor  # 1.0 if a gradient was not finite, so that nothing was updated
    terms: Tensor  # float64 [n]: means of the terms of the loss that were handed in


class DistributedOptimizer:
    """Updates the parameters of this rank's chunks, whose buffers it takes over (see `Shards`).

    Args:
        chunks: this rank's model chunks, initialized.
        table: the parameterization; it names the update rule.
        optimizer: base values, clipping and overrides.
        context: the mesh of ranks.
        parallel: bucket size and type of the communicated gradients; None: the defaults.
        precision: what parameters are stored and computed in.
        rule: how masters are updated; None: the rule that the table names.
        updates: where updates run under the next forward pass; None: in `step`, all at once.

    Attributes:
        shards: the flat buffers and their communication.
        rule: the update rule with its states.
        groups: name of a parameter, or of a logical part -> its group, in the order of the shards.
        control: the step's record on the device (kernels/control.py).
        loads: of the last step, this rank's part of the experts' loads (`balance.gather_loads`).
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
        updates: UpdateStream | None = None,
    ):
        self.context = context
        self.config = optimizer
        make_rule = rule or RULES[table.rule]
        self.shards = Shards(
            chunks, context, parallel or ParallelConfig(), precision, make_rule.kind_of, updates
        )
        named_parameters = self.shards.parameters.items()
        self.groups: dict[str, Group] = build_groups(named_parameters, table, optimizer)
        self.rule = make_rule(self.shards, self.groups, table, optimizer)
        self._states: dict[str, Tensor] = {MASTER: self.shards.master, **self.rule.states}
        if updates is not None and not self.rule.by_bucket:
            raise ConfigError(
                f"training.overlap_update = true updates bucket by bucket, which the rule "
                f"{table.rule} cannot. Use overlap_update = false."
            )
        self.control = kernels.new_control(context.device)
        self.loads: list[Loads] = []

    @property
    def states(self) -> dict[str, Tensor]:
        """All that training continues from, each a flat shard: the masters and the rule's states.

        They are those of the last step: an update that is under way is waited for.
        """
        self.wait_for_parameters()
        return self._states

    def begin_step(self, micro_batches: int) -> None:
        """Call before the first forward of a step of `micro_batches` forward-backward passes."""
        self.shards.begin_step(micro_batches)

    def next_micro_batch(self) -> None:
        """Call between two forward-backward passes of a step (`Shards.next_micro_batch`)."""
        self.shards.next_micro_batch()

    def step(
        self,
        learning_rate: float | Tensor,
        loss_sum: Tensor,
        tokens: Tensor,
        term_sums: Tensor | None = None,
    ) -> StepResult:
        """Update the parameters from the gradients of this step.

        Communicates over data (gradients, parameters), tensor (partial gradients), pipeline (tied
        embedding) and the whole mesh (norm, loss, tokens). The host never waits for the device.

        Args:
            learning_rate: of this step, before the factors of the groups; a float64 tensor [] if
                the step is captured in a CUDA graph, in which a number would be a constant.
            loss_sum: sum over the tokens of this data rank; zero if this rank has no loss.
            tokens: number of tokens that `loss_sum` is over.
            term_sums: [n], this rank's shares of further sums over tokens, reported as means.
        """
        shards = self.shards
        control = self.control
        # A parameter that no forward pass used may still be on its way, and the update below writes
        # to the buffer that it is sent from.
        shards.wait_for_parameters()
        shards.finish_gradients()
        self.loads = take_loads(shards)

        sums = self._sum_over_mesh(loss_sum, tokens, term_sums)
        sum_of_squares, loss_total, token_total, *term_totals = sums.unbind()

        # Gradients are sums over tokens. What is clipped is the norm of their average, and the
        # update multiplies gradients by the clip coefficient, so 1 / tokens joins it.
        control[LEARNING_RATE] = learning_rate
        mean_square = sum_of_squares / token_total.square()
        beta1, beta2 = self.rule.decay_rates
        kernels.begin_step_(control, mean_square, self.config.grad_clip, beta1, beta2)
        control[CLIP] /= token_total
        move_biases(shards, self.loads, token_total, control[SKIP])

        if shards.updates is None:
            self.rule.update(shards, control, self.rule.segment_tables)
            shards.start_gathering()
        else:
            shards.start_updates(self._update_bucket)

        # The next step overwrites the record, perhaps before the host has read this result.
        record = control.clone()
        terms = loss_total.new_empty(0)
        if term_totals:
            terms = torch.stack(term_totals) / token_total
        mean_loss = loss_total / token_total
        return StepResult(record[GRAD_NORM], mean_loss, token_total, record[SKIP], terms)

    def _update_bucket(self, number: int) -> None:
        self.rule.update(self.shards, self.control, self.rule.bucket_tables(number))

    def _sum_over_mesh(self, loss_sum: Tensor, tokens: Tensor, term_sums: Tensor | None) -> Tensor:
        """Sums over all ranks, float64 [3 + n]: squares of gradients, loss, tokens and terms.

        One all-reduce over the whole mesh carries all of them.
        """
        # All tensor ranks have the same loss and the same tokens, which count once.
        counts = self.context.tensor.rank == 0
        sums = [
            self.shards.sum_of_squares(),
            loss_sum.detach().double() * counts,
            tokens.to(self.context.device).double() * counts,
        ]
        if term_sums is not None and len(term_sums):
            # These are shares already: of ranks with the same value, all but one pass 0.
            sums += term_sums.double().unbind()
        return all_reduce(torch.stack(sums), self.context.world)

    def wait_for_parameters(self) -> None:
        """Return when parameters, masters and states have the values of the last step."""
        self.shards.wait_for_parameters()
