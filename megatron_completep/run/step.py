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
from megatron_completep.run.static_step import CudaGraph, StaticStep, StepInputs


@dataclass(frozen=True)
class StepFigures:
    """What one step came to, as numbers on the host. All but the last are equal on every rank."""

    loss: float  # the objective: mean over the tokens that count, before the update
    grad_norm: float  # of the mean gradient a token over the whole model, before clipping
    counted_tokens: int  # tokens whose loss counted
    skipped: bool  # a gradient was not finite, so that nothing was updated
    stop: bool  # some rank was asked to stop
    passed_over: bool = False  # training.skip_steps: the data were read, nothing was computed
    terms: Mapping[str, float] = field(default_factory=dict)  # see `ForwardBackward.terms`
    own_seconds: float = 0.0  # that this rank took for its forward and backward passes


class Stopwatch:
    """Seconds from its creation to `stop`, without waiting for the device.

    On a GPU these are seconds of the stream that does the work, elsewhere of the host.
    """

    def __init__(self, device: torch.device):
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._host_times: list[float] = []
        self._note(0)

    def stop(self) -> None:
        """End the interval."""
        self._note(1)

    def _note(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._host_times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The interval. To be read when the work is known to be done."""
        if self._events:
            start, stop = self._events
            return float(start.elapsed_time(stop)) / 1e3
        return self._host_times[1] - self._host_times[0]


class PendingFigures:
    """The figures of a step under way.

    On a GPU they are copied to page-locked memory behind the step's work, so that the host waits in
    `read` only.
    """

    def __init__(self, figures: Tensor, own: Stopwatch | None, terms: Sequence[str] = ()):
        """Start the copy.

        figures [5 + n]: loss, gradient norm, tokens, skipped, stop, then one for each of `terms`.
        own: time of this rank's own part of the step, before it waits for others in the update;
            None for a step of training.skip_steps.
        """
        self._host_figures = figures
        self._own = own
        self._terms = terms
        self._copied: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._host_figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host_figures.copy_(figures, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepFigures:
        """Wait for the step and return its figures."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm, tokens, skipped, stop, *term_means = self._host_figures.tolist()
        return StepFigures(
            loss=loss,
            grad_norm=grad_norm,
            counted_tokens=int(tokens),
            skipped=bool(skipped),
            stop=bool(stop),
            passed_over=self._own is None,
            terms=dict(zip(self._terms, term_means, strict=True)),
            own_seconds=0.0 if self._own is None else self._own.seconds,
        )


class TrainingStep:
    """Forward and backward over the micro-batches of a step, then the update."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        chunks: Sequence[GPT],
        optimizer: DistributedOptimizer,
    ):
        self.config = config
        self.context = context
        self.chunks = chunks
        self.optimizer = optimizer
        self.passes = ForwardBackward(
            chunks,
            config.model,
            config.parallel,
            context,
            config.training.micro_batch_size,
            LossConfig.of(config.training),
        )
        self._micro_batches = micro_batches_per_step(config, context.world_size)
        self._static: StaticStep | None = None
        if config.training.cuda_graph:
            on_gpu = context.device.type == "cuda"
            graph = CudaGraph(context.device) if on_gpu else None
            self._static = StaticStep(self._compute, graph)

    @property
    def pipeline(self) -> Pipeline | None:
        """What runs the stages, where the model is split in depth."""
        return self.passes.pipeline

    def run(self, batches: Sequence[Batch], step: int, stop: bool = False) -> PendingFigures:
        """Train on the micro-batches of one step. Nothing here waits for the device.

        batches: this data rank's micro-batches.
        step: its number, from 1.
        stop: whether this rank was asked to stop; the figures say whether any rank was.

        Communicates over all axes (see `DistributedOptimizer.step`) and, to agree on stopping, over
        the whole mesh.
        """
        own = Stopwatch(self.context.device)
        inputs = self._inputs(batches, step, stop)
        if self._static is None:
            figures = self._compute(inputs, own)
        else:
            figures = self._static.run(inputs)
            # One process has nobody to wait for: the whole step is its own.
            own.stop()
        return PendingFigures(figures, own, self.passes.terms)

    def _inputs(self, batches: Sequence[Batch], step: int, stop: bool) -> StepInputs:
        """What the step reads, on the device."""
        device = self.context.device
        micro_batches = []
        for number, batch in enumerate(batches):
            micro_batches.append(self._micro_batch(batch, self._dropout_seed(step, number)))
        rate: float | Tensor
        rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
        if self._static is not None:
            rate = torch.full((), rate, dtype=torch.float64, device=device)
        return StepInputs(
            micro_batches,
            tokens=torch.full((), self._count(batches), dtype=torch.int64, device=device),
            stop=torch.full((), float(stop), device=device),
            learning_rate=rate,
        )

    def _compute(self, inputs: StepInputs, own: Stopwatch | None = None) -> Tensor:
        """The figures of a step as `PendingFigures` takes them; nothing here depends on the host.

        own: stopped when this rank's own part is done.
        """
        self.optimizer.begin_step(len(inputs.micro_batches))
        loss_sum = self.passes(inputs.micro_batches)
        # What follows waits for other ranks: their time is not this rank's own.
        if own is not None:
            own.stop()
        result = self.optimizer.step(
            inputs.learning_rate, loss_sum, inputs.tokens, self.passes.take_terms()
        )
        asked = self._on_any_rank(inputs.stop)
        figures = [result.loss, result.grad_norm, result.tokens, result.skipped, asked]
        return torch.cat([torch.stack([f.double() for f in figures]), result.terms])

    def pass_over(self, stop: bool = False) -> PendingFigures:
        """A step of training.skip_steps: no loss and no update.

        Communicates over the whole mesh to agree on stopping, as `run` does.
        """
        nothing = torch.tensor(
            [math.nan, math.nan, 0.0, 1.0], dtype=torch.float64, device=self.context.device
        )
        flag = torch.full((), float(stop), device=self.context.device)
        asked = self._on_any_rank(flag).double().view(1)
        return PendingFigures(torch.cat([nothing, asked]), own=None)

    def _on_any_rank(self, flag: Tensor) -> Tensor:
        """1 where the flag [] is 1 on some rank, else 0. Communicates over the whole mesh."""
        return all_reduce(flag, self.context.world, dist.ReduceOp.MAX)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy over the tokens that count, the same on every rank.

        It is the cross-entropy alone, whatever the objective adds to it. Communicates over the
        whole mesh.
        """
        self.optimizer.wait_for_parameters()
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        remaining = iter(batches)
        while group := list(islice(remaining, self._micro_batches)):
            micro_batches = [self._micro_batch(batch, None) for batch in group]
            if self.pipeline is not None:
                # A schedule runs the number of micro-batches that it was made for: the missing
                # ones repeat the last, with no label that counts.
                no_labels = torch.full_like(micro_batches[-1].labels, IGNORED)
                filler = replace(micro_batches[-1], labels=no_labels)
                micro_batches += [filler] * (self._micro_batches - len(micro_batches))
            sums[0] += self.passes.evaluate(micro_batches).double()
            sums[1] += self._count(group)
        # Every tensor rank has the same sums: the first one counts them.
        counted_once = sums * (self.context.tensor.rank == 0)
        loss_sum, tokens = all_reduce(counted_once, self.context.world).tolist()
        return float(loss_sum / tokens)

    def _micro_batch(self, batch: Batch, dropout_seed: Tensor | None) -> MicroBatch:
        """What the model reads of a batch, on the device."""
        labels = self._place(batch.labels)
        # Asked on the host, where the mask still is: asking the device would wait for it.
        if not bool((batch.loss_mask != 0).all()):
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
        """The tensor on the device.

        A loader's batches are in page-locked memory, from which the copy overlaps the work under
        way.
        """
        return tensor.to(self.context.device, non_blocking=True)

    def _count(self, batches: Sequence[Batch]) -> int:
        """Tokens whose loss this rank computes."""
        if self.pipeline is not None and not self.pipeline.holds_last:
            return 0
        return sum(int((batch.loss_mask != 0).sum()) for batch in batches)

    def _dropout_seed(self, step: int, micro_batch: int) -> Tensor | None:
        """The dropout seed [1] of one micro-batch; None without dropout.

        It is a pure function of the run's seed and of which rows of which micro-batch these are.
        """
        if self.config.model.dropout == 0.0:
            return None
        seed = self.config.training.seed
        for number in (step, micro_batch, self.context.data.rank, self.context.sequence.index):
            seed = mix(seed ^ number)
        # A seed is a signed number of 64 bits.
        return torch.full((1,), seed >> 1, dtype=torch.int64, device=self.context.device)


def mix(value: int) -> int:
    """The finalizer of SplitMix64: neighbouring integers give unrelated ones, in [0, 2^64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
