"""Values that follow from a configuration.

They are computed here only, so that a configuration stays as its user wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod

from megatron_completep.config.schema import (
    CompletePConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    OverrideConfig,
    ParallelConfig,
    TrainingConfig,
)

# Settings of model.attention_backend that are told where documents begin, and need no bias for it.
PACKED_BACKENDS = ("flash_attention", "varlen")


def head_dim(model: ModelConfig) -> int:
    """Size of a head, D."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Number of key/value heads, G."""
    return model.num_query_groups or model.num_attention_heads


def has_qkv_bias(model: ModelConfig) -> bool:
    """Whether queries, keys and values have biases."""
    return model.bias if model.qkv_bias is None else model.qkv_bias


def expert_ffn_hidden_size(model: ModelConfig) -> int:
    """Inner width of an expert; that of the MLP where `model.moe` does not give one."""
    assert model.moe is not None
    return model.moe.ffn_hidden_size or model.ffn_hidden_size


def base_expert_ffn_hidden_size(model: ModelConfig, completep: CompletePConfig) -> int:
    """Inner width of the proxy's experts, 0 without experts.

    Where it is not given, the same multiple of the proxy's hidden size.
    """
    if model.moe is None:
        return 0
    if completep.base_expert_ffn_hidden_size is not None:
        return completep.base_expert_ffn_hidden_size
    base_hidden_size = completep.base_hidden_size or model.hidden_size
    return max(1, round(expert_ffn_hidden_size(model) * base_hidden_size / model.hidden_size))


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts in place of an MLP."""
    moe = model.moe
    if moe is None or layer < moe.first_dense_layers:
        return False
    return (layer - moe.first_dense_layers) % moe.every == 0


def expert_layers(model: ModelConfig) -> list[int]:
    """The numbers of the layers that have experts, from 0."""
    return [layer for layer in range(model.num_layers) if has_experts(model, layer)]


def padded_vocab_size(model: ModelConfig, tensor_parallel_size: int) -> int:
    """Rows of the embedding: vocab_size rounded up.

    Every tensor rank then holds a multiple of vocab_multiple.
    """
    multiple = model.vocab_multiple * tensor_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def warmup_steps(optimizer: OptimizerConfig, train_steps: int) -> int:
    """Steps of linear warm-up."""
    # At most one of the two is set (`check.py`).
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return round((optimizer.warmup_fraction or 0.0) * train_steps)


def decay_steps(optimizer: OptimizerConfig, train_steps: int) -> int:
    """Steps at the end of warmup_stable_decay, in which the learning rate falls."""
    return round(optimizer.decay_fraction * train_steps)


def matches_any(override: OverrideConfig, names: Iterable[str]) -> bool:
    """Whether the pattern of an override matches one of the names."""
    return any(fnmatchcase(name, override.pattern) for name in names)


def own_factors(optimizer: OptimizerConfig, *names: str) -> OverrideConfig:
    """The factors of the user's overrides on the values of one parameter, or of a part of one.

    They are the products over all overrides whose pattern matches one of its names: the
    parameter's, and the part's. A product that leaves the range of numbers is 0 or infinite;
    `optim.check` refuses it.
    """
    matching = [override for override in optimizer.overrides if matches_any(override, names)]
    factors = {}
    for field in ("lr", "init_std", "weight_decay", "eps"):
        factors[field] = prod(getattr(override, field) for override in matching)
    # Not validated: the product of valid factors may be 0, which no single factor may be.
    return OverrideConfig.model_construct(pattern=names[-1], **factors)


def batch_size(training: TrainingConfig, step: int) -> int:
    """Sequences of optimizer step `step` (from 1), over all ranks.

    It is global_batch_size, or less while training.batch_ramp lasts.
    """
    ramp = training.batch_ramp
    if ramp is None or step > ramp.steps:
        return training.global_batch_size
    # The sizes below the final one share the ramp's steps equally, as far as whole steps allow.
    increments = (training.global_batch_size - ramp.start) // ramp.increment
    return ramp.start + ramp.increment * ((step - 1) * increments // ramp.steps)


def batch_sizes(training: TrainingConfig) -> list[int]:
    """Every batch size of the run, in sequences, smallest first."""
    sizes: list[int] = []
    ramp = training.batch_ramp
    if ramp is not None:
        sizes += range(ramp.start, training.global_batch_size, ramp.increment)
    return [*sizes, training.global_batch_size]


def samples_before(training: TrainingConfig, step: int) -> int:
    """Sequences of the steps before step `step` (from 1), in a run that never went back."""
    # Behind the ramp all steps have one size, so that only its steps are added up one by one.
    ramp_steps = min(training.batch_ramp.steps, step - 1) if training.batch_ramp else 0
    ramp_samples = sum(batch_size(training, earlier) for earlier in range(1, ramp_steps + 1))
    full_steps = step - 1 - ramp_steps
    return ramp_samples + training.global_batch_size * full_steps


def total_samples(training: TrainingConfig) -> int:
    """Sequences of the whole run."""
    return samples_before(training, training.train_steps + 1)


def is_passed_over(training: TrainingConfig, step: int) -> bool:
    """Whether training.skip_steps lists the step (from 1), so that its data are read but not used.

    `skipped` in a step's record means more: any step without an update, also one whose gradient was
    not finite.
    """
    ranges = training.skip_steps
    return any(steps.first <= step <= (steps.last or steps.first) for steps in ranges)


def tokens_per_step(config: Config) -> int:
    """Tokens an optimizer step, over all ranks.

    Where the batch grows (training.batch_ramp), those of its final size.
    """
    return config.training.global_batch_size * config.model.seq_length


def total_tokens(config: Config) -> int:
    """Tokens of the whole run."""
    return total_samples(config.training) * config.model.seq_length


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that one sequence of a micro-batch occupies: tensor x pipeline x context."""
    return (
        parallel.tensor_parallel_size
        * parallel.pipeline_parallel_size
        * parallel.context_parallel_size
    )


def model_parallel_sizes(parallel: ParallelConfig) -> str:
    """The product that `model_parallel_size` is, for messages; context only where it is divided."""
    names = "parallel.tensor_parallel_size x pipeline_parallel_size"
    sizes = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size}"
    if parallel.context_parallel_size > 1:
        names += " x context_parallel_size"
        sizes += f" x {parallel.context_parallel_size}"
    return f"{names} = {sizes} = {model_parallel_size(parallel)}"


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that read different sequences; `check.check_world` holds that the division is exact."""
    return world_size // model_parallel_size(config.parallel)


def gradient_parallel_size(config: Config, world_size: int) -> int:
    """Ranks over which a gradient is summed and optimizer state can be sharded: data x context."""
    data_size = data_parallel_size(config, world_size)
    return data_size * config.parallel.context_parallel_size


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Micro-batches of each rank in an optimizer step (of the final batch size)."""
    replicas = data_parallel_size(config, world_size)
    return config.training.global_batch_size // (config.training.micro_batch_size * replicas)
