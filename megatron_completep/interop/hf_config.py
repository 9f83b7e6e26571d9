"""config.json of each architecture: written from our model, and read back into one."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

from megatron_completep.completep import Table
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.interop.architectures import ARCHITECTURES, CLASSES

# Of a size; of layers and heads; of a number that is not whole. More is a mistake, which must not cost memory or overflow.
MOST, MOST_PARTS, MOST_FACTOR = 2**31 - 1, 10_000, 1e30
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
    end_of_document: int | None,
    init_std: float,
) -> dict[str, Any]:
    """config.json. `torch_dtype` and `rope_theta` are the names that every version of transformers and vLLM reads."""
    values: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": end_of_document,  # a document follows the end of the one before
        "eos_token_id": end_of_document,
        "initializer_range": init_std,
        "use_cache": True,
    }
    if architecture == "gpt2":
        return values | _to_gpt2(model)
    values |= {
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "attention_bias": model.bias,
        "attention_dropout": 0.0,
    }
    if architecture in ("llama", "granite"):
        values["mlp_bias"] = model.bias
    if architecture == "qwen3":
        values |= {"use_sliding_window": False, "sliding_window": None}
    if architecture == "granite":
        values |= {
            "embedding_multiplier": model.input_multiplier,
            "residual_multiplier": table.residual_multiplier,
            "attention_multiplier": table.attention_scale,
            "logits_scaling": 1 / table.logit_multiplier,
        }
    return values


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
    values: dict[str, Any], where: str, seq_length: int | None = None
) -> tuple[str, dict[str, Any]]:
    """(architecture, settings of our `model` section) of a config.json; `seq_length` replaces its longest sequence.

    The parameterization that goes with them is `sp`, under which no tensor is scaled. Raises ConfigError naming all that we lack.
    """
    architecture = values.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: model_type = {shown(architecture)} is none of {', '.join(ARCHITECTURES)}."
        )
    problems: list[str] = []
    read = _Reader(values, problems)
    model = _from_gpt2(read) if architecture == "gpt2" else _from_llama(read, architecture)
    if values.get("quantization_config"):
        problems.append(
            "quantization_config: its tensors are quantized. Use the model in bfloat16 or float32"
        )
    if seq_length is not None:
        if architecture == "gpt2" and seq_length != model["seq_length"]:
            problems.append(
                f"--seq-length {seq_length}: it has {model['seq_length']} learned positions, neither more nor fewer"
            )
        model["seq_length"] = seq_length
    if problems:
        raise ConfigError("\n  ".join([f"{where}: this model cannot be imported", *problems]))
    return architecture, model


class _Reader:
    """Takes values out of a config.json and notes everything that is missing or is not what we can express."""

    def __init__(self, values: dict[str, Any], problems: list[str]):
        self.values, self.problems = values, problems

    def number(
        self, name: str, default: Any = None, kind: type = int, most: float | None = None
    ) -> Any:
        most = most or (MOST if kind is int else MOST_FACTOR)
        value = self.values.get(name)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value <= most
            or (kind is int and value != int(value))
        ):
            expected = f"a whole number from 1 to {most}" if kind is int else "a number above 0"
            what = f"{name} is missing" if value is None else f"{name} = {shown(value)}"
            self.problems.append(f"{what}: expected {expected}")
            return kind(1)
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{name} = {shown(value)}: expected true or false")
        return default if value is None else bool(value)

    def require(self, name: str, default: Any, fits: Callable[[Any], bool], reason: str) -> Any:
        value = self.values.get(name, default)
        if not fits(value):
            self.problems.append(f"{name} = {shown(value)}: {reason}")
        return value


def _from_llama(read: _Reader, architecture: str) -> dict[str, Any]:
    values = read.values
    heads, hidden = read.number("num_attention_heads", most=MOST_PARTS), read.number("hidden_size")
    head_size = read.number("head_dim", 128 if architecture == "qwen3" else max(1, hidden // heads))
    read.require("hidden_act", "silu", lambda name: name in ("silu", "swish"), "only silu is known")
    attention_bias, mlp_bias = read.flag("attention_bias", False), read.flag("mlp_bias", False)
    if attention_bias != mlp_bias:
        read.problems.append(
            f"attention_bias = {shown(attention_bias)}, mlp_bias = {shown(mlp_bias)}: our linear layers have biases all or none"
        )
    if values.get("use_sliding_window"):
        read.problems.append("use_sliding_window = true: our attention sees the whole sequence")
    model = {
        "hidden_size": hidden,
        "num_layers": read.number("num_hidden_layers", most=MOST_PARTS),
        "num_attention_heads": heads,
        "num_query_groups": read.number("num_key_value_heads", heads),
        "head_dim": head_size,
        "ffn_hidden_size": read.number("intermediate_size"),
        "vocab_size": read.number("vocab_size"),
        "seq_length": read.number("max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": read.number("rms_norm_eps", 1e-6, float),
        "activation": "swiglu",
        "position": "rope",
        "rope_base": _rope_base(read),
        "bias": attention_bias,
        "qk_norm": architecture == "qwen3",
        "tied_embeddings": read.flag("tie_word_embeddings", False),
    }
    if architecture == "granite":
        model |= {
            "input_multiplier": read.number("embedding_multiplier", 1.0, float),
            "residual_multiplier": read.number("residual_multiplier", 1.0, float),
            "logit_multiplier": 1 / read.number("logits_scaling", 1.0, float),
            "attention_multiplier": _beside(
                1 / math.sqrt(head_size), read.number("attention_multiplier", 1.0, float)
            ),
        }
    return model


def _rope_base(read: _Reader) -> float:
    rope = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        read.problems.append(
            f"rope_scaling of type {shown(kind)}: our rotary frequencies are not rescaled"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        read.problems.append(
            f"partial_rotary_factor = {shown(rope['partial_rotary_factor'])}: ours turns whole heads"
        )
    base = read.values.get("rope_theta", rope.get("rope_theta", 10000.0))
    return _Reader({"rope_theta": base}, read.problems).number("rope_theta", kind=float)


def shown(value: Any) -> str:
    """A value of a stranger's JSON in a message, as JSON says it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)


def _beside(scale: float, product: float) -> float:
    """The factor that gives `product` when it multiplies `scale`, to the last bit where there is one."""
    factor = product / scale
    return next(
        (
            f
            for f in (factor, math.nextafter(factor, 0), math.nextafter(factor, math.inf))
            if f * scale == product
        ),
        factor,
    )


def _from_gpt2(read: _Reader) -> dict[str, Any]:
    hidden = read.number("n_embd")
    activation = read.require(
        "activation_function",
        "gelu_new",
        lambda name: str(name) in _GELUS,
        f"only {', '.join(_GELUS)} are known",
    )
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
        "num_layers": read.number("n_layer", most=MOST_PARTS),
        "num_attention_heads": read.number("n_head", most=MOST_PARTS),
        "ffn_hidden_size": read.number("n_inner", min(4 * hidden, MOST)),
        "vocab_size": read.number("vocab_size"),
        "seq_length": read.number("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": read.number("layer_norm_epsilon", 1e-5, float),
        "activation": _GELUS.get(str(activation), "gelu"),
        "position": "learned",
        "bias": True,
        "tied_embeddings": read.flag("tie_word_embeddings", True),
    }
