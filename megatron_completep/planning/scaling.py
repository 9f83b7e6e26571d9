"""A run on paper: memory, traffic, bubble and step time, from the configuration alone.

Parameter and optimizer sizes come from the optimizer's own layout arithmetic, FLOPs and activations
from the modules of the model. Tests hold them against the real construction code on fake tensors at
8, 64 and 4096 ranks, and against what a forward pass saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_completep.config.check import check_world
from megatron_completep.config.derived import (
    data_parallel_size,
    gradient_parallel_size,
    micro_batches_per_step,
    tokens_per_step,
)
from megatron_completep.config.schema import Config, ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.block import Block
from megatron_completep.model.experts import MixtureOfExperts
from megatron_completep.model.flops import forward_flops_per_token, training_flops_per_token
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.optim.gradient_buckets import live_elements
from megatron_completep.optim.layout import Layout
from megatron_completep.optim.reduction import OVERLAPPED
from megatron_completep.parallel.parameter import Spec
from megatron_completep.planning.communication import collectives_per_step, sent_bytes
from megatron_completep.planning.memory_bound import micro_batch_bytes, optimizer_bytes
from megatron_completep.planning.orthogonal import (
    OrthogonalPlan,
    has_matrices,
    orthogonal_plan,
)
from megatron_completep.planning.sizes import (
    backward_specs,
    float8_elements,
    micro_batch_sizes,
    rank_layout,
    rank_models,
    rank_specs,
    shard_count,
    stage_model,
    state_elements,
    stored_elements,
    wide_bytes,
)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures.

    memory in bytes, memory_bandwidth in bytes/s, peak_flops in dense bf16 FLOP/s, the other
    bandwidths in bytes/s a direction: inside a node, and to other nodes a GPU.
    """

    name: str
    memory: float
    memory_bandwidth: float
    peak_flops: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 2.04e12, 312e12, 300e9, 25e9),
        Gpu("h100", 80e9, 3.35e12, 989.4e12, 450e9, 50e9),
        Gpu("h200", 141e9, 4.8e12, 989.4e12, 450e9, 50e9),
        Gpu("b200", 180e9, 8e12, 2250e12, 900e9, 50e9),
        Gpu("mi300x", 192e9, 5.3e12, 1307.4e12, 448e9, 50e9),
    )
}
IMBALANCE = 4.0  # largest load of a rank's experts over the mean, for which memory is stated
MATRIX_EFFICIENCY = 0.65  # assumed share of the peak that products and attention reach
MEMORY_EFFICIENCY = 0.8  # assumed share of the memory's bandwidth that a kernel reaches
NETWORK_EFFICIENCY = 0.8  # assumed share of the link bandwidth that a collective reaches


