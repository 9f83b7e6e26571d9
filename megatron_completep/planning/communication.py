"""Every collective of an optimizer step, on paper.

Each has its axis, operation, bytes, number of calls and purpose.
Tests count the collectives of a real step and compare. The bytes of a call are those of the whole
tensor: what an all-reduce sums, an all-gather makes, a reduce-scatter takes, a send sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from megatron_completep.completep import table_of
from megatron_completep.config.derived import gradient_parallel_size, micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stages import whole_model
from megatron_completep.optim.layout import Layout
from megatron_completep.parallel.cross_entropy import LossConfig, Unembedding
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.parameter import Spec
from megatron_completep.planning.sizes import (
    backward_specs,
    element_bytes,
    micro_batch_sizes,
    rank_layout,
    rank_models,
    shard_count,
    wide_bytes,
)

ALL_REDUCE = "all-reduce"
ALL_GATHER = "all-gather"
REDUCE_SCATTER = "reduce-scatter"
SEND = "send"


@dataclass(frozen=True)
class Collective:
    """`count` calls a step, each with `payload` bytes, over one axis of the mesh or all ranks."""

    axis: str
    operation: str
    payload: int
    count: int
    what: str

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, with ring algorithms over `ranks` ranks."""
        if self.operation == SEND:
            return float(self.payload * self.count)
        # A ring passes every part of the tensor on to all other ranks: once for a gather or a
        # scatter, twice for an all-reduce, which is both.
        passes = 2 if self.operation == ALL_REDUCE else 1
        return self.payload * self.count * (passes * (ranks - 1) / ranks)


def collectives_per_step(
    config: Config, world_size: int, pipeline_rank: int = 0, shard_rank: int = 0
) -> list[Collective]:
    """What a rank at these coordinates does in `TrainingStep.run`.

    Tensor and replica ranks are alike.

    shard_rank: the rank among those that share the optimizer; it matters for the small sum of
        partial gradients alone.
    """
    gradient_size = gradient_parallel_size(config, world_size)
    micro_batches = micro_batches_per_step(config, world_size)
    models = rank_models(config, pipeline_rank)
    specs = backward_specs(models)
    layout = rank_layout(config, specs, gradient_size)

    collectives: list[Collective] = []
    for model in models:
        collectives += _tensor(config, model, micro_batches)
    collectives += _partial_gradients(config, specs, layout, shard_rank)
    collectives += _pipeline(config, models, micro_batches)
    collectives += _tied_gradients(config, specs, layout)
    collectives += _data(config, layout, gradient_size)
    collectives += _world(config, world_size)
    return [collective for collective in collectives if collective.count]


def sent_bytes(config: Config, world_size: int) -> tuple[float, float, float]:
    """Bytes that the busiest rank sends a step along the tensor, the pipeline and the data axis."""
    parallel = config.parallel
    gradient_size = gradient_parallel_size(config, world_size)
    shards = shard_count(config, gradient_size)
    ranks = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": 2,
        "shard": shards,
        "replica": gradient_size // shards,
        "world": world_size,
    }
    # The busiest rank of one axis need not be that of another.
    most = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0}
    for pipeline_rank in range(parallel.pipeline_parallel_size):
        sent = dict.fromkeys(ranks, 0.0)
        for collective in collectives_per_step(config, world_size, pipeline_rank):
            sent[collective.axis] += collective.sent(ranks[collective.axis])
        sent["data"] = sent["shard"] + sent["replica"]
        most = {axis: max(size, sent[axis]) for axis, size in most.items()}
    return most["tensor"], most["pipeline"], most["data"]


