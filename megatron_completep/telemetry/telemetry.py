"""Parameterization telemetry: does a large run keep the sizes that its proxy had?

Every `logging.parameterization_interval` steps a fixed micro-batch is run forward once more and these figures join the step's row:

    activation_rms/NAME     root mean square of the residual stream where the norm NAME reads it (by block, and `final`)
    update_ratio/ROLE       RMS of the last update over RMS of the weights, each parameter divided by its factors of the table
    attention_logit_max     largest attention logit of the micro-batch's first sequence, over all layers and heads

The table predicts how each differs between proxy and target, and that is divided out: all are to be the same at both. Beside the rows
of a proxy's run (`logging.parameterization_reference`), an alarm line says which one left its band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.data.loader import Batch
from megatron_completep.errors import DataError
from megatron_completep.kernels import read_control
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.run.hook import Hook, StepRecord
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.measure import (
    StreamTaps,
    SumOfSquares,
    layer_entries,
    reduce_stream_sums,
)
from megatron_completep.telemetry.metrics import read_metrics

FINAL, LOGITS, UPDATE = "activation_rms/final", "attention_logit_max", "update_ratio/"
BANDS = {
    FINAL: 2.0,
    LOGITS: 3.0,
    UPDATE: 2.0,
}  # largest factor, up or down, between target and proxy
Say = Callable[[str], None]


class Telemetry(Hook):
    """Adds sizes of activations and updates. `probe`: this data rank's micro-batches of the extra forward pass."""

    def __init__(
        self,
        step: TrainingStep,
        probe: Sequence[Batch],
        interval: int,
        train_steps: int,
        reference: Mapping[float, Any] | None,
        say: Say,
    ):
        self._step, self._probe, self._interval, self._train_steps = (
            step,
            probe,
            interval,
            train_steps,
        )
        self._reference, self._say = reference, say
        chunks = step.passes.chunks
        self._streams, self._logits = StreamTaps(chunks), LogitTaps(chunks)
        # The stream is told where layers begin, and at its end.
        self._told: set[str | None] = {self._streams.final_site}
        for chunk in chunks:
            self._told.update(layer_entries(chunk))

    def due(self, step: int) -> bool:
        return step % self._interval == 0 or step == self._train_steps

    def after_step(self, record: StepRecord) -> None:
        if not self.due(record.state.step) or record.figures.skipped:
            return
        figures = self.figures()
        record.parameterization = figures
        if self._reference:
            for alarm in alarms(
                figures, nearest(self._reference, record.state.step / self._train_steps)
            ):
                self._say(f"warning: step {record.state.step}: {alarm}")

    def figures(self) -> dict[str, float]:
        """All figures of the model as it stands, the same on every rank. Communicates over every axis."""
        context = self._step.context
        with self._streams.recording() as taps, self._logits.recording() as logits:
            self._step.evaluate(self._probe)
        told = {name: tensors for name, tensors in taps.streams.items() if name in self._told}
        sizes = reduce_stream_sums(
            {name: SumOfSquares.of(tensors) for name, tensors in told.items()}, context
        )
        *layers, (_, final) = sizes.items()
        named = {f"activation_rms/{name}": value for name, value in layers}
        return {
            **named,
            FINAL: final,
            LOGITS: largest(logits.values, context),
            **update_ratios(self._step.optimizer),
        }


class LogitTaps:
    """The largest attention logit of the first sequence of each forward pass, a head at a time."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.values: list[Tensor] = []
        self._recording = False
        for module in (m for chunk in chunks for m in chunk.modules() if isinstance(m, Attention)):
            module.register_forward_pre_hook(self._look)

    def recording(self) -> LogitTaps:
        self.values = []
        return self

    def __enter__(self) -> LogitTaps:
        self._recording = True
        return self

    def __exit__(self, *_: object) -> None:
        self._recording = False

    @torch.no_grad()
    def _look(self, attention: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if not self._recording:
            return
        assert isinstance(attention, Attention)
        x, inputs = arguments
        first = AttentionInputs(
            *(part if part is None else part[:, :1] for part in (inputs.cos, inputs.sin))
        )
        q, k, _ = attention._heads(attention.qkv(x[:, :1].contiguous()), first)
        shared = attention.num_heads // attention.num_groups
        length = q.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        heads = (q[0, head] @ k[0, head // shared].t() for head in range(attention.num_heads))
        self.values += [
            (scores.float() * attention.scale).masked_fill(future, -math.inf).max()
            for scores in heads
        ]


def largest(values: Sequence[Tensor], context: ParallelContext) -> float:
    """The maximum over all ranks."""
    own = torch.stack(list(values)).max() if values else torch.full((), -math.inf)
    return float(all_reduce(own.double().to(context.device), context.world, dist.ReduceOp.MAX))


def update_ratios(optimizer: DistributedOptimizer) -> dict[str, float]:
    """By role: RMS of the last update over RMS of the weights, with the table's factors of both divided out.

    The rule says what its last update was, without the groups' own learning-rate factors. Communicates over the whole mesh.
    """
    groups, roles = list(optimizer.groups.values()), list(Role)
    step = read_control(optimizer.control)
    sums = torch.zeros(len(roles), 2, dtype=torch.float64, device=optimizer.context.device)
    for start, size, index in optimizer.shards.counted_table.tolist():
        group, part = groups[index], slice(start, start + size)
        weight = optimizer.shards.master[part]
        update = optimizer.rule.last_update(weight, part, group, step)
        spread = (
            group.init_std / optimizer.config.base_init_std or 1.0
        )  # constant roles start at 1 or 0 whatever the shape
        row = sums[roles.index(group.role)]
        row[0] += torch.linalg.vector_norm(update, dtype=torch.float64).square()
        row[1] += (torch.linalg.vector_norm(weight, dtype=torch.float64) / spread).square()
    sums = all_reduce(sums, optimizer.context.world)
    return {
        f"{UPDATE}{role}": math.sqrt(u / w)
        for role, (u, w) in zip(roles, sums.tolist(), strict=True)
        if w
    }


def read_reference(path: str | None) -> dict[float, Any] | None:
    """The proxy's figures by fraction of its run, from its output folder or metrics.jsonl. DataError where it holds none."""
    if path is None:
        return None
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        rows = read_metrics(file)
    except OSError as error:
        raise DataError(
            f"logging.parameterization_reference: {file} cannot be read: {error.strerror}. Give the proxy's output_dir."
        ) from error
    last = max((row["step"] for row in rows), default=1)
    found = {row["step"] / last: row for row in rows if FINAL in row}
    if not found:
        raise DataError(
            f"logging.parameterization_reference: {file} has no telemetry. Run the proxy with logging.parameterization_interval set."
        )
    return found


def nearest(reference: Mapping[float, Any], fraction: float) -> Mapping[str, Any]:
    """The proxy's row at the nearest part of its run."""
    return reference[min(reference, key=lambda at: abs(at - fraction))]


def alarms(figures: Mapping[str, float], proxy: Mapping[str, Any]) -> list[str]:
    """What left its band beside the proxy's figures, in words."""
    found = []
    for name, value in figures.items():
        band = next((factor for prefix, factor in BANDS.items() if name.startswith(prefix)), None)
        expected = proxy.get(name)
        if band is None or not isinstance(expected, int | float) or expected <= 0:
            continue
        ratio = value / expected
        if not 1 / band <= ratio <= band:
            found.append(
                f"{name} = {value:.3g} is {ratio:.2f} times the proxy's {expected:.3g}; the table predicts 1, alarm beyond {band:g}"
            )
    return found
