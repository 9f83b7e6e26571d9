"""Stock Hugging Face architectures: what each can express, and which tensors correspond to ours.

The list of pieces is the whole mapping. Export reads it from left to right, import from right to
left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_completep.completep import Table
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError

ARCHITECTURES = ("granite", "llama", "qwen3", "gpt2")
CLASSES = {
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

Rows = tuple[tuple[int, int, float], ...]  # (start, stop, factor), in order


@dataclass(frozen=True)
class Folding:
    """The factors of stored tensors with which a model without multipliers computes the same.

    All factors are 1 where nothing is folded.
    """

    embedding: float = 1.0  # token and learned position embeddings
    query: float = 1.0  # q projection and its bias, or the q-norm's gain
    branch: float = 1.0  # output projections of attention and MLP, and their biases
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
    result is transposed where `transposed` is set. `source` None stands for zeros: a bias that our
    model does not have. `shape` is that of the Hugging Face tensor.
    """

    name: str
    source: str | None
    rows: Rows
    shape: tuple[int, ...]
    transposed: bool = False


def blockers(architecture: str, model: ModelConfig) -> list[str]:
    """Every reason why an architecture cannot express a model; empty where it can."""
    is_gpt2 = architecture == "gpt2"
    has_qk_norm = architecture == "qwen3"
    # What the architecture's own code computes; a setting outside cannot be expressed.
    choices_of: dict[str, tuple[object, ...]] = {
        "norm": ("layernorm",) if is_gpt2 else ("rmsnorm",),
        "activation": ("gelu", "gelu_tanh") if is_gpt2 else ("swiglu",),
        "position": ("learned",) if is_gpt2 else ("rope",),
        "qk_norm": (has_qk_norm,),
    }
    reasons = []
    for name, choices in choices_of.items():
        setting = getattr(model, name)
        if setting not in choices:
            alternatives = " or ".join(map(_show, choices))
            reasons.append(f"model.{name} = {_show(setting)}, it has {alternatives}")

    if has_qk_norm and model.bias:
        reasons.append("model.bias = true, its MLP has no biases")
    # GPT-2 has no setting for the size of a head: it is hidden size / heads.
    width = model.num_attention_heads * head_dim(model)
    if is_gpt2 and width != model.hidden_size:
        reasons.append(
            f"heads of {head_dim(model)} x {model.num_attention_heads} = {width}, "
            f"it needs model.hidden_size = {model.hidden_size}"
        )
    # transformers refuses such a Llama even where config.json gives head_dim.
    if architecture == "llama" and model.hidden_size % model.num_attention_heads:
        reasons.append(
            f"model.num_attention_heads = {model.num_attention_heads} does not divide "
            f"model.hidden_size = {model.hidden_size}"
        )
    return reasons


def choose_architecture(model: ModelConfig, table: Table, architecture: str = "auto") -> str:
    """`architecture` if it can express the model.

    auto: plain Llama where nothing must be multiplied, else the first architecture that can express
    the model; Granite comes first because it keeps the multipliers. Raises ConfigError naming
    everything in the way.
    """
    candidates = ARCHITECTURES if architecture == "auto" else (architecture,)
    reasons_against = {name: blockers(name, model) for name in candidates}
    fitting = [name for name, reasons in reasons_against.items() if not reasons]

    # Llama is what most programs load, so it wins where no multiplier would be lost.
    if architecture == "auto" and "llama" in fitting:
        folding = fold("llama", model, table)
        if not folding.changed:
            return "llama"
    if fitting:
        return fitting[0]

    hint = "" if architecture == "auto" else " Try --architecture auto."
    lines = [f"no stock architecture asked for can express this model.{hint}"]
    for name, reasons in reasons_against.items():
        lines.append(f"{name}: {'; '.join(reasons)}")
    raise ConfigError("\n  ".join(lines))


def fold(architecture: str, model: ModelConfig, table: Table) -> Folding:
    """The factors to fold: none for Granite, whose configuration has all four multipliers.

    Tied embeddings: logits = norm(x) (m W)^T / (m m_N), so the final norm takes 1/m_N and undoes
    the input multiplier m.
    """
    if architecture == "granite":
        return Folding()
    input_multiplier = model.input_multiplier
    if model.tied_embeddings:
        final_norm = table.logit_multiplier / input_multiplier
        unembedding = 1.0
    else:
        final_norm = 1.0
        unembedding = table.logit_multiplier
    # These architectures scale attention logits by 1/sqrt(head_dim); the queries take the quotient.
    stock_attention_scale = 1 / math.sqrt(head_dim(model))
    return Folding(
        embedding=input_multiplier,
        query=table.attention_scale / stock_attention_scale,
        branch=table.residual_multiplier,
        final_norm=final_norm,
        unembedding=unembedding,
    )


def pieces(
    architecture: str, model: ModelConfig, folding: Folding, prefix: str | None = None
) -> list[Piece]:
    """Every tensor of the Hugging Face model; those of one parameter of ours are neighbours.

    `prefix` replaces GPT-2's 'transformer.'.
    """
    if architecture == "gpt2":
        return list(_gpt2_pieces(model, folding, "transformer." if prefix is None else prefix))
    return list(_llama_pieces(model, folding, qk_norm=architecture == "qwen3"))


