"""What a rank holds, on paper: its stages, the sizes of their parameters, and the optimizer's layout of them. Arithmetic only."""

from __future__ import annotations

from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import Config, ModelConfig, ParallelConfig
from megatron_completep.model.gpt import Stage
from megatron_completep.model.stages import split_stages
from megatron_completep.optim.layout import Layout, lay_out
from megatron_completep.parallel.embedding import padded_vocab_size


def element_bytes(config: Config) -> int:
    """Of parameters and activations."""
    return {"float32": 4, "float64": 8}.get(config.training.precision, 2)


def wide_bytes(config: Config) -> int:
    """Of gradients, statistics and optimizer state."""
    return 8 if config.training.precision == "float64" else 4


def whole(parallel: ParallelConfig) -> ParallelConfig:
    """The layout with one tensor rank: logical sizes."""
    return parallel.model_copy(update={"tensor_parallel_size": 1})


def local_sizes(model: ModelConfig, parallel: ParallelConfig, stage: Stage) -> list[tuple[str, int]]:
    """(name, elements on one tensor rank) of a stage's parameters, in forward order."""
    tp, hidden, ffn = parallel.tensor_parallel_size, model.hidden_size, model.ffn_hidden_size
    heads, groups, dim = model.num_attention_heads, num_query_groups(model), head_dim(model)
    fused = 2 if model.activation == "swiglu" else 1
    norm_bias = model.bias and model.norm == "layernorm"

    def norm(name: str) -> list[tuple[str, int]]:
        return [(f"{name}.weight", hidden)] + ([(f"{name}.bias", hidden)] if norm_bias else [])

    def linear(name: str, rows: int, columns: int) -> list[tuple[str, int]]:
        return [(f"{name}.weight", rows * columns)] + ([(f"{name}.bias", rows)] if model.bias else [])

    vocabulary = padded_vocab_size(model.vocab_size, model.vocab_multiple, tp) // tp * hidden
    sizes: list[tuple[str, int]] = []
    if stage.first:
        sizes.append(("embedding.weight", vocabulary))
        if model.position == "learned":
            sizes.append(("positions.weight", model.seq_length * hidden))
    for layer in range(stage.start, stage.stop):
        gains = [("attention.q_norm.weight", dim), ("attention.k_norm.weight", dim)] if model.qk_norm else []
        block = [
            *norm("attention_norm"),
            *linear("attention.qkv", (heads + 2 * groups) * dim // tp, hidden),
            *linear("attention.output", hidden, heads * dim // tp),
            *gains,
            *norm("mlp_norm"),
            *linear("mlp.up", fused * ffn // tp, hidden),
            *linear("mlp.down", hidden, ffn // tp),
        ]
        sizes += [(f"layers.{layer}.{name}", size) for name, size in block]
    if stage.last:
        sizes += norm("final_norm")
        if not (model.tied_embeddings and stage.first):
            sizes.append(("unembedding.weight", vocabulary))
    return sizes


def rank_stages(config: Config, pipeline_rank: int) -> list[Stage]:
    """Stages of one pipeline rank."""
    size = config.parallel.pipeline_parallel_size
    return split_stages(config.model, config.parallel)[pipeline_rank::size]


def shard_count(config: Config, data_size: int) -> int:
    """Data ranks that share one copy of the optimizer state."""
    return config.parallel.optimizer_shard_size or data_size


def rank_layout(config: Config, pipeline_rank: int, data_size: int) -> Layout:
    """The optimizer's layout of one pipeline rank's parameters."""
    model, parallel = config.model, config.parallel
    stages = rank_stages(config, pipeline_rank)
    sizes = [pair for stage in reversed(stages) for pair in reversed(local_sizes(model, parallel, stage))]
    across = model.tied_embeddings and parallel.pipeline_parallel_size > 1
    alone = frozenset({"embedding.weight", "unembedding.weight"}) if across else frozenset()
    return lay_out(sizes, shard_count(config, data_size), int(parallel.bucket_megabytes * 2**20 / 4), alone)


def has_partial_gradient(name: str, parallel: ParallelConfig) -> bool:
    """Whether a parameter's gradient on one tensor rank is a share of the sum (see `Placement.partial_gradient`)."""
    if parallel.tensor_parallel_size == 1:
        return False
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return True
    replicated = "_norm." in name or name.endswith(("output.bias", "down.bias")) or name == "positions.weight"
    return parallel.sequence_parallel and replicated
