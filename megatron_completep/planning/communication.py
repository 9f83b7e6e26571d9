"""Every collective of an optimizer step, on paper: which axis, which operation, how many bytes, how often, and what for.

Tests count the real ones and compare. The bytes of a call are those of the whole tensor: what is summed, what a gather makes,
what a scatter takes, what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_completep.config.derived import micro_batches_per_step, padded_vocab_size
from megatron_completep.config.schema import Config
from megatron_completep.model.gpt import Stage
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.parameter import Spec
from megatron_completep.planning.sizes import (
    element_bytes,
    rank_layout,
    rank_specs,
    rank_stages,
    shard_count,
    wide_bytes,
)

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND = "all-reduce", "all-gather", "reduce-scatter", "send"


@dataclass(frozen=True)
class Collective:
    """`count` calls a step, each with `payload` bytes, over one axis of the mesh (or the whole of it)."""

    axis: str
    operation: str
    payload: int
    count: int
    what: str

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, with ring algorithms over `ranks` ranks."""
        share = {ALL_REDUCE: 2 * (ranks - 1) / ranks, SEND: 1.0}.get(
            self.operation, (ranks - 1) / ranks
        )
        return self.payload * self.count * share


def collectives_per_step(
    config: Config, world_size: int, pipeline_rank: int = 0, shard_rank: int = 0
) -> list[Collective]:
    """What a rank at these coordinates does in `TrainingStep.run`. Tensor and replica ranks are alike.

    shard_rank: the rank among those that share the optimizer; it matters for the small sum of partial gradients alone.
    """
    data_size = world_size // (
        config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    )
    micro_batches = micro_batches_per_step(config, world_size)
    specs = rank_specs(config, pipeline_rank)
    found = [
        *(
            c
            for stage in rank_stages(config, pipeline_rank)
            for c in _tensor(config, stage, micro_batches)
        ),
        *_partial_gradients(config, specs, data_size, shard_rank),
        *_pipeline(config, specs, pipeline_rank, micro_batches, data_size),
        *_data(config, specs, data_size),
    ]
    if world_size > 1:
        numbers = 3 + len(LossConfig.of(config.training).terms)
        found.append(
            Collective(
                "world",
                ALL_REDUCE,
                numbers * 8,
                1,
                "squared gradient norm, loss, its terms, tokens",
            )
        )
        found.append(Collective("world", ALL_REDUCE, 4, 1, "whether a rank was asked to stop"))
    return [collective for collective in found if collective.count]


def sent_bytes(config: Config, world_size: int) -> tuple[float, float, float]:
    """Bytes that the busiest rank sends per step along the tensor, the pipeline and the data axis."""
    parallel = config.parallel
    data_size = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    shards = shard_count(config, data_size)
    ranks = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": 2,
        "shard": shards,
        "replica": data_size // shards,
    }
    totals = []
    for pipeline_rank in range(parallel.pipeline_parallel_size):
        planned = collectives_per_step(config, world_size, pipeline_rank)
        totals.append(
            {
                axis: sum(c.sent(size) for c in planned if c.axis == axis)
                for axis, size in ranks.items()
            }
        )
    return (
        max(t["tensor"] for t in totals),
        max(t["pipeline"] for t in totals),
        max(t["shard"] + t["replica"] for t in totals),
    )


def activation_bytes(config: Config) -> int:
    """One micro-batch's [S, B, H] on all of the sequence."""
    model, training = config.model, config.training
    return model.seq_length * training.micro_batch_size * model.hidden_size * element_bytes(config)


def _tensor(config: Config, stage: Stage, micro_batches: int) -> Iterator[Collective]:
    """Activations between tensor ranks, forward and backward, of one stage."""
    tp, split = config.parallel.tensor_parallel_size, config.parallel.sequence_parallel
    if tp == 1:
        return
    activation, layers = activation_bytes(config), micro_batches * (stage.stop - stage.start)
    ends = micro_batches * stage.first, micro_batches * stage.last

    def call(operation: str, count: int, what: str) -> Collective:
        return Collective("tensor", operation, activation, count, what)

    yield call(REDUCE_SCATTER if split else ALL_REDUCE, ends[0], "embeddings, forward")
    if split:
        yield call(ALL_GATHER, 2 * layers, "inputs of attention and MLP, forward")
    yield call(
        REDUCE_SCATTER if split else ALL_REDUCE, 2 * layers, "outputs of attention and MLP, forward"
    )
    if split:
        yield call(ALL_GATHER, ends[1], "input of the unembedding, forward")
    yield from _losses(config, ends[1])
    yield call(
        REDUCE_SCATTER if split else ALL_REDUCE,
        ends[1],
        "gradient of the unembedding's input, backward",
    )
    if (
        config.training.recompute == "full"
    ):  # stops when all that backward needs is there: before the last sum
        if split:
            yield call(ALL_GATHER, 2 * layers, "inputs of attention and MLP, recomputed")
        yield call(
            REDUCE_SCATTER if split else ALL_REDUCE, layers, "outputs of attention, recomputed"
        )
    if split:
        yield call(
            ALL_GATHER, 2 * layers, "gradients of the outputs of attention and MLP, backward"
        )
        yield call(
            ALL_GATHER, 2 * layers, "inputs of attention and MLP for the weight gradients, backward"
        )
    yield call(
        REDUCE_SCATTER if split else ALL_REDUCE,
        2 * layers,
        "gradients of the inputs of attention and MLP, backward",
    )
    if split:
        yield call(ALL_GATHER, ends[0], "gradient of the embeddings, backward")


