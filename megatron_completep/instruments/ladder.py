"""A ladder: runs of growing compute from one proxy, whose losses forecast that of the target.

A ladder's folder holds ladder.json (what was planned), rungs/NAME.yaml (a run's configuration, one
a rung) and points/HASH.json (a finished run each, those of the sweep engine). Nothing of it is run
twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_completep.config import config_from_mapping, save_config
from megatron_completep.config.derived import total_tokens
from megatron_completep.config.json_text import read_json_object
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import write_whole
from megatron_completep.instruments import sweep
from megatron_completep.instruments.derive import Scaling, derived
from megatron_completep.instruments.run_shape import Asked, Choice, Family, Shape
from megatron_completep.instruments.trial import change, following, under, with_seed
from megatron_completep.model.flops import training_flops_per_token

FORMAT = 1
# Misses of a rung's compute, tried in this order: that all rungs have one N : L matters more.
CLOSENESS = (0.75, 0.25, 0.03)
LOWEST_CLOSE = 10.0  # the same of the lowest rung, which nothing binds to the proxy's compute
STUDY_MISS = 0.1  # the largest miss of a rung's compute among the shapes compared at it
LR_CHECK = (-1.0, 1.0)  # octaves from the proxy's learning rate, at both ends of the ladder


@dataclass(frozen=True)
class Rung:
    """One size of the ladder, with its number of repetitions."""

    name: str
    shape: Shape
    seeds: int


@dataclass(frozen=True)
class Target:
    """What the ladder is to forecast."""

    shape: Shape
    flops: float  # of its run


@dataclass(frozen=True)
class Ladder:
    """All that a ladder's runs follow from.

    rules: parameterizations; the first one is the ladder's, the others are controls. study: shapes
    of other ratios N : L at the compute of a rung, by the rung's name. ratio: N / L that was asked
    of the rungs, and is of every forecast.
    """

    proxy: Config
    scaling: Scaling
    rungs: tuple[Rung, ...]
    rules: tuple[str, ...]
    checks_lr: bool
    study: dict[str, tuple[Shape, ...]]
    target: Target | None
    ratio: float


class Run(NamedTuple):
    """A planned run: the rung it belongs to, and the point of the sweep engine."""

    rung: str
    kind: str  # rung | lr | shape
    octaves: float  # of its learning rate from the proxy's
    point: sweep.Point


@dataclass(frozen=True)
class Wish:
    """What a user asks of a ladder.

    largest_flops: of the top rung's run. seeds: repetitions, one number a rung, or one for all.
    ratios: N / L of the shape study. target: what is asked of the target, if anything.
    """

    rungs: int
    largest_flops: float
    ratio: float
    scaling: Scaling
    seeds: Sequence[int] = (3,)
    rules: Sequence[str] = ("completep",)
    checks_lr: bool = True
    ratios: Sequence[float] = ()
    target: Asked | None = None
    smallest_flops: float | None = None  # None: those of the proxy's shape


def plan(proxy: Config, wish: Wish) -> Ladder:
    """The ladder of a wish: rungs at equal ratios of compute, from the proxy's to the largest.

    Raises ConfigError for a wish that gives no ladder.
    """
    _check_rules(wish.rules)
    family = Family(proxy)
    per_parameter = wish.scaling.tokens_per_parameter
    first = _first_shape(family, wish)
    lowest = wish.smallest_flops or first.run_flops(per_parameter)
    if lowest >= wish.largest_flops:
        raise ConfigError(
            f"the top rung's {wish.largest_flops:.3g} FLOPs are not above the lowest rung's "
            f"{lowest:.3g} ({first}). Ask for a larger top rung, or take a smaller proxy."
        )
    seeds = _seeds(wish)
    rungs: list[Rung] = []
    for number in range(wish.rungs):
        flops = lowest * (wish.largest_flops / lowest) ** (number / (wish.rungs - 1))
        shape = first
        if number > 0:
            shape = _rung_shape(family, wish, flops, rungs[-1].shape)
        rungs.append(Rung(f"{number + 1:02d}", shape, seeds[number]))
    _check_growth(rungs)

    study: dict[str, tuple[Shape, ...]] = {}
    for rung in rungs:
        study[rung.name] = _study(family, wish, rung.shape)
    return Ladder(
        proxy,
        wish.scaling,
        tuple(rungs),
        tuple(wish.rules),
        wish.checks_lr,
        study,
        _target(family, wish, rungs),
        wish.ratio,
    )


def _first_shape(family: Family, wish: Wish) -> Shape:
    """The lowest rung's: the proxy's own, or that of the ladder's ratio near to its compute."""
    model = family.proxy.model
    own_shape = family.shape(model.hidden_size, model.num_layers)
    if wish.smallest_flops is not None:
        return _rung_shape(family, wish, wish.smallest_flops, None)
    if math.isclose(wish.ratio, own_shape.ratio):
        return own_shape
    per_parameter = wish.scaling.tokens_per_parameter
    flops = own_shape.run_flops(per_parameter)
    # The smallest shape of a wide ratio may be far above the proxy: the ladder begins there.
    return family.nearest(Asked(wish.ratio, per_parameter, flops=flops, close=LOWEST_CLOSE)).shape


