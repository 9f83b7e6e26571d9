"""A run on paper: memory, traffic, bubble and step time of every rank, from the configuration alone.

The parameter sizes come from the same layout arithmetic as the optimizer's; activations from the list of what each operation
saves for backward. Tests hold both against the real construction code on fake tensors at 8, 64 and 4096 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_completep.config.check import check_world
from megatron_completep.config.derived import (
    head_dim,
    micro_batches_per_step,
    num_query_groups,
    padded_vocab_size,
    tokens_per_step,
)
from megatron_completep.config.schema import Config, ModelConfig, ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.flops import forward_flops_per_token, training_flops_per_token
from megatron_completep.model.gpt import Stage
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.planning.communication import sent_bytes
from megatron_completep.planning.sizes import (
    element_bytes,
    rank_layout,
    rank_specs,
    rank_stages,
    shard_count,
    state_count,
    stored_elements,
    wide_bytes,
)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: memory in bytes, dense bf16 FLOP/s, bytes/s a direction inside a node and to other nodes, GPUs a node."""

    name: str
    memory: float
    peak_flops: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, 300e9, 25e9),
        Gpu("h100", 80e9, 989.4e12, 450e9, 50e9),
        Gpu("h200", 141e9, 989.4e12, 450e9, 50e9),
        Gpu("b200", 180e9, 2250e12, 900e9, 50e9),
        Gpu("mi300x", 192e9, 1307.4e12, 448e9, 50e9),
    )
}
MATRIX_EFFICIENCY = 0.6  # assumed share of the peak that matrix products reach
NETWORK_EFFICIENCY = 0.8  # assumed share of the link bandwidth that a collective reaches


