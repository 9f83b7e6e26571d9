"""A checkpoint rewritten for another configuration, so that the model computes the same function.

It may have more layers, another base shape, alpha or multipliers. Where a forward multiplier
changes, the weights before it are multiplied by old / new. If a tensor is multiplied by c, its
gradients are divided by c. Each state of the update rule is therefore multiplied by c to the power
that the checkpoint's manifest gives for it: -1 for AdamW's first moment, -2 for its second.

Another update rule takes over running means of gradients from the states of the old one: AdamW's
first moment becomes Muon's momentum. Where a state is missing that cannot be made (AdamW's second
moment of what was Muon's), all states begin anew at zero, and with them the corrections of their
bias; the run goes on where it was.

It may also have longer sequences, with other rotary frequencies: a second stage of training. The
data then begin anew, as samples of one length cannot be counted in those of another.

New layers come last. The matrices that write into the residual stream are zero in them, all other
weights are as in a fresh model, and their states are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_completep.checkpoint.compare import (
    ADAPTABLE,
    LONGER,
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
from megatron_completep.config.derived import tokens_per_step
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.errors import CheckpointError, ConfigError
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import draw, scale_parts
from megatron_completep.optim.rule import MASTER, Rule
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
    adaptable = (*ADAPTABLE, *LONGER)
    _check_adaptable(folder, refused(changes, adaptable), old.model, config.model, checkpoints)
    _check_length(folder, old.model, config.model, start_anew)

    # A model on the meta device has all specs and takes no memory.
    old_table = table_of(old)
    table = table_of(config)
    fresh = GPT(config.model, table, ParallelContext.single("meta"))
    check_branches(fresh)
    factors = scale_factors(old.model, old_table, table, config.model)
    specs = {name: spec for name, spec in specs_of(fresh).items() if not spec.is_copy(name)}
    old_rule = RULES[old_table.rule]
    new_rule = RULES[table.rule] if start_anew or table.rule != old_table.rule else None
    states = States.of(stored.manifest, specs, old_rule, new_rule, start_anew)
    tensors = _Tensors(stored, config, table, specs, factors, states)
    manifest = _manifest(stored.manifest, config, table, tensors.stored_parameters, states)
    if start_anew:
        # The order of the samples that were read is nothing to go on from either.
        begin = {"step": 0, "state": Progress(**vars(RunState())), "order": None}
        manifest = manifest.model_copy(update=begin)
    # Also list the changed factors of the CompleteP table, and what becomes of the optimizer.
    for name in ("table", "states", "updates"):
        changes += differences(
            {name: getattr(stored.manifest, name)}, {name: getattr(manifest, name)}
        )
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
            "You may add layers, and change base shape, alpha, multipliers, and the length of "
            "sequences with rope_base and rope_scaling. "
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


def _check_length(folder: Path, old: ModelConfig, new: ModelConfig, start_anew: bool) -> None:
    """Raise CheckpointError if the weights or the data's position do not go with the new length."""
    if new.seq_length == old.seq_length:
        return
    if new.position == "learned":
        raise CheckpointError(
            f"{folder} has learned positions for model.seq_length = {old.seq_length}, and none "
            f"for {new.seq_length}. Keep model.seq_length = {old.seq_length}."
        )
    if not start_anew:
        raise CheckpointError(
            f"{folder} has read samples of model.seq_length = {old.seq_length} tokens, which do "
            f"not tell how many of {new.seq_length} were read. Add --start-anew to take the "
            "weights alone and begin the data anew."
        )


def length_notes(folder: Path, config: Config) -> list[str]:
    """What another length of sequences changes besides the model, for people; else nothing.

    folder: the checkpoint that is adapted to `config`.
    """
    old = _old_config(StoredCheckpoint.open(folder))
    if old.model.seq_length == config.model.seq_length:
        return []
    old_tokens = tokens_per_step(old)
    tokens = tokens_per_step(config)
    lines = [
        f"model.seq_length {old.model.seq_length} -> {config.model.seq_length}: a step has "
        f"{tokens:,} tokens where the checkpoint's had {old_tokens:,}"
    ]
    if tokens == old_tokens:
        return lines
    batch = table_of(config).batch
    old_batch = table_of(old).batch
    keeping = old_tokens / config.model.seq_length
    lines.append(
        f"m_B {old_batch.batch_ratio:g} -> {batch.batch_ratio:g}, and S, which multiplies every "
        f"learning rate, {old_batch.scale:.5g} -> {batch.scale:.5g}"
    )
    if config.completep.base_batch_tokens is None:
        lines.append(
            "without completep.base_batch_tokens learning rates do not follow the tokens a step"
        )
    if keeping.is_integer():
        lines.append(f"training.global_batch_size = {int(keeping)} would keep the tokens of a step")
    return lines


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