@dataclass(frozen=True)
class RankMemory:
    """Bytes by kind on one pipeline rank (tensor and data ranks are alike).

    communication: reduced gradients, which live from the first bucket of backward to the next step,
        parameters to be sent, and copies of buckets in the type in which gradients are sent.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        model_state = self.parameters + self.gradients + self.optimizer
        return model_state + self.activations + self.communication


@dataclass(frozen=True)
class ScalingPlan:
    """What a run at `world_size` ranks asks of each of them.

    compute_seconds: matrix products and attention.
    memory_seconds: kernels between them, which their traffic bounds.
    optimizer_seconds: the gradient's norm and the update, once a step.
    communication_seconds: exposed, tensor collectives of the forward pass and of half of backward,
        and those of the context axis.
    """

    world_size: int
    data_parallel_size: int
    micro_batches: int
    memory: tuple[RankMemory, ...]  # by pipeline rank
    tensor_bytes: float  # sent per step by the busiest rank along each axis
    pipeline_bytes: float
    data_bytes: float
    context_bytes: float
    expert_bytes: float
    bubble: float  # share of the step in which a pipeline rank waits
    flops_per_token: float
    compute_seconds: float
    memory_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    step_seconds: float
    tokens_per_second: float
    model_flops_utilisation: float
    checkpoint_bytes: int
    orthogonal: tuple[OrthogonalPlan, ...]  # by pipeline rank, under Muon
    # Activations, by pipeline rank, if a rank's experts get `stated_load` times their share of the
    # tokens; nothing if loads cannot be uneven.
    imbalanced_activations: tuple[int, ...]
    warnings: tuple[str, ...]


def gpu_of(name: str, tflops: float | None = None, memory_gb: float | None = None) -> Gpu:
    """A GPU of the table, or one that is like it but for its own figures.

    tflops: dense bf16 peak, in 10^12 FLOP/s. memory_gb: in 10^9 bytes. Raises ConfigError for a
    name that is not in the table.
    """
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known. Use one of: {', '.join(GPUS)}; for another one the "
            "nearest of them with --gpu-tflops and --gpu-memory."
        )
    gpu = GPUS[name]
    if tflops is not None:
        gpu = replace(gpu, peak_flops=tflops * 1e12, name=f"{gpu.name}, {tflops:g} TFLOP/s")
    if memory_gb is not None:
        gpu = replace(gpu, memory=memory_gb * 1e9, name=f"{gpu.name}, {memory_gb:g} GB")
    return gpu


def scaling_plan(config: Config, world_size: int, gpu: Gpu = GPUS["h100"]) -> ScalingPlan:
    """The plan of `config` on `world_size` GPUs.

    Raises ConfigError for a world size that does not fit, or a branch that does not say what it
    costs.
    """
    check_world(config, world_size)
    parallel = config.parallel
    gradient_size = gradient_parallel_size(config, world_size)
    micro_batches = micro_batches_per_step(config, world_size)
    memory = tuple(
        rank_memory(config, rank, gradient_size, micro_batches)
        for rank in range(parallel.pipeline_parallel_size)
    )
    sent = sent_bytes(config, world_size)

    # Compute: recomputation takes time, but is no part of the model's FLOPs.
    tokens = tokens_per_step(config)
    flops = training_flops_per_token(config.model)
    full = config.training.recompute == "full"
    recomputed = forward_flops_per_token(config.model) if full else 0.0
    compute = (flops + recomputed) * tokens / world_size / (gpu.peak_flops * MATRIX_EFFICIENCY)

    # Communication that nothing hides: the tensor collectives of forward and of half of backward.
    in_node = parallel.tensor_parallel_size <= gpu.per_node
    link = gpu.node_bandwidth if in_node else gpu.network_bandwidth
    exposed = 0.75 * sent.tensor / (link * NETWORK_EFFICIENCY)
    # Attention waits for the keys of other ranks, and the projections for their gradients.
    sharing = parallel.tensor_parallel_size * parallel.context_parallel_size
    link = gpu.node_bandwidth if sharing <= gpu.per_node else gpu.network_bandwidth
    exposed += sent.context / (link * NETWORK_EFFICIENCY)
    # Experts wait for their tokens.
    sharing = parallel.tensor_parallel_size * parallel.expert_parallel_size
    link = gpu.node_bandwidth if sharing <= gpu.per_node else gpu.network_bandwidth
    exposed += sent.expert / (link * NETWORK_EFFICIENCY)
    # Between matrix products stand kernels that compute little; the update comes once a step.
    bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    between = micro_batches * micro_batch_bytes(config) / bandwidth
    largest = largest_layout(config, gradient_size)
    states = state_elements(config, largest)
    update = optimizer_bytes(config, largest.shard_size, states) / bandwidth
    orthogonal = orthogonal_plans(config, gradient_size)
    update += orthogonal_seconds(config, gpu, world_size, orthogonal)
    bubble = bubble_share(parallel, micro_batches)
    step_seconds = (compute + between + exposed) / (1 - bubble) + update
    return ScalingPlan(
        world_size=world_size,
        data_parallel_size=data_parallel_size(config, world_size),
        micro_batches=micro_batches,
        memory=memory,
        tensor_bytes=sent.tensor,
        pipeline_bytes=sent.pipeline,
        data_bytes=sent.data,
        context_bytes=sent.context,
        expert_bytes=sent.expert,
        bubble=bubble,
        flops_per_token=flops,
        compute_seconds=compute,
        memory_seconds=between,
        optimizer_seconds=update,
        communication_seconds=exposed,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        model_flops_utilisation=flops * tokens / step_seconds / world_size / gpu.peak_flops,
        checkpoint_bytes=wide_bytes(config) * stored_elements(config),
        orthogonal=orthogonal,
        imbalanced_activations=imbalanced_activations(config, micro_batches),
        warnings=_warnings(config, gpu, memory, bubble, sent.data, compute),
    )


def largest_layout(config: Config, gradient_size: int) -> Layout:
    """The optimizer's layout on the pipeline rank whose shard has the most elements."""
    layouts = []
    for rank in range(config.parallel.pipeline_parallel_size):
        layouts.append(rank_layout(config, rank_specs(config, rank), gradient_size))
    return max(layouts, key=lambda layout: layout.shard_size)


