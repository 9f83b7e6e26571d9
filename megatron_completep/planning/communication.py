"""Predicts every collective of an optimizer step: axis, operation, bytes, calls and purpose.

Tests compare the prediction with the collectives of a real step. The payload of a call is the full
tensor: the input of an all-reduce, reduce-scatter, all-to-all or send, and the output of an
all-gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from megatron_completep.completep import table_of
from megatron_completep.config.derived import gradient_parallel_size, micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.model.attention import Attention, head_lots
from megatron_completep.model.experts import MixtureOfExperts
from megatron_completep.model.gpt import GPT
from megatron_completep.model.routing import routers
from megatron_completep.model.stages import whole_model
from megatron_completep.optim.layout import LOADS, Layout
from megatron_completep.parallel.cross_entropy import LossConfig, Unembedding
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.parameter import Spec, spec_of
from megatron_completep.planning.orthogonal import (
    division_of,
    exchanged_elements,
    has_matrices,
    iteration_bytes,
)
from megatron_completep.planning.sizes import (
    backward_specs,
    element_bytes,
    float8_weights,
    micro_batch_sizes,
    rank_layout,
    rank_models,
    shard_count,
    shard_places,
    shards_of_axes,
    wide_bytes,
)

ALL_REDUCE = "all-reduce"
ALL_GATHER = "all-gather"
REDUCE_SCATTER = "reduce-scatter"
SEND = "send"
ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True)
class Collective:
    """`count` calls per step, each of `payload` bytes, over one axis of the mesh or all ranks."""

    axis: str
    operation: str
    payload: int
    count: int
    purpose: str

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, with ring algorithms over `ranks` ranks."""
        if self.operation == SEND:
            return float(self.payload * self.count)
        # In a ring of n ranks each one sends (n - 1) / n of the tensor for an all-gather or a
        # reduce-scatter, and twice that for an all-reduce, which consists of both.
        passes = 2 if self.operation == ALL_REDUCE else 1
        return self.payload * self.count * (passes * (ranks - 1) / ranks)


class SentBytes(NamedTuple):
    """Bytes per step that the busiest rank sends along each axis."""

    tensor: float
    pipeline: float
    data: float
    context: float
    expert: float = 0.0


def collectives_per_step(
    config: Config,
    world_size: int,
    pipeline_rank: int = 0,
    shard_rank: int = 0,
    tensor_rank: int = 0,
) -> list[Collective]:
    """The collectives of a rank at these coordinates in `TrainingStep.run`.

    The result does not depend on the replica rank.

    shard_rank: the rank among those that share the optimizer state; affects the sizes of the
        partial-gradient all-reduce and of Muon's all-to-alls.
    tensor_rank: affects the latter.
    """
    gradient_size = gradient_parallel_size(config, world_size)
    micro_batches = micro_batches_per_step(config, world_size)
    models = rank_models(config, pipeline_rank)
    specs = backward_specs(models)
    layout = rank_layout(config, specs, gradient_size)

    collectives: list[Collective] = []
    for model in models:
        collectives += _tensor(config, model, micro_batches)
        collectives += _context(config, model, micro_batches)
        collectives += _experts(config, model, micro_batches)
        collectives += _balance_losses(config, model, micro_batches)
    places = shard_places(config, shard_rank, tensor_rank)
    collectives += _partial_gradients(config, specs, layout, places)
    collectives += _pipeline(config, models, micro_batches)
    collectives += _tied_gradients(config, specs, layout)
    collectives += _data(config, layout, gradient_size, micro_batches)
    stage_rank = shard_rank * config.parallel.tensor_parallel_size + tensor_rank
    collectives += _matrices(config, specs, layout, gradient_size, stage_rank)
    collectives += _weight_scales(config, specs, gradient_size)
    collectives += _world(config, world_size)
    return [collective for collective in collectives if collective.count]