@dataclass(frozen=True)
class States:
    """The states of the new checkpoint, and where they come from.

    powers: as in `Manifest.states`.
    kept: name of a parameter -> those that it has; None: all.
    sources: (parameter, state) -> the stored state that it is; what is missing is zero.
    begin_anew: whether all of them are zero.
    """

    powers: Mapping[str, int]
    kept: Mapping[str, list[str] | None]
    sources: Mapping[tuple[str, str], str]
    begin_anew: bool

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        specs: Mapping[str, Spec],
        old_rule: type[Rule],
        new_rule: type[Rule] | None,
        anew: bool,
    ) -> States:
        """new_rule: of the new run; None: the states are the checkpoint's."""
        powers = manifest.states if new_rule is None else new_rule.all_powers()
        kept: dict[str, list[str] | None] = {}
        sources: dict[tuple[str, str], str] = {}
        missing = False
        for name, spec in specs.items():
            is_stored = name in manifest.parameters
            if is_stored and new_rule is None:
                kept[name] = manifest.parameters[name].states
            else:
                # A new layer has what a parameter of its kind has.
                of_kind = (new_rule or old_rule).stored_states(spec)
                kept[name] = None if of_kind is None else list(of_kind)
            if not is_stored:
                continue
            stored = manifest.states_of(name)
            means = [state for state in stored if state in old_rule.means]
            for state in kept[name] or powers:
                if state in stored:
                    sources[name, state] = state
                elif new_rule is not None and state in new_rule.means and means:
                    sources[name, state] = means[0]
                else:
                    missing = True
        return cls(powers, kept, sources, anew or missing)


def _manifest(
    old: Manifest,
    config: Config,
    table: Table,
    parameters: dict[str, StoredParameter],
    states: States,
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
        "states": dict(states.powers),
    }
    if states.begin_anew:
        changed["updates"] = 0.0
    return old.model_copy(update=changed)


class _Tensors:
    """The tensors of the new checkpoint, computed row by row when they are written.

    Args:
        stored: the old checkpoint.
        specs: of the parameters of the new model, without the copies of tied ones.
        factors: of `scale_factors`.
    """

    def __init__(
        self,
        stored: StoredCheckpoint,
        config: Config,
        table: Table,
        specs: dict[str, Spec],
        factors: dict[ForwardMultiplier, float],
        states: States,
    ):
        self._stored = stored
        self._config = config
        self._table = table
        self._factors = factors
        self._states = states
        self._dtype_name = next(iter(stored.manifest.parameters.values())).dtype
        self._dtype = TORCH_DTYPES[self._dtype_name]
        self._specs = specs
        missing = sorted(stored.manifest.parameters.keys() - self._specs.keys())
        # The new model only adds layers, so it has every parameter of the old one.
        assert not missing, missing

    @property
    def stored_parameters(self) -> dict[str, StoredParameter]:
        """What the manifest says of each parameter."""
        parameters = {}
        for name, spec in self._specs.items():
            kept = self._states.kept[name]
            parameters[name] = StoredParameter(**describe(spec, self._dtype_name, kept))
        return parameters

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one state of one parameter."""
        spec = self._specs[name]
        if self._states.begin_anew and state != MASTER:
            return torch.zeros(stop - start, *spec.shape[1:], dtype=self._dtype)
        if name not in self._stored.manifest.parameters:
            return self._new(state, name)[start:stop]

        source = self._states.sources[name, state]
        tensor = self._stored.rows(source, name, start, stop)
        factor = 1.0 if spec.forward_multiplier is None else self._factors[spec.forward_multiplier]
        if factor == 1.0:
            return tensor
        # Of a fused matrix, such as query, key and value, one part alone may stand before the
        # multiplier.
        scaled_start = 0
        scaled_stop = spec.shape[0]
        if spec.multiplied_part is not None:
            scaled_start, scaled_stop = spec.part_range(spec.multiplied_part)
        power = self._stored.manifest.states[source]
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
        drawn = draw(spec, self._config.training.seed, name)[: spec.shape[0]]  # without padding
        # Nothing is split here: the parts lie as they do in the logical tensor.
        scale_parts(drawn, spec.local_parts(), name, spec, self._table, self._config.optimizer)
        return torch.from_numpy(drawn).to(self._dtype)
