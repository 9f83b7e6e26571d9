"""Checkpoints whose numbers are functions of their names, saved and loaded in any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.completep import table_of
from megatron_completep.kernels.control import STEP
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.run.assemble import assemble
from megatron_completep.run.state import RunState
from tests.support.checkpoints import checkpointed_config
from tests.support.configs import TIED_GPT2
from tests.support.ranks import WorkerPool, context_on

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 4},
    "tied_gpt": {"num_layers": 4, **TIED_GPT2, "qk_norm": True},
    "experts": {
        "num_layers": 3,
        "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 24, "first_dense_layers": 1},
    },
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep4": {"world": 4, "expert_parallel_size": 4},
    "ep2_of_shards": {"world": 4, "expert_parallel_size": 2, "optimizer_shard_size": 2},
    "ep2_tp2": {
        "world": 4,
        "expert_parallel_size": 2,
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "bucket_megabytes": 0.002,
    },
    "ep2_pp2_uneven": {
        "world": 4,
        "expert_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "pipeline_split": [1, 2],
    },
    "one": {"world": 1},
}
TP2_PP2_DP2 = {
    "world": 8,
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "sequence_parallel": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"world": 1},
    "tp4": {"world": 4, "tensor_parallel_size": 4},
    "pp4_uneven": {"world": 4, "pipeline_parallel_size": 4, "pipeline_split": [0, 2, 1, 1]},
    "dp4": {"world": 4, "bucket_megabytes": 0.002, "micro_batch_size": 1},
    "dp4_shard2": {"world": 4, "optimizer_shard_size": 2},
    "dp4_gradients": {"world": 4, "bucket_megabytes": 0.002, "sharding": "gradients"},
    "tp2_dp2": {"world": 4, "tensor_parallel_size": 2},
    "tp2_cp2": {"world": 4, "tensor_parallel_size": 2, "context_parallel_size": 2},
    "virtual": {
        "world": 2,
        "pipeline_parallel_size": 2,
        "virtual_pipeline_size": 2,
        "schedule": "interleaved_1f1b",
    },
}


def logical(name: str, state: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a state of a parameter holds in these tests: a function of its name."""
    seed = int.from_bytes(hashlib.sha256(f"{state}/{name}".encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) + 3.0  # not near 0, which padding holds


def build(
    rank: int, folder: str, model: str, layout: dict[str, Any]
) -> tuple[DistributedOptimizer, Checkpointer]:
    """An optimizer of zeros, and its checkpointer."""
    no_parallel_settings = ("world", "micro_batch_size")
    parallel = {name: layout[name] for name in layout if name not in no_parallel_settings}
    training = {"micro_batch_size": layout.get("micro_batch_size", 2)}
    config = checkpointed_config(folder, model=MODELS[model], parallel=parallel, training=training)
    context = context_on(rank, config.parallel)
    table = table_of(config)
    chunks = build_chunks(config.model, table, config.parallel, context)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    optimizer = assemble(config, context, table, chunks).optimizer
    return optimizer, Checkpointer(config, context, optimizer, table, report=lambda text: None)


def expected_flat(optimizer: DistributedOptimizer, state: str) -> torch.Tensor:
    """The flat buffer of a rank, by another way than boxes: cut from the logical tensors."""
    flat = torch.zeros(optimizer.shards.layout.size)
    for piece in optimizer.shards.layout.pieces:
        spec = optimizer.shards.specs[piece.name]
        tensor = logical(spec.stored_name(piece.name), state, spec.shape)
        flat[piece.start : piece.start + piece.size] = spec.to_local(tensor).flatten()
    return flat


def save(rank: int, folder: str, model: str, layout: dict[str, Any]) -> None:
    """Save the logical tensors in a layout, as step 6."""
    optimizer, checkpointer = build(rank, folder, model, layout)
    for state in optimizer.states:
        optimizer.states[state].copy_(optimizer.shards.own_shard(expected_flat(optimizer, state)))
    optimizer.control[STEP] = 5.0
    checkpointer.save(RunState(step=6, consumed_samples=24, tokens=192))
    checkpointer.close()


def load(
    rank: int, folder: str, model: str, layout: dict[str, Any], save_to: str | None = None
) -> list[str]:
    """Names of what did not arrive as it was saved; `save_to`: a folder to save it in again."""
    optimizer, checkpointer = build(rank, folder, model, layout)
    state = checkpointer.load_latest()
    wrong = []
    if state != RunState(6, 24, 192) or optimizer.control[STEP] != 5.0:
        wrong.append("state")
    if not torch.equal(optimizer.shards.flat, expected_flat(optimizer, "master")):
        wrong.append("parameters")
    for name, tensor in optimizer.states.items():
        expected = optimizer.shards.own_shard(expected_flat(optimizer, name))
        if not torch.equal(tensor, expected):
            wrong.append(name)
    if save_to is not None:
        fresh_optimizer, fresh_checkpointer = build(rank, save_to, model, layout)
        for name, tensor in optimizer.states.items():
            fresh_optimizer.states[name].copy_(tensor)
        fresh_optimizer.control.copy_(optimizer.control)
        fresh_checkpointer.save(state or RunState())
        fresh_checkpointer.close()
    return wrong


def run(
    pool: WorkerPool,
    function: Callable[..., Any],
    folder: Path,
    model: str,
    layout: dict[str, Any],
    *more: Any,
) -> list[Any]:
    """What the function returns on every rank of the layout."""
    if layout["world"] == 1:
        return [function(0, str(folder), model, layout, *more)]
    return pool.run(layout["world"], function, str(folder), model, layout, *more)