def _tensor(config: Config, model: GPT, micro_batches: int) -> Iterator[Collective]:
    """Activations between tensor ranks in one stage: of its parallel linears and of its ends.

    The linears are counted in the model, so that a new branch made of them is known here.
    """
    if config.parallel.tensor_parallel_size == 1:
        return
    # Partial sums [S, B, H] become the whole sum on every rank, or a part of the sequence on each,
    # which has to be gathered where the whole is needed.
    split = config.parallel.sequence_parallel
    reduce = REDUCE_SCATTER if split else ALL_REDUCE
    embeddings = micro_batches if model.chunk_range.has_embedding else 0
    unembeddings = micro_batches if model.chunk_range.has_unembedding else 0
    columns = micro_batches * _count(model, ColumnParallelLinear)
    rows = micro_batches * _count(model, RowParallelLinear)
    activation_elements = micro_batch_sizes(config).tokens * config.model.hidden_size
    payload = activation_elements * element_bytes(config)

    def call(operation: str, count: int, what: str) -> Collective:
        return Collective("tensor", operation, payload, count, what)

    yield call(reduce, embeddings, "embeddings, forward")
    if split:
        yield call(ALL_GATHER, columns, "inputs of attention and MLP, forward")
    yield call(reduce, rows, "outputs of attention and MLP, forward")
    if model.chunk_range.has_unembedding:
        if split:
            yield call(ALL_GATHER, unembeddings, "input of the unembedding, forward")
        yield from _losses(config, model.unembedding, micro_batches)

    yield call(reduce, unembeddings, "gradient of the unembedding's input, backward")
    if config.training.recompute == "full":
        # A layer is computed again until all that backward needs is there: before its last sum.
        if split:
            yield call(ALL_GATHER, columns, "inputs of attention and MLP, recomputed")
        recomputed_rows = rows - micro_batches * len(model.layers)
        yield call(reduce, recomputed_rows, "outputs of attention, recomputed")
    if split:
        yield call(ALL_GATHER, rows, "gradients of the outputs of attention and MLP, backward")
        # The forward pass keeps this rank's part of the inputs alone.
        purpose = "inputs of attention and MLP for the weight gradients, backward"
        yield call(ALL_GATHER, columns, purpose)
    yield call(reduce, columns, "gradients of the inputs of attention and MLP, backward")
    if split:
        yield call(ALL_GATHER, embeddings, "gradient of the embeddings, backward")


def _count(model: GPT, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def _losses(config: Config, unembedding: Unembedding, micro_batches: int) -> Iterator[Collective]:
    """The two reductions of the vocabulary-parallel cross-entropy, for every chunk of tokens."""
    # Of each token: the sum of exponentials and the target's logit, with smoothing that of logits.
    sums = 3 if config.training.label_smoothing > 0 else 2
    chunk_tokens = unembedding.tokens_at_once(element_bytes(config))
    full_chunks, remaining_tokens = divmod(micro_batch_sizes(config).tokens, chunk_tokens)
    remaining_chunks = 1 if remaining_tokens else 0
    for tokens, chunks in ((chunk_tokens, full_chunks), (remaining_tokens, remaining_chunks)):
        row = tokens * wide_bytes(config)
        count = chunks * micro_batches
        purpose = "largest logit of each token, forward"
        yield Collective("tensor", ALL_REDUCE, row, count, purpose)
        purpose = "sums of each token's cross-entropy, forward"
        yield Collective("tensor", ALL_REDUCE, sums * row, count, purpose)


def _partial_gradients(
    config: Config, specs: Mapping[str, Spec], layout: Layout, shard_rank: int
) -> Iterator[Collective]:
    """Gradients of replicated parameters of which each tensor rank has computed a share."""
    segments = layout.segments({"gradient": shard_rank})
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
    """The embedding's gradient between the ends of the pipeline, which hold a copy of it each."""
    # Both ends lie alone in a bucket, so that equal shards of them meet.
    for entry in layout.pieces:
        if specs[entry.name].tied_to is not None:
            bucket = layout.buckets[entry.bucket]
            payload = bucket.size // bucket.shards * wide_bytes(config)
            purpose = "gradient of the tied embedding to the other end"
            yield Collective("pipeline", SEND, payload, 1, purpose)


def _data(config: Config, layout: Layout, gradient_size: int) -> Iterator[Collective]:
    """Gradients and parameters of every bucket between data ranks, one bucket after the other."""
    if gradient_size == 1:
        return
    shards = shard_count(config, gradient_size)
    gradient_bytes = 2 if config.parallel.gradient_dtype == "bf16" else wide_bytes(config)
    for bucket in layout.buckets:
        # A rank is sent the sums of its shard, updates that, and hands the parameters round.
        gradients = bucket.size * gradient_bytes
        parameters = bucket.size * element_bytes(config)
        if shards > 1:
            purpose = "gradients of a bucket, during backward"
            yield Collective("shard", REDUCE_SCATTER, gradients, 1, purpose)
            purpose = "parameters of a bucket, during the next forward"
            yield Collective("shard", ALL_GATHER, parameters, 1, purpose)
        if shards < gradient_size:
            shard = bucket.size // shards * gradient_bytes
            purpose = "gradients of the shard, across replicas"
            yield Collective("replica", ALL_REDUCE, shard, 1, purpose)


def _world(config: Config, world_size: int) -> Iterator[Collective]:
    """The few numbers that all ranks share."""
    if world_size == 1:
        return
    own_losses = whole_model(config.model, table_of(config)).own_losses.names
    # Three, the terms of the objective and the layers' own losses, all of them float64.
    numbers = 3 + len(LossConfig.of(config.training).terms) + len(own_losses)
    purpose = "squared gradient norm, loss, its terms, tokens"
    yield Collective("world", ALL_REDUCE, numbers * 8, 1, purpose)
    yield Collective("world", ALL_REDUCE, 4, 1, "whether a rank was asked to stop")
