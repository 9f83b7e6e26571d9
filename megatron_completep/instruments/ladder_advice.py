"""What a user should know of a ladder before it is paid for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatron_completep.config.derived import total_tokens
from megatron_completep.config.schema import Config
from megatron_completep.data.corpus import sources_of
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.megatron_order import split_bounds
from megatron_completep.errors import DataError
from megatron_completep.instruments.derive import derived, duration_of, unrounded_batch
from megatron_completep.instruments.ladder import (
    STUDY_MISS,
    Ladder,
    Rung,
    study_choice,
)
from megatron_completep.instruments.ladder_fit import LEAST_RUNGS
from megatron_completep.instruments.run_shape import Family, Shape

MOST_BEYOND = 10.0  # times the top rung's compute that a law is trusted for
NEAR_RATIO = 1.1  # of N : L: rungs farther than this from what was asked scatter about a law
NEAR_COMPUTE = 0.1  # the same of the lowest rung's FLOPs, as a fraction
NEAR_BATCH = 0.1  # and of a batch, which micro-batches can round by more than whole numbers do


def warnings(
    ladder: Ladder, ratios: Sequence[float] = (), smallest_flops: float | None = None
) -> list[str]:
    """What makes a ladder say less than it could, a sentence each.

    ratios: those that were asked of its study. smallest_flops: what was asked of the lowest rung.
    """
    sentences = [*_of_repetitions(ladder), *_of_shapes(ladder)]
    sentences += _of_lowest(ladder, smallest_flops)
    sentences += _of_lengths(ladder)
    sentences += _of_batches(ladder)
    sentences += _of_counted_steps(ladder)
    sentences += _of_data(ladder)
    sentences += _of_target(ladder)
    return sentences + study_gaps(ladder, ratios)


def _of_repetitions(ladder: Ladder) -> Iterator[str]:
    if len(ladder.rungs) < LEAST_RUNGS + 1:
        yield f"{len(ladder.rungs)} rungs: a fit needs {LEAST_RUNGS}, and one more to be tried on"
    if min(rung.seeds for rung in ladder.rungs) < 2:
        yield "rungs with one seed take the noise of the others for theirs"


def _of_shapes(ladder: Ladder) -> Iterator[str]:
    far = [rung for rung in ladder.rungs if _is_off_ratio(ladder, rung.shape)]
    if far:
        shapes = ", ".join(f"{rung.name} ({rung.shape.ratio:.3g})" for rung in far)
        yield (
            f"N : L is {ladder.ratio:.3g}, but whole heads and layers allow no nearer for rungs "
            f"{shapes}: they may scatter about the law. Fewer or larger rungs (--rungs, "
            "--to-flops), or smaller heads (model.head_dim), are nearer"
        )


def _is_off_ratio(ladder: Ladder, shape: Shape) -> bool:
    return abs(math.log(shape.ratio / ladder.ratio)) > math.log(NEAR_RATIO)


def ratio_warnings(ladder: Ladder, shape: Shape) -> Iterator[str]:
    """A warning for a forecast of a shape that is not of the rungs' N : L."""
    if _is_off_ratio(ladder, shape):
        yield (
            f"N : L is {shape.ratio:.3g} ({shape}), that of the rungs {ladder.ratio:.3g}: such a "
            "run may lie off their law. Ask for a size at which whole heads and layers allow it"
        )


def _of_lowest(ladder: Ladder, smallest_flops: float | None) -> Iterator[str]:
    lowest = ladder.rungs[0].shape
    flops = lowest.run_flops(ladder.scaling.tokens_per_parameter)
    if smallest_flops is not None and abs(flops / smallest_flops - 1) > NEAR_COMPUTE:
        yield (
            f"--from-flops {smallest_flops:.3g}: the lowest rung has {flops:.3g} ({lowest}), which "
            "is the nearest of the ladder's N : L"
        )


def _of_batches(ladder: Ladder) -> Iterator[str]:
    """Rungs whose batch is far from what the length asks for, by whole micro-batches."""
    micro_batch = ladder.proxy.training.micro_batch_size
    if micro_batch == 1:
        return
    rounded = []
    for rung in ladder.rungs:
        tokens = rung.shape.tokens(ladder.scaling.tokens_per_parameter)
        exact = unrounded_batch(ladder.proxy, tokens, ladder.scaling)
        batch = duration_of(ladder.proxy, tokens, ladder.scaling).batch
        if abs(batch / exact - 1) > NEAR_BATCH:
            rounded.append(f"{rung.name} ({exact:.3g} to {batch})")
    if rounded:
        yield (
            f"batches are rounded to micro-batches of {micro_batch} at rungs "
            f"{', '.join(rounded)}: they may scatter about the law. A smaller "
            "training.micro_batch_size is nearer, --batch-power 0 keeps the proxy's batch"
        )


