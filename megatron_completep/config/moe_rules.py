"""What mixtures of experts need, and what they do not go with."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_completep.config import derived
from megatron_completep.config.remedies import VALUES, Choice, Problem, all_divisors
from megatron_completep.config.schema import CompletePConfig, Config, MoeConfig

BASE_KEYS = ("base_num_experts", "base_top_k", "base_expert_ffn_hidden_size")


def moe_problems(config: Config) -> Iterator[Problem]:
    """Settings that do not go with model.moe, or have no meaning without it."""
    moe = config.model.moe
    if moe is None:
        yield from _without_experts(config)
        return
    yield from _shape(config, moe)
    yield from _proxy(config, moe)
    yield from _layout(config, moe)
    yield from _unsupported(config)


def _without_experts(config: Config) -> Iterator[Problem]:
    """Settings that would be read but have nothing to act on."""
    for name in BASE_KEYS:
        size = getattr(config.completep, name)
        if size is not None:
            yield f"completep.{name} = {size} has no meaning without model.moe. Set it to null."
    ranks = config.parallel.expert_parallel_size
    if ranks > 1:
        yield (
            f"parallel.expert_parallel_size = {ranks} has no experts to share: model.moe is null. "
            "Set it to 1."
        )


def _shape(config: Config, moe: MoeConfig) -> Iterator[Problem]:
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k = {moe.top_k} is more than model.moe.num_experts = "
            f"{moe.num_experts}. Use at most {moe.num_experts}."
        )
    if not derived.expert_layers(config.model):
        yield (
            f"model.moe.first_dense_layers = {moe.first_dense_layers} leaves no layer of "
            f"model.num_layers = {config.model.num_layers} with experts. Use at most "
            f"{config.model.num_layers - 1}, or model.moe = null."
        )
    # A bias would shift what softmax makes of the chosen, or choose by what it does not weigh.
    if moe.gate == "softmax" and moe.balance == "bias":
        yield (
            "model.moe.balance = bias moves the scores of sigmoid gates, but model.moe.gate = "
            "softmax. Use gate = sigmoid, or balance = loss or none."
        )
    # A softmax over one logit is 1, whatever the logit: its gradient is 0.
    if moe.gate == "softmax" and moe.top_k == 1 < moe.num_experts:
        yield (
            "model.moe.top_k = 1 gives a token's only expert the weight 1 with model.moe.gate = "
            "softmax, so that the router would never learn from the tokens. Use gate = sigmoid, or "
            "a larger top_k."
        )
    yield from _balance_loss(moe)
    if config.model.bias:
        yield (
            "model.bias = true does not go with model.moe: experts have no biases, whose epsilon "
            "would need a factor of its own. Use model.bias = false (model.qkv_bias may be true)."
        )


def _balance_loss(moe: MoeConfig) -> Iterator[Problem]:
    """What balances, and the coefficient of the loss, say the same."""
    if moe.balance_loss and moe.balance != "none" and moe.top_k == moe.num_experts:
        yield (
            f"model.moe.balance_loss = {moe.balance_loss:g} is constant: each token goes to all "
            f"model.moe.num_experts = {moe.num_experts} experts, whose loads are equal. Use "
            "balance = none and balance_loss = 0."
        )
    if moe.balance == "loss" and not moe.balance_loss:
        yield (
            "model.moe.balance = loss balances by model.moe.balance_loss, which is 0. Use "
            "balance = none, or a balance_loss such as 1e-2."
        )
    if moe.balance == "none" and moe.balance_loss:
        yield (
            f"model.moe.balance_loss = {moe.balance_loss:g} would balance, but model.moe.balance = "
            "none. Use balance = loss, or balance_loss = 0."
        )


def _proxy(config: Config, moe: MoeConfig) -> Iterator[Problem]:
    """The proxy's experts: what learning rates are known to transfer to."""
    completep = config.completep
    if completep.base_hidden_size is None:
        for name in BASE_KEYS:
            if getattr(completep, name) is not None:
                yield (
                    f"completep.{name} = {getattr(completep, name)} is given without the proxy's "
                    "shape. Give completep.base_hidden_size and base_num_layers too."
                )
        return
    base_experts = completep.base_num_experts or moe.num_experts
    base_k = completep.base_top_k or moe.top_k
    if base_k > base_experts:
        yield (
            f"completep.base_top_k = {base_k} is more than completep.base_num_experts = "
            f"{base_experts}: no proxy can have been so. Use completep.base_top_k = {base_experts}."
        )
    elif not _same_share(completep, moe) and not completep.allow_sparsity_change:
        yield (
            f"model.moe: top_k / num_experts = {moe.top_k} / {moe.num_experts}, but the proxy's is "
            f"{base_k} / {base_experts}, and learning rates are not known to transfer to another "
            f"share of active experts. {_same_sparsity(completep, moe, base_k, base_experts)}"
            "or completep.allow_sparsity_change = true."
        )
    ffn = derived.expert_ffn_hidden_size(config.model)
    base_ffn = derived.base_expert_ffn_hidden_size(config.model, completep)
    if not _same_granularity(config) and not completep.allow_granularity_change:
        yield (
            f"an expert's inner width over the width is {ffn} / {config.model.hidden_size}, but "
            f"the proxy's is {base_ffn} / {completep.base_hidden_size}, and learning rates are not "
            "known to transfer to another granularity. Use model.moe.ffn_hidden_size = "
            f"{round(base_ffn * config.model.hidden_size / completep.base_hidden_size)}, or "
            "completep.allow_granularity_change = true."
        )


