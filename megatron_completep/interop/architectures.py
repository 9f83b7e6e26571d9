"""Stock Hugging Face architectures: what each can express, and which tensors correspond to ours.

The list of `Piece`s is the complete mapping: export applies each piece forwards, from our tensor to
that of Hugging Face, and import backwards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_completep.completep import Table
from megatron_completep.config.derived import has_qkv_bias, head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.block import BRANCHES

ARCHITECTURES = ("granite", "llama", "qwen3", "qwen2", "mistral", "gpt2")
CLASSES = {
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

KNOWN_BRANCHES = {"attention", "mlp"}  # what blocks have in every architecture
NOT_EXPORTABLE = (
    "export: no Hugging Face architecture can express this model (tools/export_hf.py will refuse)"
)

ScaledRanges = tuple[tuple[int, int, float], ...]  # (start, stop, factor) of rows, in order


@dataclass(frozen=True)
class Folding:
    """Factors to multiply into the exported tensors.

    With them an architecture without multipliers computes the same function as our model. All are 1
    if nothing is folded.
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
    result is transposed if `transposed` is set. If `source` is None the tensor is all zeros: a bias
    that our model does not have. `shape` is that of the Hugging Face tensor.
    """

    name: str
    source: str | None
    rows: ScaledRanges
    shape: tuple[int, ...]
    transposed: bool = False


def blockers(
    architecture: str, model: ModelConfig, branches: Collection[str] = tuple(BRANCHES)
) -> list[str]:
    """Every reason why an architecture cannot express a model; empty if it can.

    branches: names of those of a block.
    """
    is_gpt2 = architecture == "gpt2"
    has_qk_norm = architecture == "qwen3"
    # Settings that the architecture supports; a model with any other cannot be exported.
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
            reasons.append(f"model.{name} = {_show(setting)}, but it only has {alternatives}")

    further_branches = sorted(set(branches) - KNOWN_BRANCHES)
    if further_branches:
        reasons.append(f"a block has the branch {', '.join(further_branches)}, which it lacks")
    reasons += _bias_blockers(architecture, model)
    if model.moe is not None:
        reasons.append("model.moe is set, but it has no experts")
    # GPT-2 has no setting for the size of a head: it is hidden size / heads.
    width = model.num_attention_heads * head_dim(model)
    if is_gpt2 and width != model.hidden_size:
        reasons.append(
            f"model.num_attention_heads x head size = {model.num_attention_heads} x "
            f"{head_dim(model)} = {width}, but it requires this to equal "
            f"model.hidden_size = {model.hidden_size}"
        )
    # transformers rejects a Llama whose hidden size is not a multiple of its heads, even if
    # config.json gives head_dim.
    if architecture == "llama" and model.hidden_size % model.num_attention_heads:
        reasons.append(
            f"model.num_attention_heads = {model.num_attention_heads} does not divide "
            f"model.hidden_size = {model.hidden_size}"
        )
    return reasons


def _bias_blockers(architecture: str, model: ModelConfig) -> list[str]:
    """Why an architecture cannot express which linear layers of a model have biases."""
    # GPT-2 writes zeros for a bias that is not there.
    if architecture == "gpt2":
        return []
    on_qkv = has_qkv_bias(model)
    if architecture in ("granite", "llama"):
        if on_qkv == model.bias:
            return []
        return [f"model.qkv_bias = {_show(on_qkv)}, but it has biases on all linear layers or none"]
    # Qwen2 has them on queries, keys and values alone, always; Qwen3 and Mistral are without.
    reasons = []
    if model.bias:
        reasons.append("model.bias = true, but its MLP has no biases")
    elif architecture == "qwen2" and not on_qkv:
        reasons.append("model.qkv_bias = false, but it always has these biases")
    elif architecture != "qwen2" and on_qkv:
        reasons.append("model.qkv_bias = true, but it has no such biases here")
    return reasons


def exportable_as(model: ModelConfig) -> tuple[list[str], dict[str, list[str]]]:
    """(the architectures that can express a model, the reasons against each of the others)."""
    reasons_against = {name: blockers(name, model) for name in ARCHITECTURES}
    fitting = [name for name, reasons in reasons_against.items() if not reasons]
    return fitting, {name: reasons for name, reasons in reasons_against.items() if reasons}


def export_lines(model: ModelConfig, architecture: str = "auto") -> list[str]:
    """What a model can be exported as and what not, with the reasons, a line each.

    architecture: `export.architecture`; that it does not fit is said first.
    """
    fitting, reasons_against = exportable_as(model)
    lines = [f"export: as {', '.join(fitting)}" if fitting else NOT_EXPORTABLE]
    if architecture in reasons_against:
        lines.insert(0, f"export.architecture = {architecture} cannot express this model")
    for name, reasons in reasons_against.items():
        lines.append(f"  not as {name}: {'; '.join(reasons)}")
    return lines


def export_warning(model: ModelConfig, architecture: str = "auto") -> list[str]:
    """`export_lines` as one warning, if no architecture or not the chosen one fits; else none."""
    fitting, reasons_against = exportable_as(model)
    if fitting and architecture not in reasons_against:
        return []
    return ["\n".join(export_lines(model, architecture))]


def choose_architecture(model: ModelConfig, table: Table, architecture: str = "auto") -> str:
    """Return `architecture` if it can express the model.

    auto: plain Llama if no multiplier has to be folded, else the first of ARCHITECTURES that can
    express the model; Granite is tried first because it keeps the multipliers. Raises ConfigError
    listing every reason against each architecture.
    """
    candidates = ARCHITECTURES if architecture == "auto" else (architecture,)
    reasons_against = {name: blockers(name, model) for name in candidates}
    fitting = [name for name, reasons in reasons_against.items() if not reasons]

    # Most programs can load Llama, so it wins if no multiplier would be lost.
    if architecture == "auto" and "llama" in fitting:
        folding = fold("llama", model, table)
        if not folding.changed:
            return "llama"
    if fitting:
        return fitting[0]

    others, _ = exportable_as(model)
    hint = f" Take --architecture {others[0]}." if others else ""
    lines = [f"none of the requested architectures can express this model.{hint}"]
    for name, reasons in reasons_against.items():
        lines.append(f"{name}: {'; '.join(reasons)}")
    raise ConfigError("\n  ".join(lines))


def fold(architecture: str, model: ModelConfig, table: Table) -> Folding:
    """The factors to fold into the exported tensors.

    All factors are 1 for Granite, whose configuration has all four multipliers (embedding,
    attention, residual and logits). With tied embeddings, the exported embedding matrix is m W (m:
    the input multiplier), and it serves as the unembedding too, so the final norm is multiplied by
    logit_multiplier / m.
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
    # These architectures scale attention logits by 1/sqrt(head_dim): the query projection absorbs
    # the ratio of our scale to theirs.
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
    """Every tensor of the Hugging Face model.

    Tensors that are cut from the same parameter of ours are adjacent. `prefix` replaces GPT-2's
    'transformer.'.
    """
    if architecture == "gpt2":
        return list(_gpt2_pieces(model, folding, "transformer." if prefix is None else prefix))
    return list(_llama_pieces(model, folding, qk_norm=architecture == "qwen3"))


def _llama_pieces(model: ModelConfig, folding: Folding, qk_norm: bool) -> Iterator[Piece]:
    """The tensors of Llama, Granite, Qwen2, Qwen3 and Mistral, which share their names."""
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


def _llama_mlp(model: ModelConfig, folding: Folding, index: int) -> Iterator[Piece]:
    """The MLP branch of block `index`, with its norm."""
    hidden = model.hidden_size
    ffn = model.ffn_hidden_size
    hf_block = f"model.layers.{index}"
    mlp = f"layers.{index}.mlp"
    up = f"{mlp}.up"
    yield _vector(f"{hf_block}.post_attention_layernorm.weight", f"{mlp}_norm.weight", hidden)
    # Our `up` stacks the gate's rows first, then the rows that are gated.
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


def _show(setting: object) -> str:
    """A setting as YAML writes it."""
    return str(setting).lower() if isinstance(setting, bool) else str(setting)
