"""The plan on paper against the real construction code,
run on fake tensors in a fake process group of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_completep.completep import table_of
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.model.stages import build_chunks, layer_weights, split_layers
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import data_parallel_size_for
from megatron_completep.planning.scaling import (
    GPUS,
    bubble_share,
    gpu_of,
    rank_memory,
    scaling_plan,
    stage_activations,
)
from megatron_completep.planning.scaling_report import describe_scaling
from megatron_completep.planning.sizes import rank_stages
from megatron_completep.run.assemble import assemble
from tests.support.configs import TIED_GPT2, Sections, merged, small_config
from tests.support.ranks import context_on

LARGE: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 1024,
        "num_layers": 8,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "ffn_hidden_size": 2816,
        "vocab_size": 50000,
        "vocab_multiple": 128,
        "seq_length": 1024,
    },
    "completep": {"base_hidden_size": 256, "base_num_layers": 2},
    "parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 4, "sequence_parallel": True},
    "training": {"global_batch_size": 8192, "precision": "bf16"},
}
VARIANTS = {
    "rmsnorm, swiglu, rope": {},
    "layernorm, gelu, learned, tied": {"model": TIED_GPT2},
    "no sequence parallelism": {"parallel": {"sequence_parallel": False}},
    "one pipeline stage, squared ReLU, QK-norm": {
        "model": {"activation": "squared_relu", "qk_norm": True},
        "parallel": {"pipeline_parallel_size": 1},
    },
    "tensor 8": {"parallel": {"tensor_parallel_size": 8, "pipeline_parallel_size": 1}},
    "float32": {"training": {"precision": "float32"}},
    "optimizer over 4 ranks": {
        "parallel": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 2,
            "optimizer_shard_size": 4,
            "sequence_parallel": False,
        }
    },
}

# Over tensor ranks, and over more than these.
EXPERTS: dict[str, dict[str, Any]] = {
    "experts over 4 ranks": {
        "model": {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 512, "every": 2}},
        "parallel": {"pipeline_parallel_size": 1, "expert_parallel_size": 4},
    },
}


def config_of(changes: Sections, recompute: str = "none") -> Config:
    return small_config(**merged(LARGE, changes, {"training": {"recompute": recompute}}))


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """start(world_size): a process group that sends nothing,
    with this process as one of many ranks.
    """

    def start(rank: int, world_size: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    yield start
    dist.destroy_process_group()


def construct(config: Config, rank: int) -> tuple[list[Any], DistributedOptimizer]:
    """The real construction code; call it under FakeTensorMode, with a mesh made outside of it."""
    with unset_fake_temporarily():
        context = context_on(rank, config.parallel)
    table = table_of(config)
    # Without initial weights, which are drawn from numbers that fake tensors do not have.
    chunks = build_chunks(
        config.model, table, config.parallel, context, recompute=config.training.recompute
    )
    return chunks, assemble(config, context, table, chunks).optimizer


def storage_bytes(*tensors: torch.Tensor | None) -> int:
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


def saved_bytes(chunk: Any, config: Config, optimizer: DistributedOptimizer) -> int:
    """Bytes that the forward pass of one micro-batch keeps for backward, parameters apart."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {p.untyped_storage()._cdata for p in optimizer.shards.parameters.values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model, batch = config.model, config.training.micro_batch_size
    tokens = torch.zeros(batch, model.seq_length, dtype=torch.int64)
    length = model.seq_length // (
        config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1
    )
    dtype = next(chunk.parameters()).dtype
    entering = (
        tokens
        if chunk.chunk_range.has_embedding
        else torch.zeros(length, batch, model.hidden_size, dtype=dtype).requires_grad_()
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(entering, **({"labels": tokens.clone()} if chunk.chunk_range.has_unembedding else {}))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("world_size", [8, 64, 4096])
@pytest.mark.parametrize("variant", [*VARIANTS, *EXPERTS])
def test_parameters_gradients_and_optimizer_match_the_real_construction(
    fake_world, variant, world_size
):
    config = config_of({**VARIANTS, **EXPERTS}[variant])
    parallel = config.parallel
    rank = world_size - 1  # on the last pipeline rank
    fake_world(rank, world_size)
    with FakeTensorMode():
        _, optimizer = construct(config, rank)
        optimizer.shards.allocate_grad_shard()
    data_size = data_parallel_size_for(parallel, world_size)
    plan = rank_memory(
        config,
        parallel.pipeline_parallel_size - 1,
        data_size,
        micro_batches_per_step(config, world_size),
    )
    o = optimizer.shards
    assert plan.parameters == pytest.approx(storage_bytes(o.flat), rel=0.02)
    assert plan.gradients == pytest.approx(storage_bytes(o.grad), rel=0.02)
    state = storage_bytes(*optimizer.states.values())
    state -= storage_bytes(o.flat) if o.master is o.flat else 0
    assert plan.optimizer == pytest.approx(state, rel=0.02)
    buffers = storage_bytes(o.flat, o.grad, o.grad_shard, o.flat_shard) - storage_bytes(
        o.flat, o.grad
    )
    assert plan.communication == pytest.approx(buffers, rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pipeline_rank", ["first", "last"])
def test_activations_match_what_the_forward_pass_saves(
    fake_world, variant, recompute, pipeline_rank
):
    config = config_of(VARIANTS[variant], recompute)
    world_size = 64
    rank = 0 if pipeline_rank == "first" else world_size - 1
    fake_world(rank, world_size)
    with FakeTensorMode():
        chunks, optimizer = construct(config, rank)
        found = saved_bytes(chunks[0], config, optimizer)
    stage = rank_stages(
        config, 0 if pipeline_rank == "first" else config.parallel.pipeline_parallel_size - 1
    )[0]
    assert stage_activations(config, stage) == pytest.approx(found, rel=0.02)


def test_a_plan_that_forgets_sequence_parallelism_would_be_caught(fake_world):
    """Negative control."""
    config, wrong = config_of({}), config_of({"parallel": {"sequence_parallel": False}})
    fake_world(0, 64)
    with FakeTensorMode():
        chunks, optimizer = construct(config, 0)
        found = saved_bytes(chunks[0], config, optimizer)
    assert abs(stage_activations(wrong, rank_stages(wrong, 0)[0]) / found - 1) > 0.1


def test_the_bubble_is_the_textbooks():
    parallel = config_of({}).parallel
    assert bubble_share(parallel, 8) == pytest.approx(3 / 11)
    for changes, expected in (
        ({"schedule": "interleaved_1f1b", "virtual_pipeline_size": 3}, 1 / 9),
        ({"schedule": "zero_bubble"}, 1 / 9),
        ({"pipeline_parallel_size": 1}, 0),
    ):
        changed = parallel.model_copy(update=changes)
        assert bubble_share(changed, 8) == pytest.approx(expected)


def test_warnings_name_what_does_not_fit_and_what_is_slow():
    large = config_of(
        {
            "model": {
                "hidden_size": 8192,
                "num_layers": 80,
                "num_attention_heads": 64,
                "ffn_hidden_size": 28672,
            }
        }
    )
    assert any("does not fit" in warning for warning in scaling_plan(large, 64).warnings)
    few = config_of({"training": {"global_batch_size": 64}})
    assert any("bubble" in warning for warning in scaling_plan(few, 64).warnings)
    across = config_of(
        {
            "parallel": {"tensor_parallel_size": 16, "pipeline_parallel_size": 1},
            "model": {"num_query_groups": 16},
        }
    )
    assert any("crosses nodes" in warning for warning in scaling_plan(across, 64).warnings)
    assert scaling_plan(config_of({}), 64).warnings == ()


def test_the_plan_of_experts_says_exchanges_and_memory_at_uneven_loads() -> None:
    config = config_of(EXPERTS["experts over 4 ranks"])
    plan = scaling_plan(config, 64)
    # Of the dense model of as many active weights nothing is exchanged.
    assert plan.expert_bytes > 0 and scaling_plan(config_of({}), 64).expert_bytes == 0
    (uneven,) = plan.imbalanced_activations
    assert plan.memory[0].activations < uneven < 4 * plan.memory[0].activations
    text = describe_scaling(config, plan, GPUS["h100"])
    assert "experts get 4 times their share" in text and "tokens to their experts, forward" in text


def test_the_load_that_a_plan_states_is_one_that_a_rank_can_get() -> None:
    """Of a layer that is recomputed, all rows lie there while it is."""
    sizes = {}
    for ranks in (1, 2, 8):
        changes = merged(
            {"model": {"moe": {"num_experts": 64, "top_k": 2}}},
            {"parallel": {"pipeline_parallel_size": 1, "expert_parallel_size": ranks}},
        )
        plan = scaling_plan(config_of(changes), 64)
        text = describe_scaling(config_of(changes), plan, GPUS["h100"])
        sizes[ranks] = plan.imbalanced_activations
        load = min(4, ranks)
        assert (f"experts get {load} times their share" in text) == (ranks > 1)
    assert sizes[1] == () and sizes[2] < sizes[8]

    recomputed = config_of(changes, "full")
    plan = scaling_plan(recomputed, 64)
    (uneven,) = plan.imbalanced_activations
    # More than two layers' rows at equal loads, where only the inputs of layers are kept.
    assert uneven - plan.memory[0].activations > 2 * stage_of_one_layer(changes)
    assert uneven < sizes[8][0]
    text = describe_scaling(recomputed, plan, GPUS["h100"])
    assert "in every layer, with one layer under recomputation" in text


def stage_of_one_layer(changes: Sections) -> int:
    """Bytes that one layer with experts keeps for backward at equal loads."""
    one, two = (config_of(merged(changes, {"model": {"num_layers": n}})) for n in (1, 2))
    kept = [rank_memory(config, 0, 32, 1).activations for config in (one, two)]
    return kept[1] - kept[0]


def test_layers_with_experts_are_split_by_what_a_token_meets() -> None:
    moe = {"num_experts": 64, "top_k": 2, "ffn_hidden_size": 2816, "first_dense_layers": 4}
    model = config_of({"model": {"moe": moe, "vocab_size": 64}}).model
    counts = split_layers(model, 2)
    weights = [layer_weights(model, layer) for layer in range(8)]
    heaviest = max(sum(weights[: counts[0]]), sum(weights[counts[0] :]))
    for first in range(1, 8):
        assert heaviest <= max(sum(weights[:first]), sum(weights[first:])) + 64 * 1024
    assert counts[0] > counts[1]  # the dense layers are lighter


def test_a_gpu_of_ones_own_figures_changes_what_rests_on_them_and_nothing_else():
    config = config_of({})
    sheet, own = scaling_plan(config, 64), scaling_plan(config, 64, gpu_of("h100", 494.7, 0.7))
    assert own.compute_seconds == pytest.approx(2 * sheet.compute_seconds)
    assert own.memory_seconds == sheet.memory_seconds and own.memory == sheet.memory
    assert any("0.7 GB" in warning for warning in own.warnings) and not sheet.warnings
    text = describe_scaling(config, own, gpu_of("h100", 494.7, 0.7))
    assert "64 h100, 494.7 TFLOP/s, 0.7 GB" in text and "65% of 494.7 TFLOP/s" in text
    assert gpu_of("h100") == GPUS["h100"]


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="h100"):
        gpu_of("voodoo2")
    assert set(GPUS) >= {"a100", "h100", "h200", "b200"}