def _llama_pieces(model: ModelConfig, folding: Folding, qk_norm: bool) -> Iterator[Piece]:
    """The tensors of Llama, Granite and Qwen3, which share their names."""
    vocab_size = model.vocab_size
    yield _matrix(
        "model.embed_tokens.weight",
        "embedding.weight",
        (vocab_size, model.hidden_size),
        folding.embedding,
    )
    for index in range(model.num_layers):
        yield from _llama_attention(model, folding, qk_norm, index)
        yield from _llama_mlp(model, folding, index)
    yield _vector("model.norm.weight", "final_norm.weight", model.hidden_size, folding.final_norm)
    # A tied model stores one table; both programs know from config.json that it is used twice.
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
    # Rows of our qkv: queries, keys, values. There are as many of values as of keys.
    key_end = query_rows + key_rows
    query_range = (0, query_rows)
    key_range = (query_rows, key_end)
    value_range = (key_end, key_end + key_rows)

    hf_block = f"model.layers.{index}"
    hf_attention = f"{hf_block}.self_attn"
    attention = f"layers.{index}.attention"
    qkv = f"{attention}.qkv"
    yield _vector(f"{hf_block}.input_layernorm.weight", f"{attention}_norm.weight", hidden)

    # A norm on queries would undo a factor of the projection, so its gain takes the factor.
    projection_factor = 1.0 if qk_norm else folding.query
    projections = [
        *_linear(f"{hf_attention}.q_proj", qkv, query_range, hidden, model.bias, projection_factor),
        *_linear(f"{hf_attention}.k_proj", qkv, key_range, hidden, model.bias),
        *_linear(f"{hf_attention}.v_proj", qkv, value_range, hidden, model.bias),
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


def _llama_mlp(model: ModelConfig, folding: Folding, index: int) -> Iterator[Piece]:
    """The MLP branch of block `index`, with its norm."""
    hidden = model.hidden_size
    ffn = model.ffn_hidden_size
    hf_block = f"model.layers.{index}"
    mlp = f"layers.{index}.mlp"
    up = f"{mlp}.up"
    yield _vector(f"{hf_block}.post_attention_layernorm.weight", f"{mlp}_norm.weight", hidden)
    # Our up projection holds the gate's rows above those that the gate multiplies.
    halves = [
        *_linear(f"{hf_block}.mlp.gate_proj", up, (0, ffn), hidden, model.bias),
        *_linear(f"{hf_block}.mlp.up_proj", up, (ffn, 2 * ffn), hidden, model.bias),
    ]
    yield from sorted(halves, key=_source_name)
    yield from _linear(
        f"{hf_block}.mlp.down_proj", f"{mlp}.down", (0, hidden), ffn, model.bias, folding.branch
    )


def _linear(
    name: str,
    source: str,
    rows: tuple[int, int],
    columns: int,
    bias: bool,
    factor: float = 1.0,
) -> Iterator[Piece]:
    """Weight [rows, columns], and bias, of a linear layer that is `rows` of ours."""
    start, stop = rows
    scaled_rows = ((start, stop, factor),)
    size = stop - start
    yield Piece(f"{name}.weight", f"{source}.weight", scaled_rows, (size, columns))
    if bias:
        yield Piece(f"{name}.bias", f"{source}.bias", scaled_rows, (size,))


def _matrix(name: str, source: str, shape: tuple[int, int], factor: float = 1.0) -> Piece:
    """A whole matrix of ours, times a factor."""
    return Piece(name, source, ((0, shape[0], factor),), shape)


def _vector(name: str, source: str, size: int, factor: float = 1.0) -> Piece:
    """A whole vector of ours, times a factor."""
    return Piece(name, source, ((0, size, factor),), (size,))


def _source_name(piece: Piece) -> str:
    """Sorting key: pieces of one parameter become neighbours, so that it is read once."""
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
    """One block of GPT-2; the names of both sides begin with `hf_block` and `block`."""
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
    model: ModelConfig, name: str, source: str, rows: Rows, columns: int
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


def _gpt2_bias(model: ModelConfig, name: str, source: str, rows: Rows) -> Piece:
    """A bias, which GPT-2 always has: zeros for a model of ours without biases."""
    bias_source = f"{source}.bias" if model.bias else None
    return Piece(f"{name}.bias", bias_source, rows, (_number_of_rows(rows),))


def _number_of_rows(rows: Rows) -> int:
    return sum(stop - start for start, stop, _ in rows)


def _repeated_keys_and_values(model: ModelConfig) -> Rows:
    """The rows of keys, then of values, behind the queries.

    GPT-2 has as many heads of keys as of queries, so the head of a query group is written once for
    each query head of that group.
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


def _show(setting: object) -> str:
    """A setting as YAML writes it."""
    return str(setting).lower() if isinstance(setting, bool) else str(setting)
