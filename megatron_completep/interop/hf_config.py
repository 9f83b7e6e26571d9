"""config.json of each architecture: written from our model, and read back into one."""

from __future__ import annotations

import math
from typing import Any

from megatron_completep.completep import Table
from megatron_completep.config.derived import (
    expert_ffn_hidden_size,
    head_dim,
    num_query_groups,
)
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.interop.architectures import ARCHITECTURES, CLASSES, KEEPS_MULTIPLIERS
from megatron_completep.interop.hf_reader import MOST, Reader, shown
from megatron_completep.interop.hf_rope import rope_base, rope_scaling
from megatron_completep.interop.pieces import WITH_EXPERTS

MOST_PARTS = 10_000  # layers and heads; more are a mistake
_GELU_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
_GELUS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def to_hf(
    architecture: str,
    model: ModelConfig,
    table: Table,
    dtype: str,
    init_std: float,
    longest: int | None = None,
) -> dict[str, Any]:
    """The content of config.json, but for the ids of special tokens.

    longest: the longest sequence that it names; None: model.seq_length. `torch_dtype`, `rope_theta`
    and `rope_scaling` are the names that every version of transformers and vLLM reads.
    """
    config_json: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": init_std,
        "use_cache": True,
    }
    if architecture == "gpt2":
        return config_json | _to_gpt2(model)

    config_json |= _to_llama(model)
    if longest is not None:
        # A run on longer sequences than the original serves those, too.
        config_json["max_position_embeddings"] = max(longest, model.seq_length)
    if model.rope_scaling is not None:
        config_json["rope_scaling"] = model.rope_scaling.given()
    # transformers knows these keys for some of the architectures only.
    if architecture in ("llama", "granite"):
        config_json["mlp_bias"] = model.bias
    if architecture in ("llama", "qwen3", *KEEPS_MULTIPLIERS):
        config_json["attention_bias"] = model.bias
    if architecture in ("qwen2", "qwen3"):
        config_json |= {"use_sliding_window": False, "sliding_window": None}
    if architecture in ("mistral", "mixtral"):
        config_json["sliding_window"] = None  # Mistral's missing one would be of 4096 tokens
    if architecture in WITH_EXPERTS:
        config_json |= _to_experts(architecture, model)
    if architecture in KEEPS_MULTIPLIERS:
        config_json |= {
            "embedding_multiplier": model.input_multiplier,
            "residual_multiplier": table.residual_multiplier,
            "attention_multiplier": table.attention_scale,
            "logits_scaling": 1 / table.logit_multiplier,  # transformers divides logits by it
        }
    return config_json