def sent_bytes(config: Config, world_size: int) -> SentBytes:
    """Bytes per step that the busiest rank sends along each axis.

    The data axis includes shards and replicas, those of experts, and Muon's exchange over shards x
    tensor. The expert axis has the tokens on their way to the experts and back. The
    all-reduces of a few scalars over all ranks (`_world`) are left out.
    """
    parallel = config.parallel
    gradient_size = gradient_parallel_size(config, world_size)
    shards = shard_count(config, gradient_size)
    ranks = {
        "tensor": parallel.tensor_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": 2,  # sends are point to point
        "shard": shards,
        "replica": gradient_size // shards,
        "stage": shards * parallel.tensor_parallel_size,
        "expert": parallel.expert_parallel_size,
        "expert_data": shards_of_axes(config, gradient_size)["expert_data"],
        "world": world_size,
    }
    # The busiest rank of one axis need not be that of another.
    most = dict.fromkeys(SentBytes._fields, 0.0)
    for pipeline_rank in range(parallel.pipeline_parallel_size):
        sent = dict.fromkeys(ranks, 0.0)
        for collective in collectives_per_step(config, world_size, pipeline_rank):
            sent[collective.axis] += collective.sent(ranks[collective.axis])
        sent["data"] = sent["shard"] + sent["replica"] + sent["stage"] + sent["expert_data"]
        most = {axis: max(size, sent[axis]) for axis, size in most.items()}
    return SentBytes(**most)


def _tensor(config: Config, model: GPT, micro_batches: int) -> Iterator[Collective]:
    """Activation collectives of one chunk: its parallel linears, embedding and unembedding.

    The linears are found by walking the model, so that new branches are included.
    """
    if config.parallel.tensor_parallel_size == 1:
        return
    # Partial sums [S, B, H] are all-reduced. With sequence parallelism they are reduce-scattered
    # along the sequence, and a layer that needs all of the sequence gathers it.
    split = config.parallel.sequence_parallel
    reduce = REDUCE_SCATTER if split else ALL_REDUCE
    embedding_calls = micro_batches if model.chunk_range.has_embedding else 0
    unembedding_calls = micro_batches if model.chunk_range.has_unembedding else 0
    column_calls = micro_batches * _count(model, ColumnParallelLinear)
    rounded_calls = micro_batches * _count_rounded(config, model)
    row_calls = micro_batches * _count(model, RowParallelLinear)
    activation_elements = micro_batch_sizes(config).tokens * config.model.hidden_size
    payload = activation_elements * element_bytes(config)

    def call(operation: str, count: int, purpose: str) -> Collective:
        return Collective("tensor", operation, payload, count, purpose)

    def gathered_inputs(when: str) -> Iterator[Collective]:
        """Inputs of column-parallel layers; in float8 a byte an element, behind their scale."""
        purpose = f"inputs of attention and MLP, {when}"
        yield call(ALL_GATHER, column_calls - rounded_calls, purpose)
        narrow = f"{purpose}, in float8"
        yield Collective("tensor", ALL_GATHER, activation_elements, rounded_calls, narrow)
        scale = f"largest magnitude of the {purpose}"
        yield Collective("tensor", ALL_REDUCE, 4, rounded_calls, scale)

    yield call(reduce, embedding_calls, "embeddings, forward")
    if split:
        yield from gathered_inputs("forward")
    yield call(reduce, row_calls, "outputs of attention and MLP, forward")
    if model.chunk_range.has_unembedding:
        if split:
            yield call(ALL_GATHER, unembedding_calls, "input of the unembedding, forward")
        yield from _losses(config, model.unembedding, micro_batches)

    yield call(reduce, unembedding_calls, "gradient of the unembedding's input, backward")
    if config.training.recompute == "full":
        # Recomputation stops early (non-reentrant checkpoint): the last reduction of each layer is
        # not repeated, because backward does not need its result.
        if split:
            yield from gathered_inputs("recomputed")
        # Behind a mixture of experts stands the sum over its slots, which keeps its input.
        stopped_early = len(model.layers) - _count(model, MixtureOfExperts)
        recomputed_calls = row_calls - micro_batches * stopped_early
        purpose = "outputs of every branch of a layer except its last branch, recomputed"
        yield call(reduce, recomputed_calls, purpose)
    if split:
        yield call(ALL_GATHER, row_calls, "gradients of the outputs of attention and MLP, backward")
        # Forward keeps only this rank's part of the inputs, so backward gathers them again.
        purpose = "inputs of attention and MLP for the weight gradients, backward"
        yield call(ALL_GATHER, column_calls, purpose)
    yield call(reduce, column_calls, "gradients of the inputs of attention and MLP, backward")
    if split:
        yield call(ALL_GATHER, embedding_calls, "gradient of the embeddings, backward")


