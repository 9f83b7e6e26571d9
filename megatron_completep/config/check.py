"""The rules between several settings, which hold before any device is touched.

Every message gives numbers and a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from megatron_completep.config import derived
from megatron_completep.config.context_rules import context_problems
from megatron_completep.config.data_rules import source_problems, tokenizer_problems
from megatron_completep.config.float8_rules import float8_problems
from megatron_completep.config.graph_rules import graph_problems
from megatron_completep.config.moe_rules import moe_problems
from megatron_completep.config.optimizer_rules import decay_problems, muon_problems
from megatron_completep.config.remedies import (
    VALUES,
    Choice,
    Problem,
    all_divisors,
    raise_problems,
)
from megatron_completep.config.rope_section import rope_problems
from megatron_completep.config.schema import Config
from megatron_completep.config.sharding_rules import sharding_problems
from megatron_completep.config.world_rules import world_problems


def check_config(config: Config) -> None:
    """Check everything that does not depend on the number of processes.

    Raises:
        ConfigError: with all problems, one a line.
    """
    raise_problems(config, _config_problems)


def check_world(config: Config, world_size: int) -> None:
    """Check everything, including what depends on the number of processes, known only at launch.

    Args:
        world_size: all processes of the run.

    Raises:
        ConfigError: with all problems, one a line.
    """

    def problems_of(changed: Config) -> list[Problem]:
        return [*_config_problems(changed), *world_problems(changed, world_size)]

    raise_problems(config, problems_of)


def _config_problems(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    for rule in RULES:
        problems += rule(config)
    return problems


def _model(config: Config) -> Iterator[Problem]:
    """The heads of the model, and settings that nothing of it uses."""
    model = config.model
    heads = model.num_attention_heads
    groups = derived.num_query_groups(model)
    if model.head_dim is None and model.hidden_size % heads:
        yield Choice(
            f"model.num_attention_heads = {heads} does not divide "
            f"model.hidden_size = {model.hidden_size}. Use {VALUES}, or set model.head_dim.",
            "model.num_attention_heads",
            all_divisors(model.hidden_size),
            near=heads,
        )
    # Without a whole head size there is no number of elements to be even.
    elif model.position == "rope" and derived.head_dim(model) % 2:
        yield (
            "model.position = rope turns pairs of elements, but a head has "
            f"{derived.head_dim(model)}. Use an even model.head_dim."
        )
    if heads % groups:
        yield Choice(
            f"model.num_query_groups = {model.num_query_groups} does not divide "
            f"model.num_attention_heads = {heads}. Use {VALUES}.",
            "model.num_query_groups",
            all_divisors(heads),
            near=groups,
        )

    yield from rope_problems(model)
    if model.bias and model.qkv_bias is False:
        yield (
            "model.qkv_bias = false, but model.bias = true gives all linear layers biases. "
            "Leave model.qkv_bias null, or set model.bias to false."
        )

    # Settings that would be read but have nothing to act on.
    if model.tied_embeddings and "unembedding" in config.completep.factors:
        yield (
            "completep.factors.unembedding has no parameter: model.tied_embeddings = true shares "
            "the embedding's weight. Move the factors to completep.factors.embedding, or untie."
        )
    precision = config.training.precision
    if model.fp32_residual and precision not in ("bf16", "auto"):
        yield (
            f"model.fp32_residual = true has no meaning under training.precision = {precision}: "
            "the residual stream is in that type already. "
            "Set it to false, or the precision to bf16."
        )


def _attention_backend(config: Config) -> Iterator[Problem]:
    """What the attention kernels that can be asked for by name cannot do."""
    model = config.model
    precision = config.training.precision
    backend = model.attention_backend
    if backend in ("auto", "sdpa"):
        return
    where = f"model.attention_backend = {backend}"
    remedy = "Use model.attention_backend = auto"
    takes_no_bias = backend in ("flash", "flash_attention", "flash_attention_3", "varlen")
    if takes_no_bias and model.position == "alibi":
        yield f"{where} takes no bias on the logits, which model.position = alibi needs. {remedy}."
    # PACKED_BACKENDS take the boundaries of documents instead of a bias.
    if backend in ("flash", "flash_attention_3") and config.data.reset_at_document_ends:
        yield (
            f"{where} takes no bias on the logits, which data.reset_at_document_ends = true "
            f"needs. {remedy}, varlen or flash_attention."
        )
    too_wide = ("float64",) if backend == "efficient" else ("float32", "float64")
    if precision in too_wide:
        types = "bf16 or float32" if backend == "efficient" else "bf16"
        yield (
            f"{where} computes in {types} only, but training.precision = {precision}. "
            f"{remedy}, or training.precision = bf16."
        )
    if config.training.device == "cpu":
        yield f"{where} runs on GPUs only, but training.device = cpu. {remedy}."
    # The kernels are compiled for heads up to this size.
    if takes_no_bias and derived.head_dim(model) > 256:
        yield (
            f"{where} takes heads of at most 256 elements, "
            f"but these have {derived.head_dim(model)}. {remedy}."
        )
    if config.training.deterministic and backend in (
        "cudnn",
        "flash_attention",
        "flash_attention_3",
    ):
        yield (
            f"{where} adds in an order that is not fixed, but training.deterministic = true. "
            f"{remedy}, or training.deterministic = false."
        )


def _completep(config: Config) -> Iterator[Problem]:
    """The proxy's shape, and alpha where there is no depth rule."""
    completep = config.completep
    shape = {
        "base_hidden_size": completep.base_hidden_size,
        "base_num_layers": completep.base_num_layers,
    }
    missing_keys = [name for name, size in shape.items() if size is None]
    if len(missing_keys) == 1:
        missing = missing_keys[0]
        present = next(name for name in shape if name != missing)
        model_key = missing.removeprefix("base_")
        yield (
            f"completep.{present} = {shape[present]} is given and completep.{missing} is null. "
            f"Give the proxy's whole shape (this model's own {model_key} is "
            f"{getattr(config.model, model_key)}), or neither."
        )

    # Without the proxy's shape the model is its own proxy, which these two would contradict.
    for name in ("base_ffn_hidden_size", "base_head_dim"):
        size = getattr(completep, name)
        if size is not None and len(missing_keys) == 2:
            yield (
                f"completep.{name} = {size} is given without the proxy's shape. "
                "Give completep.base_hidden_size and base_num_layers too."
            )
    if completep.parameterization != "completep" and completep.alpha != 1.0:
        yield (
            f"completep.alpha = {completep.alpha} has no effect under "
            f"completep.parameterization = {completep.parameterization}, "
            "which has no depth rule. Remove it, or use completep."
        )


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    """The dimensions that tensor ranks divide among themselves."""
    model = config.model
    size = config.parallel.tensor_parallel_size
    groups = derived.num_query_groups(model)
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    # Groups that do not divide the heads are a problem of their own (`_model`).
    if model.num_attention_heads % groups == 0:
        divided["num_query_groups"] = groups
    if config.parallel.sequence_parallel:
        divided["seq_length"] = model.seq_length
    reasons = {
        "num_query_groups": " (each rank holds whole groups of keys and values)",
        "seq_length": " (parallel.sequence_parallel is on)",
    }
    sizes_that_fit = all_divisors(math.gcd(*divided.values()))
    for name, dimension in divided.items():
        # Groups that follow from num_attention_heads would repeat what is said of that.
        repeats = name == "num_query_groups" and model.num_query_groups is None
        if dimension % size and not repeats:
            yield Choice(
                f"parallel.tensor_parallel_size = {size} does not divide "
                f"model.{name} = {dimension}{reasons.get(name, '')}. Use {VALUES}.",
                "parallel.tensor_parallel_size",
                sizes_that_fit,
                near=size,
            )


