"""Parameterization telemetry: whether a large run keeps the sizes that its proxy had.

Every `logging.parameterization_interval` steps a fixed micro-batch is run forward once more, and
these figures join the row of the step:

    activation_rms/NAME  root mean square of the residual stream where the norm NAME reads it: by
                         block, and `final`
    update_ratio/ROLE    RMS of the last update over RMS of the weights, each parameter divided by
                         its factors of the table
    attention_logit_max  largest attention logit of the micro-batch's first sequence, over all
                         layers and heads

With experts those of experts.py join them.

The table predicts by how much each differs between proxy and target, and that is divided out: all
should be the same at both. Beside the rows of a proxy's run (`logging.parameterization_reference`),
an alarm line says which one left its band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.data.loader import Batch
from megatron_completep.errors import DataError
from megatron_completep.kernels import read_control
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.optim.groups import Group
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.run.hook import Hook, StepRecord
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.experts import RoutingTaps, expert_figures
from megatron_completep.telemetry.measure import (
    StreamTaps,
    SumOfSquares,
    layer_entries,
    reduce_stream_sums,
    sum_by_role,
)
from megatron_completep.telemetry.metrics import read_metrics

FINAL = "activation_rms/final"
LOGITS = "attention_logit_max"
UPDATE = "update_ratio/"

# Largest factor, up or down, between target and proxy.
BANDS = {FINAL: 2.0, LOGITS: 3.0, UPDATE: 2.0}

PIECE_ELEMENTS = 1 << 24  # 64 MiB of a float32 state

Say = Callable[[str], None]


class Telemetry(Hook):
    """Adds the sizes of activations and updates."""

    def __init__(
        self,
        step: TrainingStep,
        probe: Sequence[Batch],
        interval: int,
        train_steps: int,
        reference: Mapping[float, Any] | None,
        say: Say,
    ):
        """probe: this data rank's micro-batches of the extra forward pass.

        reference: the proxy's rows by fraction of its run.
        """
        self._step = step
        self._probe = probe
        self._interval = interval
        self._train_steps = train_steps
        self._reference = reference
        self._say = say
        chunks = step.forward_backward.chunks
        self._streams = StreamTaps(chunks)
        self._logits = LogitTaps(chunks)
        self._routing = RoutingTaps(chunks)
        # The stream is reported where layers begin, and at its end.
        self._reported_sites: set[str | None] = {self._streams.final_site}
        for chunk in chunks:
            self._reported_sites.update(layer_entries(chunk))

    def due(self, step: int) -> bool:
        return step % self._interval == 0 or step == self._train_steps

    def after_step(self, record: StepRecord) -> None:
        step = record.state.step
        if not self.due(step) or record.figures.skipped:
            return
        figures = self.figures()
        record.parameterization = figures
        if self._reference:
            # Sizes change in training, so that equal parts of the two runs are compared.
            row_of_proxy = nearest(self._reference, step / self._train_steps)
            for alarm in alarms(figures, row_of_proxy):
                self._say(f"warning: step {step}: {alarm}")

    def figures(self) -> dict[str, float]:
        """All figures of the model as it stands, the same on every rank.

        Communicates over every axis.
        """
        context = self._step.context
        routing = self._routing
        streams = self._streams.recording()
        with streams as taps, self._logits.recording() as logits, routing.recording():
            self._step.evaluate(self._probe)
        sums = {
            name: SumOfSquares.of(tensors)
            for name, tensors in taps.streams.items()
            if name in self._reported_sites
        }
        *layers, (_, final) = reduce_stream_sums(sums, context).items()
        activations = {f"activation_rms/{name}": rms for name, rms in layers}
        return {
            **activations,
            FINAL: final,
            LOGITS: largest(logits.maxima, context),
            **update_ratios(self._step.optimizer),
            **expert_figures(routing.sums, self._step.optimizer),
        }


class LogitTaps:
    """The largest attention logit of the first sequence of each forward pass, by head."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.maxima: list[Tensor] = []
        self._attentions: list[Attention] = []
        for chunk in chunks:
            self._attentions += [m for m in chunk.modules() if isinstance(m, Attention)]

    @contextmanager
    def recording(self) -> Iterator[LogitTaps]:
        """Record the forward passes inside the block, and nothing from before it."""
        self.maxima = []
        with ExitStack() as hooks:
            # They do not stay: layers with hooks are not compiled as a whole.
            for attention in self._attentions:
                hooks.enter_context(attention.register_forward_pre_hook(self._look))
            yield self

    @torch.no_grad()
    def _look(self, attention: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(attention, Attention)
        x, inputs = arguments
        first_sequence = AttentionInputs(
            None if inputs.cos is None else inputs.cos[:, :1],
            None if inputs.sin is None else inputs.sin[:, :1],
        )
        # The branch's own projections, with norm and rotation, as it would use them.
        q, k, _ = attention._heads(attention.qkv(x[:, :1].contiguous()), first_sequence)
        part = attention.context_part
        k = part.gather(k.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
        heads_per_group = attention.num_heads // attention.num_groups
        length = k.shape[2]
        places = torch.arange(length, device=q.device)
        future = places > part.places(length, q.device)[:, None]
        # One head at a time, so that one [S, W] matrix is held.
        for head in range(attention.num_heads):
            scores = q[0, head] @ k[0, head // heads_per_group].t()
            logits = (scores.float() * attention.scale).masked_fill(future, -math.inf)
            self.maxima.append(logits.max())


def largest(maxima: Sequence[Tensor], context: ParallelContext) -> float:
    """The maximum over all ranks. Communicates over the whole mesh."""
    # A stage without attention has none.
    local = torch.stack(list(maxima)).max() if maxima else torch.full((), -math.inf)
    return float(all_reduce(local.double().to(context.device), context.world, dist.ReduceOp.MAX))


def update_ratios(
    optimizer: DistributedOptimizer, piece_elements: int = PIECE_ELEMENTS
) -> dict[str, float]:
    """By role: RMS of the last update over RMS of the weights, without the table's factors of both.

    The rule says what its last update was, without the groups' learning-rate factors. Communicates
    over the whole mesh.

    piece_elements: at most so many elements of a segment are looked at together, which bounds the
        memory that an update takes.
    """
    optimizer.wait_for_parameters()
    step = read_control(optimizer.control)
    groups: list[Group] = []  # of the pieces
    measured: list[Tensor] = []  # of each piece, the norms [2] of update and weight
    for _, group, update, weight in optimizer.rule.last_updates(step, piece_elements):
        update_norm = torch.linalg.vector_norm(update, dtype=torch.float64)
        weight_norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
        groups.append(group)
        measured.append(torch.stack([update_norm, weight_norm]))

    # Row of a role: squares of the updates, squares of the weights.
    sums = {role: [0.0, 0.0] for role in Role}
    # The device is waited for once, when everything has been launched.
    sizes = torch.stack(measured).tolist() if measured else []
    for group, (update_size, weight_size) in zip(groups, sizes, strict=True):
        # Gains start at 1 and biases at 0, whatever the shape: there is nothing to divide out.
        init_factor = group.init_std / optimizer.config.base_init_std or 1.0
        sums[group.role][0] += update_size**2
        sums[group.role][1] += (weight_size / init_factor) ** 2

    ratios: dict[str, float] = {}
    for role, (updates, weights) in sum_by_role(sums, optimizer.context).items():
        # No rule moves a balance bias, and what would be shown here is no update of it.
        if weights and role is not Role.BALANCE_BIAS:
            ratios[f"{UPDATE}{role}"] = math.sqrt(updates / weights)
    return ratios


def read_reference(path: str | None) -> dict[float, Any] | None:
    """The figures of a proxy's run, by fraction of that run; None without a path.

    path: its output folder, or its metrics.jsonl. Raises DataError where it holds no telemetry.
    """
    if path is None:
        return None
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        rows = read_metrics(file)
    except OSError as error:
        raise DataError(
            f"logging.parameterization_reference: {file} cannot be read: {error.strerror}. "
            "Give the proxy's output_dir."
        ) from error
    # The proxy has another number of steps: rows are found by fraction of the run.
    last_step = max((row["step"] for row in rows), default=1)
    reference = {row["step"] / last_step: row for row in rows if FINAL in row}
    if not reference:
        raise DataError(
            f"logging.parameterization_reference: {file} has no telemetry. "
            "Run the proxy with logging.parameterization_interval set."
        )
    return reference


def nearest(reference: Mapping[float, Any], fraction: float) -> Mapping[str, Any]:
    """The proxy's row at the nearest part of its run."""
    nearest_fraction = min(reference, key=lambda candidate: abs(candidate - fraction))
    row: Mapping[str, Any] = reference[nearest_fraction]
    return row


def alarms(figures: Mapping[str, float], proxy: Mapping[str, Any]) -> list[str]:
    """A sentence for every figure that left its band around the proxy's."""
    sentences = []
    for name, figure in figures.items():
        band = next((factor for prefix, factor in BANDS.items() if name.startswith(prefix)), None)
        expected = proxy.get(name)
        # What the proxy did not have, or had as 0, gives no ratio.
        if band is None or not isinstance(expected, int | float) or expected <= 0:
            continue
        ratio = figure / expected
        if not 1 / band <= ratio <= band:
            sentences.append(
                f"{name} = {figure:.3g} is {ratio:.2f} times the proxy's {expected:.3g}; "
                f"the table predicts 1, alarm beyond {band:g}"
            )
    return sentences