def _to_llama(model: ModelConfig) -> dict[str, Any]:
    """What all but GPT-2 have in common."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = model.rope_scaling.given()
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": {**rope, "rope_theta": model.rope_base},
        "attention_dropout": 0.0,
    }


def _to_experts(architecture: str, model: ModelConfig) -> dict[str, Any]:
    """What the architectures with experts add or say otherwise."""
    assert model.moe is not None
    experts: dict[str, Any] = {
        "intermediate_size": expert_ffn_hidden_size(model),
        "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "output_router_logits": False,
    }
    if architecture == "granitemoeshared":
        experts["shared_intermediate_size"] = model.moe.shared_ffn_hidden_size or 0
    return experts


def _to_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.seq_length,
        "activation_function": _GELU_NAMES[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
    }


def from_hf(
    config_json: dict[str, Any], where: str, seq_length: int | None = None
) -> tuple[str, dict[str, Any]]:
    """(architecture, settings of our `model` section) of a config.json.

    `where` is its path, for messages; `seq_length` replaces its longest sequence. The
    parameterization that goes with the settings is `sp`, under which no tensor is scaled. Raises
    ConfigError naming all that our model lacks.
    """
    architecture = config_json.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: model_type = {shown(architecture)} is none of {', '.join(ARCHITECTURES)}."
        )
    problems: list[str] = []
    read = Reader(config_json, problems, _DEFAULTS[architecture])
    model = _from_gpt2(read) if architecture == "gpt2" else _from_llama(read, architecture)
    if config_json.get("quantization_config"):
        problems.append(
            "quantization_config: its tensors are quantized. Use the model in bfloat16 or float32"
        )
    if seq_length is not None:
        # Rotary positions are computed for any length; learned ones are rows of a table.
        if architecture == "gpt2" and seq_length != model["seq_length"]:
            problems.append(
                f"--seq-length {seq_length}: it has {model['seq_length']} learned positions, "
                "neither more nor fewer"
            )
        model["seq_length"] = seq_length
    if problems:
        raise ConfigError("\n  ".join([f"{where}: this model cannot be imported", *problems]))
    return architecture, model


def longest_sequence(config_json: dict[str, Any]) -> int:
    """The longest sequence of a config.json that `from_hf` has read."""
    architecture = config_json["model_type"]
    name = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    return int(Reader(config_json, [], _DEFAULTS[architecture]).number(name))


# What transformers' own class of an architecture takes for an entry that is missing. Sizes of
# tensors are always written, and asked for here. None: what follows from other entries.
_LLAMA: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_QWEN2 = _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_MISTRAL = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL = _LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": _LLAMA | {"num_experts_per_tok": 2},
    "granitemoeshared": _LLAMA | {"num_experts_per_tok": 2},
    "mixtral": _MIXTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "mistral": _LLAMA | _MISTRAL,
    "gpt2": {"n_positions": 1024},
}


def _from_llama(read: Reader, architecture: str) -> dict[str, Any]:
    """Our settings of any architecture but GPT-2."""
    heads = read.number("num_attention_heads", largest=MOST_PARTS)
    hidden = read.number("hidden_size")
    head_size = read.number("head_dim", max(1, hidden // heads))
    read.require("hidden_act", "silu", lambda name: name in ("silu", "swish"), "only silu is known")
    _refuse_windows(read, architecture)
    model = {
        "hidden_size": hidden,
        "num_layers": read.number("num_hidden_layers", largest=MOST_PARTS),
        "num_attention_heads": heads,
        "num_query_groups": read.number("num_key_value_heads", heads),
        "head_dim": head_size,
        "ffn_hidden_size": read.number("intermediate_size"),
        "vocab_size": read.number("vocab_size"),
        "seq_length": read.number("max_position_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": read.number("rms_norm_eps", kind=float),
        "activation": "swiglu",
        "position": "rope",
        "rope_base": rope_base(read),
        "rope_scaling": rope_scaling(read),
        "bias": _has_biases(read, architecture),
        "qkv_bias": True if architecture == "qwen2" else None,
        "qk_norm": architecture == "qwen3",
        "tied_embeddings": read.flag("tie_word_embeddings", False),
    }
    if architecture in KEEPS_MULTIPLIERS:
        model |= _granite_multipliers(read, head_size)
    if architecture in WITH_EXPERTS:
        model["moe"] = _experts(read, architecture)
    if architecture in ("granitemoe", "granitemoeshared") and heads * head_size != hidden:
        read.problems.append(
            f"head_dim = {head_size}: its heads are hidden_size / num_attention_heads = {hidden} / "
            f"{heads} wide, as versions of transformers and other programs read it"
        )
    return model


def _experts(read: Reader, architecture: str) -> dict[str, Any]:
    """`model.moe` of an architecture whose layers all have experts."""
    shared = None
    # 0 stands for none.
    if architecture == "granitemoeshared" and read.entries.get("shared_intermediate_size"):
        shared = read.number("shared_intermediate_size")
    return {
        "num_experts": read.number("num_local_experts", largest=MOST_PARTS),
        "top_k": read.number("num_experts_per_tok", largest=MOST_PARTS),
        "ffn_hidden_size": read.number("intermediate_size"),
        "shared_ffn_hidden_size": shared,
        "gate": "softmax",
        "balance": "none",
    }


def _has_biases(read: Reader, architecture: str) -> bool:
    """Whether all linear layers have biases; some architectures' choice is not in config.json."""
    if architecture in ("qwen2", "mistral", "mixtral"):
        return False
    # These have no mlp_bias, so a bias of their attention alone is caught here as well.
    without = ("qwen3", "granitemoe", "granitemoeshared")
    attention_bias = read.flag("attention_bias", False)
    mlp_bias = architecture not in without and read.flag("mlp_bias", False)
    if attention_bias != mlp_bias:
        read.problems.append(
            f"attention_bias = {shown(attention_bias)}, mlp_bias = {shown(mlp_bias)}: our linear "
            "layers have biases all, none, or on queries, keys and values alone"
        )
    return attention_bias