def _pipeline(config: Config) -> Iterator[Problem]:
    """The pipeline's schedule and chunks, and the stages."""
    parallel = config.parallel
    layers = config.model.num_layers
    ranks = parallel.pipeline_parallel_size
    virtual = parallel.virtual_pipeline_size
    schedule = parallel.schedule
    # The interleaved schedules alternate between a rank's chunks, of which the others have one.
    if ranks > 1 and virtual == 1 and schedule == "interleaved_1f1b":
        remedy = "Use the schedule 1f1b."
        if layers >= 2 * ranks:
            remedy = "Raise it, or use the schedule 1f1b."
        yield (
            "parallel.schedule = interleaved_1f1b needs virtual_pipeline_size of at least 2, "
            f"found 1. {remedy}"
        )
    if virtual > 1 and ranks == 1:
        yield (
            f"parallel.virtual_pipeline_size = {virtual} has no meaning at "
            "parallel.pipeline_parallel_size = 1. Set it to 1."
        )
    elif virtual > 1 and schedule not in ("interleaved_1f1b", "zero_bubble"):
        yield (
            f"parallel.virtual_pipeline_size = {virtual} does not go with "
            f"parallel.schedule = {schedule}. "
            "Use the schedule interleaved_1f1b or zero_bubble, or the size 1."
        )
    yield from _stages(config)


