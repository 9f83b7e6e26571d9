"""A small model of a given shape and parameterization, with its optimizer and batches.

All instruments train such models for some steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_completep.completep import Table, table_of
from megatron_completep.config import check_config
from megatron_completep.config.derived import (
    base_expert_ffn_hidden_size,
    head_dim,
    num_query_groups,
)
from megatron_completep.config.schema import (
    Config,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    OverrideConfig,
)
from megatron_completep.data.loader import Batch
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.expert_taps import ExpertTaps
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.measure import StreamTaps
from megatron_completep.training.build import build_training_loader

TableMaker = Callable[[Config], Table]
ModelMaker = Callable[[Config, Table, ParallelContext], nn.Module]

# The settings of the completep section, by the names that sweeps and checks use.
PARAMETERIZATIONS: dict[str, dict[str, Any]] = {
    "completep": {"parameterization": "completep", "alpha": 1.0},
    "alpha_0.5": {"parameterization": "completep", "alpha": 0.5},
    "mup": {"parameterization": "mup", "alpha": 1.0},
    "sp": {"parameterization": "sp", "alpha": 1.0},
}


@dataclass(frozen=True)
class Design:
    """How models are made: the table of a shape, and optionally a model of the user's own.

    make_model(config, table, context) returns an initialized module that declares the roles of its
    parameters. Called with (tokens [B, S], labels=[B, S]) it gives the sum of the token losses, and
    without labels the logits [B, S, V].
    """

    make_table: TableMaker = table_of
    make_model: ModelMaker | None = None


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with some settings of some sections replaced, and checked again.

    Raises ConfigError where the new settings are not allowed.
    """
    changed_sections = {}
    for name, settings in sections.items():
        changed_sections[name] = getattr(config, name).model_copy(update=settings)
    changed = config.model_copy(update=changed_sections)
    check_config(changed)
    return changed


def on_one_process(config: Config) -> Config:
    """The configuration without a division over ranks, since that of one shape may fit no other."""
    plain: dict[str, Any] = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "virtual_pipeline_size": 1,
        "context_parallel_size": 1,
        "schedule": "1f1b",
        "pipeline_split": None,
        "sequence_parallel": False,
        "optimizer_shard_size": None,
    }
    return change(config, parallel=plain)


def with_base(config: Config) -> Config:
    """The configuration with its base shape written out: its own shape where it names none."""
    model = config.model
    completep = config.completep
    # Where it names only a width, the base MLP has the model's ratio of ffn_hidden_size.
    base_hidden = completep.base_hidden_size or model.hidden_size
    base_ffn = completep.base_ffn_hidden_size
    if not base_ffn:
        base_ffn = max(1, round(model.ffn_hidden_size * base_hidden / model.hidden_size))
    base = {
        "base_hidden_size": base_hidden,
        "base_num_layers": completep.base_num_layers or model.num_layers,
        "base_ffn_hidden_size": base_ffn,
        "base_head_dim": completep.base_head_dim or head_dim(model),
    }
    if model.moe is not None:
        base |= {
            "base_num_experts": completep.base_num_experts or model.moe.num_experts,
            "base_top_k": completep.base_top_k or model.moe.top_k,
            "base_expert_ffn_hidden_size": base_expert_ffn_hidden_size(model, completep),
        }
    return change(config, completep=base)


def stretch(
    overrides: Sequence[OverrideConfig], num_layers: int, target_layers: int
) -> list[OverrideConfig]:
    """A user's own factors at another depth.

    Factors of layer k of `num_layers` go to the target's layers from k / L to (k + 1) / L of its
    depth; patterns that name no single layer stay as they are. Factors multiply the table, so they
    are the same at every size (Complete(d)P, arXiv 2512.22382, transfers its per-module and
    per-depth multipliers in this way).
    """
    stretched = []
    for override in overrides:
        layer_prefix = re.match(r"layers\.(\d+)\.", override.pattern)
        if layer_prefix is None or num_layers == target_layers:
            stretched.append(override)
            continue
        inner_pattern = override.pattern[layer_prefix.end() :]
        source_layer = int(layer_prefix[1])
        for layer in range(target_layers):
            # Integer division gives every target layer exactly one source layer.
            if layer * num_layers // target_layers == source_layer:
                pattern = f"layers.{layer}.{inner_pattern}"
                stretched.append(override.model_copy(update={"pattern": pattern}))
    return stretched


