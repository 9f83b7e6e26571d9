"""One optimizer step, and the evaluation of held-out batches, without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.errors import ExpertsDoNotFit
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import dropout_seeds
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
    """Results of one step, as host numbers. All except own_seconds are identical on every rank.

    `skipped` and `passed_over` are also metrics names. A step of training.skip_steps sets both.
    """

    loss: float  # the objective: mean over the counted tokens, before the update
    grad_norm: (
        float  # norm over the whole model of the gradient averaged per token, before clipping
    )
    counted_tokens: int  # tokens whose loss is counted
    skipped: bool  # there was no update, as a gradient was not finite or the step is passed over
    stop: bool  # a stop was requested on some rank
    passed_over: bool = False  # the step is in training.skip_steps: no forward, backward or update
    terms: Mapping[str, float] = field(default_factory=dict)  # see `ForwardBackward.terms`
    own_seconds: float = 0.0  # seconds this rank spent on its own forward and backward passes


# The figures of a step travel from the device to the host as one float64 tensor in this order,
# followed by the loss terms.
FIGURES = ("loss", "grad_norm", "counted_tokens", "skipped", "stop")


def pack_figures(
    loss: Tensor,
    grad_norm: Tensor,
    counted_tokens: Tensor,
    skipped: Tensor,
    stop: Tensor,
    terms: Tensor,
) -> Tensor:
    """One float64 tensor [len(FIGURES) + len(terms)] in the order of FIGURES."""
    figures = (loss, grad_norm, counted_tokens, skipped, stop)
    scalars = torch.stack([figure.double() for figure in figures])
    return torch.cat([scalars, terms])


class Stopwatch:
    """Seconds from its creation to `stop`, without waiting for the device.

    Measured by CUDA events on the current CUDA stream, or by the host clock without a GPU.
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
        """Length of the interval. Read it only after the GPU has finished the work."""
        if self._events:
            start, stop = self._events
            return float(start.elapsed_time(stop)) / 1e3
        return self._host_times[1] - self._host_times[0]


class PendingFigures:
    """The figures of a step that the device may still be computing.

    On a GPU they are copied asynchronously to pinned memory after the step's kernels; the host
    waits only in `read`.
    """

    def __init__(
        self,
        figures: Tensor,
        own_time: Stopwatch | None = None,
        terms: Sequence[str] = (),
        passed_over: bool = False,
    ):
        """Start the copy.

        figures: as `pack_figures` returns them, with one value for each of `terms`.
        own_time: stopwatch over this rank's forward and backward; None if the step is passed over.
        passed_over: whether the step is in training.skip_steps.
        """
        self._host_figures = figures
        self._own_time = own_time
        self._terms = terms
        self._passed_over = passed_over
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
        values = self._host_figures.tolist()
        figures = dict(zip(FIGURES, values, strict=False))
        term_means = values[len(FIGURES) :]
        return StepFigures(
            loss=figures["loss"],
            grad_norm=figures["grad_norm"],
            counted_tokens=int(figures["counted_tokens"]),
            skipped=bool(figures["skipped"]),
            stop=bool(figures["stop"]),
            passed_over=self._passed_over,
            terms=dict(zip(self._terms, term_means, strict=True)),
            own_seconds=0.0 if self._own_time is None else self._own_time.seconds,
        )


