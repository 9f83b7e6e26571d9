"""The stock Hugging Face architectures that a model can become: what each can express, and which of its tensors are which of ours.

The list of pieces is the whole mapping. Export reads it from left to right, import from right to left.
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
    """What stored tensors are multiplied by, so that a model without multipliers computes the same. All 1: nothing is folded."""

    embedding: float = 1.0  # token and learned position embeddings
    query: float = 1.0  # q projection and its bias, or the q-norm's gain
    branch: float = 1.0  # output projections of attention and MLP, and their biases
    final_norm: float = 1.0  # its gain and bias
    unembedding: float = 1.0

    @property
    def changed(self) -> dict[str, float]:
        """The factors that are not 1."""
        return {name: value for name, value in vars(self).items() if value != 1.0}


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs: `rows` of our parameter `source`, each range times a factor, one below the other, then transposed.

    source None: zeros, for a bias that our model leaves out. shape: theirs.
    """

    name: str
    source: str | None
    rows: Rows
    shape: tuple[int, ...]
    transposed: bool = False


def blockers(architecture: str, model: ModelConfig) -> list[str]:
    """Every reason why an architecture cannot express a model; empty where it can."""
    gpt2, qk_norm = architecture == "gpt2", architecture == "qwen3"
    wanted = {
        "norm": ("layernorm",) if gpt2 else ("rmsnorm",),
        "activation": ("gelu", "gelu_tanh") if gpt2 else ("swiglu",),
        "position": ("learned",) if gpt2 else ("rope",),
        "qk_norm": (qk_norm,),
    }
    found = [
        f"model.{name} = {_show(getattr(model, name))}, it has {' or '.join(map(_show, values))}"
        for name, values in wanted.items()
        if getattr(model, name) not in values
    ]
    width = model.num_attention_heads * head_dim(model)
    if qk_norm and model.bias:
        found.append("model.bias = true, its MLP has no biases")
    if gpt2 and width != model.hidden_size:
        found.append(
            f"heads of {head_dim(model)} x {model.num_attention_heads} = {width}, it needs model.hidden_size = {model.hidden_size}"
        )
    if architecture == "llama" and model.hidden_size % model.num_attention_heads:
        found.append(
            f"model.num_attention_heads = {model.num_attention_heads} does not divide model.hidden_size = {model.hidden_size}"
        )
    return found


def choose_architecture(model: ModelConfig, table: Table, wanted: str = "auto") -> str:
    """`wanted` if it can express the model. auto: plain Llama where nothing must be multiplied, else the first that can, Granite
    first because it keeps the multipliers. ConfigError names everything in the way."""
    asked = ARCHITECTURES if wanted == "auto" else (wanted,)
    problems = {name: blockers(name, model) for name in asked}
    fitting = [name for name, found in problems.items() if not found]
    if wanted == "auto" and "llama" in fitting and not fold("llama", model, table).changed:
        return "llama"
    if fitting:
        return fitting[0]
    lines = [f"{name}: {'; '.join(found)}" for name, found in problems.items()]
    others = "" if wanted == "auto" else " Try --architecture auto."
    raise ConfigError(
        "\n  ".join([f"no stock architecture asked for can express this model.{others}", *lines])
    )


def fold(architecture: str, model: ModelConfig, table: Table) -> Folding:
    """What must be folded: nothing for Granite, whose configuration has all four multipliers.

    Tied embeddings: logits = norm(x) (m W)^T / (m m_N), so the final norm takes 1/m_N and undoes the input multiplier m.
    """
    if architecture == "granite":
        return Folding()
    tied, entering = model.tied_embeddings, model.input_multiplier
    return Folding(
        embedding=entering,
        query=table.attention_scale / (1 / math.sqrt(head_dim(model))),
        branch=table.residual_multiplier,
        final_norm=table.logit_multiplier / entering if tied else 1.0,
        unembedding=1.0 if tied else table.logit_multiplier,
    )


def pieces(
    architecture: str, model: ModelConfig, folding: Folding, prefix: str | None = None
) -> list[Piece]:
    """Every tensor of the Hugging Face model; those of one parameter of ours side by side. `prefix` replaces 'transformer.'."""
    if architecture == "gpt2":
        return list(_gpt2_pieces(model, folding, "transformer." if prefix is None else prefix))
    return list(_llama_pieces(model, folding, qk_norm=architecture == "qwen3"))