def reshape(
    config: Config,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_experts: int | None = None,
) -> Config:
    """The same model at another width, depth or number of experts.

    Heads keep their size, inner widths of MLPs and experts their ratio, experts the share of them
    that a token goes to, and the base its shape; optimizer.overrides of single layers are stretched
    over the depth. Raises ConfigError for a width that does not divide into whole heads, and for a
    number of experts of which the share is no whole number.
    """
    config = with_base(config)
    model = config.model
    head_size = head_dim(model)
    width = hidden_size or model.hidden_size
    depth = num_layers or model.num_layers
    if width % head_size:
        below = max(1, width // head_size) * head_size
        raise ConfigError(
            f"hidden_size {width} is not a multiple of the head size {head_size}. "
            f"Use {below}, or set model.head_dim."
        )

    # Query groups shrink with the width, but every group needs as many heads as the others.
    heads = max(1, round(model.num_attention_heads * width / model.hidden_size))
    groups = max(1, round(num_query_groups(model) * width / model.hidden_size))
    while heads % groups:
        groups -= 1
    ffn_hidden_size = max(1, round(model.ffn_hidden_size * width / model.hidden_size))
    shape = {
        "hidden_size": width,
        "num_layers": depth,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": head_size,
        "ffn_hidden_size": ffn_hidden_size,
        "moe": _reshaped_experts(model, width, num_experts),
        # A backend that runs on every device and in float64.
        "attention_backend": "auto",
    }
    overrides = stretch(config.optimizer.overrides, model.num_layers, depth)
    # A split of the layers over stages that the user wrote out fits no other depth.
    parallel = {"pipeline_split": None}
    return change(config, model=shape, parallel=parallel, optimizer={"overrides": overrides})


def _reshaped_experts(model: ModelConfig, width: int, num_experts: int | None) -> MoeConfig | None:
    """The section of the experts at another width of the model, and with another number of them.

    Raises ConfigError where the model has none, or where top_k would be no whole number.
    """
    moe = model.moe
    if moe is None:
        if num_experts:
            raise ConfigError(
                f"{num_experts} experts, but model.moe is null. Give model.moe, or no number."
            )
        return None
    changes: dict[str, int] = {}
    for name in ("ffn_hidden_size", "shared_ffn_hidden_size"):
        inner = getattr(moe, name)
        if inner is not None:
            changes[name] = max(1, round(inner * width / model.hidden_size))
    if num_experts:
        top_k, remainder = divmod(num_experts * moe.top_k, moe.num_experts)
        if remainder or not top_k:
            raise ConfigError(
                f"{num_experts} experts: a token goes to {moe.top_k} of {moe.num_experts}, which "
                "is no whole number of these. Use a multiple of "
                f"{moe.num_experts // math.gcd(moe.num_experts, moe.top_k)}."
            )
        changes |= {"num_experts": num_experts, "top_k": top_k}
    return moe.model_copy(update=changes)


def under(config: Config, parameterization: str) -> Config:
    """The same model under another parameterization, by its name in PARAMETERIZATIONS.

    "own" leaves the configuration as it is.
    """
    if parameterization == "own":
        return config
    return change(config, completep=PARAMETERIZATIONS[parameterization])


def with_seed(config: Config, number: int) -> Config:
    """The configuration with other initial weights and another order of the data.

    The seeds of number 0 are the configuration's own.
    """
    # Two different primes, so that the two seeds do not move in step.
    training_seed = config.training.seed + 7919 * number
    data_seed = config.data.seed + 104729 * number
    return change(config, training={"seed": training_seed}, data={"seed": data_seed})


@dataclass
class Trial:
    """A model with its optimizer and its training step, before the first step."""

    config: Config
    context: ParallelContext
    table: Table
    chunks: Sequence[nn.Module]
    optimizer: DistributedOptimizer
    step: TrainingStep
    taps: StreamTaps
    expert_taps: ExpertTaps

    @classmethod
    def build(cls, config: Config, context: ParallelContext, design: Design | None = None) -> Trial:
        """Make the model and all that trains it. Communicates as the start of a training run does.

        Raises ConfigError for a model with a parameter that declares no role.
        """
        design = design or Design()
        table = design.make_table(config)
        chunks: Sequence[Any] | None = None
        if design.make_model is None:
            check_parameters(config, table)
        else:
            # A user's model has parameters that the configuration does not tell of.
            chunks = [design.make_model(config, table, context)]
            check_parameters(config, table, chunks[0].named_parameters())
        assembly = assemble(config, context, table, chunks)
        return cls(
            config,
            context,
            table,
            assembly.chunks,
            assembly.optimizer,
            assembly.step,
            StreamTaps(assembly.chunks),
            ExpertTaps(assembly.chunks),
        )


def read_batches(config: Config, context: ParallelContext, steps: int) -> list[list[Batch]]:
    """This data rank's micro-batches of the first `steps` steps, one list a step.

    Raises DataError where the configuration's token files are missing.
    """
    # All batches are read at once, so a thread that reads ahead would only cost its start.
    data = config.data.model_copy(update={"prefetch": 0})
    training = config.training.model_copy(update={"train_steps": steps})
    config = config.model_copy(update={"data": data, "training": training})
    with build_training_loader(config, context) as loader:
        return [loader.next_step() for _ in range(steps)]


def for_short_runs(
    config: Config, steps: int, precision: str = "float32", **optimizer: Any
) -> Config:
    """The settings of a run of a few steps, at a constant learning rate from the first step on.

    optimizer: further settings of that section.
    """
    # A warm-up would take up all of the few steps.
    schedule = {"schedule": "constant", "warmup_steps": None, "warmup_fraction": None}
    training = {"train_steps": steps, "precision": precision, "recompute": "none"}
    # Instruments read masters and gradients between two steps.
    training["overlap_update"] = False
    # Which of small matrices are converted says nothing about a large model.
    training |= {"float8": "none", "float8_weight_gradient": "high"}
    settings = {**schedule, **following(config.optimizer, optimizer)}
    return change(config, optimizer=settings, training=training)


def following(optimizer: OptimizerConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """New base values with those of Muon's section that follow from them.

    base_lr: the two learning rates keep their ratio. base_weight_decay: where it changes, both have
    one tau; where it is 0, no rule solves for another.
    """
    settings = dict(settings)
    decay = settings.get("base_weight_decay", optimizer.base_weight_decay)
    if decay == 0:
        settings |= {"weight_decay_rule": "table", "target_tau": None}
    muon = optimizer.muon
    if muon is None:
        return settings
    ratio = muon.base_lr / optimizer.base_lr
    changes = {"base_lr": ratio * settings.get("base_lr", optimizer.base_lr)}
    if decay != optimizer.base_weight_decay:
        changes["base_weight_decay"] = decay / ratio
    return {**settings, "muon": muon.model_copy(update=changes)}
