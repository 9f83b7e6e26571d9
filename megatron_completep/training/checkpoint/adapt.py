"""A checkpoint for another configuration, on purpose: more layers, another base shape, alpha or multipliers. The function stays.

Where a forward multiplier changes, the weights before it take the ratio, so that the model computes what it computed: a tensor
multiplied by c has its gradients, and so its first moments, divided by c and its second ones by c^2. New layers come last; the
matrices that write into the residual stream are zero in them, all else is as in a fresh model, and their moments are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_completep.completep import Role, Table, declaration_of, table_for
from megatron_completep.config import config_from_mapping
from megatron_completep.config.derived import tokens_per_step, total_tokens
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.errors import CheckpointError, ConfigError
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import CONSTANT_ROLES, draw, initial_std
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.placement import placement_of
from megatron_completep.training.checkpoint.compare import ADAPTABLE, Difference, differences, refused, table_of
from megatron_completep.training.checkpoint.examine import rewrite_checkpoint
from megatron_completep.training.checkpoint.identity import describe_table
from megatron_completep.training.checkpoint.load import StoredCheckpoint
from megatron_completep.training.checkpoint.manifest import Manifest, Progress, StoredParameter, committed_steps
from megatron_completep.training.checkpoint.parts import TORCH_DTYPES
from megatron_completep.training.checkpoint.save import jsonable
from megatron_completep.training.state import RunState

POWER = {"master": 1, "exp_avg": -1, "exp_avg_sq": -2}  # of the factor on a tensor, by state


def adapt_checkpoint(
    folder: Path, config: Config, checkpoints: Path, files: int = 1, start_anew: bool = False
) -> tuple[Path, list[Difference]]:
    """Write the checkpoint as one that a run of `config` continues from; returns its folder and what changed.

    start_anew: from step 0, with the weights alone: no moments, the data from its beginning. Needs memory for one of `files` files.
    Raises CheckpointError: damaged, of a model that differs in more than ADAPTABLE, or `checkpoints` holds some already.
    """
    stored = StoredCheckpoint.open(folder)
    old = _old_config(stored)
    found = differences({"model": stored.manifest.config["model"]}, {"model": config.model.model_dump(mode="json")})
    _refuse(folder, refused(found, ADAPTABLE), old.model, config.model, checkpoints)
    old_table, table = table_of_run(old), table_of_run(config)
    fresh = GPT(config.model, table, ParallelContext.single("meta"))
    factors = dict(scale_factors(old.model, old_table, table, config.model))
    values = _Values(stored, config, table, dict(fresh.named_parameters()), factors, start_anew)
    manifest = _manifest(stored.manifest, config, table, values.described, start_anew)
    found += differences({"table": stored.manifest.table}, {"table": manifest.table})
    return rewrite_checkpoint(manifest, checkpoints, files, values.rows), found


def table_of_run(config: Config) -> Table:
    return table_for(config.model, config.completep, tokens_per_step(config), total_tokens(config))


def _old_config(stored: StoredCheckpoint) -> Config:
    try:
        return config_from_mapping(stored.manifest.config, name=f"{stored.folder}: its configuration")
    except ConfigError as error:
        raise CheckpointError(f"{error}\nThis version cannot adapt it.") from None


def _refuse(folder: Path, bad: list[Difference], old: ModelConfig, new: ModelConfig, checkpoints: Path) -> None:
    if bad:
        raise CheckpointError(
            f"{folder} cannot become a checkpoint of this model:\n{table_of(bad, 'checkpoint', 'new')}\n"
            "Layers can be added, and base shape, alpha and multipliers changed; all else must be the checkpoint's."
        )
    if new.num_layers < old.num_layers:
        raise CheckpointError(
            f"{folder} has {old.num_layers} layers, model.num_layers = {new.num_layers}: layers can be added, not taken away. "
            f"Use at least {old.num_layers}."
        )
    if steps := committed_steps(checkpoints):
        raise CheckpointError(f"{checkpoints} holds a checkpoint of step {max(steps)} already. Choose another training.output_dir.")


def scale_factors(old: ModelConfig, old_table: Table, table: Table, new: ModelConfig) -> Iterator[tuple[str, tuple[float, int | None]]]:
    """Pattern of names -> the factor on these tensors, and on how many of their first rows (None: all)."""
    branch = old_table.residual_multiplier / table.residual_multiplier
    for name in ("attention.output", "mlp.down"):
        yield f"layers.*.{name}.*", (branch, None)
    attention = old_table.attention_scale / table.attention_scale
    head_dim = old.head_dim or old.hidden_size // old.num_attention_heads
    if old.qk_norm:
        yield "layers.*.attention.q_norm.weight", (attention, None)
    else:
        yield "layers.*.attention.qkv.*", (attention, old.num_attention_heads * head_dim)  # the queries stand first
    inputs = old.input_multiplier / new.input_multiplier
    yield "embedding.weight", (inputs, None)
    yield "positions.weight", (inputs, None)
    logits = old_table.logit_multiplier / table.logit_multiplier
    if old.tied_embeddings:  # the embedding serves both ends; the norm between them takes the difference
        yield "final_norm.*", (logits / inputs, None)
    else:
        yield "unembedding.weight", (logits, None)


def _manifest(old: Manifest, config: Config, table: Table, parameters: dict[str, StoredParameter], start_anew: bool) -> Manifest:
    changed = {
        "config": config.model_dump(mode="json"),
        "table": jsonable(describe_table(table)),
        "parameters": parameters,
        "elements": sum(int(np.prod(p.shape)) for p in parameters.values()),
    }
    if start_anew:
        changed |= {"step": 0, "state": Progress(**vars(RunState())), "updates": 0.0}
    return old.model_copy(update=changed)


class _Values:
    """Rows of the new checkpoint's tensors."""

    def __init__(self, stored: StoredCheckpoint, config: Config, table: Table, fresh: dict, factors: dict, start_anew: bool):
        self._stored, self._config, self._table, self._factors, self._anew = stored, config, table, factors, start_anew
        self._dtype = next(iter(stored.manifest.parameters.values())).dtype
        self._fresh = {name: p for name, p in fresh.items() if placement_of(p).tied_to in (None, name)}
        missing = sorted(stored.manifest.parameters.keys() - self._fresh.keys())
        assert not missing, missing  # more layers of the same model have all of its parameters

    @property
    def described(self) -> dict[str, StoredParameter]:
        found = {}
        for name, parameter in self._fresh.items():
            declaration, shape = declaration_of(name, parameter), list(placement_of(parameter).global_shape)
            found[name] = StoredParameter(role=declaration.role.value, width_ratio=declaration.width_ratio, shape=shape, dtype=self._dtype)
        return found

    def rows(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one state of one parameter."""
        if self._anew and state != "master":
            return torch.zeros(stop - start, *self._shape(name)[1:], dtype=TORCH_DTYPES[self._dtype])
        if name not in self._stored.manifest.parameters:
            return self._new(state, name)[start:stop]
        values = self._stored.rows(state, name, start, stop)
        for pattern, (factor, rows) in self._factors.items():
            if fnmatchcase(name, pattern) and factor != 1.0:
                values[: None if rows is None else max(0, rows - start)] *= factor ** POWER[state]
        return values

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(placement_of(self._fresh[name]).global_shape)

    def _new(self, state: str, name: str) -> Tensor:
        """Of a layer that the checkpoint lacks."""
        parameter, dtype = self._fresh[name], TORCH_DTYPES[self._dtype]
        declaration, shape = declaration_of(name, parameter), self._shape(name)
        writes = any(fnmatchcase(name, f"layers.*.{part}.*") for part in ("attention.output", "mlp.down"))
        if state != "master" or writes or declaration.role is Role.HIDDEN_BIAS or name.endswith(".bias"):
            return torch.zeros(shape, dtype=dtype)
        if declaration.role in CONSTANT_ROLES:
            return torch.ones(shape, dtype=dtype)
        std = initial_std(name, declaration, self._table, self._config.optimizer)
        return torch.from_numpy(draw(placement_of(parameter), shape, self._config.training.seed, name) * np.float32(std)).to(dtype)