def _stages(config: Config) -> Iterator[Problem]:
    """The division of the layers over the stages of the pipeline."""
    parallel = config.parallel
    layers = config.model.num_layers
    ranks = parallel.pipeline_parallel_size
    virtual = parallel.virtual_pipeline_size
    stages = ranks * virtual
    product = f"parallel.pipeline_parallel_size x virtual_pipeline_size = {ranks} x {virtual}"
    split = parallel.pipeline_split
    if split is None:
        if layers < stages:
            yield (
                f"{product} makes {stages} stages of model.num_layers = {layers} layers. "
                f"Use at most {layers} stages."
            )
        return
    if len(split) != stages:
        yield (
            f"parallel.pipeline_split has {len(split)} stages, but {product} makes {stages}. "
            "Give one number a stage."
        )
    if sum(split) != layers:
        yield (
            f"parallel.pipeline_split = {split} adds up to {sum(split)}, "
            f"but model.num_layers = {layers}. Make the two equal."
        )
    # The ends have work without a layer: the embedding, and the loss.
    if 0 in split[1:-1]:
        yield (
            f"parallel.pipeline_split = {split} leaves a stage in the middle empty. "
            "Only the first and the last may have 0 layers."
        )


def _schedule(config: Config) -> Iterator[Problem]:
    """The moments, and the learning rate over the steps."""
    optimizer = config.optimizer
    steps = config.training.train_steps
    for index, beta in enumerate(optimizer.betas):
        if beta >= 1:
            yield (
                f"optimizer.betas.{index} = {beta} is not less than 1, "
                "so the moment would never move. Use a value such as 0.9 or 0.95."
            )
    if optimizer.warmup_fraction is not None and optimizer.warmup_steps is not None:
        yield (
            f"optimizer.warmup_fraction = {optimizer.warmup_fraction} and "
            f"optimizer.warmup_steps = {optimizer.warmup_steps} "
            "are both given. Set one of the two to null."
        )
        # Which of the two is meant is not known, so there is nothing to compare with the steps.
        return

    warmup = derived.warmup_steps(optimizer, steps)
    decay = derived.decay_steps(optimizer, steps)
    decays_at_end = optimizer.schedule == "warmup_stable_decay"
    if warmup > steps:
        most = steps - decay if decays_at_end else steps
        yield (
            f"optimizer.warmup_steps = {warmup} is more than training.train_steps = {steps}. "
            f"Use at most {most}."
        )
    elif decays_at_end and warmup + decay > steps:
        # Rounded down, so that the number shown is one that fits.
        most_decay = math.floor((steps - warmup) / steps * 1000) / 1000
        yield (
            f"optimizer: {warmup} steps of warm-up and {decay} of decay "
            f"(decay_fraction = {optimizer.decay_fraction}) "
            f"are more than training.train_steps = {steps}. "
            f"Use a decay_fraction of at most {most_decay}."
        )


def _training(config: Config) -> Iterator[Problem]:
    """The batch, in whole micro-batches."""
    micro = config.training.micro_batch_size
    samples = config.training.global_batch_size
    if samples % micro:
        yield Choice(
            f"training.micro_batch_size = {micro} does not divide "
            f"training.global_batch_size = {samples}. Use {VALUES}.",
            "training.micro_batch_size",
            all_divisors(samples),
            near=micro,
        )


def _validation(config: Config) -> Iterator[Problem]:
    """The parts of the sequence whose losses a validation records."""
    count = config.training.validation_positions
    length = config.model.seq_length
    if count and length % count:
        yield Choice(
            f"training.validation_positions = {count} does not divide "
            f"model.seq_length = {length}. Use {VALUES}, or 0.",
            "training.validation_positions",
            all_divisors(length),
            near=count,
        )


def _batch_ramp(config: Config) -> Iterator[Problem]:
    """The batch sizes on the way to the final one."""
    training = config.training
    ramp = training.batch_ramp
    if ramp is None:
        return
    final = training.global_batch_size
    micro = training.micro_batch_size
    multiples_of_micro = range(micro, final, micro)
    if ramp.start >= final:
        yield Choice(
            f"training.batch_ramp.start = {ramp.start} is not less than "
            f"training.global_batch_size = {final}. Use {VALUES}, or batch_ramp = null.",
            "training.batch_ramp.start",
            multiples_of_micro,
            near=ramp.start,
        )
    elif (final - ramp.start) % ramp.increment:
        yield Choice(
            f"training.batch_ramp.increment = {ramp.increment} does not lead from "
            f"start = {ramp.start} to training.global_batch_size = {final}. Use {VALUES}.",
            "training.batch_ramp.increment",
            all_divisors(final - ramp.start),
            near=ramp.increment,
        )

    # Every size of the ramp is then a whole number of micro-batches.
    for name, samples in (("start", ramp.start), ("increment", ramp.increment)):
        if samples % micro:
            path = f"training.batch_ramp.{name}"
            yield Choice(
                f"{path} = {samples} is not a multiple of training.micro_batch_size = {micro}. "
                f"Use {VALUES}.",
                path,
                multiples_of_micro,
                near=samples,
                around=True,
            )
    if ramp.steps > training.train_steps:
        yield (
            f"training.batch_ramp.steps = {ramp.steps} is more than "
            f"training.train_steps = {training.train_steps}, so training.global_batch_size, "
            "from which CompleteP scales, is never reached. "
            f"Use at most {training.train_steps}."
        )


