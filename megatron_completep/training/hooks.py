"""The hooks of every training run: validation, metrics and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_completep.config.schema import Config, TrainingConfig
from megatron_completep.data.loader import ValidationBatches
from megatron_completep.model.flops import peak_flops, training_flops_per_token
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.hook import (
    AT_POSITIONS,
    BeginRecord,
    Hook,
    Row,
    Stage,
    StepRecord,
    validation_figures,
)
from megatron_completep.run.state import Checkpointer, RunState
from megatron_completep.run.step import TrainingStep, naming_work
from megatron_completep.telemetry.metrics import memory_bytes
from megatron_completep.telemetry.trackers import Sink


class Validation(Hook):
    """Adds `validation_loss`, the cross-entropy alone, at an interval and after the last step.

    Of several sources the loss of each is added, too, and those by position where the configuration
    asks for them.
    """

    def __init__(
        self,
        step: TrainingStep,
        batches: ValidationBatches,
        training: TrainingConfig,
        say: Callable[[str], None],
    ):
        self._step = step
        self._batches = batches
        self._training = training
        self._say = say

    def due(self, step: int) -> bool:
        training = self._training
        return step == training.train_steps or _is_multiple(step, training.validation_interval)

    def before_training(self, record: BeginRecord) -> None:
        # A start that goes on from a checkpoint has the row of step 0 already.
        if self._training.validation_at_start and record.state.step == 0:
            record.figures.update(validation_figures(*self._validate(0)))

    def after_step(self, record: StepRecord) -> None:
        if self.due(record.state.step):
            loss, parts = self._validate(record.state.step)
            record.validation_loss = loss
            record.validation_parts = parts

    def _validate(self, step: int) -> tuple[float, dict[str, float]]:
        """(loss, losses of parts of the tokens by their metrics names); says them on the console.

        The parts are the sources where there are several, and the positions that are asked for.
        """
        started = time.perf_counter()
        batches = self._batches
        names = batches.source_names
        positions = self._training.validation_positions
        by_source: dict[str, float] = {}
        by_position: list[float] = []
        with naming_work(f"validation at step {step}"):
            if len(names) == 1 and not positions:
                # The loss of the only source is the mean itself, and needs no sums by sample.
                loss = self._step.evaluate(batches)
            else:
                loss, losses, by_position = self._step.evaluate_in_parts(
                    batches, batches.source_of, len(names), positions
                )
        if len(names) > 1:
            by_source = dict(zip(names, losses, strict=True))
        seconds = time.perf_counter() - started
        self._say(
            f"validation at step {step}: loss {loss:.4f} "
            f"over {batches.num_samples} sequences ({seconds:.1f} s){_by_source(by_source)}"
        )
        parts = {f"validation_loss/{name}": part_loss for name, part_loss in by_source.items()}
        length = self._step.config.model.seq_length
        for number, part_loss in enumerate(by_position):
            part_length = length // positions
            first = number * part_length
            parts[f"{AT_POSITIONS}{first}-{first + part_length - 1}"] = part_loss
        # A part that has no token that counts has no loss.
        counted = {
            name: part_loss for name, part_loss in parts.items() if not math.isnan(part_loss)
        }
        return loss, counted


def _by_source(losses: Mapping[str, float]) -> str:
    """The rest of a line: the loss of each source."""
    phrases = []
    for name, loss in losses.items():
        phrases.append(f"{name} no token" if math.isnan(loss) else f"{name} {loss:.4f}")
    return f": {', '.join(phrases)}" if phrases else ""


class Metrics(Hook):
    """Turns records into rows and hands them to the sinks, which only the first rank has."""

    stage = Stage.REPORT

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        device_name: str,
        dtype: torch.dtype,
        open_at: Callable[[int], Sequence[Sink]],
        step: int,
    ):
        """open_at: opens the sinks for the rows after a step; the run stands at `step` now."""
        self._config = config
        self._context = context
        self._open_at = open_at
        self._sinks = open_at(step)
        self._flops_per_token = training_flops_per_token(config.model)
        # The tokens per second below are those of all ranks, and so has to be the peak.
        peak_of_device = peak_flops(device_name, dtype)
        # None: the device's peak is not known, so that no utilisation can be told.
        self._peak = peak_of_device * context.world_size if peak_of_device else None

    def before_training(self, record: BeginRecord) -> None:
        if not record.figures:
            return
        state = record.state
        counts = {"consumed_samples": state.consumed_samples, "tokens": state.tokens}
        for sink in self._sinks:
            sink.write({"step": state.step, **counts, **record.figures})

    def after_step(self, record: StepRecord) -> None:
        # Other ranks have no sinks and need no row.
        row = self._row(record) if self._sinks else {}
        for sink in self._sinks:
            sink.write(row)

    def _row(self, record: StepRecord) -> Row:
        state = record.state
        figures = record.figures
        # A step that was passed over read data and computed nothing.
        computed_samples = 0 if figures.passed_over else record.samples
        tokens_per_second = computed_samples * self._config.model.seq_length / record.seconds
        mfu = tokens_per_second * self._flops_per_token / self._peak if self._peak else None
        train_steps = self._config.training.train_steps
        return {
            "step": state.step,
            "loss": figures.loss,
            **figures.terms,
            **record.added_figures(),
            **({"passed_over": True} if figures.passed_over else {}),
            # The rate follows from the step alone, so the device need not be asked.
            "lr": learning_rate(state.step, self._config.optimizer, train_steps),
            "grad_norm": figures.grad_norm,
            "skipped": figures.skipped,
            "consumed_samples": state.consumed_samples,
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "step_seconds": record.seconds,
            "data_wait_seconds": record.data_wait_seconds,
            "memory_bytes": memory_bytes(self._context.device),
        }

    def rewind(self, state: RunState) -> None:
        # Opening them again cuts off the rows of the steps that no longer count.
        self.close()
        self._sinks = self._open_at(state.step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class CheckpointFigures(Hook):
    """Adds what saving cost since the last step.

    `checkpoint_blocked_seconds` stands in the record of the step after a save, and
    `checkpoint_seconds` in that of the step during which it was complete on disk.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def after_step(self, record: StepRecord) -> None:
        record.checkpoint = self._checkpointer.take_figures()


class Checkpoints(Hook):
    """Saves every `interval` steps and when the run ends.

    Between them, every `local_interval` steps, it takes snapshots on the nodes' own disks.
    """

    stage = Stage.SAVE

    def __init__(
        self,
        checkpointer: Checkpointer,
        interval: int | None,
        saved_step: int,
        local_interval: int | None = None,
    ):
        """saved_step: the step of the newest checkpoint on the shared disk."""
        self._checkpointer = checkpointer
        self._interval = interval
        self._local_interval = local_interval
        self._saved_step = saved_step

    def due(self, step: int) -> bool:
        return _is_multiple(step, self._interval) or _is_multiple(step, self._local_interval)

    def after_step(self, record: StepRecord) -> None:
        step = record.state.step
        # A step at which both are due is saved once, on the shared disk.
        if _is_multiple(step, self._interval):
            self._save(record.state)
        elif _is_multiple(step, self._local_interval):
            self._checkpointer.save(record.state, local=True)

    def _save(self, state: RunState) -> None:
        self._checkpointer.save(state)
        self._saved_step = state.step

    def rewind(self, state: RunState) -> None:
        self._saved_step = state.step

    def finish(self, state: RunState) -> None:
        # Not again where the last step was one of the interval's, or where the start did no step.
        if state.step != self._saved_step:
            self._save(state)

    def close(self) -> None:
        self._checkpointer.close()


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
