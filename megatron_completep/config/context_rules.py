"""What ranks that share a sequence need: lengths that divide, and attention that they can have."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_completep.config.derived import PACKED_BACKENDS, num_query_groups
from megatron_completep.config.remedies import VALUES, Choice, Problem, all_divisors
from megatron_completep.config.schema import Config

LARGEST_BIAS = 4 << 30  # bytes of a bias on the attention logits that a context rank may hold


def context_problems(config: Config) -> Iterator[Problem]:
    """Settings that do not go with parallel.context_parallel_size."""
    size = config.parallel.context_parallel_size
    yield from _heads_at_once(config)
    if size == 1:
        return
    length = config.model.seq_length
    where = f"parallel.context_parallel_size = {size}"
    fitting = all_divisors(length // 2) if length % 2 == 0 else [1]
    # Every rank holds an early and a late chunk.
    if length % (2 * size):
        yield Choice(
            f"{where} cuts a sequence into 2 x {size} = {2 * size} chunks, which "
            f"model.seq_length = {length} is not a multiple of. Use {VALUES}, or another "
            "seq_length.",
            "parallel.context_parallel_size",
            fitting,
            near=size,
        )
        return
    yield from _sequence_parallel(config, fitting)
    if config.model.attention_backend == "cudnn":
        yield (
            f"{where} attends from the end of a longer sequence, which model.attention_backend = "
            "cudnn takes as a mask in memory only. Use attention_backend = auto."
        )
    bias = _bias_bytes(config)
    if bias > LARGEST_BIAS:
        needs_bias = "data.reset_at_document_ends = true"
        remedy = "model.attention_backend = varlen or flash_attention, a larger "
        remedy += "context_parallel_size or a smaller micro_batch_size"
        if config.model.position == "alibi":
            needs_bias = "model.position = alibi"
            remedy = "a larger context_parallel_size, or another position"
        yield (
            f"{where} and {needs_bias} need a bias on the attention logits of "
            f"{bias / 2**30:.1f} GiB on each rank, above {LARGEST_BIAS >> 30} GiB. "
            f"Use {remedy}."
        )


def _sequence_parallel(config: Config, fitting: list[int]) -> Iterator[Problem]:
    """Tensor ranks divide what a context rank holds."""
    parallel = config.parallel
    size = parallel.context_parallel_size
    ranks = parallel.tensor_parallel_size
    own_tokens = config.model.seq_length // size
    # What does not divide the whole sequence is a problem of its own (`check.py`).
    divides_whole = config.model.seq_length % ranks == 0
    if parallel.sequence_parallel and divides_whole and own_tokens % ranks:
        yield Choice(
            f"parallel.context_parallel_size = {size} leaves {config.model.seq_length} / {size} = "
            f"{own_tokens} tokens of a sequence to a rank, which parallel.tensor_parallel_size = "
            f"{ranks} does not divide (parallel.sequence_parallel is on). Use {VALUES}.",
            "parallel.context_parallel_size",
            fitting,
            near=size,
        )


def _heads_at_once(config: Config) -> Iterator[Problem]:
    """Keys and values are gathered in equal lots."""
    parallel = config.parallel
    at_once = parallel.context_heads_at_once
    if at_once is None:
        return
    where = f"parallel.context_heads_at_once = {at_once}"
    if parallel.context_parallel_size == 1:
        yield (
            f"{where} has no meaning under parallel.context_parallel_size = 1: nothing is "
            "gathered. Use null, or more context ranks."
        )
        return
    all_groups = num_query_groups(config.model)
    tensor_ranks = parallel.tensor_parallel_size
    groups = all_groups // tensor_ranks
    # Groups that do not divide over tensor ranks are a problem of their own (`check.py`).
    if all_groups % tensor_ranks == 0 and groups % at_once:
        yield Choice(
            f"{where} does not divide the {groups} groups of keys and values of a rank "
            f"({all_groups} over parallel.tensor_parallel_size = {tensor_ranks}). Use {VALUES}, "
            "or null.",
            "parallel.context_heads_at_once",
            all_divisors(groups),
            near=at_once,
        )


def _bias_bytes(config: Config) -> int:
    """Bytes of the bias of documents or ALiBi that a rank holds; 0 where there is none."""
    model = config.model
    parallel = config.parallel
    packed = model.attention_backend in PACKED_BACKENDS
    documents = config.data.reset_at_document_ends and not packed
    alibi = model.position == "alibi"
    if not documents and not alibi:
        return 0
    rows = config.training.micro_batch_size if documents else 1
    heads = model.num_attention_heads // parallel.tensor_parallel_size if alibi else 1
    queries = model.seq_length // parallel.context_parallel_size
    element_bytes = {"float64": 8, "float32": 4}.get(config.training.precision, 2)
    return rows * heads * queries * model.seq_length * element_bytes