def _rung_shape(family: Family, wish: Wish, flops: float, below: Shape | None) -> Shape:
    """The shape of a rung: of the ladder's ratio, or nearer to its compute where that is `below`'s.

    The last one that was tried if none is larger, which `_check_growth` refuses.
    """
    for close in CLOSENESS:
        asked = Asked(wish.ratio, wish.scaling.tokens_per_parameter, flops=flops, close=close)
        shape = family.choose(asked).shape
        if below is None or shape.flops_per_token > below.flops_per_token:
            break
    return shape


def study_choice(family: Family, scaling: Scaling, ratio: float, own: Shape) -> Choice:
    """The shape of another ratio that is nearest to the compute of a rung of shape `own`."""
    per_parameter = scaling.tokens_per_parameter
    flops = own.run_flops(per_parameter)
    return family.nearest(Asked(ratio, per_parameter, flops=flops, close=STUDY_MISS))


def _study(family: Family, wish: Wish, own: Shape) -> tuple[Shape, ...]:
    """The shapes of other ratios at a rung's compute; those that are not near it are left out."""
    shapes: list[Shape] = []
    for ratio in wish.ratios:
        choice = study_choice(family, wish.scaling, ratio, own)
        if abs(choice.miss) <= STUDY_MISS and choice.shape not in (own, *shapes):
            shapes.append(choice.shape)
    return tuple(shapes)


def _check_rules(rules: Sequence[str]) -> None:
    """Raises ConfigError for a rule that is named twice: its seeds would count twice."""
    repeated = sorted({rule for rule in rules if rules.count(rule) > 1})
    if repeated:
        raise ConfigError(
            f"--parameterizations {','.join(rules)}: {', '.join(repeated)} stands there more than "
            "once. Name each rule once."
        )


def _seeds(wish: Wish) -> list[int]:
    seeds = list(wish.seeds)
    if len(seeds) == 1:
        seeds *= wish.rungs
    if len(seeds) != wish.rungs:
        raise ConfigError(
            f"--seeds {','.join(map(str, seeds))}: {len(seeds)} numbers for {wish.rungs} rungs. "
            "Give one number, or one a rung."
        )
    return seeds


def _check_growth(rungs: Sequence[Rung]) -> None:
    """Raises ConfigError where two rungs are one shape, or out of order."""
    sizes = [rung.shape.flops_per_token for rung in rungs]
    if any(after <= before for before, after in pairwise(sizes)):
        shapes = ", ".join(str(rung.shape) for rung in rungs)
        raise ConfigError(
            f"the rungs do not grow: {shapes}. Whole layers and heads lie too far apart: ask for "
            "fewer rungs, for more compute at the top, or for smaller heads (model.head_dim)."
        )


def _target(family: Family, wish: Wish, rungs: Sequence[Rung]) -> Target | None:
    if wish.target is None:
        return None
    shape = family.choose(wish.target).shape
    flops = shape.run_flops(wish.scaling.tokens_per_parameter)
    top = rungs[-1].shape.run_flops(wish.scaling.tokens_per_parameter)
    if flops <= top:
        raise ConfigError(
            f"the target's {flops:.3g} FLOPs ({shape}) are not above the top rung's {top:.3g}. "
            "Ask for a smaller top rung, or for a larger target."
        )
    return Target(shape, flops)


def runs(ladder: Ladder) -> list[Run]:
    """All runs, the small rungs first, each rule's in turn; rules that coincide share runs."""
    planned: list[Run] = []
    ends = (ladder.rungs[0], ladder.rungs[-1])
    for rung in ladder.rungs:
        for rule in ladder.rules:
            for seed in range(rung.seeds):
                planned.append(_run(ladder, rung, rung.shape, rule, seed))
        for shape in ladder.study[rung.name]:
            for rule in ladder.rules:
                for seed in range(rung.seeds):
                    planned.append(_run(ladder, rung, shape, rule, seed, "shape"))
    # Last, so that a ladder that is ended early has all of its rungs. One seed: the noise is known
    # from the others.
    for rung in ends if ladder.checks_lr else ():
        for rule in ladder.rules:
            for octaves in LR_CHECK:
                planned.append(_run(ladder, rung, rung.shape, rule, 0, "lr", octaves))
    return planned


def _run(
    ladder: Ladder,
    rung: Rung,
    shape: Shape,
    rule: str,
    seed: int,
    kind: str = "rung",
    octaves: float = 0.0,
) -> Run:
    config = derived(ladder.proxy, shape, ladder.scaling)
    base = config.completep
    # At the proxy's depth the rules of depth coincide, and with one configuration share a run.
    coincide = rule != "sp" and shape.num_layers == base.base_num_layers
    config = with_seed(under(config, "completep" if coincide else rule), seed)
    rate = config.optimizer.base_lr * 2**octaves
    config = change(
        config,
        optimizer=following(config.optimizer, {"base_lr": rate}),
        training={"validation_interval": None},
    )
    optimizer = config.optimizer
    point = sweep.Point(
        rule,
        shape.hidden_size,
        shape.num_layers,
        config.training.train_steps,
        optimizer.base_weight_decay,
        optimizer.base_init_std,
        rate,
        seed,
        config,
        0 if config.model.moe is None else config.model.moe.num_experts,
    )
    return Run(rung.name, kind, octaves, point)