def orthogonal_plans(config: Config, gradient_size: int) -> tuple[OrthogonalPlan, ...]:
    """What Muon asks of each pipeline rank; nothing under another rule."""
    if not has_matrices(config):
        return ()
    ranks = range(config.parallel.pipeline_parallel_size)
    return tuple(orthogonal_plan(config, rank, gradient_size) for rank in ranks)


def orthogonal_seconds(
    config: Config, gpu: Gpu, world_size: int, plans: tuple[OrthogonalPlan, ...]
) -> float:
    """What Muon adds to a step: the iterations of the busiest owner, and both exchanges."""
    if not plans:
        return 0.0
    iterations = max(plan.flops for plan in plans) / (gpu.peak_flops * MATRIX_EFFICIENCY)
    ranks = max(plan.ranks for plan in plans)
    link = gpu.node_bandwidth if ranks <= gpu.per_node else gpu.network_bandwidth
    sent = 0.0
    for rank in range(len(plans)):
        calls = collectives_per_step(config, world_size, rank)
        sent = max(sent, sum(call.sent(ranks) for call in calls if call.axis == "stage"))
    return iterations + sent / (link * NETWORK_EFFICIENCY)


def rank_memory(
    config: Config, pipeline_rank: int, gradient_size: int, micro_batches: int
) -> RankMemory:
    """Bytes on a rank.

    Mixed precision: bf16 parameters, fp32 gradients, and in the shard fp32 master and states.
    """
    mixed = config.training.precision in ("bf16", "auto")
    # Besides the wide type (fp32, fp64), mixed precision has parameters in bf16.
    wide_size = wide_bytes(config)
    narrow_size = 2 if mixed else 0
    models = rank_models(config, pipeline_rank)
    specs = backward_specs(models)
    layout = rank_layout(config, specs, gradient_size)
    is_sharded = any(bucket.shards > 1 for bucket in layout.buckets)
    shares_master = not is_sharded and not mixed  # the master is the parameter itself
    sharded = layout.shard_size * (wide_size + narrow_size) if is_sharded else 0

    # `in_flight` counts chunks; where they differ in size, their mean stands for each.
    chunks = in_flight(config.parallel, pipeline_rank, micro_batches)
    sizes = micro_batch_sizes(config)
    in_all_chunks = sum(chunks * model.activation_bytes(sizes) for model in models)
    return RankMemory(
        # Rounded weights lie there twice, as they are and transposed, a byte an element.
        parameters=layout.size * (narrow_size or wide_size) + 2 * float8_elements(config, specs),
        gradients=gradient_elements(config, specs, layout, gradient_size) * wide_size,
        optimizer=wide_size * (state_elements(config, layout) - shares_master * layout.shard_size),
        activations=int(in_all_chunks / len(models)),
        communication=sharded + sent_copies(config, layout, gradient_size),
    )


def stated_load(config: Config) -> float:
    """The load of a rank's experts over their share at which memory is stated.

    IMBALANCE, or the most that there can be: all choices of all tokens, which are of different
    experts, fall on one of the ranks that share a layer's experts. 1: loads cannot be uneven.
    """
    moe = config.model.moe
    if moe is None:
        return 1.0
    ranks = config.parallel.expert_parallel_size
    return min(IMBALANCE, float(ranks), moe.num_experts / moe.top_k)


def imbalanced_activations(config: Config, micro_batches: int) -> tuple[int, ...]:
    """Bytes of activations by pipeline rank at the stated load in every layer with experts.

    Where layers are recomputed whole these are their inputs, and one layer under recomputation.
    Nothing if loads cannot be uneven.
    """
    load = stated_load(config)
    if load == 1:
        return ()
    sizes = micro_batch_sizes(config)
    by_rank = []
    for rank in range(config.parallel.pipeline_parallel_size):
        models = rank_models(config, rank)
        kept = 0
        recomputed = 0
        for model in models:
            kept += model.activation_bytes(sizes)
            for module, block in _with_experts(model):
                more = module.activation_bytes_at(sizes, load) - module.activation_bytes(sizes)
                # Of a layer that is recomputed everything lies there, but of one at a time.
                if config.training.recompute == "full":
                    recomputed = max(recomputed, block.activation_bytes(sizes) + more)
                else:
                    kept += more
        chunks = in_flight(config.parallel, rank, micro_batches)
        by_rank.append(int(chunks * kept / len(models)) + recomputed)
    return tuple(by_rank)


def _with_experts(model: GPT) -> Iterator[tuple[MixtureOfExperts, Block]]:
    """The mixtures of experts of a chunk, each with the layer that it is a branch of."""
    for _, block in model.blocks():
        for module in block.modules():
            if isinstance(module, MixtureOfExperts):
                yield module, block


