"""One optimizer step, and the evaluation of held-out batches, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.distributed_adamw import DistributedAdamW
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED
from megatron_completep.parallel.pipeline import Pipeline

Inputs = dict[str, Tensor]  # tokens, labels, and where needed positions, document_ids, dropout_seed


@dataclass(frozen=True)
class StepFigures:
    """What one step came to, as numbers of the host; equal on every rank."""

    loss: float  # mean over the tokens that count, before the update
    grad_norm: float  # of the token average over the whole model, before clipping
    counted_tokens: int  # tokens whose loss counted
    skipped: bool  # a gradient was not finite; nothing was updated
    stop: bool  # some rank was asked to stop


class PendingFigures:
    """The figures of a step under way. On a GPU they travel to page-locked memory behind the step's work; nobody waits until `read`."""

    def __init__(self, figures: Tensor):
        self._event: torch.cuda.Event | None = None
        self._host = figures
        if figures.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepFigures:
        """Wait for the step and return its figures."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, tokens, skipped, stop = self._host.tolist()
        return StepFigures(loss, grad_norm, int(tokens), bool(skipped), bool(stop))


class TrainingStep:
    """Forward and backward over a step's micro-batches, then the update; through a pipeline where the model is split in depth."""

    def __init__(
        self, config: Config, context: ParallelContext, chunks: Sequence[GPT], optimizer: DistributedAdamW, pipeline: Pipeline | None = None
    ):
        self.config, self.context, self.chunks, self.optimizer, self.pipeline = config, context, chunks, optimizer, pipeline
        self._micro_batches = micro_batches_per_step(config, context.world_size)

    def run(self, batches: Sequence[Batch], step: int, stop: bool = False) -> PendingFigures:
        """Step number `step` (from 1). `stop`: this rank was asked to stop; the figures say whether any rank was.

        Communicates over all axes (see `DistributedAdamW.step`) and, to agree on stopping, over the whole mesh.
        """
        optimizer, device = self.optimizer, self.context.device
        optimizer.begin_step(len(batches))
        optimizer.wait_for_parameters()
        inputs = [self._inputs(batch, self._seed(step, number)) for number, batch in enumerate(batches)]
        loss_sum, tokens = self._forward_backward(inputs), torch.full((), self._count(batches), dtype=torch.int64, device=device)
        rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
        result = optimizer.step(rate, loss_sum, tokens)
        asked = all_reduce(torch.full((), float(stop), device=device), self.context.world, dist.ReduceOp.MAX)
        return PendingFigures(torch.stack([f.double() for f in (result.loss, result.grad_norm, result.tokens, result.skipped, asked)]))

    def _forward_backward(self, inputs: Sequence[Inputs]) -> Tensor:
        """Sum of this data rank's token losses, 0 where another pipeline rank has them; gradients go through the queues."""
        if self.pipeline is not None:
            return self.pipeline.forward_backward(len(inputs), **join(inputs))
        total = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for micro_batch in inputs:
            loss = self._model(micro_batch)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over the tokens that count, the same on every rank. Communicates over the whole mesh."""
        self.optimizer.wait_for_parameters()
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        remaining = iter(batches)
        while group := list(islice(remaining, self._micro_batches)):
            sums[0] += self._evaluate([self._inputs(batch, None) for batch in group]).double()
            sums[1] += self._count(group)
        loss_sum, tokens = all_reduce(sums * (self.context.tensor.rank == 0), self.context.world).tolist()
        return loss_sum / tokens

    def _evaluate(self, inputs: list[Inputs]) -> Tensor:
        if self.pipeline is None:
            return torch.stack([self._model(micro_batch) for micro_batch in inputs]).sum()
        nothing = {**inputs[-1], "labels": torch.full_like(inputs[-1]["labels"], IGNORED)}
        inputs += [nothing] * (self._micro_batches - len(inputs))  # schedules want the number of micro-batches they were made for
        return self.pipeline.evaluate(self._micro_batches, **join(inputs))

    def _model(self, inputs: Inputs) -> Tensor:
        return self.chunks[0](inputs["tokens"], **{name: value for name, value in inputs.items() if name != "tokens"})

    def _inputs(self, batch: Batch, dropout_seed: Tensor | None) -> Inputs:
        """What the model takes of a batch, on the device."""
        inputs = {"tokens": batch.tokens, "labels": counted_labels(batch)}
        if self.config.data.reset_at_document_ends:
            inputs |= {"positions": batch.positions, "document_ids": batch.document_ids}
        inputs = {name: value.to(self.context.device, non_blocking=True) for name, value in inputs.items()}
        return inputs if dropout_seed is None else {**inputs, "dropout_seed": dropout_seed}

    def _count(self, batches: Sequence[Batch]) -> int:
        """Tokens that count in this rank's loss."""
        if self.pipeline is not None and not self.pipeline.holds_last:
            return 0
        return sum(int((batch.loss_mask != 0).sum()) for batch in batches)

    def _seed(self, step: int, micro_batch: int) -> Tensor | None:
        """The dropout seed [1] of one micro-batch: a pure function of the run's seed and of which micro-batch it is."""
        if self.config.model.dropout == 0.0:
            return None
        mixed = self.config.training.seed
        for number in (step, micro_batch, self.context.data.rank):
            mixed = mix(mixed ^ number)
        return torch.full((1,), mixed >> 1, dtype=torch.int64, device=self.context.device)


def join(inputs: Sequence[Inputs]) -> Inputs:
    """The micro-batches one after the other along the first dimension, as a pipeline takes them."""
    return {name: torch.cat([micro_batch[name] for micro_batch in inputs]) for name in inputs[0]}


def counted_labels(batch: Batch) -> Tensor:
    """Labels [B, S] with those that the loss leaves out as IGNORED."""
    return batch.labels.masked_fill(batch.loss_mask == 0, IGNORED)


def mix(value: int) -> int:
    """The finalizer of SplitMix64: neighbouring integers give unrelated ones, in [0, 2^64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