def points(ladder: Ladder) -> list[sweep.Point]:
    """The points of all runs, each configuration once, in order."""
    by_key: dict[str, sweep.Point] = {}
    for run in runs(ladder):
        by_key.setdefault(run.point.key, run.point)
    return list(by_key.values())


def save(ladder: Ladder, folder: Path) -> None:
    """Write ladder.json and the rungs' configurations.

    Raises DataError where the folder holds another ladder, or cannot be written.
    """
    path = folder / "ladder.json"
    content = json.loads(json.dumps(_to_json(ladder)))
    if path.exists() and _with_ratio(read_json_object(path)) != content:
        raise DataError(
            f"{path}: the folder holds another ladder. Plan into another folder, or remove this "
            "file; finished runs stay, and those that the new ladder shares are not run again."
        )
    try:
        (folder / "rungs").mkdir(parents=True, exist_ok=True)
        # Of a ladder that was planned here before, and whose ladder.json was removed.
        for left_over in (folder / "rungs").glob("[0-9][0-9].yaml"):
            left_over.unlink()
        for rung in ladder.rungs:
            config = derived(ladder.proxy, rung.shape, ladder.scaling)
            save_config(config, folder / "rungs" / f"{rung.name}.yaml")
        write_whole(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror}. Choose another folder."
        ) from None


def load(folder: Path) -> Ladder:
    """The ladder of a folder. Raises DataError where there is none."""
    path = folder / "ladder.json"
    try:
        content = read_json_object(path)
        if content["format"] != FORMAT:
            raise DataError(f"format {content['format']} is not {FORMAT}")
        return _from_json(content)
    except (ConfigError, DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a ladder ({error}). Make one with tools/ladder.py plan."
        ) from None


def _to_json(ladder: Ladder) -> dict[str, Any]:
    content = asdict(ladder)
    content["proxy"] = ladder.proxy.model_dump(mode="json")
    return {"format": FORMAT, **content}


def _with_ratio(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a ladder.json; one of before the ratio was kept has the proxy's."""
    if "ratio" in content or "proxy" not in content:
        return content
    return {**content, "ratio": ratio_of(config_from_mapping(content["proxy"]))}


def _from_json(content: dict[str, Any]) -> Ladder:
    content = _with_ratio(content)
    rungs = []
    for entry in content["rungs"]:
        rungs.append(Rung(entry["name"], Shape(**entry["shape"]), entry["seeds"]))
    study = {}
    for name, shapes in content["study"].items():
        study[name] = tuple(Shape(**shape) for shape in shapes)
    target = content["target"]
    if target is not None:
        target = Target(Shape(**target["shape"]), target["flops"])
    return Ladder(
        config_from_mapping(content["proxy"]),
        Scaling(**content["scaling"]),
        tuple(rungs),
        tuple(content["rules"]),
        content["checks_lr"],
        study,
        target,
        content["ratio"],
    )


def table_rows(ladder: Ladder) -> Iterator[list[str]]:
    """A row a rung: name, shape, parameters, without embeddings, tokens, batch, steps, FLOPs.

    Below a rung, a row for each shape of the study.
    """
    for rung in ladder.rungs:
        yield _table_row(ladder, rung.name, rung.shape, rung.seeds)
        for shape in ladder.study[rung.name]:
            yield _table_row(ladder, f"{rung.name} study", shape, rung.seeds)


def _table_row(ladder: Ladder, name: str, shape: Shape, seeds: int) -> list[str]:
    config = derived(ladder.proxy, shape, ladder.scaling)
    training = config.training
    return [
        name,
        str(shape),
        f"{shape.ratio:.3g}",
        f"{shape.parameters:,}",
        f"{shape.inner_parameters:,}",
        f"{total_tokens(config):,}",
        str(training.global_batch_size),
        str(training.train_steps),
        f"{shape.run_flops(ladder.scaling.tokens_per_parameter):.3g}",
        str(seeds),
    ]


ROW_HEADS = [
    "rung",
    "shape",
    "N/L",
    "parameters",
    "without embeddings",
    "tokens",
    "batch",
    "steps",
    "FLOPs",
    "seeds",
]


def flops_by_rung(ladder: Ladder) -> dict[str, float]:
    """FLOPs of all runs of a rung by its name, each run once."""
    flops = {rung.name: 0.0 for rung in ladder.rungs}
    counted: set[str] = set()
    for run in runs(ladder):
        if run.point.key not in counted:
            counted.add(run.point.key)
            config = run.point.config
            flops[run.rung] += training_flops_per_token(config.model) * total_tokens(config)
    return flops


def total_flops(ladder: Ladder) -> float:
    """FLOPs of all runs, each once."""
    return sum(flops_by_rung(ladder).values())


def ratio_of(proxy: Config) -> float:
    """N / L of the proxy, which its ladder keeps."""
    return proxy.model.hidden_size / proxy.model.num_layers