def _context(config: Config, model: GPT, micro_batches: int) -> Iterator[Collective]:
    """Keys and values of a chunk's layers, gathered over the ranks that share a sequence."""
    if config.parallel.context_parallel_size == 1:
        return
    recompute = config.training.recompute
    for module in model.modules():
        if not isinstance(module, Attention):
            continue
        lots = head_lots(module.num_groups, config.parallel.context_heads_at_once)
        heads = 2 * len(lots[0]) * module.head_dim
        payload = micro_batch_sizes(config).whole_tokens * heads * element_bytes(config)
        calls = micro_batches * len(lots)

        def call(
            operation: str, purpose: str, payload: int = payload, calls: int = calls
        ) -> Collective:
            return Collective("context", operation, payload, calls, purpose)

        yield call(ALL_GATHER, "keys and values, forward")
        if recompute != "none":
            yield call(ALL_GATHER, "keys and values, recomputed")
        yield call(REDUCE_SCATTER, "gradients of keys and values, backward")


def _experts(config: Config, model: GPT, micro_batches: int) -> Iterator[Collective]:
    """Tokens to the ranks of their experts and back, if every expert gets its share of them.

    What a rank sends to the experts, and the gradient that it sends, are exact in any case.
    """
    if config.parallel.expert_parallel_size == 1:
        return
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        slots = micro_batch_sizes(config).local_tokens * module.top_k
        rows = slots * config.model.hidden_size * element_bytes(config)

        def call(payload: int, purpose: str) -> Collective:
            return Collective("expert", ALL_TO_ALL, payload, micro_batches, purpose)

        counts = 8 * module.num_experts  # int64
        passes = ("forward", "recomputed") if config.training.recompute == "full" else ("forward",)
        for name in passes:
            yield call(counts, f"numbers of tokens of each expert, {name}")
            yield call(rows, f"tokens to their experts, {name}")
            yield call(rows, f"outputs of the experts, {name}")
        yield call(rows, "gradients of the experts' outputs, backward")
        yield call(rows, "gradients of the tokens, backward")


def _balance_losses(config: Config, model: GPT, micro_batches: int) -> Iterator[Collective]:
    """The loads of each sequence, over the axes that divide it, in every layer with experts."""
    passes = ("forward", "recomputed") if config.training.recompute == "full" else ("forward",)
    for router in routers(model):
        if not router.losses.balances:
            continue
        payload = 8 * config.training.micro_batch_size * router.num_experts  # int64
        for axis in router.losses.axes:
            for name in passes:
                purpose = f"loads of each sequence for the balance loss, {name}"
                yield Collective(axis.name, ALL_REDUCE, payload, micro_batches, purpose)


def _count(model: GPT, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def _count_rounded(config: Config, model: GPT) -> int:
    """Column-parallel layers with float8 products."""
    specs = {}
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):
            specs[name] = spec_of(module.weight)
    return len(float8_weights(config, specs))


def _losses(config: Config, unembedding: Unembedding, micro_batches: int) -> Iterator[Collective]:
    """The two reductions of the vocabulary-parallel cross-entropy, for every chunk of tokens."""
    # Per token: the sum of exponentials and the target's logit; with label smoothing also the sum
    # of the logits.
    sums = 3 if config.training.label_smoothing > 0 else 2
    all_tokens = micro_batch_sizes(config).tokens
    chunk_tokens = unembedding.chunk_tokens(all_tokens, element_bytes(config))
    full_chunks, remaining_tokens = divmod(all_tokens, chunk_tokens)
    remaining_chunks = 1 if remaining_tokens else 0
    for tokens, chunks in ((chunk_tokens, full_chunks), (remaining_tokens, remaining_chunks)):
        value_bytes = tokens * wide_bytes(config)  # of one value per token
        count = chunks * micro_batches
        purpose = "largest logit of each token, forward"
        yield Collective("tensor", ALL_REDUCE, value_bytes, count, purpose)
        purpose = "sums of each token's cross-entropy, forward"
        yield Collective("tensor", ALL_REDUCE, sums * value_bytes, count, purpose)


def _partial_gradients(
    config: Config, specs: Mapping[str, Spec], layout: Layout, places: Mapping[str, int]
) -> Iterator[Collective]:
    """Partial gradients of replicated parameters, summed over tensor ranks."""
    segments = layout.segments(places)
    elements = sum(s.size for s in segments if specs[s.name].partial_gradient)
    if elements:
        payload = elements * wide_bytes(config)
        purpose = "gradients of norms and biases in the shard"
        yield Collective("tensor", ALL_REDUCE, payload, 1, purpose)


