"""Values that follow from a configuration: computed here once, so that a configuration stays as its user wrote it."""

from __future__ import annotations

from megatron_completep.config.schema import Config, ModelConfig, OptimizerConfig


def head_dim(model: ModelConfig) -> int:
    """Size of a head, D."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Key/value heads, G."""
    return model.num_query_groups or model.num_attention_heads


def padded_vocab_size(model: ModelConfig, tensor_parallel_size: int) -> int:
    """Rows of the embedding: vocab_size rounded up so that every tensor rank holds a multiple of vocab_multiple."""
    multiple = model.vocab_multiple * tensor_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def warmup_steps(optimizer: OptimizerConfig, train_steps: int) -> int:
    """Steps of linear warm-up."""
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return round((optimizer.warmup_fraction or 0.0) * train_steps)


def decay_steps(optimizer: OptimizerConfig, train_steps: int) -> int:
    """Steps of the last part of warmup_stable_decay, in which the learning rate falls."""
    return round(optimizer.decay_fraction * train_steps)


def tokens_per_step(config: Config) -> int:
    """Tokens an optimizer step, over all ranks."""
    return config.training.global_batch_size * config.model.seq_length


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas of the model; `check.check_world` holds that the division leaves no rest."""
    return world_size // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Micro-batches that each rank works through in an optimizer step."""
    return config.training.global_batch_size // (config.training.micro_batch_size * data_parallel_size(config, world_size))
