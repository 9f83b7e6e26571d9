"""The rules that concern several settings. They hold before any device is touched; every message gives numbers and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completep.config import derived
from megatron_completep.config.field_errors import one_of
from megatron_completep.config.schema import Config, SourceConfig
from megatron_completep.errors import ConfigError

VALUES = "<values>"  # in a problem's text: those that fit
TRIED, SHOWN = 64, 8  # values of a setting that are tried as remedies, and shown


@dataclass(frozen=True)
class Choice:
    """A problem that another value of one setting mends. Only values that no other rule refuses are offered.

    around: offer the nearest that fits on either side, and no more.
    """

    text: str  # with VALUES in their place
    path: str
    values: Iterable[int]
    near: int
    around: bool = False


Problem = str | Choice


def check_config(config: Config) -> None:
    """Check everything that does not depend on the number of processes.

    Raises:
        ConfigError: with all problems, one a line.
    """
    _raise_all(config, lambda changed: [problem for rule in RULES for problem in rule(changed)])


def check_world(config: Config, world_size: int) -> None:
    """Check what depends on the number of processes, known only at launch.

    Args:
        world_size: all processes of the run.

    Raises:
        ConfigError: with all problems, one a line.
    """
    _raise_all(
        config,
        lambda changed: (
            [problem for rule in RULES for problem in rule(changed)]
            + list(_world(changed, world_size))
        ),
    )


def _raise_all(config: Config, problems_of: Callable[[Config], list[Problem]]) -> None:
    if not (problems := problems_of(config)):
        return

    def fits(path: str, value: int) -> bool:
        return len(problems_of(_with(config, path.split("."), value))) < len(problems)

    lines = [
        problem if isinstance(problem, str) else _with_values(problem, fits) for problem in problems
    ]
    count = "1 setting does" if len(problems) == 1 else f"{len(problems)} settings do"
    raise ConfigError("\n  ".join([f"{count} not fit the others", *lines]))


def _with(section: Any, path: Sequence[str], value: int) -> Any:
    """A section with one setting replaced."""
    name, *rest = path
    return section.model_copy(
        update={name: _with(getattr(section, name), rest, value) if rest else value}
    )


def _with_values(problem: Choice, fits: Callable[[str, int], bool]) -> str:
    """The text of a problem, with the values closest by ratio of those that fit."""

    def distance(value: int) -> float:
        return max(value / problem.near, problem.near / value)

    tried = sorted(problem.values, key=distance)[:TRIED]
    fitting = [value for value in tried if fits(problem.path, value)]
    if problem.around:
        below, above = (
            [v for v in fitting if (v < problem.near) == smaller] for smaller in (True, False)
        )
        fitting = below[:1] + above[:1]
    offered = (
        one_of(sorted(fitting[:SHOWN]))
        if fitting
        else "another value together with the settings that it must fit"
    )
    return problem.text.replace(VALUES, offered)


def _model(config: Config) -> Iterator[Problem]:
    model, heads = config.model, config.model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield Choice(
            f"model.num_attention_heads = {heads} does not divide model.hidden_size = {model.hidden_size}. "
            f"Use {VALUES}, or set model.head_dim.",
            "model.num_attention_heads",
            _all_divisors(model.hidden_size),
            near=heads,
        )
    elif model.position == "rope" and derived.head_dim(model) % 2:
        yield f"model.position = rope turns pairs of elements, but a head has {derived.head_dim(model)}. Use an even model.head_dim."
    if heads % derived.num_query_groups(model):
        yield Choice(
            f"model.num_query_groups = {model.num_query_groups} does not divide model.num_attention_heads = {heads}. Use {VALUES}.",
            "model.num_query_groups",
            _all_divisors(heads),
            near=derived.num_query_groups(model),
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


def _attention_backend(config: Config) -> Iterator[Problem]:
    model, training = config.model, config.training
    if model.attention_backend != "flash_attention":
        return
    where, remedy = (
        "model.attention_backend = flash_attention",
        "Use model.attention_backend = sdpa",
    )
    if model.position == "alibi":
        yield f"{where} takes no bias on the logits, which model.position = alibi needs. {remedy}."
    if training.precision in ("float32", "float64"):
        yield f"{where} computes in bf16 only, but training.precision = {training.precision}. {remedy}, or training.precision = bf16."
    if training.device == "cpu":
        yield f"{where} runs on GPUs only, but training.device = cpu. {remedy}."
    if derived.head_dim(model) > 256:
        yield f"{where} takes heads of at most 256 elements, but these have {derived.head_dim(model)}. {remedy}."


def _completep(config: Config) -> Iterator[Problem]:
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


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    model, size = config.model, config.parallel.tensor_parallel_size
    where, groups = f"parallel.tensor_parallel_size = {size}", derived.num_query_groups(model)
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
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
        follows = (
            name == "num_query_groups" and model.num_query_groups is None
        )  # num_attention_heads says it already
        if value % size and not follows:
            text = f"{where} does not divide model.{name} = {value}{reasons.get(name, '')}. Use {VALUES}."
            yield Choice(text, "parallel.tensor_parallel_size", fitting, near=size)


def _compile(config: Config) -> Iterator[Problem]:
    flash = config.model.attention_backend == "flash_attention"
    if config.training.compile and flash and config.data.reset_at_document_ends:
        yield (
            "training.compile = true does not go with model.attention_backend = flash_attention and data.reset_at_document_ends = true: "
            "the number of documents, a shape, changes with every micro-batch, and each new one would be compiled anew. "
            "Use model.attention_backend = sdpa, or training.compile = false."
        )


def _pipeline(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    ranks, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    stages = ranks * virtual
    product = f"parallel.pipeline_parallel_size x virtual_pipeline_size = {ranks} x {virtual}"
    if ranks > 1 and virtual == 1 and parallel.schedule == "interleaved_1f1b":
        raising = (
            "Raise it, or use the schedule 1f1b."
            if layers >= 2 * ranks
            else "Use the schedule 1f1b."
        )
        yield f"parallel.schedule = interleaved_1f1b needs virtual_pipeline_size of at least 2, found 1. {raising}"
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


def _schedule(config: Config) -> Iterator[Problem]:
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
    warmup, decay = derived.warmup_steps(optimizer, steps), derived.decay_steps(optimizer, steps)
    if warmup > steps:
        most = steps - decay if optimizer.schedule == "warmup_stable_decay" else steps
        yield f"optimizer.warmup_steps = {warmup} is more than training.train_steps = {steps}. Use at most {most}."
    if optimizer.schedule == "warmup_stable_decay" and warmup <= steps < warmup + decay:
        yield (
            f"optimizer: {warmup} steps of warm-up and {decay} of decay (decay_fraction = {optimizer.decay_fraction}) "
            f"are more than training.train_steps = {steps}. Use a decay_fraction of at most {_rounded_down((steps - warmup) / steps)}."
        )


def _sources(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.validation is not None and data.split is not None:
        yield f"data.split = '{data.split}' and data.validation are both given. Set one of the two to null."
    if data.validation == []:
        yield "data.validation = [] names no source. Use null for a run without validation."
    if data.split is not None and (problem := _split_problem(data.split)):
        yield f"data.split = '{data.split}' {problem}. Write the three parts training, validation and test, such as '969,30,1'."
    blends: dict[str, list[SourceConfig]] = {
        "train": data.train,
        "validation": data.validation or [],
    }
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


def _tokenizer(config: Config) -> Iterator[Problem]:
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return
    if tokenizer.type == "bytes" and tokenizer.model is not None:
        yield f"data.tokenizer.model = '{tokenizer.model}' is not used by data.tokenizer.type = bytes. Remove it."
    if tokenizer.type != "bytes" and tokenizer.model is None:
        yield f"data.tokenizer.model is null, but data.tokenizer.type = {tokenizer.type} needs one. Give its model, or use the type bytes."


def _training(config: Config) -> Iterator[Problem]:
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    if total % micro:
        text = f"training.micro_batch_size = {micro} does not divide training.global_batch_size = {total}. Use {VALUES}."
        yield Choice(text, "training.micro_batch_size", _all_divisors(total), near=micro)


def _batch_ramp(config: Config) -> Iterator[Problem]:
    ramp, training = config.training.batch_ramp, config.training
    if ramp is None:
        return
    where, total, micro = (
        "training.batch_ramp",
        training.global_batch_size,
        training.micro_batch_size,
    )
    if ramp.start >= total:
        yield Choice(
            f"{where}.start = {ramp.start} is not less than training.global_batch_size = {total}. Use {VALUES}, or batch_ramp = null.",
            f"{where}.start",
            range(micro, total, micro),
            near=ramp.start,
        )
    elif (total - ramp.start) % ramp.increment:
        yield Choice(
            f"{where}.increment = {ramp.increment} does not lead from start = {ramp.start} to training.global_batch_size = {total}. "
            f"Use {VALUES}.",
            f"{where}.increment",
            _all_divisors(total - ramp.start),
            near=ramp.increment,
        )
    for name, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % micro:
            text = f"{where}.{name} = {value} is not a multiple of training.micro_batch_size = {micro}. Use {VALUES}."
            yield Choice(
                text, f"{where}.{name}", range(micro, total, micro), near=value, around=True
            )
    if ramp.steps > training.train_steps:
        yield (
            f"{where}.steps = {ramp.steps} is more than training.train_steps = {training.train_steps}, "
            f"so training.global_batch_size, from which CompleteP scales, is never reached. Use at most {training.train_steps}."
        )


def _step_numbers(config: Config) -> Iterator[Problem]:
    """Settings that name steps name steps of the run."""
    steps, first = config.training.train_steps, config.profiling.first_step
    for index, part in enumerate(config.training.skip_steps):
        last = part.last or part.first
        if last < part.first:
            remedy = (
                "Exchange them."
                if part.first <= steps
                else f"Exchange them; none may be after training.train_steps = {steps}."
            )
            yield f"training.skip_steps.{index}: last = {last} is less than first = {part.first}. {remedy}"
        elif last > steps:
            yield f"training.skip_steps.{index}: step {last} is after training.train_steps = {steps}. Use at most {steps}."
    if first is not None and first + config.profiling.steps - 1 > steps:
        yield (
            f"profiling.first_step = {first} and profiling.steps = {config.profiling.steps} end after training.train_steps = {steps}. "
            f"Begin at {max(1, steps - config.profiling.steps + 1)} or earlier, and record at most {steps} steps."
        )


def _guards(config: Config) -> Iterator[Problem]:
    guards, hang, bound = (
        config.guards,
        config.guards.hang_timeout_minutes,
        config.parallel.timeout_minutes,
    )
    if hang is not None and hang > bound:
        yield (
            f"guards.hang_timeout_minutes = {_plain(hang)} is more than parallel.timeout_minutes = {_plain(bound)}: the collective's "
            f"time-out would end a hang first, and name no rank. Use a timeout_minutes of at least {_plain(hang)}."
        )
    if guards.rollback_threshold is not None and config.data.order == "megatron":
        yield (
            f"guards.rollback_threshold = {guards.rollback_threshold:g} does not go with data.order = megatron, whose tables hold the "
            "run's samples and none in place of those left out. Use data.order = permutation, or rollback_threshold = null."
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    local_dir, local = config.checkpoint.local_dir, config.checkpoint.local_interval
    if (local_dir is None) != (local is None):
        name, other = (
            ("local_interval", "local_dir")
            if local_dir is None
            else ("local_dir", "local_interval")
        )
        yield f"checkpoint.{name} is set without checkpoint.{other}. Set both for snapshots on each node's own disk, or neither."
    interval, every = config.checkpoint.interval, config.checkpoint.keep_every
    if interval is not None and every is not None and every % interval:
        yield (
            f"checkpoint.keep_every = {every} is not a multiple of checkpoint.interval = {interval}, so it would keep almost none. "
            f"Use {max(1, every // interval) * interval} or another multiple."
        )


def _world(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    model_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    product = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size} = {model_ranks}"
    if world_size % model_ranks:
        products = _closest(_all_divisors(world_size), model_ranks)
        yield (
            f"parallel.tensor_parallel_size x pipeline_parallel_size = {product} does not divide the world size {world_size}. "
            f"Start a multiple of {model_ranks} processes, or use sizes whose product is {products}."
        )
        return
    replicas = derived.data_parallel_size(config, world_size)
    shard = parallel.optimizer_shard_size
    if shard is not None and replicas % shard:
        yield Choice(
            f"parallel.optimizer_shard_size = {shard} does not divide the data-parallel size {replicas} "
            f"(world size {world_size} / {model_ranks}). Use {VALUES}, or null.",
            "parallel.optimizer_shard_size",
            _all_divisors(replicas),
            near=shard,
        )
    together = training.micro_batch_size * replicas
    fitting = True
    for where, total in _batches(config):
        if total % together:
            fitting = False
            yield Choice(
                f"{where} = {total} is not a multiple of micro_batch_size x data-parallel size = "
                f"{training.micro_batch_size} x {replicas} = {together}. Use {VALUES}, or another micro_batch_size.",
                where,
                _multiples(together, total),
                near=total,
                around=True,
            )
    if fitting:
        for total in derived.batch_sizes(training):
            yield from _micro_batches(config, total, together)
    if (
        outside := max(config.profiling.ranks)
    ) >= world_size and config.profiling.first_step is not None:
        yield f"profiling.ranks names rank {outside}, but the ranks go from 0 to {world_size - 1}. Leave it out."


def _batches(config: Config) -> Iterator[tuple[str, int]]:
    """What must be dealt out evenly to micro-batches and data ranks."""
    yield "training.global_batch_size", config.training.global_batch_size
    if ramp := config.training.batch_ramp:
        yield "training.batch_ramp.start", ramp.start
        yield "training.batch_ramp.increment", ramp.increment


def _micro_batches(config: Config, total: int, together: int) -> Iterator[Problem]:
    """What the pipeline schedules demand of the number of micro-batches (torch.distributed.pipelining)."""
    parallel, count = config.parallel, total // together
    ranks = parallel.pipeline_parallel_size
    if ranks == 1:
        return
    ramps = total != config.training.global_batch_size
    name = "training.batch_ramp: the batch size" if ramps else "training.global_batch_size"
    where = f"{name} = {total} makes {count} micro-batches"
    setting = "training.global_batch_size"
    values: Sequence[int] = _multiples(together, total)
    if ramps:
        setting, values = (
            "training.batch_ramp.start",
            range(together, config.training.global_batch_size, together),
        )
    if parallel.schedule == "1f1b" and count < ranks:
        smaller = " a smaller micro_batch_size," if config.training.micro_batch_size > 1 else ""
        yield Choice(
            f"{where}, fewer than parallel.pipeline_parallel_size = {ranks}, which the schedule 1f1b needs. "
            f"Use {setting} = {VALUES},{smaller} or the schedule gpipe.",
            setting,
            [value for value in values if value >= ranks * together],
            near=total,
        )
    rounds = max(1, count // ranks)
    if parallel.schedule in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        yield Choice(
            f"{where}, which parallel.schedule = {parallel.schedule} cannot deal out in {rounds} equal rounds over {ranks} stages. "
            f"Use {VALUES}.",
            setting,
            [value for value in values if value % (ranks * together) == 0],
            near=total,
            around=True,
        )


def _multiples(step: int, value: int) -> list[int]:
    """The positive multiples of `step` round a value, as many as are tried, and more above where few are below."""
    middle = max(1, value // step)
    return [step * factor for factor in range(max(1, middle - TRIED), middle + TRIED + 1)]


def _rounded_down(fraction: float) -> float:
    """To three decimals, so that the number shown is one that fits."""
    return math.floor(fraction * 1000) / 1000


def _plain(value: float) -> str:
    """A number as it stands in a file, every digit of it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _all_divisors(value: int) -> list[int]:
    # The bound keeps a mistyped number of thirty digits from costing more than a message.
    small = [n for n in range(1, min(math.isqrt(value), 100_000) + 1) if value % n == 0]
    return sorted({*small, *(value // n for n in small)})


def _closest(values: Iterable[int], near: int) -> str:
    """The values closest to `near` by ratio, in order, as '1, 2 or 4'."""
    return one_of(sorted(sorted(values, key=lambda value: max(value / near, near / value))[:SHOWN]))


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
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