def _losses(config: Config, micro_batches: int) -> Iterator[Collective]:
    """The two reductions of the vocabulary-parallel cross-entropy, for every chunk of tokens."""
    model, training, tp = config.model, config.training, config.parallel.tensor_parallel_size
    tokens = model.seq_length * training.micro_batch_size
    rows = padded_vocab_size(model, tp) // tp
    at_once = max(1, LossConfig().chunk_bytes // (rows * element_bytes(config)))
    sums = 3 if training.label_smoothing > 0 else 2
    whole, rest = divmod(tokens, at_once)
    for size, count in ((at_once, whole), (rest, 1 if rest else 0)):
        row = size * wide_bytes(config)
        yield Collective(
            "tensor", ALL_REDUCE, row, count * micro_batches, "largest logit of each token, forward"
        )
        yield Collective(
            "tensor",
            ALL_REDUCE,
            sums * row,
            count * micro_batches,
            "sums of each token's cross-entropy, forward",
        )


def _partial_gradients(
    config: Config, specs: dict[str, Spec], data_size: int, shard_rank: int
) -> Iterator[Collective]:
    segments = rank_layout(config, specs, data_size).segments({"gradient": shard_rank})
    elements = sum(s.size for s in segments if specs[s.name].partial_gradient)
    if elements:
        yield Collective(
            "tensor",
            ALL_REDUCE,
            elements * wide_bytes(config),
            1,
            "gradients of norms and biases in the shard",
        )


def _pipeline(
    config: Config, specs: dict[str, Spec], pipeline_rank: int, micro_batches: int, data_size: int
) -> Iterator[Collective]:
    model, parallel = config.model, config.parallel
    if parallel.pipeline_parallel_size == 1:
        return
    stages = rank_stages(config, pipeline_rank)
    stream = activation_bytes(config) // (
        parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    )
    if model.fp32_residual and element_bytes(config) == 2:
        stream *= 2
    forward, backward = (
        sum(not stage.last for stage in stages),
        sum(not stage.first for stage in stages),
    )
    yield Collective(
        "pipeline",
        SEND,
        stream,
        forward * micro_batches,
        "residual stream to the next stage, forward",
    )
    yield Collective(
        "pipeline",
        SEND,
        stream,
        backward * micro_batches,
        "its gradient to the stage before, backward",
    )
    layout = rank_layout(config, specs, data_size)
    for piece in layout.pieces:
        if specs[piece.name].tied_to is not None:
            bucket = layout.buckets[piece.bucket]
            payload = bucket.size // bucket.shards * wide_bytes(config)
            yield Collective(
                "pipeline", SEND, payload, 1, "gradient of the tied embedding to the other end"
            )


def _data(config: Config, specs: dict[str, Spec], data_size: int) -> Iterator[Collective]:
    """Gradients and parameters, one bucket after the other."""
    if data_size == 1:
        return
    shards = shard_count(config, data_size)
    gradient = 2 if config.parallel.gradient_dtype == "bf16" else wide_bytes(config)
    for bucket in rank_layout(config, specs, data_size).buckets:
        size = bucket.size
        if shards > 1:
            yield Collective(
                "shard",
                REDUCE_SCATTER,
                size * gradient,
                1,
                "gradients of a bucket, during backward",
            )
            yield Collective(
                "shard",
                ALL_GATHER,
                size * element_bytes(config),
                1,
                "parameters of a bucket, during the next forward",
            )
        if shards < data_size:
            yield Collective(
                "replica",
                ALL_REDUCE,
                size // shards * gradient,
                1,
                "gradients of the shard, across replicas",
            )
