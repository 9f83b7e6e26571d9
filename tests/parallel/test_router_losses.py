"""The losses of routers over ranks: what they train and what metrics say is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.model.router_losses import BALANCE_LOSS, ROUTER_Z_LOSS
from megatron_completep.run.assemble import assemble
from megatron_completep.run.step import StepFigures
from tests.support.configs import small_config
from tests.support.ranks import context_on

MOE = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 24,
    "balance_loss": 0.5,
    "router_z_loss": 0.5,
}
SEQUENCES = 4
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}
CONTEXT = {"context_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2}


def config_of(parallel: dict[str, Any], moe: dict[str, Any], micro_batch: int = 1) -> Config:
    return small_config(
        model={"moe": {**MOE, **moe}},
        parallel=parallel,
        training={
            "precision": "float64",
            "micro_batch_size": micro_batch,
            "global_batch_size": SEQUENCES,
        },
    )


def batches_of(config: Config, data_rank: int, data_size: int) -> list[Batch]:
    """Sequences of which 11, 8, 5 and 2 tokens count, so that ranks count unequally many."""
    length = config.model.seq_length
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.model.vocab_size, (SEQUENCES, length + 1), generator=generator)
    numbers = torch.arange(SEQUENCES)
    size = config.training.micro_batch_size
    batches = []
    for rows in numbers.chunk(data_size)[data_rank].split(size):
        shape = len(rows), length
        first_counted = (1 + 3 * rows)[:, None]
        batches.append(
            Batch(
                tokens=tokens[rows, :-1],
                labels=tokens[rows, 1:],
                loss_mask=(torch.arange(length) >= first_counted).float(),
                positions=torch.arange(length).expand(shape),
                document_ids=torch.zeros(shape, dtype=torch.int32),
                sample_ids=rows,
            )
        )
    return batches


def steps_of(
    rank: int,
    parallel: dict[str, Any],
    moe: dict[str, Any],
    micro_batch: int = 1,
    half: int | None = None,
) -> list[StepFigures]:
    """Two steps, so that the figures of the second one show what the first one trained.

    half: of the sequences, alone; None: all, over the data ranks.
    """
    config = config_of(parallel, moe, micro_batch)
    context = context_on(rank, config.parallel)
    step = assemble(config, context, table_of(config)).step
    batches = batches_of(config, context.data.rank, context.data.size)
    if half is not None:
        batches = batches_of(config, half, 2)
    return [step.run(batches, number).read() for number in (1, 2)]


def far_apart(ranks: list[list[StepFigures]], truth: list[StepFigures]) -> list[str]:
    """The figures that are not those of the truth, by step and rank."""
    lines = []
    for rank, steps in enumerate(ranks):
        for number, (own, true) in enumerate(zip(steps, truth, strict=True), start=1):
            figures = {"loss": own.loss, "grad_norm": own.grad_norm, **own.terms}
            expected = {"loss": true.loss, "grad_norm": true.grad_norm, **true.terms}
            for name, value in expected.items():
                if figures[name] != pytest.approx(value, rel=1e-11):
                    lines.append(f"rank {rank}, step {number}: {name} {figures[name]} not {value}")
    return lines


@pytest.mark.parametrize("parallel", [SEQUENCE, CONTEXT], ids=["tensor", "context"])
def test_gradients_of_router_losses_do_not_grow_with_the_ranks_that_share_a_sequence(
    pool: Any, parallel: dict[str, Any]
) -> None:
    """Megatron-LM's #5047, where the scale of both gradients depended on tensor and context ranks.

    The coefficients are so large that the losses are most of the gradient's norm.
    """
    truth = steps_of(0, {}, {})
    assert far_apart(pool.run(2, steps_of, parallel, {}), truth) == []
    # The controls: without the losses, and with twice their coefficients, the norm is another.
    off = {"balance_loss": 0.0, "router_z_loss": 0.0}
    assert steps_of(0, {}, off)[0].grad_norm < 0.7 * truth[0].grad_norm
    assert far_apart([steps_of(0, {}, {"balance_loss": 1.0, "router_z_loss": 1.0})], truth)


def test_the_reported_z_loss_is_the_mean_of_the_counted_tokens_wherever_they_are(
    pool: Any,
) -> None:
    """Megatron-LM's #3199, where it was averaged otherwise than the loss it belongs to.

    Ranks and micro-batches have unequally many counted tokens.
    """
    truth = steps_of(0, {}, {}, SEQUENCES)
    assert truth[0].counted_tokens == 11 + 8 + 5 + 2
    assert far_apart([steps_of(0, {}, {}, 1)], truth) == []
    assert far_apart(pool.run(2, steps_of, {"expert_parallel_size": 2}, {}), truth) == []
    # The control: the mean of the means of two ranks is another.
    halves = [steps_of(0, {}, {}, 1, half)[0] for half in (0, 1)]
    for name, value in truth[0].terms.items():
        mean = sum(half.counted_tokens * half.terms[name] for half in halves) / 26
        assert mean == pytest.approx(value, rel=1e-11)
        assert sum(half.terms[name] for half in halves) / 2 != pytest.approx(value, rel=1e-3)


def test_metrics_are_sums_over_the_layers_that_have_experts_on_whatever_stage(pool: Any) -> None:
    """Megatron-LM's #6748, where a mean was taken over a number of layers that was guessed."""
    alone = {layers: steps_of(0, {}, layers_with(*layers)) for layers in [(1, 0), (1, 3), (2, 0)]}
    # Of four layers the second stage alone has one with experts, or each has one.
    for layers in [(1, 3), (2, 0)]:
        for schedule in ("1f1b", "zero_bubble"):
            parallel = {**PIPELINE, "schedule": schedule}
            ranks = pool.run(2, steps_of, parallel, layers_with(*layers))
            assert far_apart(ranks, alone[layers]) == []
    # The control: four layers are more than one or two, and no mean hides that.
    whole, last, two = (alone[layers][0].terms for layers in [(1, 0), (1, 3), (2, 0)])
    for name in (BALANCE_LOSS, ROUTER_Z_LOSS):
        assert whole[name] > 1.7 * two[name] > 2.9 * last[name]


def layers_with(every: int, first: int) -> dict[str, int]:
    return {"every": every, "first_dense_layers": first}
