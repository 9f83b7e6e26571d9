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

# Upper bounds. A larger number is a mistake, which must not cost memory or overflow.
MOST = 2**31 - 1  # of a size
MOST_PARTS = 10_000  # of layers and heads
MOST_FACTOR = 1e30  # of a number that is not whole
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
    """The content of config.json.

    `torch_dtype` and `rope_theta` are the names that every version of transformers and vLLM reads.
    """
    config_json: dict[str, Any] = {
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
        return config_json | _to_gpt2(model)

    config_json |= _to_llama(model)
    # transformers knows these keys for some of the architectures only.
    if architecture in ("llama", "granite"):
        config_json["mlp_bias"] = model.bias
    if architecture == "qwen3":
        config_json |= {"use_sliding_window": False, "sliding_window": None}
    if architecture == "granite":
        config_json |= {
            "embedding_multiplier": model.input_multiplier,
            "residual_multiplier": table.residual_multiplier,
            "attention_multiplier": table.attention_scale,
            "logits_scaling": 1 / table.logit_multiplier,  # transformers divides logits by it
        }
    return config_json


def _to_llama(model: ModelConfig) -> dict[str, Any]:
    """What Llama, Granite and Qwen3 have in common."""
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "attention_bias": model.bias,
        "attention_dropout": 0.0,
    }


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
    read = _Reader(config_json, problems)
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


class _Reader:
    """Reads the entries of a config.json, and notes what is missing or cannot be expressed.

    After a problem it returns a stand-in, so that one reading collects all problems.
    """

    def __init__(self, entries: dict[str, Any], problems: list[str]):
        self.entries = entries
        self.problems = problems

    def number(
        self, name: str, default: Any = None, kind: type = int, largest: float | None = None
    ) -> Any:
        """A number above 0 and up to `largest`; a whole one where `kind` is int."""
        largest = largest or (MOST if kind is int else MOST_FACTOR)
        entry = self.entries.get(name)
        if entry is None:
            entry = default
        is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        if is_number and 0 < entry <= largest and (kind is not int or entry == int(entry)):
            return kind(entry)

        expected = f"a whole number from 1 to {largest}" if kind is int else "a number above 0"
        problem = f"{name} is missing" if entry is None else f"{name} = {shown(entry)}"
        self.problems.append(f"{problem}: expected {expected}")
        return kind(1)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null stands for the default."""
        entry = self.entries.get(name)
        if entry is not None and not isinstance(entry, bool):
            self.problems.append(f"{name} = {shown(entry)}: expected true or false")
        return default if entry is None else bool(entry)

    def require(self, name: str, default: Any, fits: Callable[[Any], bool], reason: str) -> Any:
        """An entry of which our model expresses some values only; `reason` says why."""
        entry = self.entries.get(name, default)
        if not fits(entry):
            self.problems.append(f"{name} = {shown(entry)}: {reason}")
        return entry


def _from_llama(read: _Reader, architecture: str) -> dict[str, Any]:
    """Our settings of a Llama, Granite or Qwen3."""
    heads = read.number("num_attention_heads", largest=MOST_PARTS)
    hidden = read.number("hidden_size")
    default_head_size = 128 if architecture == "qwen3" else max(1, hidden // heads)
    head_size = read.number("head_dim", default_head_size)
    read.require("hidden_act", "silu", lambda name: name in ("silu", "swish"), "only silu is known")

    # Qwen3 has no mlp_bias, so a bias of its attention alone is caught here as well.
    attention_bias = read.flag("attention_bias", False)
    mlp_bias = read.flag("mlp_bias", False)
    if attention_bias != mlp_bias:
        read.problems.append(
            f"attention_bias = {shown(attention_bias)}, mlp_bias = {shown(mlp_bias)}: our linear "
            "layers have biases all or none"
        )
    if read.entries.get("use_sliding_window"):
        read.problems.append("use_sliding_window = true: our attention sees the whole sequence")

    # An entry that may be missing has the default of transformers' LlamaConfig.
    model = {
        "hidden_size": hidden,
        "num_layers": read.number("num_hidden_layers", largest=MOST_PARTS),
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
        model |= _granite_multipliers(read, head_size)
    return model


def _granite_multipliers(read: _Reader, head_size: int) -> dict[str, float]:
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


def _rope_base(read: _Reader) -> float:
    """The base of rotary positions, under the names of older and newer versions of transformers."""
    rope = read.entries.get("rope_parameters") or read.entries.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        rope = {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        read.problems.append(
            f"rope_scaling of type {shown(kind)}: our rotary frequencies are not rescaled"
        )
    partial_rotary_factor = rope.get("partial_rotary_factor", 1.0)
    if partial_rotary_factor != 1.0:
        read.problems.append(
            f"partial_rotary_factor = {shown(partial_rotary_factor)}: ours turns whole heads"
        )
    base = read.entries.get("rope_theta", rope.get("rope_theta", 10000.0))
    return float(_Reader({"rope_theta": base}, read.problems).number("rope_theta", kind=float))


def shown(entry: Any) -> str:
    """An entry of an untrusted JSON file in a message: as JSON writes it, shortened."""
    if entry is None or isinstance(entry, bool):
        return {None: "null", True: "true", False: "false"}[entry]
    return reprlib.repr(entry)


def _cofactor(scale: float, product: float) -> float:
    """The factor that times `scale` gives `product`, to the last bit where there is one."""
    quotient = product / scale
    # The rounded quotient may be off by one unit in the last place, either way.
    candidates = (quotient, math.nextafter(quotient, 0), math.nextafter(quotient, math.inf))
    for candidate in candidates:
        if candidate * scale == product:
            return candidate
    return quotient


def _from_gpt2(read: _Reader) -> dict[str, Any]:
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
        "seq_length": read.number("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": read.number("layer_norm_epsilon", 1e-5, float),
        "activation": _GELUS.get(str(activation), "gelu"),
        "position": "learned",
        "bias": True,
        "tied_embeddings": read.flag("tie_word_embeddings", True),
    }