def _pipeline(config: Config, models: list[GPT], micro_batches: int) -> Iterator[Collective]:
    """The residual stream and its gradient between stages."""
    if config.parallel.pipeline_parallel_size == 1:
        return
    sizes = micro_batch_sizes(config)
    stream = sizes.local_tokens * config.model.hidden_size * sizes.stream_bytes
    forward = micro_batches * sum(not model.chunk_range.has_unembedding for model in models)
    backward = micro_batches * sum(not model.chunk_range.has_embedding for model in models)
    yield Collective(
        "pipeline", SEND, stream, forward, "residual stream to the next stage, forward"
    )
    yield Collective(
        "pipeline", SEND, stream, backward, "its gradient to the stage before, backward"
    )


def _tied_gradients(
    config: Config, specs: Mapping[str, Spec], layout: Layout
) -> Iterator[Collective]:
    """The embedding's gradient between the first and last stage, each of which holds a copy."""
    # The tied embedding has a bucket of its own on both stages, so their shards cover the same
    # elements.
    for entry in layout.pieces:
        if specs[entry.name].tied_to is not None:
            bucket = layout.buckets[entry.bucket]
            payload = bucket.size // bucket.shards * wide_bytes(config)
            purpose = "gradient of the tied embedding to the other end"
            yield Collective("pipeline", SEND, payload, 1, purpose)


def _data(
    config: Config, layout: Layout, gradient_size: int, micro_batches: int
) -> Iterator[Collective]:
    """Gradients and parameters of every bucket between the ranks that hold its parameters."""
    replicas = gradient_size // shard_count(config, gradient_size)
    narrow = config.parallel.gradient_dtype == "bf16"
    # Full gradients that are not kept over the step are reduced in every micro-batch.
    reductions = micro_batches if config.parallel.sharding == "gradients" else 1
    for bucket in layout.buckets:
        axis = "shard" if bucket.axis == "gradient" else bucket.axis
        # Loads of experts are counts, which no rounding may change.
        gradient_bytes = 2 if narrow and bucket.kind != LOADS else wide_bytes(config)
        # Each rank receives the summed gradients of its shard and updates it; then the new
        # parameters are all-gathered.
        gradients = bucket.size * gradient_bytes
        parameters = bucket.size * element_bytes(config)
        if bucket.shards > 1:
            purpose = "gradients of a bucket, during backward"
            yield Collective(axis, REDUCE_SCATTER, gradients, reductions, purpose)
            purpose = "parameters of a bucket, during the next forward"
            yield Collective(axis, ALL_GATHER, parameters, 1, purpose)
        if replicas > 1:
            shard = bucket.size // bucket.shards * gradient_bytes
            purpose = "gradients of the shard, across replicas"
            yield Collective("replica", ALL_REDUCE, shard, 1, purpose)


def _matrices(
    config: Config, specs: Mapping[str, Spec], layout: Layout, gradient_size: int, rank: int
) -> Iterator[Collective]:
    """Muon's matrices to the ranks that make them orthogonal, and back.

    rank: in `ParallelContext.stage`.
    """
    if not has_matrices(config):
        return
    division = division_of(config, specs, layout, gradient_size)
    if division.ranks == 1:
        return
    item_bytes = iteration_bytes(config)
    for packed, scattered in exchanged_elements(division, rank):
        purpose = "momentum to the owners of the matrices"
        yield Collective("stage", ALL_TO_ALL, packed * item_bytes, 1, purpose)
        purpose = "orthogonal factors from the owners"
        yield Collective("stage", ALL_TO_ALL, scattered * item_bytes, 1, purpose)


def _weight_scales(
    config: Config, specs: Mapping[str, Spec], gradient_size: int
) -> Iterator[Collective]:
    """The largest magnitudes of float8 weights, over all ranks that share them."""
    matrices = len(float8_weights(config, specs))
    ranks = shard_count(config, gradient_size) * config.parallel.tensor_parallel_size
    if matrices and ranks > 1:
        yield Collective("stage", ALL_REDUCE, 4 * matrices, 1, "scales of float8 weights")


def _world(config: Config, world_size: int) -> Iterator[Collective]:
    """The all-reduces of a few scalars over all ranks."""
    if world_size == 1:
        return
    own_losses = whole_model(config.model, table_of(config)).own_losses.names
    # Squared gradient norm, loss and token count, plus one value per term of the objective and per
    # loss that a layer declares; all are float64.
    numbers = 3 + len(LossConfig.of(config.training).terms) + len(own_losses)
    purpose = "squared gradient norm, loss, its terms, tokens"
    yield Collective("world", ALL_REDUCE, numbers * 8, 1, purpose)
    yield Collective("world", ALL_REDUCE, 4, 1, "whether a rank was asked to stop")