@dataclass(frozen=True)
class RankMemory:
    """Bytes by kind on one pipeline rank (tensor and data ranks are alike).

    communication: reduced gradients, which live from the first bucket of backward to the next step, and parameters to be sent.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.communication
        )


@dataclass(frozen=True)
class ScalingPlan:
    """What a run at `world_size` ranks asks of each of them."""

    world_size: int
    data_parallel_size: int
    micro_batches: int
    memory: tuple[RankMemory, ...]  # by pipeline rank
    tensor_bytes: float  # sent per step by the busiest rank along each axis
    pipeline_bytes: float
    data_bytes: float
    bubble: float  # share of the step in which a pipeline rank waits
    flops_per_token: float
    compute_seconds: float
    communication_seconds: (
        float  # exposed: tensor collectives of the forward pass and of half the backward pass
    )
    step_seconds: float
    tokens_per_second: float
    model_flops_utilisation: float
    checkpoint_bytes: int
    warnings: tuple[str, ...]


def scaling_plan(config: Config, world_size: int, gpu_name: str = "h100") -> ScalingPlan:
    """The plan of `config` on `world_size` GPUs. ConfigError for an unknown GPU or a world size that does not fit."""
    if gpu_name not in GPUS:
        raise ConfigError(f"--gpu {gpu_name} is not known. Use one of: {', '.join(GPUS)}.")
    check_world(config, world_size)
    gpu, model, parallel = GPUS[gpu_name], config.model, config.parallel
    data_size = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    micro_batches = micro_batches_per_step(config, world_size)
    memory = tuple(
        rank_memory(config, rank, data_size, micro_batches)
        for rank in range(parallel.pipeline_parallel_size)
    )
    traffic = sent_bytes(config, world_size)
    bubble = bubble_share(parallel, micro_batches)
    tokens = tokens_per_step(config)
    flops = training_flops_per_token(model)
    recomputed = forward_flops_per_token(model) if config.training.recompute == "full" else 0.0
    compute = (flops + recomputed) * tokens / world_size / (gpu.peak_flops * MATRIX_EFFICIENCY)
    link = (
        gpu.node_bandwidth
        if parallel.tensor_parallel_size <= gpu.per_node
        else gpu.network_bandwidth
    )
    exposed = 0.75 * traffic[0] / (link * NETWORK_EFFICIENCY)
    step_seconds = (compute + exposed) / (1 - bubble)
    return ScalingPlan(
        world_size=world_size,
        data_parallel_size=data_size,
        micro_batches=micro_batches,
        memory=memory,
        tensor_bytes=traffic[0],
        pipeline_bytes=traffic[1],
        data_bytes=traffic[2],
        bubble=bubble,
        flops_per_token=flops,
        compute_seconds=compute,
        communication_seconds=exposed,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        model_flops_utilisation=flops * tokens / step_seconds / world_size / gpu.peak_flops,
        checkpoint_bytes=4 * state_count(config) * stored_elements(config),
        warnings=_warnings(config, gpu, memory, bubble, traffic[2], compute),
    )


def rank_memory(
    config: Config, pipeline_rank: int, data_size: int, micro_batches: int
) -> RankMemory:
    """Bytes on a rank. Mixed precision: bf16 parameters, fp32 gradients, fp32 master and moments in the shard."""
    parallel, training = config.parallel, config.training
    mixed = training.precision in ("bf16", "auto")
    wide, narrow = (8 if training.precision == "float64" else 4), (2 if mixed else 0)
    shards = shard_count(config, data_size)
    stages = rank_stages(config, pipeline_rank)
    layout = rank_layout(config, rank_specs(config, pipeline_rank), data_size)
    shares_master = shards == 1 and not mixed  # the master is the parameter itself
    held = [
        in_flight(parallel, pipeline_rank, micro_batches) * stage_activations(config, stage)
        for stage in stages
    ]
    return RankMemory(
        parameters=layout.size * (narrow or wide),
        gradients=layout.size * wide,
        optimizer=layout.shard_size * wide * (state_count(config) - shares_master),
        activations=int(sum(held) / len(stages)),
        communication=layout.shard_size * (wide + narrow) if shards > 1 else 0,
    )


def in_flight(parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> int:
    """Forward passes of chunks whose activations a rank holds at once, at the worst moment of the schedule."""
    size, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    if parallel.schedule == "gpipe":
        return micro_batches * virtual
    if virtual == 1:
        return min(size - pipeline_rank, micro_batches)
    return min(2 * (size - pipeline_rank - 1) + (virtual - 1) * size + 1, micro_batches * virtual)


def stage_activations(config: Config, stage: Stage) -> int:
    """Bytes that one micro-batch leaves for the backward pass of a stage."""
    model, training, tp = config.model, config.training, config.parallel.tensor_parallel_size
    element, wide = element_bytes(config), wide_bytes(config)
    tokens = model.seq_length * training.micro_batch_size
    local = tokens // tp if config.parallel.sequence_parallel else tokens
    stream = local * model.hidden_size * (4 if model.fp32_residual else element)
    layers = stage.stop - stage.start
    total = layers * _layer_activations(model, training.recompute, tokens, local, tp, element, wide)
    if training.recompute == "full":
        pending = layers - 1 if stage.first or layers else 0
        total = layers * stream + max(0, pending) * local * model.hidden_size * element
    if stage.first:
        total += tokens * 8 + (tokens if tp > 1 else 0)
    if model.position == "rope" and training.recompute != "full":
        total += 2 * model.seq_length * head_dim(model) // 2 * wide
    if stage.last:
        vocabulary = padded_vocab_size(model, tp) // tp
        total += stream + local * wide * (2 if model.norm == "layernorm" else 1)
        kept = tokens * vocabulary * element
        if kept <= LossConfig().chunk_bytes:
            total += kept + tokens * model.hidden_size * element + tokens * (8 + wide)
        else:  # both gradients are made in the forward pass
            total += tokens * model.hidden_size * element + vocabulary * model.hidden_size * wide
    return total


def _layer_activations(
    model: ModelConfig, recompute: str, tokens: int, local: int, tp: int, element: int, wide: int
) -> int:
    """What a layer's operations save: two stream states and two norm outputs, QKV, the attention's output and row statistics, and
    the inputs of the activation and of the down projection."""
    stream = local * model.hidden_size * (4 if model.fp32_residual else element)
    normed = local * model.hidden_size * element
    heads, groups, dim = (
        model.num_attention_heads // tp,
        num_query_groups(model) // tp,
        head_dim(model),
    )
    statistics = local * wide * (2 if model.norm == "layernorm" else 1)
    fused = 2 if model.activation == "swiglu" else 1
    qkv, mixed = tokens * (heads + 2 * groups) * dim * element, tokens * heads * dim * element
    if (
        model.qk_norm
    ):  # the inputs of both norms are views of QKV; their outputs and the rotated ones are new
        qkv += tokens * (heads + groups) * (dim * element + wide)
    row_statistics = tokens * heads * 4 if recompute == "none" else 0
    inner = tokens * model.ffn_hidden_size // tp * element
    down_input = inner if recompute == "none" else 0
    return (
        2 * (stream + normed + statistics)
        + qkv
        + mixed
        + row_statistics
        + fused * inner
        + down_input
    )


def bubble_share(parallel: ParallelConfig, micro_batches: int) -> float:
    """Share of the step in which a pipeline rank is idle, with forward : input gradient : weight gradient = 1 : 1 : 1."""
    size, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    idle = (size - 1) / virtual
    if parallel.schedule == "zero_bubble":
        idle /= 3
    return idle / (micro_batches + idle)


def _warnings(
    config: Config,
    gpu: Gpu,
    memory: tuple[RankMemory, ...],
    bubble: float,
    data_bytes: float,
    compute: float,
) -> tuple[str, ...]:
    found = []
    worst = max(range(len(memory)), key=lambda rank: memory[rank].total)
    if memory[worst].total > 0.94 * gpu.memory:
        found.append(
            f"does not fit: pipeline rank {worst} needs {memory[worst].total / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} GB. "
            "Raise the tensor- or pipeline-parallel size, recompute more, or take a smaller micro-batch."
        )
    if bubble > 0.15:
        found.append(
            f"the pipeline bubble is {bubble:.0%}, above 15 %. More micro-batches, virtual stages, or schedule: zero_bubble."
        )
    if config.parallel.tensor_parallel_size > gpu.per_node:
        found.append(
            f"tensor_parallel_size = {config.parallel.tensor_parallel_size} crosses nodes of {gpu.per_node} GPUs: slow collectives."
        )
    if data_bytes / (gpu.network_bandwidth * NETWORK_EFFICIENCY) > compute:
        found.append(
            "data-parallel traffic takes longer than the computation that hides it. A larger global batch, or gradient_dtype: bf16."
        )
    tp = config.parallel.tensor_parallel_size
    sides = {
        "hidden_size": config.model.hidden_size,
        "ffn_hidden_size / tensor ranks": config.model.ffn_hidden_size // tp,
    }
    odd = [f"{name} = {side}" for name, side in sides.items() if side % 64]
    if odd:
        found.append(
            f"{', '.join(odd)}: not a multiple of 64, so that tensor cores lose part of their speed."
        )
    return tuple(found)
