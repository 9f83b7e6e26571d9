"""Pipeline schedules of torch.distributed.pipelining over this rank's chunks.

Shapes are static and gradients are not scaled. Weight gradients wait in the queue of each chunk
until the schedule runs them through `dw_builder`: otherwise zero-bubble schedules would run the
code of weight gradients more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """A chunk as the library expects it: the loss of the last one has a first dimension."""

    def __init__(self, chunk: nn.Module, is_last: bool):
        super().__init__()
        self.chunk = chunk
        self.is_last = is_last

    def forward(self, x: Tensor, **keywords: Tensor) -> Tensor:
        out: Tensor = self.chunk(x, **keywords)
        return out.view(1) if self.is_last else out


class Pipeline:
    """Runs micro-batches through the stages that this rank holds."""

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
        """chunks: this rank's modules, each with a `queue`.

        stages: their numbers among the `num_stages` of the model.
        tokens: an example [B, S] of what enters the first stage, on the meta device.
        boundary: an example [s, B, H] of what one stage sends to the next, on the meta device.
        """
        self.context = context
        self.schedule_name = schedule
        self.num_stages = num_stages
        self.holds_first = 0 in stages
        self.holds_last = num_stages - 1 in stages
        loss = torch.empty(1, dtype=loss_dtype, device="meta")
        self._stages = []
        for chunk, index in zip(chunks, stages, strict=True):
            queue = chunk.queue
            assert isinstance(queue, GradientQueue)
            # The schedule decides when weight gradients run.
            queue.deferred = True
            is_last = index == num_stages - 1
            # With examples of both ends the library knows all shapes and does not ask the
            # neighbours for them. Tokens need no gradient; everything else that crosses a boundary
            # does.
            stage = PipelineStage(
                _StageModule(chunk, is_last),
                index,
                num_stages,
                context.device,
                input_args=tokens if index == 0 else boundary.clone().requires_grad_(),
                output_args=(loss if is_last else boundary.clone()).requires_grad_(),
                group=context.pipeline.group,
                dw_builder=queue.take,
            )
            self._stages.append(stage)
        # A schedule is made for one number of micro-batches.
        self._schedules: dict[int, PipelineScheduleSingle | PipelineScheduleMulti] = {}

    def forward_backward(self, micro_batches: int, tokens: Tensor, **keywords: Tensor) -> Tensor:
        """Sum [] of the losses of all micro-batches; gradients of weights go through the queues.

        It is 0 on ranks without the last stage. `tokens` [micro_batches * B, S] and the keywords of
        the chunks (labels, positions, ...) are cut along their first dimension. Communicates over
        the pipeline.
        """
        return self._run(micro_batches, tokens, keywords, evaluate=False)

    @torch.no_grad()
    def evaluate(self, micro_batches: int, tokens: Tensor, **keywords: Tensor) -> Tensor:
        """The same without gradients."""
        return self._run(micro_batches, tokens, keywords, evaluate=True)

    def _run(
        self, micro_batches: int, tokens: Tensor, keywords: dict[str, Tensor], evaluate: bool
    ) -> Tensor:
        schedule = self._schedule(micro_batches)
        run: Callable[..., Any] = schedule.eval if evaluate else schedule.step
        # Evaluation does not know the option.
        options: dict[str, Any] = {} if evaluate else {"return_outputs": False}
        # The library appends the loss of each micro-batch.
        losses: list[Tensor] | None = [] if self.holds_last else None
        # Only the first stage is handed tokens, and only the last has a loss. Keywords are not sent
        # from stage to stage: every rank passes its own to its chunks.
        run(
            *((tokens,) if self.holds_first else ()),
            target=keywords["labels"] if self.holds_last else None,
            losses=losses,
            **keywords,
            **options,
        )
        if losses is None:
            return torch.zeros((), device=self.context.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _schedule(self, micro_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """The schedule for so many micro-batches; a batch ramp uses several."""
        if micro_batches not in self._schedules:
            schedule = make_schedule(self.schedule_name, self._stages, micro_batches)
            self._schedules[micro_batches] = schedule
        return self._schedules[micro_batches]


def make_schedule(
    name: str, stages: list[PipelineStage], micro_batches: int
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """The library's schedule of that name.

    The output of the last stage is the loss itself, a sum over tokens that must not be rescaled.
    """

    # The chunk has the labels as a keyword; the target is there because the library wants one.
    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return output[0]

    match name:
        # gpipe and 1f1b run one stage on each rank, the others all stages that it holds.
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