def _refuse_windows(read: Reader, architecture: str) -> None:
    """Note layers that see a part of the sequence only."""
    reason = "our attention sees the whole sequence"
    window = read.entry("sliding_window")
    if architecture in ("mistral", "mixtral") and window is not None:
        missing = "" if "sliding_window" in read.entries else " (where it is missing)"
        read.problems.append(f"sliding_window = {shown(window)}{missing}: {reason}")
    if architecture not in ("qwen2", "qwen3"):
        return
    layer_types = read.entries.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
            read.problems.append(f"layer_types = {shown(layer_types)}: {reason}")
    elif read.entries.get("use_sliding_window"):
        # Without layer types the layers from max_window_layers (28) on have a window.
        first = read.entries.get("max_window_layers", 28)
        layers = read.entry("num_hidden_layers")
        is_beyond = isinstance(first, int) and isinstance(layers, int) and first >= layers
        if not is_beyond and ("sliding_window" not in read.entries or window is not None):
            read.problems.append(
                f"use_sliding_window = true, max_window_layers = {shown(first)}: {reason}"
            )


def _granite_multipliers(read: Reader, head_size: int) -> dict[str, float]:
    """Granite's four multipliers as the base factors of our `model` section under `sp`."""
    input_multiplier = read.number("embedding_multiplier", 1.0, float)
    residual_multiplier = read.number("residual_multiplier", 1.0, float)
    logit_divisor = read.number("logits_scaling", 1.0, float)
    attention_scale = read.number("attention_multiplier", 1.0, float)
    return {
        "input_multiplier": input_multiplier,
        "residual_multiplier": residual_multiplier,
        "logit_multiplier": 1 / logit_divisor,
        # Ours multiplies 1/sqrt(head_dim); Granite's is the whole scale.
        "attention_multiplier": _cofactor(1 / math.sqrt(head_size), attention_scale),
    }


def _cofactor(scale: float, product: float) -> float:
    """The factor that times `scale` gives `product`, to the last bit where there is one."""
    quotient = product / scale
    # The rounded quotient may be off by one unit in the last place, either way.
    candidates = (quotient, math.nextafter(quotient, 0), math.nextafter(quotient, math.inf))
    for candidate in candidates:
        if candidate * scale == product:
            return candidate
    return quotient


def _from_gpt2(read: Reader) -> dict[str, Any]:
    """Our settings of a GPT-2."""
    hidden = read.number("n_embd")
    activation = read.require(
        "activation_function",
        "gelu_new",
        lambda name: str(name) in _GELUS,
        f"only {', '.join(_GELUS)} are known",
    )
    # Variants of attention that other programs train under the name of GPT-2.
    read.require("scale_attn_weights", True, bool, "our attention logits are always scaled")
    read.require(
        "scale_attn_by_inverse_layer_idx",
        False,
        lambda on: not on,
        "our attention scale is that of every layer",
    )
    read.require(
        "add_cross_attention", False, lambda on: not on, "a decoder alone has no cross-attention"
    )
    return {
        "hidden_size": hidden,
        "num_layers": read.number("n_layer", largest=MOST_PARTS),
        "num_attention_heads": read.number("n_head", largest=MOST_PARTS),
        # A missing or null n_inner stands for 4 x hidden size.
        "ffn_hidden_size": read.number("n_inner", min(4 * hidden, MOST)),
        "vocab_size": read.number("vocab_size"),
        "seq_length": read.number("n_positions"),
        "norm": "layernorm",
        "norm_eps": read.number("layer_norm_epsilon", 1e-5, float),
        "activation": _GELUS.get(str(activation), "gelu"),
        "position": "learned",
        "bias": True,
        "tied_embeddings": read.flag("tie_word_embeddings", True),
    }
