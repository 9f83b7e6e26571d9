"""Bytes that the kernels of a step move which compute little: their time is their traffic.

These are norms, activations, rotations, the loss and the optimizer; matrix products and attention
are counted by FLOPs. A kernel counts what it has to read and write once, as the kernel benchmark
does. Branches that others register are not known here, and neither are embeddings and dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_completep.config.derived import (
    expert_ffn_hidden_size,
    expert_layers,
    head_dim,
    num_query_groups,
)
from megatron_completep.config.schema import Config
from megatron_completep.model.mlp import GATED
from megatron_completep.planning.sizes import (
    element_bytes,
    micro_batch_sizes,
    wide_bytes,
)


@dataclass(frozen=True)
class Passes:
    """Bytes of a forward pass, and of the backward pass behind it."""

    forward: float
    backward: float


def residual_norm_bytes(config: Config) -> Passes:
    """One norm of the residual stream with the sum of a branch, for a micro-batch on one rank."""
    sizes = micro_batch_sizes(config)
    elements = sizes.local_tokens * config.model.hidden_size
    stream = elements * sizes.stream_bytes
    narrow = elements * sizes.element_bytes
    # Forward reads stream and branch, and writes stream and normed. Backward reads the stream and
    # both gradients, and writes those of stream and branch.
    return Passes(2 * stream + 2 * narrow, 3 * stream + 2 * narrow)


def head_bytes(config: Config) -> Passes:
    """What lies between QKV and attention in one layer: QK-norm, rotation, one gradient of QKV.

    Norm and rotation together are one pass, and so are rotating back and joining: they write the
    gradients where they belong.
    """
    model = config.model
    groups = num_query_groups(model)
    rows = micro_batch_sizes(config).tokens / config.parallel.tensor_parallel_size
    row_bytes = head_dim(model) * element_bytes(config)
    queries_and_keys = rows * (model.num_attention_heads + groups) * row_bytes
    values = rows * groups * row_bytes
    if model.qk_norm and model.position == "rope":
        return Passes(2 * queries_and_keys, 3 * queries_and_keys + 2 * values)
    rotation = 2 * queries_and_keys if model.position == "rope" else 0
    norm_forward = 2 * queries_and_keys if model.qk_norm else 0
    norm_backward = 3 * queries_and_keys if model.qk_norm else 0
    joining = 2 * (queries_and_keys + values)
    return Passes(norm_forward + rotation, norm_backward + joining)


def activation_bytes(config: Config) -> Passes:
    """The activation of one layer's MLP."""
    model = config.model
    tokens = micro_batch_sizes(config).tokens
    inner_size = model.ffn_hidden_size / config.parallel.tensor_parallel_size
    inner = tokens * inner_size * element_bytes(config)
    inputs = (2 if model.activation in GATED else 1) * inner
    return Passes(inputs + inner, 2 * inputs + inner)


def expert_bytes(config: Config) -> Passes:
    """The activation of one layer's experts, and their rows sorted, put back and summed.

    Of equal loads. What tokens cost on their way is counted as communication.
    """
    model = config.model
    moe = model.moe
    assert moe is not None
    sizes = micro_batch_sizes(config)
    slots = sizes.local_tokens * moe.top_k * sizes.element_bytes
    inner: float = slots * expert_ffn_hidden_size(model)
    if moe.shared_ffn_hidden_size is not None:
        shared = moe.shared_ffn_hidden_size / config.parallel.tensor_parallel_size
        inner += sizes.tokens * shared * sizes.element_bytes
    inputs = (2 if model.activation in GATED else 1) * inner
    # Each of the two orders reads and writes every row; with several ranks there are two more.
    orders = 4 if config.parallel.expert_parallel_size > 1 else 2
    sorting = orders * 2 * slots * model.hidden_size
    # Backward also reads the experts' outputs, for the gradients of the weights.
    return Passes(inputs + inner + sorting, 2 * inputs + inner + 1.5 * sorting)


def loss_bytes(config: Config) -> float:
    """The cross-entropy of a micro-batch: logits are read, and read and written over."""
    model = config.model
    ranks = config.parallel.tensor_parallel_size
    columns = ceil(model.vocab_size / (model.vocab_multiple * ranks)) * model.vocab_multiple
    logits = micro_batch_sizes(config).tokens * columns * element_bytes(config)
    return 3 * logits


def micro_batch_bytes(config: Config) -> float:
    """Forward and backward of a micro-batch on one rank, were stages equally long."""
    norm = residual_norm_bytes(config)
    runs = {"none": 1, "selective": 1, "full": 2}[config.training.recompute]
    mlp = activation_bytes(config)
    experts = len(expert_layers(config.model))
    second_branches = [(mlp, config.model.num_layers - experts)]
    if experts:
        second_branches.append((expert_bytes(config), experts))
    layers = 0.0
    for branch, count in second_branches:
        parts = [norm, norm, head_bytes(config), branch]
        layer = sum(runs * part.forward + part.backward for part in parts)
        if config.training.recompute == "selective":
            layer += branch.forward
        layers += count * layer
    final_norm = norm.forward + norm.backward
    total = layers + final_norm + loss_bytes(config)
    return total / config.parallel.pipeline_parallel_size


def optimizer_bytes(config: Config, shard_elements: int, state_elements: int) -> float:
    """The gradient's norm and the update of one rank's shard.

    The update reads gradient, masters and states, and writes masters, states and, under mixed
    precision, the rounded parameters.

    state_elements: masters and states together.
    """
    gradient = wide_bytes(config)
    rounded = 2 if config.training.precision in ("bf16", "auto") else 0
    of_states = 2 * state_elements * wide_bytes(config)
    return shard_elements * (gradient + gradient + rounded) + of_states
