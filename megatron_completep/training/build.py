"""The parts of a run, built from its configuration, in the order in which `pretrain` needs them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_completep.config import save_config
from megatron_completep.config.derived import PACKED_BACKENDS, total_samples
from megatron_completep.config.schema import Config
from megatron_completep.data.beginning import beginning_lines
from megatron_completep.data.corpus import has_validation
from megatron_completep.data.loader import (
    Batch,
    Loader,
    ValidationBatches,
    build_loader,
    validation_batches,
)
from megatron_completep.data.run_tokenizer import keep_tokenizer, with_readable_tokenizer
from megatron_completep.errors import ConfigError
from megatron_completep.model.compile import idle_reason
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.model.gpt import GPT
from megatron_completep.model.layer_graph import LAYERS_A_GRAPH, SERVED
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.hook import Hook
from megatron_completep.run.starts import STARTS, append_start
from megatron_completep.run.state import Checkpointer, RunState
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.metrics import METRICS, open_sinks
from megatron_completep.telemetry.profiling import Profiler
from megatron_completep.telemetry.telemetry import Telemetry, read_reference
from megatron_completep.telemetry.trackers import Sink
from megatron_completep.training.balance import balance_warning
from megatron_completep.training.hooks import CheckpointFigures, Checkpoints, Metrics, Validation
from megatron_completep.training.routing_check import check_routing

Say = Callable[[str], None]
CONFIG = "config.yaml"


def prepare_output(config: Config) -> None:
    """Make the run's folder. Called on rank 0 only.

    Raises ConfigError if the folder cannot be written to, or if something that is not a regular
    file stands in the place of one of the run's files.
    """
    folder = Path(config.training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"training.output_dir = {folder} cannot be made: {error.strerror}. "
            "Choose a folder that can."
        ) from None
    # Checked now and not with the first metrics: set-up takes minutes on a large job.
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"training.output_dir = {folder} cannot be written to. "
            "Choose another folder or change its permissions."
        )
    for path in (folder / CONFIG, folder / STARTS, folder / METRICS):
        # Opening a pipe would wait for somebody at its other end.
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"{path} is no regular file, and the run keeps one there. "
                "Move it away, or choose another training.output_dir."
            )


def keep_run_tokenizer(config: Config, say: Say) -> None:
    """Copy the tokenizer to the run's folder, after the data were compared with it.

    What could not be compared is said. Called on rank 0 only.
    """
    folder = Path(config.training.output_dir)
    # At a restart the original may be gone; then the copy that an earlier start made stands for it.
    data = with_readable_tokenizer(config.data, folder)
    for line in beginning_lines(data):
        say(line)
    message = keep_tokenizer(data.tokenizer, folder)
    if message:
        say(message)


def record_start(config: Config, state: RunState) -> None:
    """Save the resolved configuration in the run's folder, and add this start to its record.

    Called on rank 0 only, and only when the checkpoint is loaded: a start that is refused (another
    model's checkpoint) must replace nothing. Raises ConfigError if the files cannot be written, and
    DataError if the record of earlier starts cannot be read.
    """
    folder = Path(config.training.output_dir)
    save_config(config, folder / CONFIG)
    try:
        append_start(folder, config, state)
    except OSError as error:
        raise ConfigError(
            f"{folder / STARTS} cannot be written: {error.strerror}. "
            "Choose another folder or free some space."
        ) from None


def message_if_complete(config: Config, state: RunState) -> str | None:
    """The message for a run that has reached its last step already; None if steps remain."""
    training = config.training
    if state.step >= training.train_steps:
        return (
            f"nothing to do: step {state.step} of {training.train_steps}. "
            f"To go on, raise training.train_steps above {state.step}."
        )
    # This only ends a start early: the schedule goes on by train_steps.
    if training.stop_at_step is not None and state.step >= training.stop_at_step:
        return (
            f"nothing to do: step {state.step}, and training.stop_at_step = "
            f"{training.stop_at_step}. Without it the run goes on."
        )
    return None


def build_training_loader(config: Config, context: ParallelContext) -> Loader:
    """Training batches of this data rank, from the first sample."""
    return build_loader(
        with_readable_tokenizer(config.data, Path(config.training.output_dir)),
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        train_steps=config.training.train_steps,
        total_samples=total_samples(config.training),
        vocab_size=config.model.vocab_size,
        data_rank=context.data.rank,
        data_size=context.data.size,
        # The copy of a batch to a GPU runs beside its kernels only from pinned memory.
        pin_memory=context.device.type == "cuda",
    )


def build_validation(config: Config, context: ParallelContext) -> ValidationBatches | None:
    """The fixed validation samples of this data rank; None if the configuration names none."""
    if not has_validation(config.data):
        return None
    return validation_batches(
        with_readable_tokenizer(config.data, Path(config.training.output_dir)),
        samples=config.training.validation_samples,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        vocab_size=config.model.vocab_size,
        data_rank=context.data.rank,
        data_size=context.data.size,
    )


def default_hooks(
    config: Config,
    context: ParallelContext,
    step: TrainingStep,
    validation: ValidationBatches | None,
    checkpointer: Checkpointer,
    state: RunState,
    precision: torch.dtype,
    say: Say,
) -> list[Hook]:
    """Profiler, validation, telemetry, metrics and checkpoints, as the configuration asks."""
    training = config.training
    hooks: list[Hook] = []
    if config.profiling.first_step is not None and context.rank in config.profiling.ranks:
        hooks.append(Profiler(config.profiling, context, Path(training.output_dir), say))
    if validation is not None:
        hooks.append(Validation(step, validation, training, say))
    if config.logging.parameterization_interval is not None:
        hooks.append(
            build_telemetry(config, context, step, config.logging.parameterization_interval, say)
        )

    # A function is handed on and not the sinks: a rollback opens them again at an earlier step.
    def open_at(step: int) -> list[Sink]:
        return open_sinks(config, step, say) if context.is_first else []

    name = device_name(context.device)
    # Known from the start, so that a run that does no step does not save again.
    saved_step = max(checkpointer.settled_steps(), default=0)
    checkpoint = config.checkpoint
    hooks.append(CheckpointFigures(checkpointer))
    hooks.append(Metrics(config, context, name, precision, open_at, state.step))
    hooks.append(
        Checkpoints(checkpointer, checkpoint.interval, saved_step, checkpoint.local_interval)
    )
    return hooks


def build_telemetry(
    config: Config, context: ParallelContext, step: TrainingStep, interval: int, say: Say
) -> Telemetry:
    """The hook that measures the parameterization, always on the run's first micro-batch."""
    probe = first_step(config, context)[:1]
    reference = read_reference(config.logging.parameterization_reference)
    return Telemetry(step, probe, interval, config.training.train_steps, reference, say)


def first_step(config: Config, context: ParallelContext) -> list[Batch]:
    """The micro-batches of this data rank in the run's first step."""
    # Only one step is needed, and a background worker would read more.
    data_without_prefetch = config.data.model_copy(update={"prefetch": 0})
    config_of_probe = config.model_copy(update={"data": data_without_prefetch})
    # A new loader begins with the run's first sample, so that figures of all starts compare.
    with build_training_loader(config_of_probe, context) as loader:
        return loader.next_step()


def check_first_step(
    config: Config, context: ParallelContext, step: TrainingStep, state: RunState, say: Say
) -> None:
    """Say what is known of the run's first step before it is done.

    Raises ConfigError as `check_routing` does, which communicates over the whole mesh.
    """
    warn_of_imbalance(config, context, say)
    if state.step:
        say(f"resumed after step {state.step}")
    # Only fresh routers can be tied; each rank has read the same state.
    elif config.model.moe is not None:
        check_routing(config, context, step, first_step(config, context), say)


def warn_of_imbalance(config: Config, context: ParallelContext, say: Say) -> None:
    """Say where documents leave context ranks with unequal work; the first rank looks at its own.

    Only backends that are told where documents begin leave out those that a query does not see.
    """
    skips_keys = config.model.attention_backend in PACKED_BACKENDS
    if not (context.is_first and config.data.reset_at_document_ends and skips_keys):
        return
    if context.context.size == 1:
        return
    warning = balance_warning(first_step(config, context), context.context.size)
    if warning is not None:
        say(f"warning: {warning}")


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def describe_run(
    config: Config,
    context: ParallelContext,
    precision: torch.dtype,
    threads: int,
    chunks: Sequence[GPT],
    products: str,
) -> str:
    """Where and on what the run trains, in a few lines.

    products: the library that computes the matrix products.
    """
    model = config.model
    training = config.training
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    # The count is that of this rank, which has the whole model only if nothing is split.
    model_is_split = context.tensor.size * context.pipeline.size * context.expert_size > 1
    where = "parameters on this rank" if model_is_split else "parameters"
    flops = training_flops_per_token(model) / 1e6

    place = device_name(context.device)
    if context.device.type == "cpu":
        place += f", {threads} threads"
    processes = "process" if context.world_size == 1 else "processes"
    dtype = str(precision).removeprefix("torch.")
    sharing = f" x context {context.context.size}" if context.context.size > 1 else ""
    if context.expert_size > 1:
        sharing += f", experts over {context.expert_size}"

    ramp = ""
    if training.batch_ramp:
        ramp = f" (from {training.batch_ramp.start} in the first {training.batch_ramp.steps})"

    return (
        f"{model.num_layers} layers x {model.hidden_size}, {parameters:,} {where}, "
        f"{flops:,.1f} MFLOP a token\n"
        f"{context.world_size} {processes} on {place}, {dtype}, products by {products}; "
        f"tensor {context.tensor.size} x pipeline {context.pipeline.size} "
        f"x data {context.data.size}{sharing}\n"
        f"{training.train_steps} steps of {training.global_batch_size}{ramp} "
        f"x {model.seq_length} tokens -> {training.output_dir}"
        + "".join(_compiled(config, context, precision, chunks))
        + "".join(_warnings(config, context, precision))
    )


def _compiled(
    config: Config, context: ParallelContext, precision: torch.dtype, chunks: Sequence[GPT]
) -> Iterator[str]:
    """A line that says what training.compile compiles, if anything."""
    if not config.training.compile or idle_reason(context.device, precision) is not None:
        return
    for chunk in chunks[:1]:  # all are alike
        reason = chunk.graphs_idle
        if precision not in SERVED:
            reason = "not in float32 or bf16"
        elif config.data.reset_at_document_ends:
            reason = "data.reset_at_document_ends"
        elif chunk.layer_graphs is not None and chunk.layer_graphs.hooked:
            reason = "modules wait for their parameters, or are watched"
        if reason is None:
            yield f"\ncompiled: layers, {LAYERS_A_GRAPH} a graph"
        else:
            yield f"\ncompiled: operations between products; no whole layers: {reason}"


def _warnings(config: Config, context: ParallelContext, precision: torch.dtype) -> Iterator[str]:
    """A line for each setting that changes nothing here, or not what it is for."""
    training = config.training
    on_cpu = context.device.type == "cpu"
    reason = idle_reason(context.device, precision)
    if training.compile and reason is not None:
        yield f"\nwarning: training.compile = true changes nothing: {reason}"
    if training.overlap_update and on_cpu:
        yield (
            "\nwarning: training.overlap_update = true changes nothing: a CPU has no second stream"
        )
    if config.parallel.sharding == "gradients" and context.shard.size == 1:
        yield (
            "\nwarning: parallel.sharding = gradients changes nothing: one rank shares with nobody"
        )
    if training.float8 != "none" and on_cpu:
        yield (
            f"\nwarning: training.float8 = {training.float8} is emulated on a CPU, which is slower"
        )
