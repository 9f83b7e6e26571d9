"""What is said of stragglers with experts over ranks, by a clock that counts rows of experts.

No time is measured. A rank's clock goes on by the rows that its experts compute, and where ranks
wait for each other's tokens all clocks are set to the latest.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.guards.hooks import Stragglers
from megatron_completep.model.experts import Experts
from megatron_completep.model.routing import fixing
from megatron_completep.parallel import dispatch
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_reduce, start_all_to_all
from megatron_completep.run import step as stepping
from megatron_completep.run.assemble import assemble
from tests.support.configs import small_config
from tests.support.models import batch_of
from tests.support.ranks import context_on

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}
NOBODY = -1
SLOW = 100_000.0  # rows that a rank could compute in the time that it loses


class RowClock:
    """The time of one rank, in rows of experts."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows = 0

    def perf_counter(self) -> float:
        return self.now

    def start_all_to_all(self, x: Tensor, axis: Axis, *sizes: list[int]) -> Any:
        """An exchange, with which the clocks of the axis go on together."""
        latest = torch.tensor([self.now], dtype=torch.float64)
        self.now = all_reduce(latest, axis, dist.ReduceOp.MAX).item()
        return start_all_to_all(x, axis, *sizes)

    def compute(self, _experts: Any, inputs: Any, out: Tensor) -> None:
        """After a forward pass of experts; the backward pass takes twice as long."""
        rows = len(inputs[0])
        self.rows += rows
        self.now += rows
        if out.requires_grad:
            out.register_hook(lambda _: self.lose(2.0 * rows))

    def lose(self, rows: float) -> None:
        self.now += rows


def time_of_a_step(rank: int, slow_rank: int) -> tuple[float, int]:
    """A rank's own time of a step, in rows, and the rows that its experts computed.

    All tokens go to the experts 0 and 1. Of four data ranks 0 and 1 share the experts, and so do 2
    and 3: ranks 0 and 2 have all rows.
    """
    config = small_config(
        model={"num_layers": 2, "moe": MOE},
        parallel={"expert_parallel_size": 2},
        training={"micro_batch_size": 1, "global_batch_size": 4},
    )
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context, table_of(config))
    (gpt,) = assembly.chunks
    clock = RowClock()
    for module in gpt.modules():
        if isinstance(module, Experts):
            module.register_forward_hook(clock.compute)
    if rank == slow_rank:
        gpt.embedding.register_forward_pre_hook(lambda *_: clock.lose(SLOW))
    tokens, labels = batch_of(config.model, batch=1, seed=rank)
    batch: Any = SimpleNamespace(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones_like(tokens),
        sample_ids=torch.zeros(1, dtype=torch.int64),
    )
    chosen = dict.fromkeys((0, 1), torch.tensor([[0, 1]]).expand(tokens.numel(), 2))
    with (
        mock.patch.object(dispatch, "start_all_to_all", clock.start_all_to_all),
        mock.patch.object(stepping, "time", clock),
        fixing(gpt, chosen),
    ):
        figures = assembly.step.run([batch], 1).read()
    return figures.own_seconds, clock.rows


class Reports:
    """The exchange of a rank that hears of these times."""

    def __init__(self, times: Sequence[float]):
        self._times = times

    def all_gather(self, _own: Any) -> list[tuple[float, str]]:
        return [(time, f"host{rank}") for rank, time in enumerate(self._times)]


def said_of(times: Sequence[float]) -> tuple[list[str], Any]:
    """The lines of the guard, and the record of its step."""
    lines: list[str] = []
    reports: Any = Reports(times)
    guard = Stragglers(reports, interval=1, ratio=1.5, say=lines.append)
    record: Any = SimpleNamespace(
        state=SimpleNamespace(step=7),
        figures=SimpleNamespace(own_seconds=times[0]),
        data_wait_seconds=0.0,
    )
    guard.after_step(record)
    return lines, record


def named(lines: list[str]) -> list[str]:
    return [line.split(" on ")[0] for line in lines]


def test_an_uneven_load_makes_no_rank_a_straggler_as_ranks_with_its_experts_wait(pool: Any) -> None:
    ranks = pool.run(4, time_of_a_step, NOBODY)
    # Two sequences of 12 tokens meet there, each token twice, in each of two layers.
    assert [rows for _, rows in ranks] == [96, 0, 96, 0]
    times = [seconds for seconds, _ in ranks]
    assert times == [pytest.approx(3 * 96)] * 4
    lines, record = said_of(times)
    assert lines == [] and record.slowest_rank_ratio == 1.0

    # The control: by the rows alone, without the waiting, two ranks would be called slow.
    apart = [3.0 * rows + 1 for _, rows in ranks]
    assert named(said_of(apart)[0]) == ["step 7: rank 0", "step 7: rank 2"]


def test_a_slow_rank_slows_those_that_share_its_experts_and_the_report_names_these(
    pool: Any,
) -> None:
    ranks = pool.run(4, time_of_a_step, 3)
    lines, record = said_of([seconds for seconds, _ in ranks])
    assert named(lines) == ["step 7: rank 2", "step 7: rank 3"]
    assert record.slowest_rank in (2, 3) and record.slowest_rank_ratio > 100
    # The control: where nobody waited the report would name the slow rank alone.
    apart = [3.0 * rows + 200 for _, rows in ranks]
    apart[3] += SLOW
    assert named(said_of(apart)[0]) == ["step 7: rank 3"]