def _of_counted_steps(ladder: Ladder) -> Iterator[str]:
    training = ladder.proxy.training
    names = ("batch_ramp", "stop_at_step", "skip_steps")
    dropped = [f"training.{name}" for name in names if getattr(training, name)]
    if dropped:
        yield f"{', '.join(dropped)} of the proxy is left out: it counts the proxy's own steps"


def _of_lengths(ladder: Ladder) -> Iterator[str]:
    per_parameter = ladder.scaling.tokens_per_parameter
    proxy_length = total_tokens(ladder.proxy) / ladder.rungs[0].shape.tokens(per_parameter)
    if not 0.5 <= proxy_length <= 2:
        yield (
            f"the proxy's own run is {proxy_length:.3g} times as long as the lowest rung's: its "
            "learning rate was found at another length. Tune it at --tokens-per-parameter "
            f"{proxy_length * per_parameter:.3g}, or plan the ladder with that"
        )


def _of_data(ladder: Ladder) -> Iterator[str]:
    """Rungs that read the corpus more than once, or that its files are not here to tell."""
    repeating = []
    for rung in ladder.rungs:
        epochs = epochs_read(derived(ladder.proxy, rung.shape, ladder.scaling))
        if epochs is None:
            prefixes = ", ".join(source.prefix for source in ladder.proxy.data.train)
            yield f"data.train: {prefixes}: not here, so whether it is read twice is not known"
            return
        if epochs > 1:
            repeating.append(f"{rung.name} ({epochs:.3g} times)")
    if repeating:
        yield (
            f"rungs that read their text more than once: {', '.join(repeating)}. Repeated text is "
            "worth less, which bends the law: take more text, or ask for less compute"
        )


def epochs_read(config: Config) -> float | None:
    """How often a run reads the source that it reads most often; None without its files.

    Sources by weight have their shares; where some are given in epochs, all count together.
    """
    sources, share = sources_of(config.data, "train")
    sizes = []
    try:
        for source in sources:
            dataset = IndexedDataset(source.prefix)
            whole = (0, dataset.num_documents)
            first, end = split_bounds(share, dataset.num_documents) or whole
            sizes.append(dataset.token_offset(end) - dataset.token_offset(first))
    except DataError:
        return None
    tokens = total_tokens(config)
    if min(sizes) <= 0:
        return math.inf
    if any(source.epochs is not None for source in sources):
        return tokens / sum(sizes)
    weights = [source.weight or 1.0 for source in sources]
    read = [tokens * weight / sum(weights) for weight in weights]
    return max(part / size for part, size in zip(read, sizes, strict=True))


def _of_target(ladder: Ladder) -> Iterator[str]:
    if ladder.target is None:
        return
    top = ladder.rungs[-1].shape.run_flops(ladder.scaling.tokens_per_parameter)
    yield from ratio_warnings(ladder, ladder.target.shape)
    yield from beyond_warnings(ladder.target.flops / top)


def beyond_warnings(times: float) -> Iterator[str]:
    """A warning for a run of so many times the top rung's compute, if that is too far."""
    if times > MOST_BEYOND:
        yield (
            f"the run is {times:.3g} times the compute of the top rung: the interval knows the "
            "noise, not whether the law bends beyond the rungs. Keep within "
            f"{MOST_BEYOND:g} times"
        )


def study_gaps(ladder: Ladder, ratios: Sequence[float]) -> list[str]:
    """What is left out of the study of shapes and why, a sentence a ratio."""
    family = Family(ladder.proxy)
    sentences = []
    for ratio in ratios:
        gaps = list(_gaps(family, ladder, ratio))
        if gaps:
            sentences.append(
                f"--study {ratio:g} is left out at rungs {', '.join(gaps)}: a shape must be within "
                f"{STUDY_MISS:.0%} of the rung's compute and be another than the rung's"
            )
    return sentences


def _gaps(family: Family, ladder: Ladder, ratio: float) -> Iterator[str]:
    for rung in ladder.rungs:
        choice = study_choice(family, ladder.scaling, ratio, rung.shape)
        if choice.shape not in ladder.study[rung.name]:
            yield f"{rung.name} ({_why(rung, choice.shape, choice.miss)})"


def _why(rung: Rung, shape: Shape, miss: float) -> str:
    if shape == rung.shape:
        return "it has that shape"
    return f"nearest {shape}, {miss:+.0%}"