class Evaluation(NamedTuple):
    """Mean cross-entropies over the counted tokens; nan where no token counts."""

    loss: float
    by_source: list[float]
    by_position: list[float]  # of equal parts of the sequence, in their order


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
        self.forward_backward = ForwardBackward(
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
        """The pipeline schedule; None without pipeline parallelism."""
        return self.forward_backward.pipeline

    def run(self, batches: Sequence[Batch], step: int, stop: bool = False) -> PendingFigures:
        """Train on the micro-batches of one step. Nothing here waits for the device.

        batches: this data rank's micro-batches.
        step: the number of the step, from 1.
        stop: whether a stop was requested on this rank; the figures say whether on any rank.

        Communicates over all axes (see `DistributedOptimizer.step`) and, to agree on stopping, over
        the whole mesh.
        """
        own_time = Stopwatch(self.context.device)
        inputs = self._inputs(batches, step, stop)
        if self._static is None:
            with naming_work(f"step {step}"):
                figures = self._compute(inputs, own_time)
        else:
            figures = self._static.run(inputs)
            # training.cuda_graph is for a single process, which waits for no other rank: the whole
            # step counts as its own time.
            own_time.stop()
        return PendingFigures(figures, own_time, self.forward_backward.terms)

    def _inputs(self, batches: Sequence[Batch], step: int, stop: bool) -> StepInputs:
        """What the step reads, on the device."""
        device = self.context.device
        micro_batches = []
        for batch in batches:
            micro_batches.append(self._micro_batch(batch, self.seeds_of(step, batch)))
        rate: float | Tensor
        rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
        if self._static is not None:
            rate = torch.full((), rate, dtype=torch.float64, device=device)
        counted_tokens = self._counted_tokens(batches)
        return StepInputs(
            micro_batches,
            tokens=torch.full((), counted_tokens, dtype=torch.int64, device=device),
            stop=torch.full((), float(stop), device=device),
            learning_rate=rate,
        )

    def _compute(self, inputs: StepInputs, own_time: Stopwatch | None = None) -> Tensor:
        """The figures of a step as `PendingFigures` takes them; nothing here depends on the host.

        own_time: stopped when this rank's own part is done.
        """
        self.optimizer.begin_step(len(inputs.micro_batches))
        loss_sum = self.forward_backward(inputs.micro_batches, self.optimizer.next_micro_batch)
        # The update below waits for other ranks; stop the clock here so that their time is not
        # counted.
        if own_time is not None:
            own_time.stop()
        result = self.optimizer.step(
            inputs.learning_rate, loss_sum, inputs.tokens, self.forward_backward.take_terms()
        )
        return pack_figures(
            result.loss,
            result.grad_norm,
            result.tokens,
            result.skipped,
            self._on_any_rank(inputs.stop),
            result.terms,
        )

    def pass_over(self, stop: bool = False) -> PendingFigures:
        """Run a step of training.skip_steps: no loss and no update.

        Communicates over the whole mesh to agree on stopping, as `run` does.
        """
        device = self.context.device
        not_computed = torch.full((), math.nan, device=device)
        figures = pack_figures(
            loss=not_computed,
            grad_norm=not_computed,
            counted_tokens=torch.zeros((), device=device),
            skipped=torch.ones((), device=device),
            stop=self._on_any_rank(torch.full((), float(stop), device=device)),
            terms=torch.empty(0, dtype=torch.float64, device=device),
        )
        return PendingFigures(figures, passed_over=True)

    def _on_any_rank(self, flag: Tensor) -> Tensor:
        """1 if the flag [] is 1 on some rank, else 0. Communicates over the whole mesh."""
        return all_reduce(flag, self.context.world, dist.ReduceOp.MAX)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy over the counted tokens, the same on every rank.

        It excludes other terms of the objective; nan where no token counts. Communicates over the
        whole mesh.
        """
        self.optimizer.wait_for_parameters()
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for step_batches, micro_batches in self._steps_to_evaluate(batches):
            sums[0] += self.forward_backward.evaluate(micro_batches).double()
            sums[1] += self._counted_tokens(step_batches)
        return self._means(sums)[0]

    @torch.no_grad()
    def evaluate_in_parts(
        self,
        batches: Iterable[Batch],
        source_of: Callable[[int], int],
        num_sources: int,
        num_positions: int = 0,
    ) -> Evaluation:
        """What `evaluate` returns, to the bit, with the means over parts of the tokens.

        source_of: the number of the source of a sample, by the sample's number.
        num_positions: equal parts of the sequence.
        """
        self.optimizer.wait_for_parameters()
        device = self.context.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # Losses, then counted tokens, of each source and of each part of the sequence.
        by_source = torch.zeros(2 * num_sources, dtype=torch.float64, device=device)
        by_position = torch.zeros(2 * num_positions, dtype=torch.float64, device=device)
        for step_batches, micro_batches in self._steps_to_evaluate(batches):
            loss_sum, token_losses = self.forward_backward.evaluate_tokens(micro_batches)
            sums[0] += loss_sum.double()
            sums[1] += self._counted_tokens(step_batches)
            if token_losses is None:
                continue
            sample_ids = torch.cat([batch.sample_ids for batch in step_batches]).tolist()
            sources = self._place(torch.tensor([source_of(sample) for sample in sample_ids]))
            # A pipeline's filler comes last.
            row_losses = token_losses.sum(1).flatten()[: len(sources)]
            by_source.index_add_(0, sources, row_losses)
            mask = torch.cat([self._own_mask(batch) for batch in step_batches]) != 0
            by_source.index_add_(0, sources + num_sources, self._place(mask.sum(1).double()))
            if num_positions:
                places = self.context.context_part.places(self.config.model.seq_length, device)
                part = places * num_positions // self.config.model.seq_length
                # Labels of the filler are ignored: their losses are 0.
                by_position.index_add_(0, part, token_losses.sum((0, 2)))
                counted = self._place(mask.sum(0).double())
                by_position.index_add_(0, part + num_positions, counted)
        # Several reductions: elements of another tensor may be added in another order of ranks.
        return Evaluation(
            self._means(sums)[0],
            self._means(by_source),
            self._means(by_position) if num_positions else [],
        )

    def _steps_to_evaluate(
        self, batches: Iterable[Batch]
    ) -> Iterator[tuple[list[Batch], list[MicroBatch]]]:
        """The batches by as many as a step has, and what the model reads of them."""
        remaining = iter(batches)
        while step_batches := list(islice(remaining, self._micro_batches)):
            micro_batches = [self._micro_batch(batch, None) for batch in step_batches]
            if self.pipeline is not None:
                # A pipeline schedule has a fixed number of micro-batches, so pad with copies of the
                # last one whose labels are all ignored.
                no_labels = torch.full_like(micro_batches[-1].labels, IGNORED)
                filler = replace(micro_batches[-1], labels=no_labels)
                micro_batches += [filler] * (self._micro_batches - len(micro_batches))
            yield step_batches, micro_batches

    def _means(self, sums: Tensor) -> list[float]:
        """The means [n] of this rank's shares [2 n] of sums, then counts; nan where none counts.

        Communicates over the whole mesh.
        """
        # All tensor ranks hold the same sums, so only tensor rank 0 contributes.
        counted_once = sums * (self.context.tensor.rank == 0)
        totals = all_reduce(counted_once, self.context.world).tolist()
        half = len(totals) // 2
        pairs = zip(totals[:half], totals[half:], strict=True)
        return [total / count if count else math.nan for total, count in pairs]

    def _micro_batch(self, batch: Batch, dropout_seeds: Tensor | None) -> MicroBatch:
        """The tensors of a batch that the model reads, on the device: of this rank's tokens."""
        labels = self._place(batch.labels)
        # Check on the host, where the mask still is; checking on the device would synchronize.
        if not bool((batch.loss_mask != 0).all()):
            labels = labels.masked_fill(self._place(batch.loss_mask) == 0, IGNORED)
        micro_batch = MicroBatch(self._place(batch.tokens), labels, dropout_seeds=dropout_seeds)
        if self.config.data.reset_at_document_ends:
            micro_batch = replace(
                micro_batch,
                positions=self._place(batch.positions),
                document_ids=self._place(batch.document_ids),
            )
        return micro_batch.part(self.context.context_part)

    def _place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device.

        A loader's batches are in pinned memory, so the copy overlaps with running kernels.
        """
        return tensor.to(self.context.device, non_blocking=True)

    def _counted_tokens(self, batches: Sequence[Batch]) -> int:
        """Number of tokens whose loss this rank computes; 0 unless it holds the last stage."""
        if self.pipeline is not None and not self.pipeline.holds_last:
            return 0
        return sum(int((self._own_mask(batch) != 0).sum()) for batch in batches)

    def _own_mask(self, batch: Batch) -> Tensor:
        """The loss mask [B, S] of this rank's tokens."""
        return self.context.context_part.cut(batch.loss_mask)

    def seeds_of(self, step: int, batch: Batch) -> Tensor | None:
        """The seeds of one micro-batch's dropout [1, branches + 1, 7]; None without dropout.

        Masks are a function of the run's seed, the step, the sample, the position and the place in
        the model, so that they are the same in every layout.
        """
        model = self.config.model
        if model.dropout == 0.0:
            return None
        sequence = self.context.sequence
        context_part = self.context.context_part
        # Sequence parallelism divides what a context rank holds.
        first = sequence.index * sequence.length(context_part.length(model.seq_length))
        rows = context_part.rows(first, model.seq_length)
        seed = kernels.dropout_seed(
            # Drop one of 64 bits to fit a non-negative int64.
            mix(self.config.training.seed ^ mix(step)) >> 1,
            batch=len(batch.tokens),
            first_sample=int(batch.sample_ids[0]),
            seq_length=model.seq_length,
            start=rows.start,
            turn=rows.turn,
            second_start=rows.second_start,
        )
        seeds = dropout_seeds(seed, model.num_layers * len(BRANCHES))
        return self._place(seeds[None])


@contextmanager
def naming_work(work: str) -> Iterator[None]:
    """Add the step, or other work, to what a layer says of experts that do not fit.

    A pipeline schedule wraps what a stage raises.
    """
    try:
        yield
    except (ExpertsDoNotFit, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ExpertsDoNotFit):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ExpertsDoNotFit(f"{work}, {cause}") from None


def mix(value: int) -> int:
    """The finalizer of SplitMix64: neighbouring integers give unrelated ones, in [0, 2^64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
