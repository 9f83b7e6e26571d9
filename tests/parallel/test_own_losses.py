"""Losses that layers have of their own: in every layout they train, and metrics report them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_completep.completep import Table, table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import CompletePConfig, Config, ModelConfig, OptimizerConfig
from megatron_completep.data.loader import Batch
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.model.stages import split_stages, stage_indices
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.context import ParallelContext, data_parallel_size_for
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.own_losses import with_own_loss
from megatron_completep.run.assemble import assemble

STEPS = 3
SEQUENCES = 8
INNER = 12


class ScoredBranch(nn.Module):
    """down(up(x)^2) with two losses of its own: one over split features, one over the stream.

    Layers with an odd number have the second loss only, so that stages declare different names.
    """

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool,
    ):
        super().__init__()
        base = table.base_hidden_size
        self.up = ColumnParallelLinear(model.hidden_size, {"up": INNER}, base, False, context)
        self.down = RowParallelLinear(INNER, model.hidden_size, 4, False, context)
        self.ledger = context.own_losses
        # Without sequence parallelism all tensor ranks see the same tokens of the stream.
        ranks = context.ranks
        self.counts = ranks.sequence.split or ranks.tensor.rank == 0
        self.scores_features = layer % 2 == 0
        self.ledger.declare("stream")
        if self.scores_features:
            self.ledger.declare("features")

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        x = with_own_loss(x, 0.02 * x.square().sum(), "stream", self.ledger, self.counts)
        inner = self.up(x)
        if self.scores_features:
            # Every tensor rank has features of its own, so that each value counts.
            inner = with_own_loss(inner, 0.01 * inner.abs().sum(), "features", self.ledger)
        return Branch(self.down(inner.square()))


def scored_config(parallel: dict[str, Any]) -> Config:
    model = ModelConfig(
        hidden_size=16,
        num_layers=4,
        num_attention_heads=2,
        ffn_hidden_size=16,
        vocab_size=29,
        vocab_multiple=4,
        seq_length=8,
    )
    return bare_config(
        model,
        completep=CompletePConfig(base_hidden_size=8, base_num_layers=2),
        optimizer=OptimizerConfig(base_lr=1e-2, schedule="constant"),
        parallel=parallel,
        training={
            "micro_batch_size": 1,
            "global_batch_size": SEQUENCES,
            "train_steps": STEPS,
            "precision": "float64",
            "z_loss": 1e-3,
        },
    )


def batches_of(config: Config, data_rank: int, data_size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    length = config.model.seq_length
    tokens = torch.randint(config.model.vocab_size, (SEQUENCES, length + 1), generator=generator)
    batches = []
    for row in tokens.chunk(data_size)[data_rank].split(1):
        shape = 1, length
        batches.append(
            Batch(
                tokens=row[:, :-1].contiguous(),
                labels=row[:, 1:].contiguous(),
                loss_mask=torch.ones(shape),
                positions=torch.arange(length).expand(shape),
                document_ids=torch.zeros(shape, dtype=torch.int32),
                sample_ids=torch.zeros(1, dtype=torch.int64),
            )
        )
    return batches


def train_scored(rank: int, world_size: int, parallel: dict[str, Any]) -> list[dict[str, float]]:
    """Figures of a few steps of the whole assembly, in the process group at hand."""
    config = scored_config(parallel)
    context = ParallelContext.single()
    if world_size > 1:
        data_size = data_parallel_size_for(config.parallel, world_size)
        context = ParallelContext.over_world(
            config.parallel, torch.device("cpu"), rank, world_size, data_size
        )
    table = table_of(config)
    stages = split_stages(config.model, config.parallel)
    chunks = []
    for index in stage_indices(config.parallel, context):
        branches = {**BRANCHES, "scored": ScoredBranch}
        loss = LossConfig.of(config.training)
        chunk = GPT(config.model, table, context, stages[index], loss, branches=branches)
        initialize(chunk, table, config.optimizer, 1)
        chunks.append(chunk.double())
    step = assemble(config, context, table, chunks).step
    batches = batches_of(config, context.data.rank, context.data.size)
    rows = []
    for number in range(1, STEPS + 1):
        figures = step.run(batches, number).read()
        rows.append({"loss": figures.loss, "grad_norm": figures.grad_norm, **figures.terms})
    return rows


LAYOUTS = {
    "tensor": (2, {"tensor_parallel_size": 2}),
    "tensor and sequence": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "data": (2, {}),
    "pipeline": (2, {"pipeline_parallel_size": 2}),
    "zero bubble": (
        4,
        {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "schedule": "zero_bubble"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_own_losses_and_their_means_are_the_same_in_every_layout(pool: Any, name: str) -> None:
    expected = train_scored(0, 1, {})
    world_size, parallel = LAYOUTS[name]
    assert {"loss", "grad_norm", "cross_entropy", "z_loss", "features", "stream"} == set(
        expected[0]
    )
    assert expected[0]["stream"] > 0.1 and expected[0]["features"] > 0
    for rows in pool.run(world_size, train_scored, world_size, parallel):
        for row, right in zip(rows, expected, strict=True):
            assert row == {key: pytest.approx(value, rel=1e-10) for key, value in right.items()}


def test_an_own_loss_that_was_not_declared_is_refused() -> None:
    """The control: without a declaration other ranks could not know the name."""
    chunk = GPT(
        scored_config({}).model, table_of(scored_config({})), ParallelContext.single()
    ).double()
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = with_own_loss(x, x.sum(), "unknown", chunk.own_losses)
    with pytest.raises(AssertionError, match="unknown"):
        y.sum().backward()
