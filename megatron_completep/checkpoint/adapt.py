"""A checkpoint for another configuration, on purpose: more layers, another base shape, alpha or multipliers. The function stays.

Where a forward multiplier changes, the weights before it take the ratio, so that the model computes what it computed: a tensor
multiplied by c has its gradients divided by c, and the update rule's states follow with the powers that the checkpoint lists (of
AdamW's, the first moments are divided by c and the second ones by c^2). New layers come last; the
matrices that write into the residual stream are zero in them, all else is as in a fresh model, and their states are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from megatron_completep.checkpoint.compare import (
    ADAPTABLE,
    Difference,
    differences,
    refused,
    side_by_side,
)
from megatron_completep.checkpoint.examine import rewrite_checkpoint
from megatron_completep.checkpoint.identity import describe_table
from megatron_completep.checkpoint.load import StoredCheckpoint
from megatron_completep.checkpoint.manifest import (
    Manifest,
    Progress,
    StoredParameter,
    committed_steps,
)
from megatron_completep.checkpoint.parts import TORCH_DTYPES
from megatron_completep.checkpoint.save import jsonable
from megatron_completep.checkpoint.shard import describe
from megatron_completep.completep import Table, table_of
from megatron_completep.config import config_from_mapping
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.errors import CheckpointError, ConfigError
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import draw, initial_std
from megatron_completep.optim.rule import MASTER
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Site, Spec, specs_of
from megatron_completep.run.state import RunState


def adapt_checkpoint(
    folder: Path, config: Config, checkpoints: Path, files: int = 1, start_anew: bool = False
) -> tuple[Path, list[Difference]]:
    """Write the checkpoint as one that a run of `config` continues from; returns its folder and what changed.

    start_anew: from step 0, with the weights alone: no states, the data from its beginning. Needs memory for one of `files` files.
    Raises CheckpointError: damaged, of a model that differs in more than ADAPTABLE, or `checkpoints` holds some already.
    """
    stored = StoredCheckpoint.open(folder)
    old = _old_config(stored)
    found = differences(
        {"model": stored.manifest.config["model"]}, {"model": config.model.model_dump(mode="json")}
    )
    _refuse(folder, refused(found, ADAPTABLE), old.model, config.model, checkpoints)
    old_table, table = table_of(old), table_of(config)
    fresh = GPT(config.model, table, ParallelContext.single("meta"))
    check_branches(fresh)
    factors = scale_factors(old.model, old_table, table, config.model)
    values = _Values(stored, config, table, specs_of(fresh), factors, start_anew)
    manifest = _manifest(stored.manifest, config, table, values.described, start_anew)
    found += differences({"table": stored.manifest.table}, {"table": manifest.table})
    return rewrite_checkpoint(manifest, checkpoints, files, values.rows), found


def _old_config(stored: StoredCheckpoint) -> Config:
    try:
        return config_from_mapping(
            stored.manifest.config, name=f"{stored.folder}: its configuration"
        )
    except ConfigError as error:
        raise CheckpointError(f"{error}\nThis version cannot adapt it.") from None


def _refuse(
    folder: Path, bad: list[Difference], old: ModelConfig, new: ModelConfig, checkpoints: Path
) -> None:
    if bad:
        raise CheckpointError(
            f"{folder} cannot become a checkpoint of this model:\n{side_by_side(bad, 'checkpoint', 'new')}\n"
            "Layers can be added, and base shape, alpha and multipliers changed; all else must be the checkpoint's."
        )
    if new.num_layers < old.num_layers:
        raise CheckpointError(
            f"{folder} has {old.num_layers} layers, model.num_layers = {new.num_layers}: layers can be added, not taken away. "
            f"Use at least {old.num_layers}."
        )
    if steps := committed_steps(checkpoints):
        raise CheckpointError(
            f"{checkpoints} holds a checkpoint of step {max(steps)} already. Choose another training.output_dir."
        )


def check_branches(model: GPT) -> None:
    """Whether every branch says which of its parameters make its output.

    They take a change of the residual multiplier over, and are zero in a new layer, which is silent at first by that. Raises
    CheckpointError naming the branches that declare none.
    """
    unknown = []
    for layer, block in model.blocks():
        names = {module: name for name, module in block.named_children()}
        for _, branch in block.branches:
            module = cast(nn.Module, branch)
            if not any(spec.writes_to_stream for spec in specs_of(module).values()):
                unknown.append(f"layer {layer}, {names[module]}")
    if unknown:
        raise CheckpointError(
            f"{'; '.join(unknown)}: no parameter declares that it makes the branch's output, so neither a new layer "
            "nor another residual multiplier can keep the function. Make the output with RowParallelLinear, or give "
            "its Spec the site STREAM."
        )


def scale_factors(
    old: ModelConfig, old_table: Table, table: Table, new: ModelConfig
) -> dict[Site, float]:
    """What the values before each forward multiplier are multiplied with, so that its change does not show."""
    inputs = old.input_multiplier / new.input_multiplier
    logits = old_table.logit_multiplier / table.logit_multiplier
    return {
        Site.STREAM: old_table.residual_multiplier / table.residual_multiplier,
        Site.QUERY: old_table.attention_scale / table.attention_scale,
        Site.INPUT: inputs,
        Site.LOGITS: logits,
        # A tied embedding serves both ends; the norm between them takes the difference.
        Site.TIED_LOGITS: logits / inputs,
    }


def _manifest(
    old: Manifest,
    config: Config,
    table: Table,
    parameters: dict[str, StoredParameter],
    start_anew: bool,
) -> Manifest:
    changed = {
        "config": config.model_dump(mode="json"),
        "table": jsonable(describe_table(table)),
        "parameters": parameters,
        "elements": sum(int(np.prod(p.shape)) for p in parameters.values()),
    }
    if start_anew:
        changed |= {
            "step": 0,
            "state": Progress(**vars(RunState())),
            "updates": 0.0,
            "states": RULES[table.rule].all_powers(),
        }
    return old.model_copy(update=changed)


class _Values:
    """Rows of the new checkpoint's tensors."""

    def __init__(
        self,
        stored: StoredCheckpoint,
        config: Config,
        table: Table,
        specs: dict[str, Spec],
        factors: dict[Site, float],
        start_anew: bool,
    ):
        self._stored = stored
        self._config = config
        self._table = table
        self._factors = factors
        self._anew = start_anew
        self._type = next(iter(stored.manifest.parameters.values())).dtype
        self._specs = {name: spec for name, spec in specs.items() if not spec.is_copy(name)}
        missing = sorted(stored.manifest.parameters.keys() - self._specs.keys())
        assert not missing, missing  # more layers of the same model have all of its parameters

    @property
    def described(self) -> dict[str, StoredParameter]:
        return {
            name: StoredParameter(**describe(spec, self._type))
            for name, spec in self._specs.items()
        }

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one state of one parameter."""
        spec = self._specs[name]
        if self._anew and state != MASTER:
            return torch.zeros(stop - start, *spec.shape[1:], dtype=TORCH_DTYPES[self._type])
        if name not in self._stored.manifest.parameters:
            return self._new(state, name)[start:stop]
        values = self._stored.rows(state, name, start, stop)
        factor = 1.0 if spec.site is None else self._factors[spec.site]
        if factor != 1.0:
            first, last = (
                (0, spec.shape[0]) if spec.site_part is None else spec.part_range(spec.site_part)
            )
            values[max(0, first - start) : max(0, last - start)] *= (
                factor ** self._stored.manifest.states[state]
            )
        return values

    def _new(self, state: str, name: str) -> Tensor:
        """Of a layer that the checkpoint lacks: silent at first, otherwise as in a fresh model."""
        spec, dtype = self._specs[name], TORCH_DTYPES[self._type]
        if state != MASTER or spec.writes_to_stream:
            return torch.zeros(spec.shape, dtype=dtype)
        if spec.constant is not None:
            return torch.full(spec.shape, spec.constant, dtype=dtype)
        std = initial_std(name, spec, self._table, self._config.optimizer)
        drawn = draw(spec, self._config.training.seed, name)[: spec.shape[0]]
        return torch.from_numpy(drawn * np.float32(std)).to(dtype)