def _llama_pieces(model: ModelConfig, folding: Folding, qk_norm: bool) -> Iterator[Piece]:
    hidden, ffn, d = model.hidden_size, model.ffn_hidden_size, head_dim(model)
    queries, keys = model.num_attention_heads * d, num_query_groups(model) * d
    in_q = 1.0 if qk_norm else folding.query

    def linear(
        name: str, source: str, rows: tuple[int, int], columns: int, factor: float = 1.0
    ) -> Iterator[Piece]:
        span = ((*rows, factor),)
        yield Piece(f"{name}.weight", f"{source}.weight", span, (rows[1] - rows[0], columns))
        if model.bias:
            yield Piece(f"{name}.bias", f"{source}.bias", span, (rows[1] - rows[0],))

    def vector(name: str, source: str, size: int, factor: float = 1.0) -> Piece:
        return Piece(name, source, ((0, size, factor),), (size,))

    vocabulary = (model.vocab_size, hidden)
    yield Piece(
        "model.embed_tokens.weight",
        "embedding.weight",
        ((0, model.vocab_size, folding.embedding),),
        vocabulary,
    )
    for index in range(model.num_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        yield vector(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", hidden)
        qkv = f"{ours}.attention.qkv"
        projections = [
            *linear(f"{theirs}.self_attn.q_proj", qkv, (0, queries), hidden, in_q),
            *linear(f"{theirs}.self_attn.k_proj", qkv, (queries, queries + keys), hidden),
            *linear(
                f"{theirs}.self_attn.v_proj", qkv, (queries + keys, queries + 2 * keys), hidden
            ),
        ]
        yield from sorted(projections, key=lambda piece: piece.source or "")
        if qk_norm:
            yield vector(
                f"{theirs}.self_attn.q_norm.weight",
                f"{ours}.attention.q_norm.weight",
                d,
                folding.query,
            )
            yield vector(f"{theirs}.self_attn.k_norm.weight", f"{ours}.attention.k_norm.weight", d)
        yield from linear(
            f"{theirs}.self_attn.o_proj",
            f"{ours}.attention.output",
            (0, hidden),
            queries,
            folding.branch,
        )
        yield vector(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", hidden)
        halves = [
            *linear(f"{theirs}.mlp.gate_proj", f"{ours}.mlp.up", (0, ffn), hidden),
            *linear(f"{theirs}.mlp.up_proj", f"{ours}.mlp.up", (ffn, 2 * ffn), hidden),
        ]
        yield from sorted(halves, key=lambda piece: piece.source or "")
        yield from linear(
            f"{theirs}.mlp.down_proj", f"{ours}.mlp.down", (0, hidden), ffn, folding.branch
        )
    yield vector("model.norm.weight", "final_norm.weight", hidden, folding.final_norm)
    if not model.tied_embeddings:
        yield Piece(
            "lm_head.weight",
            "unembedding.weight",
            ((0, model.vocab_size, folding.unembedding),),
            vocabulary,
        )


def _gpt2_pieces(model: ModelConfig, folding: Folding, prefix: str) -> Iterator[Piece]:
    hidden, ffn, d = model.hidden_size, model.ffn_hidden_size, head_dim(model)
    groups = num_query_groups(model)

    def bias(name: str, source: str, rows: Rows) -> Piece:
        size = sum(stop - start for start, stop, _ in rows)
        return Piece(f"{name}.bias", f"{source}.bias" if model.bias else None, rows, (size,))

    def linear(name: str, source: str, rows: Rows, columns: int) -> Iterator[Piece]:
        size = sum(stop - start for start, stop, _ in rows)
        yield Piece(f"{name}.weight", f"{source}.weight", rows, (columns, size), transposed=True)
        yield bias(name, source, rows)

    def norm(name: str, source: str, factor: float = 1.0) -> Iterator[Piece]:
        yield Piece(f"{name}.weight", f"{source}.weight", ((0, hidden, factor),), (hidden,))
        yield bias(name, source, ((0, hidden, factor),))

    def table(name: str, source: str, rows: int, factor: float) -> Piece:
        return Piece(name, source, ((0, rows, factor),), (rows, hidden))

    yield table(f"{prefix}wte.weight", "embedding.weight", model.vocab_size, folding.embedding)
    yield table(f"{prefix}wpe.weight", "positions.weight", model.seq_length, folding.embedding)
    heads = ((0, hidden, folding.query), *_repeated(hidden, model.num_attention_heads, groups, d))
    for index in range(model.num_layers):
        theirs, ours = f"{prefix}h.{index}", f"layers.{index}"
        yield from norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
        yield from linear(f"{theirs}.attn.c_attn", f"{ours}.attention.qkv", heads, hidden)
        yield from linear(
            f"{theirs}.attn.c_proj",
            f"{ours}.attention.output",
            ((0, hidden, folding.branch),),
            hidden,
        )
        yield from norm(f"{theirs}.ln_2", f"{ours}.mlp_norm")
        yield from linear(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up", ((0, ffn, 1.0),), hidden)
        yield from linear(
            f"{theirs}.mlp.c_proj", f"{ours}.mlp.down", ((0, hidden, folding.branch),), ffn
        )
    yield from norm(f"{prefix}ln_f", "final_norm", folding.final_norm)
    if not model.tied_embeddings:
        yield table("lm_head.weight", "unembedding.weight", model.vocab_size, folding.unembedding)


def _repeated(start: int, heads: int, groups: int, d: int) -> Rows:
    """Keys, then values: GPT-2 has as many heads of them as of queries, so a group's are written once for each of its heads."""
    return tuple(
        (start + (part * groups + group) * d, start + (part * groups + group + 1) * d, 1.0)
        for part in range(2)
        for group in range(groups)
        for _ in range(heads // groups)
    )


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