def _same_share(completep: CompletePConfig, moe: MoeConfig) -> bool:
    """Whether a token goes to as large a share of the experts as in the proxy."""
    base_experts = completep.base_num_experts or moe.num_experts
    base_k = completep.base_top_k or moe.top_k
    return moe.top_k * base_experts == base_k * moe.num_experts


def _same_granularity(config: Config) -> bool:
    """Whether an expert's inner width is as large a share of the width as in the proxy.

    Of a proxy whose inner width is not given it is.
    """
    completep = config.completep
    if completep.base_hidden_size is None or completep.base_expert_ffn_hidden_size is None:
        return True
    ffn = derived.expert_ffn_hidden_size(config.model)
    base_ffn = completep.base_expert_ffn_hidden_size
    return ffn * completep.base_hidden_size == base_ffn * config.model.hidden_size


def moe_warnings(config: Config) -> list[str]:
    """What is allowed, and is not known to be right, or does nothing: one line each."""
    moe = config.model.moe
    if moe is None:
        return []
    completep = config.completep
    warnings = []
    if completep.base_hidden_size is not None and not _same_share(completep, moe):
        warnings.append(
            "unproven: learning rates are not known to transfer to another share of active experts "
            f"({moe.top_k} / {moe.num_experts} here, {completep.base_top_k or moe.top_k} / "
            f"{completep.base_num_experts or moe.num_experts} in the proxy), which "
            "completep.allow_sparsity_change = true allows."
        )
    if not _same_granularity(config):
        ffn = derived.expert_ffn_hidden_size(config.model)
        warnings.append(
            "unproven: learning rates are not known to transfer to another inner width of an "
            f"expert over the width ({ffn} / {config.model.hidden_size} here, "
            f"{completep.base_expert_ffn_hidden_size} / {completep.base_hidden_size} in the "
            "proxy), which completep.allow_granularity_change = true allows."
        )
    # A default that does nothing is nobody's mistake.
    if moe.balance != "bias" and moe.bias_rate != MoeConfig.model_fields["bias_rate"].default:
        warnings.append(
            f"model.moe.bias_rate = {moe.bias_rate:g} moves no bias: model.moe.balance = "
            f"{moe.balance}."
        )
    return warnings


def _same_sparsity(
    completep: CompletePConfig, moe: MoeConfig, base_k: int, base_experts: int
) -> str:
    """The top_k that keeps the proxy's share, where there is a whole one."""
    if completep.base_top_k is None:
        return "Give completep.base_top_k, which is null, "
    k, remainder = divmod(moe.num_experts * base_k, base_experts)
    return f"Use model.moe.top_k = {k}, " if k and not remainder else "Use the proxy's share, "


def _layout(config: Config, moe: MoeConfig) -> Iterator[Problem]:
    parallel = config.parallel
    ranks = parallel.expert_parallel_size
    if moe.num_experts % ranks:
        yield Choice(
            f"parallel.expert_parallel_size = {ranks} does not divide model.moe.num_experts = "
            f"{moe.num_experts}. Use {VALUES}.",
            "parallel.expert_parallel_size",
            all_divisors(moe.num_experts),
            near=ranks,
        )
    tensor = parallel.tensor_parallel_size
    # Without it tensor ranks hold the same tokens, which experts would see several times.
    if tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"model.moe with parallel.tensor_parallel_size = {tensor} needs each tensor rank to "
            "hold tokens of its own. Use parallel.sequence_parallel = true, or "
            "tensor_parallel_size = 1."
        )
    shared = moe.shared_ffn_hidden_size
    if shared is not None and shared % tensor:
        yield Choice(
            f"parallel.tensor_parallel_size = {tensor} does not divide "
            f"model.moe.shared_ffn_hidden_size = {shared}. Use {VALUES}.",
            "parallel.tensor_parallel_size",
            all_divisors(math.gcd(shared, config.model.num_attention_heads)),
            near=tensor,
        )


def _unsupported(config: Config) -> Iterator[Problem]:
    if config.training.cuda_graph:
        yield (
            "training.cuda_graph = true cannot capture model.moe, whose experts' loads are read by "
            "the host in every layer. Use cuda_graph = false."
        )
    if config.optimizer.type == "muon":
        yield (
            "optimizer.type = muon does not make the matrices of experts orthogonal yet. "
            "Use optimizer.type = adamw, or model.moe = null."
        )


def expert_world_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Experts are shared inside of the ranks that hold one copy of a stage's optimizer state."""
    parallel = config.parallel
    ranks = parallel.expert_parallel_size
    gradient_size = derived.gradient_parallel_size(config, world_size)
    shards = parallel.optimizer_shard_size or gradient_size
    tensor = parallel.tensor_parallel_size
    stage = shards * tensor
    # Shards that do not divide are a problem of their own.
    if gradient_size % shards == 0 and stage % ranks:
        yield Choice(
            f"parallel.expert_parallel_size = {ranks} does not divide the ranks that share a "
            f"stage's state: optimizer shards x tensor ranks = {shards} x {tensor} = {stage}. "
            f"Use {VALUES}.",
            "parallel.expert_parallel_size",
            all_divisors(stage),
            near=ranks,
        )
