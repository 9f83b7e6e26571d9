"""Pipeline schedules of torch.distributed.pipelining over this rank's chunks.

Static shapes, no gradient scaling, and weight gradients held in each chunk's queue until the schedule runs them through
`dw_builder`: with anything less, zero-bubble schedules run weight-gradient code more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue


class _StageModule(nn.Module):
    """A chunk as the library wants it: the last one's loss has one element along the first dimension."""

    def __init__(self, chunk: nn.Module, last: bool):
        super().__init__()
        self.chunk, self.last = chunk, last

    def forward(self, x: Tensor, **side: Tensor) -> Tensor:
        out = self.chunk(x, **side)
        return out.view(1) if self.last else out


class Pipeline:
    """Runs micro-batches through the stages that this rank holds.

    chunks: this rank's modules, each with a `queue`; stages: their global indices of `num_stages`.
    boundary: an example of what crosses a boundary, [s, B, H] (meta device); tokens: of what enters, [B, S] (meta device).
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        stages: Sequence[int],
        num_stages: int,
        schedule: str,
        context: ParallelContext,
        tokens: Tensor,
        boundary: Tensor,
        loss_dtype: torch.dtype,
    ):
        self.context, self.schedule_name, self.num_stages = context, schedule, num_stages
        self.holds_first, self.holds_last = 0 in stages, num_stages - 1 in stages
        loss = torch.empty(1, dtype=loss_dtype, device="meta")
        self._stages = []
        for chunk, index in zip(chunks, stages, strict=True):
            queue = chunk.queue
            assert isinstance(queue, GradientQueue)
            queue.deferred = True
            last = index == num_stages - 1
            stage = PipelineStage(
                _StageModule(chunk, last),
                index,
                num_stages,
                context.device,
                input_args=tokens if index == 0 else boundary.clone().requires_grad_(),
                output_args=(loss if last else boundary.clone()).requires_grad_(),
                group=context.pipeline.group,
                dw_builder=queue.take,
            )
            self._stages.append(stage)
        self._schedules: dict[int, PipelineScheduleSingle | PipelineScheduleMulti] = {}

    def forward_backward(self, micro_batches: int, tokens: Tensor, **side: Tensor) -> Tensor:
        """Sum of the losses of all micro-batches (0 on ranks without the last stage); gradients go through the queues.

        tokens [micro_batches * B, S] and `side` tensors (labels, positions, ...) are cut along their first dimension.
        """
        return self._run(micro_batches, tokens, side, evaluate=False)

    @torch.no_grad()
    def evaluate(self, micro_batches: int, tokens: Tensor, **side: Tensor) -> Tensor:
        """The same without gradients."""
        return self._run(micro_batches, tokens, side, evaluate=True)

    def _run(
        self, micro_batches: int, tokens: Tensor, side: dict[str, Tensor], evaluate: bool
    ) -> Tensor:
        schedule = self._schedule(micro_batches)
        losses: list[Tensor] | None = [] if self.holds_last else None
        run = schedule.eval if evaluate else schedule.step
        arguments = (tokens,) if self.holds_first else ()
        keywords: dict[str, Any] = {**side} if evaluate else {**side, "return_outputs": False}
        run(
            *arguments,
            target=side["labels"] if self.holds_last else None,
            losses=losses,
            **keywords,
        )
        if losses is None:
            return torch.zeros((), device=self.context.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _schedule(self, micro_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        if micro_batches not in self._schedules:
            self._schedules[micro_batches] = make_schedule(
                self.schedule_name, self._stages, micro_batches
            )
        return self._schedules[micro_batches]


def make_schedule(
    name: str, stages: list[PipelineStage], micro_batches: int
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """The library's schedule of that name; the last stage's output is the loss itself, a sum that nothing rescales."""

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return output[0]

    match name:
        case "gpipe":
            return ScheduleGPipe(stages[0], micro_batches, loss_of, scale_grads=False)
        case "1f1b":
            return Schedule1F1B(stages[0], micro_batches, loss_of, scale_grads=False)
        case "interleaved_1f1b":
            return ScheduleInterleaved1F1B(list(stages), micro_batches, loss_of, scale_grads=False)
        case _:
            return ScheduleInterleavedZeroBubble(
                list(stages), micro_batches, loss_of, scale_grads=False
            )
