"""Which layers each pipeline stage holds, and the chunks of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.derived import (
    expert_ffn_hidden_size,
    has_experts,
    head_dim,
    num_query_groups,
)
from megatron_completep.config.schema import ModelConfig, ParallelConfig
from megatron_completep.model.block import BRANCHES, BranchMaker
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.mlp import GATED
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.products import Products


def layer_weights(model: ModelConfig, layer: int) -> int:
    """Matrix elements of one layer that a token meets: what its time is proportional to.

    A formula, because layers are split before there is a model to ask.
    """
    heads_of_projections = 2 * model.num_attention_heads + 2 * num_query_groups(model)
    attention = model.hidden_size * head_dim(model) * heads_of_projections
    matrices = 3 if model.activation in GATED else 2
    inner_width = model.ffn_hidden_size
    router = 0
    if model.moe is not None and has_experts(model, layer):
        inner_width = model.moe.top_k * expert_ffn_hidden_size(model)
        inner_width += model.moe.shared_ffn_hidden_size or 0
        router = model.hidden_size * model.moe.num_experts
    return attention + model.hidden_size * inner_width * matrices + router


def split_layers(model: ModelConfig, num_stages: int) -> list[int]:
    """Layers of each stage, so that the slowest stage is as fast as can be.

    On the last stage the unembedding counts as the matrix it is. The embedding is a lookup, so that
    among equal splits the first stage takes the layer more.
    """
    weights = [layer_weights(model, layer) for layer in range(model.num_layers)]
    unembedding = model.vocab_size * model.hidden_size
    if len(set(weights)) > 1:
        return _split_unequal(weights, unembedding, num_stages)
    unembedding_layers = unembedding / weights[0]
    # Each further layer goes to the stage that has the least to do: layers are equal, so that no
    # other split has a lighter heaviest stage.
    counts = [1] * num_stages
    for _ in range(model.num_layers - num_stages):
        loads = [float(count) for count in counts]
        loads[-1] += unembedding_layers
        lightest = loads.index(min(loads))  # the first of equals
        counts[lightest] += 1
    return counts


def _split_unequal(weights: Sequence[int], unembedding: int, num_stages: int) -> list[int]:
    """Layers of each stage where some have experts and others do not."""
    ends = [0, *accumulate(weights)]
    num_layers = len(weights)
    # heaviest[stop]: of the best split of the layers before `stop` into the stages so far; and the
    # layers in each of them.
    heaviest = {stop: (ends[stop], [stop]) for stop in range(1, num_layers + 1)}
    for stage in range(1, num_stages):
        extra = unembedding if stage == num_stages - 1 else 0
        longer = {}
        for stop in range(stage + 1, num_layers + 1):
            candidates = []
            for start in range(stage, stop):
                before, counts = heaviest[start]
                load = max(before, ends[stop] - ends[start] + extra)
                candidates.append((load, [*counts, stop - start]))
            # Among equals the first stages take more.
            longer[stop] = min(candidates, key=lambda found: (found[0], [-n for n in found[1]]))
        heaviest = longer
    return heaviest[num_layers][1]


def split_stages(model: ModelConfig, parallel: ParallelConfig) -> list[ChunkRange]:
    """All stages of the model in order; `parallel.pipeline_split` decides where it is set."""
    num_stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_size
    counts = list(parallel.pipeline_split or split_layers(model, num_stages))
    stages = []
    for index, stop in enumerate(accumulate(counts)):
        is_last = index == num_stages - 1
        stages.append(
            ChunkRange(
                stop - counts[index], stop, has_embedding=index == 0, has_unembedding=is_last
            )
        )
    return stages


def stage_indices(parallel: ParallelConfig, context: ParallelContext) -> list[int]:
    """The stages of this pipeline rank: every pipeline_parallel_size-th one."""
    size = parallel.pipeline_parallel_size
    return [context.pipeline.rank + chunk * size for chunk in range(parallel.virtual_pipeline_size)]


def whole_model(
    model: ModelConfig, table: Table, branches: Mapping[str, BranchMaker] = BRANCHES
) -> GPT:
    """The model as one process would hold it, on the meta device: without memory."""
    return GPT(model, table, ParallelContext.single("meta"), branches=branches)


def build_chunks(
    model: ModelConfig,
    table: Table,
    parallel: ParallelConfig,
    context: ParallelContext,
    loss: LossConfig | None = None,
    recompute: str = "none",
    products: Products | None = None,
    compiled: kernels.CompiledDefinitions | None = None,
) -> list[GPT]:
    """This rank's part of the model, float32 and not initialized: one chunk a virtual stage."""
    stages = split_stages(model, parallel)
    return [
        GPT(model, table, context, stages[index], loss, recompute, products, compiled)
        for index in stage_indices(parallel, context)
    ]