def _step_numbers(config: Config) -> Iterator[Problem]:
    """Settings that name steps name steps of the run."""
    steps = config.training.train_steps
    for index, skipped in enumerate(config.training.skip_steps):
        first_step = skipped.first
        last_step = skipped.last or skipped.first
        # A reversed range would skip nothing, without a word.
        if last_step < first_step:
            remedy = "Exchange them."
            if first_step > steps:
                remedy = f"Exchange them; none may be after training.train_steps = {steps}."
            yield (
                f"training.skip_steps.{index}: last = {last_step} is less than "
                f"first = {first_step}. {remedy}"
            )
        elif last_step > steps:
            yield (
                f"training.skip_steps.{index}: step {last_step} is after "
                f"training.train_steps = {steps}. Use at most {steps}."
            )

    # A window that ends after the run would never be written.
    profiling = config.profiling
    first_profiled = profiling.first_step
    if first_profiled is not None and first_profiled + profiling.steps - 1 > steps:
        latest_begin = max(1, steps - profiling.steps + 1)
        yield (
            f"profiling.first_step = {first_profiled} and profiling.steps = {profiling.steps} "
            f"end after training.train_steps = {steps}. "
            f"Begin at {latest_begin} or earlier, and record at most {steps} steps."
        )


def _guards(config: Config) -> Iterator[Problem]:
    """What the guards need of the time-outs and of the data's order."""
    guards = config.guards
    hang_minutes = guards.hang_timeout_minutes
    collective_minutes = config.parallel.timeout_minutes
    # Both count while a collective does not end; only the watchdog can say which rank is missing.
    if hang_minutes is not None and hang_minutes > collective_minutes:
        least = _plain(hang_minutes)
        yield (
            f"guards.hang_timeout_minutes = {least} is more than "
            f"parallel.timeout_minutes = {_plain(collective_minutes)}: the collective's "
            "time-out would end a hang first, and name no rank. "
            f"Use a timeout_minutes of at least {least}."
        )
    if guards.rollback_threshold is not None and config.data.order == "megatron":
        yield (
            f"guards.rollback_threshold = {guards.rollback_threshold:g} does not go with "
            "data.order = megatron, whose tables hold the run's samples and none in place of "
            "those left out. Use data.order = permutation, or rollback_threshold = null."
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    """The snapshots on local disks, and the checkpoints that are kept for good."""
    checkpoint = config.checkpoint
    has_folder = checkpoint.local_dir is not None
    has_interval = checkpoint.local_interval is not None
    if has_folder != has_interval:
        present = "local_dir" if has_folder else "local_interval"
        missing = "local_interval" if has_folder else "local_dir"
        yield (
            f"checkpoint.{present} is set without checkpoint.{missing}. "
            "Set both for snapshots on each node's own disk, or neither."
        )
    # Kept for good are the checkpoints whose step is a multiple of both.
    interval = checkpoint.interval
    keep_every = checkpoint.keep_every
    if interval is not None and keep_every is not None and keep_every % interval:
        multiple = max(1, keep_every // interval) * interval
        yield (
            f"checkpoint.keep_every = {keep_every} is not a multiple of "
            f"checkpoint.interval = {interval}, so it would keep almost none. "
            f"Use {multiple} or another multiple."
        )


def _plain(number: float) -> str:
    """A number as it stands in a file, every digit of it."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


# In the order in which their problems are listed.
RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _model,
    _attention_backend,
    _completep,
    _tensor_parallel,
    context_problems,
    moe_problems,
    _pipeline,
    _schedule,
    muon_problems,
    decay_problems,
    source_problems,
    tokenizer_problems,
    _training,
    _validation,
    _batch_ramp,
    graph_problems,
    sharding_problems,
    float8_problems,
    _step_numbers,
    _checkpoint,
    _guards,
)
