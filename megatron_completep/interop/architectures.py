"""Stock Hugging Face architectures: what each can express, and which factors it needs folded."""

from __future__ import annotations

import math
from collections.abc import Collection

from megatron_completep.completep import Table
from megatron_completep.config.derived import expert_layers, has_qkv_bias, head_dim
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.interop.pieces import WITH_EXPERTS, Folding
from megatron_completep.model.block import BRANCHES

ARCHITECTURES = (
    *("granite", "llama", "qwen3", "qwen2", "mistral"),
    *("granitemoe", "granitemoeshared", "mixtral"),
    "gpt2",
)
# Those whose config.json has the multipliers of embedding, attention, residual and logits.
KEEPS_MULTIPLIERS = ("granite", "granitemoe", "granitemoeshared")
CLASSES = {
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

KNOWN_BRANCHES = {"attention", "mlp"}  # what blocks have in every architecture
NOT_EXPORTABLE = (
    "export: no Hugging Face architecture can express this model (tools/export_hf.py will refuse)"
)


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
    reasons += _expert_blockers(architecture, model)
    # These have no setting for the size of a head: it is hidden size / heads.
    follows_width = ("gpt2", "granitemoe", "granitemoeshared")
    width = model.num_attention_heads * head_dim(model)
    if architecture in follows_width and width != model.hidden_size:
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
    # Qwen2 has them on queries, keys and values alone, always; the others are without.
    reasons = []
    if model.bias:
        reasons.append("model.bias = true, but its MLP has no biases")
    elif architecture == "qwen2" and not on_qkv:
        reasons.append("model.qkv_bias = false, but it always has these biases")
    elif architecture != "qwen2" and on_qkv:
        reasons.append("model.qkv_bias = true, but it has no such biases here")
    return reasons


def _expert_blockers(architecture: str, model: ModelConfig) -> list[str]:
    """Why an architecture cannot express which layers of a model have experts, and of what kind."""
    moe = model.moe
    if architecture not in WITH_EXPERTS:
        return [] if moe is None else ["model.moe is set, but it has no experts"]
    if moe is None:
        return ["model.moe is null, but its layers have experts instead of an MLP"]
    reasons = []
    # A softmax over all, scaled to a sum of 1 over the chosen, is one over the chosen.
    if moe.gate != "softmax":
        reasons.append(
            f"model.moe.gate = {moe.gate}, but its weights are a softmax over the chosen experts"
        )
    if moe.balance == "bias":
        reasons.append("model.moe.balance = bias, but it has no bias on the choice")
    if moe.shared_ffn_hidden_size is not None and architecture != "granitemoeshared":
        reasons.append(
            f"model.moe.shared_ffn_hidden_size = {moe.shared_ffn_hidden_size}, but it has no MLP "
            "beside the experts"
        )
    num_dense = model.num_layers - len(expert_layers(model))
    if num_dense:
        reasons.append(
            f"model.moe.first_dense_layers = {moe.first_dense_layers} and every = {moe.every} "
            f"leave {num_dense} of {model.num_layers} layers without experts, but all of its "
            "layers have them"
        )
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
    # Those against which the same is to be said share a line.
    names_of: dict[str, list[str]] = {}
    for name, reasons in reasons_against.items():
        names_of.setdefault("; ".join(reasons), []).append(name)
    for joined_reasons, names in names_of.items():
        lines.append(f"  not as {', '.join(names)}: {joined_reasons}")
    return lines


def export_warning(model: ModelConfig, architecture: str = "auto") -> list[str]:
    """`export_lines` as one warning, if no architecture or not the chosen one fits; else none."""
    fitting, reasons_against = exportable_as(model)
    if fitting and architecture not in reasons_against:
        return []
    return ["\n".join(export_lines(model, architecture))]


def choose_architecture(model: ModelConfig, table: Table, architecture: str = "auto") -> str:
    """Return `architecture` if it can express the model.

    auto: plain Llama (with experts Mixtral) if no multiplier has to be folded, else the first of
    ARCHITECTURES that can express the model; Granite is tried first because it keeps the
    multipliers. Raises ConfigError listing every reason against each architecture.
    """
    candidates = ARCHITECTURES if architecture == "auto" else (architecture,)
    reasons_against = {name: blockers(name, model) for name in candidates}
    fitting = [name for name, reasons in reasons_against.items() if not reasons]

    # Most programs can load these, so they win if no multiplier would be lost.
    for widespread in ("llama", "mixtral"):
        is_candidate = architecture == "auto" and widespread in fitting
        if is_candidate and not fold(widespread, model, table).changed:
            return widespread
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

    All factors are 1 for the kinds of Granite, whose configuration has all four multipliers
    (embedding, attention, residual and logits). With tied embeddings, the exported embedding matrix
    is m W (m: the input multiplier), and it serves as the unembedding too, so the final norm is
    multiplied by logit_multiplier / m.
    """
    if architecture in KEEPS_MULTIPLIERS:
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


def _show(setting: object) -> str:
    """A setting as YAML writes it."""
    return str(setting).lower() if isinstance(setting, bool) else str(setting)
