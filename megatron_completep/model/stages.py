"""Which layers each pipeline stage holds, and the chunks of one rank."""

from __future__ import annotations

from itertools import accumulate

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig, ParallelConfig
from megatron_completep.model.gpt import GPT, Stage
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.products import Products


def layer_weights(model: ModelConfig) -> int:
    """Matrix elements of one layer: what its time is proportional to."""
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    attention = model.hidden_size * head_dim * (2 * model.num_attention_heads + 2 * groups)
    return attention + model.hidden_size * model.ffn_hidden_size * (
        3 if model.activation == "swiglu" else 2
    )


def split_layers(model: ModelConfig, num_stages: int) -> list[int]:
    """Layers of each stage, so that the slowest stage is as fast as can be. The unembedding counts as the matrix it is on the
    last stage; the embedding is a lookup, so that among equal splits the first stage takes the layer more."""
    last_extra = model.vocab_size * model.hidden_size / layer_weights(model)
    counts = [1] * num_stages
    for _ in range(model.num_layers - num_stages):
        loads = [
            count + (last_extra if stage == num_stages - 1 else 0.0)
            for stage, count in enumerate(counts)
        ]
        counts[min(range(num_stages), key=lambda stage: loads[stage])] += 1
    return counts


def split_stages(model: ModelConfig, parallel: ParallelConfig) -> list[Stage]:
    """All stages of the model in order; `parallel.pipeline_split` decides where it is given."""
    num_stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_size
    counts = list(parallel.pipeline_split or split_layers(model, num_stages))
    stops = list(accumulate(counts))
    return [
        Stage(stop - count, stop, first=index == 0, last=index == num_stages - 1)
        for index, (count, stop) in enumerate(zip(counts, stops, strict=True))
    ]


def stage_indices(parallel: ParallelConfig, context: ParallelContext) -> list[int]:
    """Stages of this pipeline rank: every pipeline_parallel_size-th one."""
    size = parallel.pipeline_parallel_size
    return [context.pipeline.rank + chunk * size for chunk in range(parallel.virtual_pipeline_size)]


def whole_model(model: ModelConfig, table: Table) -> GPT:
    """The model as one process would hold it, without memory (on the meta device): every parameter by its name, role and shape."""
    return GPT(model, table, ParallelContext.single("meta"))


def build_chunks(
    model: ModelConfig,
    table: Table,
    parallel: ParallelConfig,
    context: ParallelContext,
    loss: LossConfig | None = None,
    recompute: str = "none",
    products: Products | None = None,
) -> list[GPT]:
    """This rank's part of the model: one chunk, or one a virtual stage; float32, not yet initialized."""
    stages = split_stages(model, parallel)
    return [
        GPT(model, table, context, stages[index], loss, recompute, products)
        for index in stage_indices(parallel, context)
    ]
