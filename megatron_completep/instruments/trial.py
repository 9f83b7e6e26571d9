"""A small model of a given shape and parameterization, trained for some steps: what every instrument is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_completep.completep import Table, table_of
from megatron_completep.config import check_config
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import Config, OverrideConfig
from megatron_completep.data.loader import Batch
from megatron_completep.errors import ConfigError
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.measure import StreamTaps
from megatron_completep.training.build import build_training_loader

TableMaker = Callable[[Config], Table]
ModelMaker = Callable[[Config, Table, ParallelContext], nn.Module]

PARAMETERIZATIONS: dict[str, dict[str, Any]] = {
    "completep": {"parameterization": "completep", "alpha": 1.0},
    "alpha_0.5": {"parameterization": "completep", "alpha": 0.5},
    "mup": {"parameterization": "mup", "alpha": 1.0},
    "sp": {"parameterization": "sp", "alpha": 1.0},
}


@dataclass(frozen=True)
class Design:
    """How models come about: the table of a shape, and optionally a user's own model in place of the project's.

    make_model(config, table, context) returns an initialized module that declares its roles, whose call (tokens [B, S], labels=[B, S])
    gives the sum of the token losses and whose call without labels gives the logits [B, S, V].
    """

    make_table: TableMaker = table_of
    make_model: ModelMaker | None = None


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with some settings of some sections replaced, checked anew."""
    changed = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    changed_config = config.model_copy(update=changed)
    check_config(changed_config)
    return changed_config


def with_base(config: Config) -> Config:
    """The proxy's shape written out: where the configuration names none, it is itself the proxy."""
    model, completep = config.model, config.completep
    base_hidden = completep.base_hidden_size or model.hidden_size
    values = {
        "base_hidden_size": base_hidden,
        "base_num_layers": completep.base_num_layers or model.num_layers,
        "base_ffn_hidden_size": completep.base_ffn_hidden_size
        or max(1, round(model.ffn_hidden_size * base_hidden / model.hidden_size)),
        "base_head_dim": completep.base_head_dim or head_dim(model),
    }
    return change(config, completep=values)


def stretch(
    overrides: Sequence[OverrideConfig], num_layers: int, target_layers: int
) -> list[OverrideConfig]:
    """A user's own factors at another depth: what was found for layer k of L holds for the target's layers from k / L of its depth to
    (k + 1) / L; patterns that name no single layer stay as they are. Factors multiply the table, so they are the same at every size
    (Complete(d)P, arXiv 2512.22382, transfers its per-module and per-depth multipliers in this way)."""
    found = []
    for override in overrides:
        named = re.match(r"layers\.(\d+)\.", override.pattern)
        if named is None or num_layers == target_layers:
            found.append(override)
            continue
        rest = override.pattern[named.end() :]
        layers = [
            layer
            for layer in range(target_layers)
            if layer * num_layers // target_layers == int(named[1])
        ]
        found += [
            override.model_copy(update={"pattern": f"layers.{layer}.{rest}"}) for layer in layers
        ]
    return found


def reshape(
    config: Config, hidden_size: int | None = None, num_layers: int | None = None
) -> Config:
    """The same model at another width or depth: heads of the same size, the same ratio of ffn_hidden_size, the same base, and
    optimizer.overrides of single layers stretched over the depth.

    Raises ConfigError for a width that does not divide into whole heads.
    """
    config = with_base(config)
    model, size = config.model, head_dim(config.model)
    width = hidden_size or model.hidden_size
    if width % size:
        raise ConfigError(
            f"hidden_size {width} is not a multiple of the head size {size}. Use {max(1, width // size) * size}, or set model.head_dim."
        )
    heads = max(1, round(model.num_attention_heads * width / model.hidden_size))
    groups = max(1, round(num_query_groups(model) * width / model.hidden_size))
    while heads % groups:
        groups -= 1
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": num_layers or model.num_layers,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": size,
        "ffn_hidden_size": max(1, round(model.ffn_hidden_size * width / model.hidden_size)),
        "attention_backend": "sdpa",
    }
    overrides = stretch(config.optimizer.overrides, model.num_layers, shape["num_layers"])
    return change(
        config, model=shape, parallel={"pipeline_split": None}, optimizer={"overrides": overrides}
    )


def under(config: Config, parameterization: str) -> Config:
    """The same model under another parameterization, by its name in PARAMETERIZATIONS ("own": as configured)."""
    return (
        config
        if parameterization == "own"
        else change(config, completep=PARAMETERIZATIONS[parameterization])
    )


def with_seed(config: Config, number: int) -> Config:
    """Other initial weights and another order of the data."""
    return change(
        config,
        training={"seed": config.training.seed + 7919 * number},
        data={"seed": config.data.seed + 104729 * number},
    )


@dataclass
class Trial:
    """A model with its optimizer and its batches, before the first step."""

    config: Config
    context: ParallelContext
    table: Table
    chunks: Sequence[nn.Module]
    optimizer: DistributedOptimizer
    step: TrainingStep
    taps: StreamTaps

    @classmethod
    def build(cls, config: Config, context: ParallelContext, design: Design | None = None) -> Trial:
        """Raises ConfigError for a model with a parameter that declares no role."""
        design = design or Design()
        table = design.make_table(config)
        chunks: Sequence[Any] | None = None
        if design.make_model is None:
            check_parameters(config, table)
        else:
            chunks = [design.make_model(config, table, context)]
            check_parameters(config, table, chunks[0].named_parameters())
        parts = assemble(config, context, table, chunks)
        taps = StreamTaps(parts.chunks)
        return cls(config, context, table, parts.chunks, parts.optimizer, parts.step, taps)


def read_batches(config: Config, context: ParallelContext, steps: int) -> list[list[Batch]]:
    """This data rank's micro-batches of the first `steps` steps. Raises DataError where the configuration's token files are missing."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"prefetch": 0})})
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"train_steps": steps})}
    )
    with build_training_loader(config, context) as loader:
        return [loader.next_step() for _ in range(steps)]


def for_short_runs(
    config: Config, steps: int, precision: str = "float32", **optimizer: Any
) -> Config:
    """Settings of a run of a few steps: a constant learning rate from the first step on, nothing saved."""
    settings = {"schedule": "constant", "warmup_steps": None, "warmup_fraction": None, **optimizer}
    return change(
        config,
        optimizer=settings,
        training={"train_steps": steps, "precision": precision, "recompute": "none"},
    )
