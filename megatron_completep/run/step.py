"""One optimizer step, and the evaluation of held-out batches, without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED, LossConfig
from megatron_completep.parallel.pipeline import Pipeline
from megatron_completep.run.forward_backward import ForwardBackward, MicroBatch


@dataclass(frozen=True)
class StepFigures:
    """What one step came to, as numbers of the host; all but the last equal on every rank."""

    loss: float  # the objective: mean over the tokens that count, before the update
    grad_norm: float  # of the token average over the whole model, before clipping
    counted_tokens: int  # tokens whose loss counted
    skipped: bool  # a gradient was not finite; nothing was updated
    stop: bool  # some rank was asked to stop
    passed_over: bool = False  # training.skip_steps: the data were read past, nothing was computed
    terms: Mapping[str, float] = field(
        default_factory=dict
    )  # what the loss is the sum of, where that is more than cross-entropy
    own_seconds: float = 0.0  # that this rank took for forward and backward


class Stopwatch:
    """Seconds from its making to `stop`: of the GPU's stream, where the work runs, or of the host. Nobody waits until `seconds`."""

    def __init__(self, device: torch.device):
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else []
        )
        self._times: list[float] = []
        self._note(0)

    def stop(self) -> None:
        self._note(1)

    def _note(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Once the work is known to be done."""
        return (
            self._events[0].elapsed_time(self._events[1]) / 1e3
            if self._events
            else self._times[1] - self._times[0]
        )


class PendingFigures:
    """The figures of a step under way. On a GPU they travel to page-locked memory behind the step's work; nobody waits until `read`.

    own: this rank's own part of the step, before it waits for others in the update; None for a step of training.skip_steps. terms:
    names of the figures after the first five.
    """

    def __init__(self, figures: Tensor, own: Stopwatch | None, terms: Sequence[str] = ()):
        self._event: torch.cuda.Event | None = None
        self._host, self._own, self._terms = figures, own, terms
        if figures.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepFigures:
        """Wait for the step and return its figures."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, tokens, skipped, stop, *terms = self._host.tolist()
        own_seconds = 0.0 if self._own is None else self._own.seconds
        by_name = dict(zip(self._terms, terms, strict=True))
        return StepFigures(
            loss,
            grad_norm,
            int(tokens),
            bool(skipped),
            bool(stop),
            self._own is None,
            by_name,
            own_seconds,
        )


class TrainingStep:
    """Forward and backward over a step's micro-batches, then the update."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        chunks: Sequence[GPT],
        optimizer: DistributedOptimizer,
    ):
        self.config, self.context, self.chunks, self.optimizer = config, context, chunks, optimizer
        loss = LossConfig.of(config.training)
        self.passes = ForwardBackward(
            chunks, config.model, config.parallel, context, config.training.micro_batch_size, loss
        )
        self._micro_batches = micro_batches_per_step(config, context.world_size)

    @property
    def pipeline(self) -> Pipeline | None:
        """What runs the stages, where the model is split in depth."""
        return self.passes.pipeline

    def run(self, batches: Sequence[Batch], step: int, stop: bool = False) -> PendingFigures:
        """Step number `step` (from 1). `stop`: this rank was asked to stop; the figures say whether any rank was.

        Communicates over all axes (see `DistributedOptimizer.step`) and, to agree on stopping, over the whole mesh.
        """
        own = Stopwatch(self.context.device)
        optimizer, device = self.optimizer, self.context.device
        optimizer.begin_step(len(batches))
        loss_sum = self.passes(
            [
                self._micro_batch(batch, self._seed(step, number))
                for number, batch in enumerate(batches)
            ]
        )
        tokens = torch.full((), self._count(batches), dtype=torch.int64, device=device)
        rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
        own.stop()
        result = optimizer.step(rate, loss_sum, tokens, self.passes.take_terms())
        asked = self._any_rank(stop)
        figures = torch.stack(
            [
                f.double()
                for f in (result.loss, result.grad_norm, result.tokens, result.skipped, asked)
            ]
        )
        return PendingFigures(torch.cat([figures, result.terms]), own, self.passes.terms)

    def pass_over(self, stop: bool = False) -> PendingFigures:
        """A step of training.skip_steps: no loss, no update. Communicates over the whole mesh to agree on stopping, as `run`."""
        nothing = torch.tensor(
            [math.nan, math.nan, 0.0, 1.0], dtype=torch.float64, device=self.context.device
        )
        return PendingFigures(torch.cat([nothing, self._any_rank(stop).double().view(1)]), own=None)

    def _any_rank(self, flag: bool) -> Tensor:
        return all_reduce(
            torch.full((), float(flag), device=self.context.device),
            self.context.world,
            dist.ReduceOp.MAX,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy (whatever the objective adds to it) over the tokens that count, the same on every rank.

        Communicates over the whole mesh."""
        self.optimizer.wait_for_parameters()
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        remaining = iter(batches)
        while group := list(islice(remaining, self._micro_batches)):
            sums[1] += self._count(group)
            micro_batches = [self._micro_batch(batch, None) for batch in group]
            if (
                self.pipeline is not None
            ):  # schedules want the number of micro-batches that they were made for
                nothing = replace(
                    micro_batches[-1], labels=torch.full_like(micro_batches[-1].labels, IGNORED)
                )
                micro_batches += [nothing] * (self._micro_batches - len(micro_batches))
            sums[0] += self.passes.evaluate(micro_batches).double()
        loss_sum, tokens = all_reduce(
            sums * (self.context.tensor.rank == 0), self.context.world
        ).tolist()
        return loss_sum / tokens

    def _micro_batch(self, batch: Batch, dropout_seed: Tensor | None) -> MicroBatch:
        """What the model takes of a batch, on the device."""
        labels = self._place(batch.labels)
        if not bool((batch.loss_mask != 0).all()):  # asked on the host, where the mask still is
            labels = labels.masked_fill(self._place(batch.loss_mask) == 0, IGNORED)
        micro_batch = MicroBatch(self._place(batch.tokens), labels, dropout_seed=dropout_seed)
        if self.config.data.reset_at_document_ends:
            micro_batch = replace(
                micro_batch,
                positions=self._place(batch.positions),
                document_ids=self._place(batch.document_ids),
            )
        return micro_batch

    def _place(self, tensor: Tensor) -> Tensor:
        """On the device. From the page-locked memory of a loader's batches this copies behind the work under way."""
        return tensor.to(self.context.device, non_blocking=True)

    def _count(self, batches: Sequence[Batch]) -> int:
        """Tokens that count in this rank's loss."""
        if self.pipeline is not None and not self.pipeline.holds_last:
            return 0
        return sum(int((batch.loss_mask != 0).sum()) for batch in batches)

    def _seed(self, step: int, micro_batch: int) -> Tensor | None:
        """The dropout seed [1] of one micro-batch: a pure function of the run's seed and of which rows of which micro-batch these are."""
        if self.config.model.dropout == 0.0:
            return None
        mixed = self.config.training.seed
        for number in (step, micro_batch, self.context.data.rank, self.context.sequence.index):
            mixed = mix(mixed ^ number)
        return torch.full((1,), mixed >> 1, dtype=torch.int64, device=self.context.device)


def mix(value: int) -> int:
    """The finalizer of SplitMix64: neighbouring integers give unrelated ones, in [0, 2^64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