def gradient_elements(
    config: Config, specs: Mapping[str, Spec], layout: Layout, gradient_size: int
) -> int:
    """Elements of full gradients that are live at most, with what has been summed of them."""
    shards = shard_count(config, gradient_size)
    if config.parallel.sharding == "optimizer" or shards == 1:
        return layout.size
    reused = {piece.bucket for piece in layout.pieces if specs[piece.name].uses > 1}
    filled_long = [layout.buckets[number] for number in reused]
    live = live_elements(layout.buckets, filled_long)
    # The sum of a later micro-batch arrives beside the shard to which it is added.
    return live + live // shards


def sent_copies(config: Config, layout: Layout, gradient_size: int) -> int:
    """Bytes of the buckets' copies in the type in which gradients are sent, at the worst moment."""
    if gradient_size == 1 or config.parallel.gradient_dtype != "bf16":
        return 0
    # What is sent takes the place of the full gradients, which are freed.
    if config.parallel.sharding == "gradients":
        return 0
    largest_first = sorted((bucket.size for bucket in layout.buckets), reverse=True)
    return 2 * sum(largest_first[: 2 * OVERLAPPED])


def in_flight(parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> int:
    """Forward passes of chunks whose activations a rank holds, at the schedule's worst moment."""
    size = parallel.pipeline_parallel_size
    virtual = parallel.virtual_pipeline_size
    if parallel.schedule == "gpipe":  # all forward passes come before the first backward
        return micro_batches * virtual
    if virtual == 1:  # the warm-up fills the stages behind, and each backward frees one pass
        return min(size - pipeline_rank, micro_batches)
    return min(2 * (size - pipeline_rank - 1) + (virtual - 1) * size + 1, micro_batches * virtual)


def stage_activations(config: Config, stage: ChunkRange) -> int:
    """Bytes that one micro-batch leaves for the backward pass of a stage."""
    return stage_model(config, stage).activation_bytes(micro_batch_sizes(config))


def bubble_share(parallel: ParallelConfig, micro_batches: int) -> float:
    """Share of the step in which a pipeline rank is idle.

    Forward, input gradient and weight gradient are taken to last equally long.
    """
    idle = (parallel.pipeline_parallel_size - 1) / parallel.virtual_pipeline_size
    if parallel.schedule == "zero_bubble":
        idle /= 3  # weight gradients, which nobody waits for, fill the rest
    return idle / (micro_batches + idle)


def _warnings(
    config: Config,
    gpu: Gpu,
    memory: tuple[RankMemory, ...],
    bubble: float,
    data_bytes: float,
    compute: float,
) -> tuple[str, ...]:
    """What does not fit and what is slow, each with a remedy."""
    warnings = []
    fullest = max(range(len(memory)), key=lambda rank: memory[rank].total)
    if memory[fullest].total > 0.94 * gpu.memory:
        warnings.append(
            f"does not fit: pipeline rank {fullest} needs {memory[fullest].total / 1e9:.1f} GB of "
            f"{gpu.memory / 1e9:.3g} GB. Raise the tensor- or pipeline-parallel size, recompute "
            "more, or take a smaller micro-batch or, with long sequences, a larger "
            "context_parallel_size."
        )
    if bubble > 0.15:
        warnings.append(
            f"the pipeline bubble is {bubble:.0%}, above 15 %. More micro-batches, virtual stages, "
            "or schedule: zero_bubble."
        )
    tensor_ranks = config.parallel.tensor_parallel_size
    if tensor_ranks > gpu.per_node:
        warnings.append(
            f"tensor_parallel_size = {tensor_ranks} crosses nodes of {gpu.per_node} GPUs: slow "
            "collectives."
        )
    if data_bytes / (gpu.network_bandwidth * NETWORK_EFFICIENCY) > compute:
        warnings.append(
            "data-parallel traffic takes longer than the computation that hides it. A larger "
            "global batch, or gradient_dtype: bf16."
        )
    sides = {
        "hidden_size": config.model.hidden_size,
        "ffn_hidden_size / tensor ranks": config.model.ffn_hidden_size // tensor_ranks,
    }
    odd_sides = [f"{name} = {side}" for name, side in sides.items() if side % 64]
    if odd_sides:
        warnings.append(
            f"{', '.join(odd_sides)}: not a multiple of 64, so that tensor cores lose part of "
            "their speed."
        )
    return tuple(warnings)
