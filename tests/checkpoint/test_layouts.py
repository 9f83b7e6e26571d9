"""Any layout loads any checkpoint: every number arrives, bit for bit, where the other layout holds it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.checkpoint import Checkpointer, StoredCheckpoint
from megatron_completep.completep import table_of
from megatron_completep.kernels.control import STEP
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext, data_parallel_size_for
from megatron_completep.run.state import RunState
from tests.support.checkpoints import tiny_config
from tests.support.ranks import WorkerPool

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 4},
    "tied_gpt": {
        "num_layers": 4,
        "norm": "layernorm",
        "bias": True,
        "activation": "gelu",
        "position": "learned",
        "qk_norm": True,
        "tied_embeddings": True,
    },
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
    "tp2_dp2": {"world": 4, "tensor_parallel_size": 2},
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
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 3.0
    )  # never 0, which is what padding holds


def build(
    rank: int, folder: str, model: str, layout: dict[str, Any]
) -> tuple[DistributedOptimizer, Checkpointer]:
    parallel = {
        key: value for key, value in layout.items() if key not in ("world", "micro_batch_size")
    }
    training = {"micro_batch_size": layout.get("micro_batch_size", 2)}
    config = tiny_config(folder, model=MODELS[model], parallel=parallel, training=training)
    context = ParallelContext.single("cpu")
    if layout["world"] > 1:
        data_size = data_parallel_size_for(config.parallel, layout["world"])
        context = ParallelContext.over_world(
            config.parallel, torch.device("cpu"), rank, layout["world"], data_size
        )
    table = table_of(config)
    chunks = build_chunks(config.model, table, config.parallel, context)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.data.zero_()
    optimizer = DistributedOptimizer(
        chunks, table, config.optimizer, context, config.parallel, torch.float32
    )
    return optimizer, Checkpointer(config, context, optimizer, table, report=lambda text: None)


def expected_flat(optimizer: DistributedOptimizer, state: str) -> torch.Tensor:
    """The whole flat buffer of a rank, by another way than boxes: cut from the logical tensors, piece by piece."""
    flat = torch.zeros(optimizer.shards.layout.size)
    for piece in optimizer.shards.layout.pieces:
        spec = optimizer.shards.specs[piece.name]
        whole = logical(spec.stored_name(piece.name), state, spec.shape)
        flat[piece.start : piece.start + piece.size] = spec.cut(whole).flatten()
    return flat


def save(rank: int, folder: str, model: str, layout: dict[str, Any]) -> None:
    optimizer, checkpointer = build(rank, folder, model, layout)
    for state in optimizer.states:
        optimizer.states[state].copy_(optimizer.shards.own_shard(expected_flat(optimizer, state)))
    optimizer.control[STEP] = 5.0
    checkpointer.save(RunState(step=6, consumed_samples=24, tokens=192))
    checkpointer.close()


def load(
    rank: int, folder: str, model: str, layout: dict[str, Any], save_to: str | None = None
) -> list[str]:
    """Names of what did not arrive as it was saved."""
    optimizer, checkpointer = build(rank, folder, model, layout)
    state = checkpointer.load_latest()
    wrong = [] if state == RunState(6, 24, 192) and optimizer.control[STEP] == 5.0 else ["state"]
    wrong += (
        []
        if torch.equal(optimizer.shards.flat, expected_flat(optimizer, "master"))
        else ["parameters"]
    )
    for name in optimizer.states:
        if not torch.equal(
            optimizer.states[name], optimizer.shards.own_shard(expected_flat(optimizer, name))
        ):
            wrong.append(name)
    if save_to is not None:
        build_again, other = build(rank, save_to, model, layout)
        for name in optimizer.states:
            build_again.states[name].copy_(optimizer.states[name])
        build_again.control.copy_(optimizer.control)
        other.save(state or RunState())
        other.close()
    return wrong


def run(
    pool: WorkerPool, function, folder: Path, model: str, layout: dict[str, Any], *more: Any
) -> list[Any]:
    if layout["world"] == 1:
        return [function(0, str(folder), model, layout, *more)]
    return pool.run(layout["world"], function, str(folder), model, layout, *more)


@pytest.mark.parametrize("model", [pytest.param("llama", marks=pytest.mark.slow), "tied_gpt"])
def test_a_checkpoint_of_tp2_pp2_dp2_is_read_by_every_layout_and_back(pool, tmp_path, model):
    run(pool, save, tmp_path / "first", model, TP2_PP2_DP2)
    for name, layout in LAYOUTS.items():
        save_to = str(tmp_path / name)  # and from there back
        assert not [
            wrong
            for rank in run(pool, load, tmp_path / "first", model, layout, save_to)
            for wrong in rank
        ], name
    for name in (
        LAYOUTS if model == "llama" else ("one", "pp4_uneven")
    ):  # all of them in the slow suite
        assert not [
            wrong for rank in run(pool, load, tmp_path / name, model, TP2_PP2_DP2) for wrong in rank
        ], name


def test_every_layout_stores_the_same_tensors_each_element_once(pool, tmp_path):
    stored = {}
    for name in ("one", "tp2_dp2", "pp4_uneven"):
        run(pool, save, tmp_path / name, "tied_gpt", LAYOUTS[name])
        checkpoint = StoredCheckpoint.open(tmp_path / name / "checkpoints" / "step_00000006")
        stored[name] = {
            parameter: checkpoint.tensor(parameter, "exp_avg")
            for parameter in checkpoint.manifest.parameters
        }
        assert checkpoint.manifest.elements == sum(t.numel() for t in stored[name].values())
    for name in stored:
        assert (
            stored[name].keys() == stored["one"].keys() and "unembedding.weight" not in stored[name]
        )
        assert all(torch.equal(stored[name][p], stored["one"][p]) for p in stored["one"])


def test_a_missing_part_is_noticed_by_every_rank(pool, tmp_path):
    """The negative control: take one rank's file away and the load fails, on all ranks alike, naming the file."""
    layout = LAYOUTS["tp2_dp2"]
    run(pool, save, tmp_path, "llama", layout)
    folder = tmp_path / "checkpoints" / "step_00000006"
    shutil.move(folder / "rank_00002_of_00004.safetensors", tmp_path / "elsewhere")
    with pytest.raises(
        AssertionError,
        match=r"(?s)rank 3:.*CheckpointError.*rank_00002_of_00004.safetensors: No such file",
    ):
        run(pool, load, tmp_path, "llama", layout)
