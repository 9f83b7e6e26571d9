"""Which tensors of a stock Hugging Face architecture correspond to which of ours.

The list of `Piece`s is the complete mapping: export applies each piece forwards, from our tensor to
that of Hugging Face, and import backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_completep.config.derived import (
    expert_ffn_hidden_size,
    has_qkv_bias,
    head_dim,
    num_query_groups,
)
from megatron_completep.config.schema import ModelConfig, MoeConfig

WITH_EXPERTS = ("granitemoe", "granitemoeshared", "mixtral")

ScaledRanges = tuple[tuple[int, int, float], ...]  # (start, stop, factor) of rows, in order


@dataclass(frozen=True)
class Folding:
    """Factors to multiply into the exported tensors.

    With them an architecture without multipliers computes the same function as our model. All are 1
    if nothing is folded.
    """

    embedding: float = 1.0  # token and learned position embeddings
    query: float = 1.0  # q projection and its bias, or the q-norm's gain
    branch: float = 1.0  # output projections of attention, MLP and experts, and their biases
    final_norm: float = 1.0  # its gain and bias
    unembedding: float = 1.0

    @property
    def changed(self) -> dict[str, float]:
        """The factors that are not 1."""
        return {name: factor for name, factor in vars(self).items() if factor != 1.0}


@dataclass(frozen=True)
class Piece:
    """One tensor of the Hugging Face model, cut from our parameter `source`.

    Each range of `rows` is multiplied by its factor, the ranges are stacked in order, and the
    result is transposed if `transposed` is set. If `source` is None the tensor is all zeros: a bias
    that our model does not have. `shape` is that of the Hugging Face tensor. With `expert`, rows
    are those of one matrix of a parameter that stacks one an expert; without it, such a parameter
    is taken whole, and its rows are matrices.
    """

    name: str
    source: str | None
    rows: ScaledRanges
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None


def pieces(
    architecture: str, model: ModelConfig, folding: Folding, prefix: str | None = None
) -> list[Piece]:
    """Every tensor of the Hugging Face model.

    Tensors that are cut from the same parameter of ours are adjacent. `prefix` replaces GPT-2's
    'transformer.'.
    """
    if architecture == "gpt2":
        return list(_gpt2_pieces(model, folding, "transformer." if prefix is None else prefix))
    return list(_llama_pieces(architecture, model, folding))


def _llama_pieces(architecture: str, model: ModelConfig, folding: Folding) -> Iterator[Piece]:
    """The tensors of all but GPT-2, which share their names except for those of experts."""
    vocab_size = model.vocab_size
    yield _matrix(
        "model.embed_tokens.weight",
        "embedding.weight",
        (vocab_size, model.hidden_size),
        folding.embedding,
    )
    for index in range(model.num_layers):
        yield from _llama_attention(model, folding, architecture == "qwen3", index)
        yield from _post_attention_norm(model, index)
        if architecture == "mixtral":
            yield from _mixtral_experts(model, folding, index)
        elif architecture in WITH_EXPERTS:
            yield from _granite_experts(model, folding, index)
        else:
            yield from _llama_mlp(model, folding, index)
    yield _vector("model.norm.weight", "final_norm.weight", model.hidden_size, folding.final_norm)
    # A tied model stores one table: transformers and our import learn from config.json
    # (tie_word_embeddings) that it is used twice.
    if not model.tied_embeddings:
        yield _matrix(
            "lm_head.weight",
            "unembedding.weight",
            (vocab_size, model.hidden_size),
            folding.unembedding,
        )


def _llama_attention(
    model: ModelConfig, folding: Folding, qk_norm: bool, index: int
) -> Iterator[Piece]:
    """The attention branch of block `index`, with its norm."""
    hidden = model.hidden_size
    head_size = head_dim(model)
    query_rows = model.num_attention_heads * head_size
    key_rows = num_query_groups(model) * head_size
    # Rows of our qkv: queries, keys, values. Values have as many rows as keys.
    key_end = query_rows + key_rows
    query_range = (0, query_rows)
    key_range = (query_rows, key_end)
    value_range = (key_end, key_end + key_rows)

    hf_block = f"model.layers.{index}"
    hf_attention = f"{hf_block}.self_attn"
    attention = f"layers.{index}.attention"
    qkv = f"{attention}.qkv"
    yield _vector(f"{hf_block}.input_layernorm.weight", f"{attention}_norm.weight", hidden)

    # A norm on queries would undo a factor of the projection, so its gain is multiplied instead.
    projection_factor = 1.0 if qk_norm else folding.query
    bias = has_qkv_bias(model)
    projections = [
        *_linear(f"{hf_attention}.q_proj", qkv, query_range, hidden, bias, projection_factor),
        *_linear(f"{hf_attention}.k_proj", qkv, key_range, hidden, bias),
        *_linear(f"{hf_attention}.v_proj", qkv, value_range, hidden, bias),
    ]
    yield from sorted(projections, key=_source_name)
    if qk_norm:
        q_norm = f"{attention}.q_norm.weight"
        yield _vector(f"{hf_attention}.q_norm.weight", q_norm, head_size, folding.query)
        yield _vector(f"{hf_attention}.k_norm.weight", f"{attention}.k_norm.weight", head_size)
    yield from _linear(
        f"{hf_attention}.o_proj",
        f"{attention}.output",
        (0, hidden),
        query_rows,
        model.bias,
        folding.branch,
    )


def _post_attention_norm(model: ModelConfig, index: int) -> Iterator[Piece]:
    """The norm of the second branch of block `index`."""
    name = f"model.layers.{index}.post_attention_layernorm.weight"
    yield _vector(name, f"layers.{index}.mlp_norm.weight", model.hidden_size)


def _llama_mlp(model: ModelConfig, folding: Folding, index: int) -> Iterator[Piece]:
    """The MLP of block `index`."""
    hidden = model.hidden_size
    ffn = model.ffn_hidden_size
    hf_block = f"model.layers.{index}"
    mlp = f"layers.{index}.mlp"
    up = f"{mlp}.up"
    # Our `up` stacks the gate's rows first, then the rows that are gated.
    halves = [
        *_linear(f"{hf_block}.mlp.gate_proj", up, (0, ffn), hidden, model.bias),
        *_linear(f"{hf_block}.mlp.up_proj", up, (ffn, 2 * ffn), hidden, model.bias),
    ]
    yield from sorted(halves, key=_source_name)
    yield from _linear(
        f"{hf_block}.mlp.down_proj", f"{mlp}.down", (0, hidden), ffn, model.bias, folding.branch
    )


def _experts_of(model: ModelConfig) -> MoeConfig:
    """The section of a model that an architecture with experts can express."""
    assert model.moe is not None
    return model.moe


def _granite_experts(model: ModelConfig, folding: Folding, index: int) -> Iterator[Piece]:
    """Router and experts of block `index` as GraniteMoe stores them, and its shared MLP.

    Its tensors stack the experts as ours do, gate rows before the rows that are gated.
    """
    moe = _experts_of(model)
    hidden = model.hidden_size
    count = moe.num_experts
    ffn = expert_ffn_hidden_size(model)
    mlp = f"layers.{index}.mlp"
    hf_block = f"model.layers.{index}"
    hf_moe = f"{hf_block}.block_sparse_moe"
    # `rows` of a whole parameter are its matrices.
    down_rows = ((0, count, folding.branch),)
    up_shape = (count, 2 * ffn, hidden)
    yield _matrix(f"{hf_moe}.router.layer.weight", f"{mlp}.router.weight", (count, hidden))
    yield Piece(f"{hf_moe}.input_linear.weight", f"{mlp}.experts.up", ((0, count, 1.0),), up_shape)
    yield Piece(
        f"{hf_moe}.output_linear.weight", f"{mlp}.experts.down", down_rows, (count, hidden, ffn)
    )
    shared = moe.shared_ffn_hidden_size
    if shared is not None:
        hf_shared = f"{hf_block}.shared_mlp"
        up = f"{mlp}.shared.up.weight"
        down = f"{mlp}.shared.down.weight"
        yield _matrix(f"{hf_shared}.input_linear.weight", up, (2 * shared, hidden))
        yield _matrix(f"{hf_shared}.output_linear.weight", down, (hidden, shared), folding.branch)


def _mixtral_experts(model: ModelConfig, folding: Folding, index: int) -> Iterator[Piece]:
    """Router and experts of block `index` as Mixtral stores them, three matrices an expert."""
    moe = _experts_of(model)
    hidden = model.hidden_size
    ffn = expert_ffn_hidden_size(model)
    mlp = f"layers.{index}.mlp"
    up = f"{mlp}.experts.up"
    down = f"{mlp}.experts.down"
    hf_moe = f"model.layers.{index}.block_sparse_moe"
    gate_rows = ((0, ffn, 1.0),)
    gated_rows = ((ffn, 2 * ffn, 1.0),)
    down_rows = ((0, hidden, folding.branch),)
    up_shape = (ffn, hidden)
    yield _matrix(f"{hf_moe}.gate.weight", f"{mlp}.router.weight", (moe.num_experts, hidden))
    # Those of one parameter together, so that it is read once.
    for expert in range(moe.num_experts):
        name = f"{hf_moe}.experts.{expert}"
        yield Piece(f"{name}.w1.weight", up, gate_rows, up_shape, expert=expert)
        yield Piece(f"{name}.w3.weight", up, gated_rows, up_shape, expert=expert)
    for expert in range(moe.num_experts):
        name = f"{hf_moe}.experts.{expert}.w2.weight"
        yield Piece(name, down, down_rows, (hidden, ffn), expert=expert)


def _linear(
    name: str,
    source: str,
    rows: tuple[int, int],
    columns: int,
    bias: bool,
    factor: float = 1.0,
) -> Iterator[Piece]:
    """Weight and bias of a Hugging Face linear layer that consists of `rows` of our layer.

    The weight has shape [stop - start, columns].
    """
    start, stop = rows
    scaled_rows = ((start, stop, factor),)
    size = stop - start
    yield Piece(f"{name}.weight", f"{source}.weight", scaled_rows, (size, columns))
    if bias:
        yield Piece(f"{name}.bias", f"{source}.bias", scaled_rows, (size,))


def _matrix(name: str, source: str, shape: tuple[int, int], factor: float = 1.0) -> Piece:
    """Our complete matrix, times a factor."""
    return Piece(name, source, ((0, shape[0], factor),), shape)


def _vector(name: str, source: str, size: int, factor: float = 1.0) -> Piece:
    """Our complete vector, times a factor."""
    return Piece(name, source, ((0, size, factor),), (size,))


def _source_name(piece: Piece) -> str:
    """Sorting key that makes pieces of one parameter adjacent, so that it is read once."""
    return piece.source or ""


def _gpt2_pieces(model: ModelConfig, folding: Folding, prefix: str) -> Iterator[Piece]:
    """The tensors of GPT-2, whose linear layers store the transposed weight."""
    hidden = model.hidden_size
    embedding_shape = (model.vocab_size, hidden)
    position_shape = (model.seq_length, hidden)
    factor = folding.embedding
    yield _matrix(f"{prefix}wte.weight", "embedding.weight", embedding_shape, factor)
    yield _matrix(f"{prefix}wpe.weight", "positions.weight", position_shape, factor)
    for index in range(model.num_layers):
        yield from _gpt2_block(model, folding, f"{prefix}h.{index}", f"layers.{index}")
    yield from _gpt2_norm(model, f"{prefix}ln_f", "final_norm", folding.final_norm)
    # The head stands beside the base model, so its name has no prefix.
    if not model.tied_embeddings:
        factor = folding.unembedding
        yield _matrix("lm_head.weight", "unembedding.weight", embedding_shape, factor)


def _gpt2_block(model: ModelConfig, folding: Folding, hf_block: str, block: str) -> Iterator[Piece]:
    """One block of GPT-2.

    hf_block, block: name prefixes in the Hugging Face model and in ours.
    """
    hidden = model.hidden_size
    ffn = model.ffn_hidden_size
    query_rows = (0, hidden, folding.query)
    qkv_rows = (query_rows, *_repeated_keys_and_values(model))
    output_rows = ((0, hidden, folding.branch),)
    up_rows = ((0, ffn, 1.0),)
    qkv = f"{block}.attention.qkv"
    output = f"{block}.attention.output"

    yield from _gpt2_norm(model, f"{hf_block}.ln_1", f"{block}.attention_norm")
    yield from _gpt2_linear(model, f"{hf_block}.attn.c_attn", qkv, qkv_rows, hidden)
    yield from _gpt2_linear(model, f"{hf_block}.attn.c_proj", output, output_rows, hidden)
    yield from _gpt2_norm(model, f"{hf_block}.ln_2", f"{block}.mlp_norm")
    yield from _gpt2_linear(model, f"{hf_block}.mlp.c_fc", f"{block}.mlp.up", up_rows, hidden)
    yield from _gpt2_linear(model, f"{hf_block}.mlp.c_proj", f"{block}.mlp.down", output_rows, ffn)


def _gpt2_linear(
    model: ModelConfig, name: str, source: str, rows: ScaledRanges, columns: int
) -> Iterator[Piece]:
    """Weight [columns, rows] and bias of a linear layer."""
    shape = (columns, _number_of_rows(rows))
    yield Piece(f"{name}.weight", f"{source}.weight", rows, shape, transposed=True)
    yield _gpt2_bias(model, name, source, rows)


def _gpt2_norm(model: ModelConfig, name: str, source: str, factor: float = 1.0) -> Iterator[Piece]:
    """Gain and bias of a norm."""
    hidden = model.hidden_size
    yield _vector(f"{name}.weight", f"{source}.weight", hidden, factor)
    yield _gpt2_bias(model, name, source, ((0, hidden, factor),))


def _gpt2_bias(model: ModelConfig, name: str, source: str, rows: ScaledRanges) -> Piece:
    """A bias, which GPT-2 always has: zeros if our model has none."""
    has_bias = has_qkv_bias(model) if source.endswith("qkv") else model.bias
    bias_source = f"{source}.bias" if has_bias else None
    return Piece(f"{name}.bias", bias_source, rows, (_number_of_rows(rows),))


def _number_of_rows(rows: ScaledRanges) -> int:
    return sum(stop - start for start, stop, _ in rows)


def _repeated_keys_and_values(model: ModelConfig) -> ScaledRanges:
    """The rows of keys, then of values, which follow the queries in our qkv.

    GPT-2 has as many key and value heads as query heads, so each key or value head is repeated for
    every query head of its group.
    """
    groups = num_query_groups(model)
    head_size = head_dim(model)
    repetitions = model.num_attention_heads // groups
    begin = model.hidden_size
    end = begin + 2 * groups * head_size
    rows: list[tuple[int, int, float]] = []
    for start in range(begin, end, head_size):
        head = (start, start + head_size, 1.0)
        rows += [head] * repetitions
    return tuple(rows)
