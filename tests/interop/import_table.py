"""Configurations of models that people import: right, or refused with the true reason.

`RIGHT`: name -> (family of transformers, settings of its configuration, entries of config.json that
are written over what save_pretrained wrote; None takes an entry out). `REFUSED`: name -> (the same,
words of the reason).
"""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 96,
}
GPT2: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 8.0,
}


EXPERTS: dict[str, Any] = {
    **SHAPE,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def rope(scaling: dict[str, Any], base: float = 10000.0) -> dict[str, Any]:
    return {**SHAPE, "rope_parameters": {**scaling, "rope_theta": base}}


def old_style(scaling: dict[str, Any] | None, base: float = 10000.0) -> dict[str, Any]:
    """Rotary entries as versions of transformers before 5 wrote them."""
    return {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": base}


Right = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]
RIGHT: Right = {
    "Llama": ("Llama", SHAPE, {}),
    "Llama, one group": ("Llama", {**SHAPE, "num_key_value_heads": 1}, {}),
    "Llama, tied": ("Llama", {**SHAPE, "tie_word_embeddings": True}, {}),
    "Llama, biases": ("Llama", {**SHAPE, "attention_bias": True, "mlp_bias": True}, {}),
    "Llama, wide heads": ("Llama", {**SHAPE, "head_dim": 12}, {}),
    "Llama 3": ("Llama", rope({"rope_type": "default"}, 500000.0), {}),
    "Llama 3.1": ("Llama", rope(LLAMA3, 500000.0), {}),
    "Llama 3.1, as transformers 4 wrote it": (
        "Llama",
        rope(LLAMA3, 500000.0),
        old_style(LLAMA3, 500000.0),
    ),
    "Llama 3.2, tied, factor 32": (
        "Llama",
        {**rope({**LLAMA3, "factor": 32.0}, 500000.0), "tie_word_embeddings": True},
        {},
    ),
    "Llama, linear": ("Llama", rope(LINEAR), {}),
    "Llama, linear, type for rope_type": (
        "Llama",
        rope(LINEAR),
        old_style({"type": "linear", "factor": 4.0}),
    ),
    "Llama, both notations alike": (
        "Llama",
        rope(LINEAR),
        {"rope_scaling": LINEAR, "rope_theta": 10000.0},
    ),
    "Llama, yarn": ("Llama", rope(YARN), {}),
    "Llama, yarn, betas": ("Llama", rope({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}), {}),
    "Llama, yarn, attention factor": ("Llama", rope({**YARN, "attention_factor": 1.3}), {}),
    "Llama, yarn, mscale": (
        "Llama",
        rope({**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
        {},
    ),
    "Llama, yarn, not truncated": ("Llama", rope({**YARN, "truncate": False}), {}),
    "Llama, yarn, truncate null": ("Llama", rope({**YARN, "truncate": None}), {}),
    "Llama, pretraining_tp": ("Llama", {**SHAPE, "pretraining_tp": 2}, {}),
    "Llama, null groups": (
        "Llama",
        {**SHAPE, "num_key_value_heads": 4},
        {"num_key_value_heads": None},
    ),
    "Qwen2": ("Qwen2", SHAPE, {}),
    "Qwen2.5, tied": (
        "Qwen2",
        {**rope({"rope_type": "default"}, 1e6), "tie_word_embeddings": True},
        {},
    ),
    "Qwen2.5, yarn": ("Qwen2", rope(YARN, 1e6), {}),
    "Qwen2.5, yarn by type": (
        "Qwen2",
        rope(YARN, 1e6),
        old_style({**{k: v for k, v in YARN.items() if k != "rope_type"}, "type": "yarn"}, 1e6),
    ),
    "Qwen2, a window that no layer has": (
        "Qwen2",
        {**SHAPE, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
        {"layer_types": None},
    ),
    "Qwen3": ("Qwen3", {**SHAPE, "head_dim": 16}, {}),
    "Qwen3, tied, yarn": (
        "Qwen3",
        {**rope(YARN, 1e6), "head_dim": 16, "tie_word_embeddings": True},
        {},
    ),
    "Mistral without a window": ("Mistral", {**SHAPE, "sliding_window": None}, {}),
    "Mistral Nemo's heads": ("Mistral", {**SHAPE, "sliding_window": None, "head_dim": 16}, {}),
    "Mistral, theta 1e6": (
        "Mistral",
        {**rope({"rope_type": "default"}, 1e6), "sliding_window": None},
        {},
    ),
    "Mistral, missing groups are 8": (
        "Mistral",
        {
            **SHAPE,
            "sliding_window": None,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        {"num_key_value_heads": ...},
    ),
    "Granite": ("Granite", {**SHAPE, **GRANITE}, {}),
    "Granite, tied, llama3": (
        "Granite",
        {**rope(LLAMA3), **GRANITE, "tie_word_embeddings": True},
        {},
    ),
    "Granite, biases": (
        "Granite",
        {**SHAPE, **GRANITE, "attention_bias": True, "mlp_bias": True},
        {},
    ),
    "GraniteMoe": ("GraniteMoe", {**EXPERTS, **GRANITE}, {}),
    "GraniteMoeShared, tied, 3 of 4 experts": (
        "GraniteMoeShared",
        {
            **EXPERTS,
            **GRANITE,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 20,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "GraniteMoeShared without a shared MLP": (
        "GraniteMoeShared",
        {**EXPERTS, "shared_intermediate_size": 0},
        {},
    ),
    "Mixtral": ("Mixtral", EXPERTS, {}),
    "Mixtral, wide heads, its own base": (
        "Mixtral",
        {**EXPERTS, "head_dim": 12, "num_experts_per_tok": 3},
        {"rope_parameters": ...},
    ),
    "GPT-2": ("GPT2", {**GPT2, "n_positions": 96}, {}),
    "GPT-2, untied, erf": (
        "GPT2",
        {
            **GPT2,
            "n_positions": 96,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
        {},
    ),
    "GPT-2, inner width": ("GPT2", {**GPT2, "n_positions": 96, "n_inner": 48}, {}),
}

_CONTRADICTION = "contradict each other"
_WINDOW = "sees the whole sequence"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope_scaling beside rope_parameters": (
        "Llama",
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        _CONTRADICTION,
    ),
    "two bases": ("Llama", {"rope_theta": 500000.0}, _CONTRADICTION),
    "rope_type and type": (
        "Llama",
        old_style({"rope_type": "yarn", "type": "linear", "factor": 2.0}),
        _CONTRADICTION,
    ),
    "two original lengths": (
        "Llama",
        {**old_style(LLAMA3), "original_max_position_embeddings": 48},
        _CONTRADICTION,
    ),
    "dynamic": ("Llama", old_style({"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
    "longrope": (
        "Llama",
        old_style({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
        "'longrope'",
    ),
    "llama3 without a factor": (
        "Llama",
        old_style({**LLAMA3, "low_freq_factor": None}),
        "low_freq_factor is missing",
    ),
    "llama3, factors crossed": (
        "Llama",
        old_style({**LLAMA3, "low_freq_factor": 8.0}),
        "is not below high_freq_factor",
    ),
    "a factor that takes the heads away": (
        "Llama",
        old_style({**YARN, "attention_factor": 0}),
        "attention_factor",
    ),
    "an unknown entry": ("Llama", old_style({**LINEAR, "mrope_section": [1, 2]}), "mrope_section"),
    "partial rotation": ("Llama", {"partial_rotary_factor": 0.5}, "ours turns whole heads"),
    "frequencies by kind of layer": (
        "Llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "of their own",
    ),
    "biases of attention alone": ("Llama", {"attention_bias": True}, "mlp_bias = false"),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "only silu"),
    "quantized": ("Llama", {"quantization_config": {"bits": 4}}, "quantized"),
    "a width that is text": ("Llama", {"hidden_size": "wide"}, "expected a whole number"),
    "a missing width": ("Llama", {"hidden_size": ...}, "hidden_size is missing"),
    "Mistral's window": ("Mistral", {"sliding_window": 4096}, _WINDOW),
    "Mistral's missing window": ("Mistral", {"sliding_window": ...}, "(where it is missing)"),
    "Qwen2's windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "layer_types": ...,
        },
        _WINDOW,
    ),
    "Qwen3's layer types": (
        "Qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        _WINDOW,
    ),
    "Qwen3's biases": ("Qwen3", {"attention_bias": True}, "attention_bias = true"),
    "Mixtral's window": ("Mixtral", {"sliding_window": 4096}, _WINDOW),
    "Mixtral, more experts for a token than there are": (
        "Mixtral",
        {"num_experts_per_tok": 5},
        "model.moe.top_k = 5 is more than",
    ),
    "GraniteMoe's biases": ("GraniteMoe", {"attention_bias": True}, "attention_bias = true"),
    "GraniteMoe's heads": ("GraniteMoe", {"head_dim": 12}, "hidden_size / num_attention_heads"),
    "GPT-2, scaled by layer": (
        "GPT2",
        {"scale_attn_by_inverse_layer_idx": True},
        "that of every layer",
    ),
    "GPT-2, another activation": ("GPT2", {"activation_function": "relu"}, "are known"),
    "another family": ("Llama", {"model_type": "gemma2"}, "'gemma2' is none of"),
}
