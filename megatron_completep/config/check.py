"""The rules that concern several settings. They hold before any device is touched; every message gives numbers and a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from megatron_completep.config import derived
from megatron_completep.config.field_errors import one_of
from megatron_completep.config.schema import Config, SourceConfig
from megatron_completep.errors import ConfigError


def check_config(config: Config) -> None:
    """Check everything that does not depend on the number of processes.

    Raises:
        ConfigError: with all problems, one a line.
    """
    rules = (
        _model,
        _attention_backend,
        _compile,
        _completep,
        _tensor_parallel,
        _pipeline,
        _schedule,
        _sources,
        _tokenizer,
        _training,
        _batch_ramp,
        _step_numbers,
        _checkpoint,
        _guards,
    )
    _raise_all([problem for rule in rules for problem in rule(config)])


def check_world(config: Config, world_size: int) -> None:
    """Check what depends on the number of processes, known only at launch.

    Args:
        world_size: all processes of the run.

    Raises:
        ConfigError: with all problems, one a line.
    """
    _raise_all(list(_world(config, world_size)))


def _raise_all(problems: list[str]) -> None:
    if problems:
        count = "1 setting does" if len(problems) == 1 else f"{len(problems)} settings do"
        raise ConfigError("\n  ".join([f"{count} not fit the others", *problems]))


def _model(config: Config) -> Iterator[str]:
    model, heads = config.model, config.model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads = {heads} does not divide model.hidden_size = {model.hidden_size}. "
            f"Use {_divisors(model.hidden_size, near=heads)}, or set model.head_dim."
        )
    elif model.position == "rope" and derived.head_dim(model) % 2:
        yield f"model.position = rope turns pairs of elements, but a head has {derived.head_dim(model)}. Use an even model.head_dim."
    if heads % derived.num_query_groups(model):
        yield (
            f"model.num_query_groups = {model.num_query_groups} does not divide model.num_attention_heads = {heads}. "
            f"Use {_divisors(heads, near=derived.num_query_groups(model))}."
        )
    if model.tied_embeddings and "unembedding" in config.completep.factors:
        yield (
            "completep.factors.unembedding has no parameter: model.tied_embeddings = true shares the embedding's weight. "
            "Move the factors to completep.factors.embedding, or untie."
        )
    if model.fp32_residual and config.training.precision not in ("bf16", "auto"):
        yield (
            f"model.fp32_residual = true has no meaning under training.precision = {config.training.precision}: "
            "the residual stream is in that type already. Set it to false, or the precision to bf16."
        )


def _attention_backend(config: Config) -> Iterator[str]:
    model, training = config.model, config.training
    if model.attention_backend != "flash_attention":
        return
    where, remedy = "model.attention_backend = flash_attention", "Use model.attention_backend = sdpa"
    if model.position == "alibi":
        yield f"{where} takes no bias on the logits, which model.position = alibi needs. {remedy}."
    if training.precision in ("float32", "float64"):
        yield f"{where} computes in bf16 only, but training.precision = {training.precision}. {remedy}, or training.precision = bf16."
    if training.device == "cpu":
        yield f"{where} runs on GPUs only, but training.device = cpu. {remedy}."
    if derived.head_dim(model) > 256:
        yield f"{where} takes heads of at most 256 elements, but these have {derived.head_dim(model)}. {remedy}."


def _completep(config: Config) -> Iterator[str]:
    completep = config.completep
    shape = {name: getattr(completep, name) for name in ("base_hidden_size", "base_num_layers")}
    if len(missing := [name for name, value in shape.items() if value is None]) == 1:
        given = next(name for name in shape if name not in missing)
        own = getattr(config.model, missing[0].removeprefix("base_"))
        yield (
            f"completep.{given} = {shape[given]} is given and completep.{missing[0]} is null. "
            f"Give the proxy's whole shape (this model's own {missing[0].removeprefix('base_')} is {own}), or neither."
        )
    for name in ("base_ffn_hidden_size", "base_head_dim"):
        value = getattr(completep, name)
        if value is not None and len(missing) == 2:
            yield f"completep.{name} = {value} is given without the proxy's shape. Give completep.base_hidden_size and base_num_layers too."
    if completep.parameterization != "completep" and completep.alpha != 1.0:
        yield (
            f"completep.alpha = {completep.alpha} has no effect under completep.parameterization = {completep.parameterization}, "
            "which has no depth rule. Remove it, or use completep."
        )


def _tensor_parallel(config: Config) -> Iterator[str]:
    model, size = config.model, config.parallel.tensor_parallel_size
    where, groups = f"parallel.tensor_parallel_size = {size}", derived.num_query_groups(model)
    divided = {"num_attention_heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_hidden_size}
    if model.num_attention_heads % groups == 0:
        divided["num_query_groups"] = groups
    if config.parallel.sequence_parallel:
        divided["seq_length"] = model.seq_length
    reasons = {
        "num_query_groups": " (each rank holds whole groups of keys and values)",
        "seq_length": " (parallel.sequence_parallel is on)",
    }
    fitting = _all_divisors(math.gcd(*divided.values()))
    for name, value in divided.items():
        follows = name == "num_query_groups" and model.num_query_groups is None  # num_attention_heads says it already
        if value % size and not follows:
            yield f"{where} does not divide model.{name} = {value}{reasons.get(name, '')}. Use {_choice(fitting, size)}."


def _compile(config: Config) -> Iterator[str]:
    flash = config.model.attention_backend == "flash_attention"
    if config.training.compile and flash and config.data.reset_at_document_ends:
        yield (
            "training.compile = true does not go with model.attention_backend = flash_attention and data.reset_at_document_ends = true: "
            "the number of documents, a shape, changes with every micro-batch, and each new one would be compiled anew. "
            "Use model.attention_backend = sdpa, or training.compile = false."
        )


def _pipeline(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    ranks, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    stages = ranks * virtual
    product = f"parallel.pipeline_parallel_size x virtual_pipeline_size = {ranks} x {virtual}"
    if ranks > 1 and virtual == 1 and parallel.schedule == "interleaved_1f1b":
        yield "parallel.schedule = interleaved_1f1b needs virtual_pipeline_size of at least 2, found 1. Raise it, or use the schedule 1f1b."
    if virtual > 1 and ranks == 1:
        yield f"parallel.virtual_pipeline_size = {virtual} has no meaning at parallel.pipeline_parallel_size = 1. Set it to 1."
    elif virtual > 1 and parallel.schedule not in ("interleaved_1f1b", "zero_bubble"):
        yield (
            f"parallel.virtual_pipeline_size = {virtual} does not go with parallel.schedule = {parallel.schedule}. "
            "Use the schedule interleaved_1f1b or zero_bubble, or the size 1."
        )
    split = parallel.pipeline_split
    if split is None and layers < stages:
        yield f"{product} makes {stages} stages of model.num_layers = {layers} layers. Use at most {layers} stages."
    if split is None:
        return
    if len(split) != stages:
        yield f"parallel.pipeline_split has {len(split)} stages, but {product} makes {stages}. Give one number a stage."
    if sum(split) != layers:
        yield f"parallel.pipeline_split = {split} adds up to {sum(split)}, but model.num_layers = {layers}. Make the two equal."
    if 0 in split[1:-1]:
        yield f"parallel.pipeline_split = {split} leaves a stage in the middle empty. Only the first and the last may have 0 layers."


def _schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.training.train_steps
    for index, beta in enumerate(optimizer.betas):
        if beta >= 1:
            yield f"optimizer.betas.{index} = {beta} is not less than 1, so the moment would never move. Use a value such as 0.9 or 0.95."
    if optimizer.warmup_fraction is not None and optimizer.warmup_steps is not None:
        yield (
            f"optimizer.warmup_fraction = {optimizer.warmup_fraction} and optimizer.warmup_steps = {optimizer.warmup_steps} "
            "are both given. Set one of the two to null."
        )
        return
    warmup = derived.warmup_steps(optimizer, steps)
    if warmup > steps:
        yield f"optimizer.warmup_steps = {warmup} is more than training.train_steps = {steps}. Use at most {steps}."
    decay = derived.decay_steps(optimizer, steps)
    if optimizer.schedule == "warmup_stable_decay" and warmup <= steps < warmup + decay:
        yield (
            f"optimizer: {warmup} steps of warm-up and {decay} of decay (decay_fraction = {optimizer.decay_fraction}) "
            f"are more than training.train_steps = {steps}. Use a decay_fraction of at most {(steps - warmup) / steps:.3g}."
        )


def _sources(config: Config) -> Iterator[str]:
    data = config.data
    if data.validation is not None and data.split is not None:
        yield f"data.split = '{data.split}' and data.validation are both given. Set one of the two to null."
    if data.validation == []:
        yield "data.validation = [] names no source. Use null for a run without validation."
    if data.split is not None and (problem := _split_problem(data.split)):
        yield f"data.split = '{data.split}' {problem}. Write the three parts training, validation and test, such as '969,30,1'."
    blends: dict[str, list[SourceConfig]] = {"train": data.train, "validation": data.validation or []}
    for name, blend in blends.items():
        for index, source in enumerate(blend):
            if source.weight is not None and source.epochs is not None:
                yield (
                    f"data.{name}.{index}: weight = {source.weight} and epochs = {source.epochs} are both given for {source.prefix}. "
                    "Keep one of the two."
                )


def _split_problem(split: str) -> str | None:
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        return "is not a list of numbers"
    if len(parts) != 3:
        return f"has {len(parts)} parts"
    if not all(0 <= part < float("inf") for part in parts):
        return "has a part below zero or without bound"
    return None if parts[0] > 0 else "leaves nothing for training"


def _tokenizer(config: Config) -> Iterator[str]:
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return
    if tokenizer.type == "bytes" and tokenizer.model is not None:
        yield f"data.tokenizer.model = '{tokenizer.model}' is not used by data.tokenizer.type = bytes. Remove it."
    if tokenizer.type != "bytes" and tokenizer.model is None:
        yield f"data.tokenizer.model is null, but data.tokenizer.type = {tokenizer.type} needs one. Give its model, or use the type bytes."


def _training(config: Config) -> Iterator[str]:
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    if total % micro:
        yield (
            f"training.micro_batch_size = {micro} does not divide training.global_batch_size = {total}. Use {_divisors(total, near=micro)}."
        )


def _batch_ramp(config: Config) -> Iterator[str]:
    ramp, training = config.training.batch_ramp, config.training
    if ramp is None:
        return
    where, total, micro = "training.batch_ramp", training.global_batch_size, training.micro_batch_size
    if ramp.start >= total:
        yield f"{where}.start = {ramp.start} is not less than training.global_batch_size = {total}. Lower it, or use batch_ramp = null."
    elif (total - ramp.start) % ramp.increment:
        divisors = _all_divisors(total - ramp.start)
        yield (
            f"{where}.increment = {ramp.increment} does not lead from start = {ramp.start} to training.global_batch_size = {total}. "
            f"Use {_choice([n for n in divisors if n % micro == 0] or divisors, near=ramp.increment)}."
        )
    for name, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % micro:
            yield f"{where}.{name} = {value} is not a multiple of training.micro_batch_size = {micro}. Use {_near(micro, value)}."
    if ramp.steps > training.train_steps:
        yield (
            f"{where}.steps = {ramp.steps} is more than training.train_steps = {training.train_steps}, "
            f"so training.global_batch_size, from which CompleteP scales, is never reached. Use at most {training.train_steps}."
        )


def _step_numbers(config: Config) -> Iterator[str]:
    """Settings that name steps name steps of the run."""
    steps, first = config.training.train_steps, config.profiling.first_step
    for index, part in enumerate(config.training.skip_steps):
        last = part.last or part.first
        if last < part.first:
            yield f"training.skip_steps.{index}: last = {last} is less than first = {part.first}. Exchange them."
        elif last > steps:
            yield f"training.skip_steps.{index}: step {last} is after training.train_steps = {steps}. Use at most {steps}."
    if first is not None and first + config.profiling.steps - 1 > steps:
        yield (
            f"profiling.first_step = {first} and profiling.steps = {config.profiling.steps} end after training.train_steps = {steps}. "
            "Begin earlier, or record fewer steps."
        )


def _guards(config: Config) -> Iterator[str]:
    guards, hang, bound = config.guards, config.guards.hang_timeout_minutes, config.parallel.timeout_minutes
    if hang is not None and hang > bound:
        yield (
            f"guards.hang_timeout_minutes = {hang:g} is more than parallel.timeout_minutes = {bound:g}: the collective's time-out would "
            f"end a hang first, and name no rank. Use a timeout_minutes of at least {hang:g}."
        )
    if guards.rollback_threshold is not None and config.data.order == "megatron":
        yield (
            f"guards.rollback_threshold = {guards.rollback_threshold:g} does not go with data.order = megatron, whose tables hold the "
            "run's samples and none in place of those left out. Use data.order = permutation, or rollback_threshold = null."
        )


def _checkpoint(config: Config) -> Iterator[str]:
    local_dir, local = config.checkpoint.local_dir, config.checkpoint.local_interval
    if (local_dir is None) != (local is None):
        name, other = ("local_interval", "local_dir") if local_dir is None else ("local_dir", "local_interval")
        yield f"checkpoint.{name} is set without checkpoint.{other}. Set both for snapshots on each node's own disk, or neither."
    interval, every = config.checkpoint.interval, config.checkpoint.keep_every
    if interval is not None and every is not None and every % interval:
        yield (
            f"checkpoint.keep_every = {every} is not a multiple of checkpoint.interval = {interval}, so it would keep almost none. "
            f"Use {max(1, every // interval) * interval} or another multiple."
        )


def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    model_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    product = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size} = {model_ranks}"
    if world_size % model_ranks:
        yield (
            f"parallel.tensor_parallel_size x pipeline_parallel_size = {product} does not divide the world size {world_size}. "
            f"Start a multiple of {model_ranks} processes, or use sizes whose product is {_divisors(world_size, near=model_ranks)}."
        )
        return
    replicas = derived.data_parallel_size(config, world_size)
    shard = parallel.optimizer_shard_size
    if shard is not None and replicas % shard:
        yield (
            f"parallel.optimizer_shard_size = {shard} does not divide the data-parallel size {replicas} "
            f"(world size {world_size} / {model_ranks}). Use {_divisors(replicas, near=shard)}, or null."
        )
    together = training.micro_batch_size * replicas
    fitting = True
    for where, total in _batches(config):
        if total % together:
            fitting = False
            yield (
                f"{where} = {total} is not a multiple of micro_batch_size x data-parallel size = "
                f"{training.micro_batch_size} x {replicas} = {together}. Use {_near(together, total)}, or another micro_batch_size."
            )
    if fitting:
        for total in derived.batch_sizes(training):
            yield from _micro_batches(config, total, together)
    if (outside := max(config.profiling.ranks)) >= world_size and config.profiling.first_step is not None:
        yield f"profiling.ranks names rank {outside}, but the ranks go from 0 to {world_size - 1}. Leave it out."


def _batches(config: Config) -> Iterator[tuple[str, int]]:
    """What must be dealt out evenly to micro-batches and data ranks."""
    yield "training.global_batch_size", config.training.global_batch_size
    if ramp := config.training.batch_ramp:
        yield "training.batch_ramp.start", ramp.start
        yield "training.batch_ramp.increment", ramp.increment


def _micro_batches(config: Config, total: int, together: int) -> Iterator[str]:
    """What the pipeline schedules demand of the number of micro-batches (torch.distributed.pipelining)."""
    parallel, count = config.parallel, total // together
    ranks = parallel.pipeline_parallel_size
    if ranks == 1:
        return
    name = "training.global_batch_size" if total == config.training.global_batch_size else "training.batch_ramp: the batch size"
    where = f"{name} = {total} makes {count} micro-batches"
    if parallel.schedule == "1f1b" and count < ranks:
        yield (
            f"{where}, fewer than parallel.pipeline_parallel_size = {ranks}, which the schedule 1f1b needs. "
            f"Use at least {ranks * together}, a smaller micro_batch_size, or the schedule gpipe."
        )
    rounds = max(1, count // ranks)
    if parallel.schedule in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        below, above = _multiples_around(ranks, count)
        yield (
            f"{where}, which parallel.schedule = {parallel.schedule} cannot deal out in {rounds} equal rounds over {ranks} stages. "
            f"Use {below * together} or {above * together}."
        )


def _near(step: int, value: int) -> str:
    """The multiples around a value."""
    return one_of(n for n in _multiples_around(step, value) if n)


def _multiples_around(step: int, value: int) -> tuple[int, int]:
    below = value // step * step
    return below, below + step


def _all_divisors(value: int) -> list[int]:
    # The bound keeps a mistyped number of thirty digits from costing more than a message.
    small = [n for n in range(1, min(math.isqrt(value), 100_000) + 1) if value % n == 0]
    return sorted({*small, *(value // n for n in small)})


def _divisors(value: int, near: int) -> str:
    return _choice(_all_divisors(value), near)


def _choice(values: Iterable[int], near: int) -> str:
    """The eight values closest to `near` by ratio, in order, as '1, 2 or 4'."""
    closest = sorted(values, key=lambda value: max(value / near, near / value))[:8]
    return one_of(sorted(closest))
