"""A checkpoint rewritten for another configuration, so that the model computes the same function.

It may have more layers, another base shape, alpha or multipliers. Where a forward multiplier
changes, the weights before it are multiplied by old / new. If a tensor is multiplied by c, its
gradients are divided by c. Each state of the update rule is therefore multiplied by c to the power
that the checkpoint's manifest gives for it: -1 for AdamW's first moment, -2 for its second.

New layers come last. The matrices that write into the residual stream are zero in them, all other
weights are as in a fresh model, and their states are zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

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
from megatron_completep.parallel.parameter import ForwardMultiplier, Spec, specs_of
from megatron_completep.run.state import RunState


def adapt_checkpoint(
    folder: Path, config: Config, checkpoints: Path, files: int = 1, start_anew: bool = False
) -> tuple[Path, list[Difference]]:
    """Write the checkpoint as one that a run of `config` continues from.

    Needs memory for one file, and for one logical tensor.

    Args:
        folder: the checkpoint.
        checkpoints: the folder in which the new one is made.
        files: how many files it has.
        start_anew: from step 0 with the weights alone: states are zero, and the data begin anew.

    Returns:
        The folder of the new checkpoint, and what changed.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a model that differs in more than
            ADAPTABLE, or `checkpoints` holds one already.
    """
    stored = StoredCheckpoint.open(folder)
    old = _old_config(stored)
    stored_model = {"model": stored.manifest.config["model"]}
    changes = differences(stored_model, {"model": config.model.model_dump(mode="json")})
    _check_adaptable(folder, refused(changes, ADAPTABLE), old.model, config.model, checkpoints)

    # A model on the meta device has all specs and takes no memory.
    old_table = table_of(old)
    table = table_of(config)
    fresh = GPT(config.model, table, ParallelContext.single("meta"))
    check_branches(fresh)
    factors = scale_factors(old.model, old_table, table, config.model)
    tensors = _Tensors(stored, config, table, specs_of(fresh), factors, start_anew)
    manifest = _manifest(stored.manifest, config, table, tensors.stored_parameters, start_anew)
    # Also list the changed factors of the CompleteP table, for the user.
    changes += differences({"table": stored.manifest.table}, {"table": manifest.table})
    return rewrite_checkpoint(manifest, checkpoints, files, tensors.rows), changes


def _old_config(stored: StoredCheckpoint) -> Config:
    """The configuration of the checkpoint, as this version reads it."""
    name = f"{stored.folder}: its configuration"
    try:
        return config_from_mapping(stored.manifest.config, name=name)
    except ConfigError as error:
        raise CheckpointError(f"{error}\nThis version cannot adapt it.") from None


def _check_adaptable(
    folder: Path, bad: list[Difference], old: ModelConfig, new: ModelConfig, checkpoints: Path
) -> None:
    """Raise CheckpointError if the checkpoint cannot become one of the new model.

    bad: differences between the models that no rescaling of the weights can make up for.
    """
    if bad:
        raise CheckpointError(
            f"{folder} cannot become a checkpoint of this model:\n"
            f"{side_by_side(bad, 'checkpoint', 'new')}\n"
            "You may add layers, and change base shape, alpha and multipliers. "
            "Every other model setting must be the same as in the checkpoint."
        )
    if new.num_layers < old.num_layers:
        raise CheckpointError(
            f"{folder} has {old.num_layers} layers, model.num_layers = {new.num_layers}: "
            f"layers can be added, not taken away. Use at least {old.num_layers}."
        )
    # A run in this folder resumes from its newest checkpoint, which would not necessarily be the
    # one written now.
    if steps := committed_steps(checkpoints):
        raise CheckpointError(
            f"{checkpoints} holds a checkpoint of step {max(steps)} already. "
            "Choose another training.output_dir."
        )


def check_branches(model: GPT) -> None:
    """Raise CheckpointError unless every branch declares which parameters make its output.

    These parameters are rescaled when the residual multiplier changes. In a new layer they are
    zero, so that the layer adds nothing at first. The error names the branches that declare none.
    """
    undeclared = []
    for layer, block in model.blocks():
        names = {module: name for name, module in block.named_children()}
        for _, branch in block.branches:
            module = cast(nn.Module, branch)
            if not any(spec.writes_to_stream for spec in specs_of(module).values()):
                undeclared.append(f"layer {layer}, {names[module]}")
    if undeclared:
        raise CheckpointError(
            f"{'; '.join(undeclared)}: no parameter declares that it makes the branch's output, "
            "so neither a new layer nor another residual multiplier can keep the function. "
            "Make the output with RowParallelLinear, or give its Spec "
            "forward_multiplier=ForwardMultiplier.STREAM."
        )


def scale_factors(
    old: ModelConfig, old_table: Table, table: Table, new: ModelConfig
) -> dict[ForwardMultiplier, float]:
    """For each forward multiplier, the factor of the parameters before it.

    With these factors the function stays the same although the multipliers change.
    """
    inputs = old.input_multiplier / new.input_multiplier
    logits = old_table.logit_multiplier / table.logit_multiplier
    return {
        ForwardMultiplier.STREAM: old_table.residual_multiplier / table.residual_multiplier,
        ForwardMultiplier.QUERY: old_table.attention_scale / table.attention_scale,
        ForwardMultiplier.INPUT: inputs,
        ForwardMultiplier.LOGITS: logits,
        # A tied embedding is scaled for the input multiplier. The final norm is scaled by what
        # remains for the logits.
        ForwardMultiplier.TIED_LOGITS: logits / inputs,
    }


def _manifest(
    old: Manifest,
    config: Config,
    table: Table,
    parameters: dict[str, StoredParameter],
    start_anew: bool,
) -> Manifest:
    """The manifest of the new checkpoint, except what `rewrite_checkpoint` fills in."""
    elements = 0
    for parameter in parameters.values():
        elements += math.prod(parameter.shape)
    changed: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "table": jsonable(describe_table(table)),
        "parameters": parameters,
        "elements": elements,
    }
    if start_anew:
        changed["step"] = 0
        changed["state"] = Progress(**vars(RunState()))
        changed["updates"] = 0.0
        # The new run may have another update rule: the states of the old one are not taken over.
        changed["states"] = RULES[table.rule].all_powers()
    return old.model_copy(update=changed)


class _Tensors:
    """The tensors of the new checkpoint, computed row by row when they are written.

    Args:
        stored: the old checkpoint.
        specs: of the parameters of the new model.
        factors: of `scale_factors`.
        start_anew: whether the states are zero.
    """

    def __init__(
        self,
        stored: StoredCheckpoint,
        config: Config,
        table: Table,
        specs: dict[str, Spec],
        factors: dict[ForwardMultiplier, float],
        start_anew: bool,
    ):
        self._stored = stored
        self._config = config
        self._table = table
        self._factors = factors
        self._start_anew = start_anew
        self._dtype_name = next(iter(stored.manifest.parameters.values())).dtype
        self._dtype = TORCH_DTYPES[self._dtype_name]
        self._specs = {name: spec for name, spec in specs.items() if not spec.is_copy(name)}
        missing = sorted(stored.manifest.parameters.keys() - self._specs.keys())
        # The new model only adds layers, so it has every parameter of the old one.
        assert not missing, missing

    @property
    def stored_parameters(self) -> dict[str, StoredParameter]:
        """What the manifest says of each parameter."""
        parameters = {}
        for name, spec in self._specs.items():
            parameters[name] = StoredParameter(**describe(spec, self._dtype_name))
        return parameters

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one state of one parameter."""
        spec = self._specs[name]
        if self._start_anew and state != MASTER:
            return torch.zeros(stop - start, *spec.shape[1:], dtype=self._dtype)
        if name not in self._stored.manifest.parameters:
            return self._new(state, name)[start:stop]

        tensor = self._stored.rows(state, name, start, stop)
        factor = 1.0 if spec.forward_multiplier is None else self._factors[spec.forward_multiplier]
        if factor == 1.0:
            return tensor
        # Of a fused matrix, such as query, key and value, one part alone may stand before the
        # multiplier.
        scaled_start = 0
        scaled_stop = spec.shape[0]
        if spec.multiplied_part is not None:
            scaled_start, scaled_stop = spec.part_range(spec.multiplied_part)
        power = self._stored.manifest.states[state]
        scaled_rows = slice(max(0, scaled_start - start), max(0, scaled_stop - start))
        tensor[scaled_rows] *= factor**power
        return tensor

    def _new(self, state: str, name: str) -> Tensor:
        """A tensor of a layer that the checkpoint lacks.

        The layer adds nothing to the residual stream at first, and is otherwise as in a fresh
        model.
        """
        spec = self._specs[name]
        if state != MASTER or spec.writes_to_stream:
            return torch.zeros(spec.shape, dtype=self._dtype)
        if spec.constant is not None:
            return torch.full(spec.shape, spec.constant, dtype=self._dtype)
        std = initial_std(name, spec, self._table, self._config.optimizer)
        drawn = draw(spec, self._config.training.seed, name)[: spec.shape[0]]  # without padding
        return torch.from_numpy(drawn * np.float32(std)).to(self._dtype)
