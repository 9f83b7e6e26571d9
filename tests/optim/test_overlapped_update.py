"""Updates under the next forward pass give the bits of updates at once.

A CPU has no second stream. `Later` is the worst that one can do: nothing of an update happens
before somebody waits for its bucket. A reader that forgot to wait would see old values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep.config.schema import OptimizerConfig, ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.optim.adamw import AdamW
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.update_stream import Arrival, CudaUpdateStream
from megatron_completep.parallel.collectives import Pending
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.telemetry.telemetry import update_ratios
from tests.support.models import (
    batch_of,
    build_model,
    model_config,
    optimizer_config,
    table_for,
    train_step,
)
from tests.support.ranks import context_on

PARALLEL = {"bucket_megabytes": 0.02}
RATES = (1e-2, 3e-2, 1e-2)


class Later:
    """Runs the update of a bucket when it is waited for, and not before."""

    def __init__(self) -> None:
        self.begun = 0
        self.order: list[str] = []

    def begin(self) -> None:
        self.begun += 1

    def run(self, work: Callable[[], Pending]) -> Arrival:
        self.order.append("handed over")
        return _AtWait(self, work)


class _AtWait:
    def __init__(self, stream: Later, work: Callable[[], Pending]):
        self.stream = stream
        self.work = work

    def wait(self) -> None:
        self.stream.order.append("waited for")
        self.work().wait()


class Never(Later):
    """The negative control: what is handed over is lost."""

    def run(self, work: Callable[[], Pending]) -> Arrival:
        return Pending(torch.zeros(0))


def trained(
    updates: Any,
    precision: torch.dtype,
    context: ParallelContext | None = None,
    parallel: dict[str, Any] = PARALLEL,
    features: dict[str, Any] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and states after three steps, and the losses before each of them."""
    model = model_config(**(features or {}))
    table = table_for(model)
    start = torch.float64 if precision == torch.float64 else torch.float32
    gpt = build_model(model, table, start)
    optimizer = DistributedOptimizer(
        [gpt],
        table,
        optimizer_config(),
        context or ParallelContext.single(),
        ParallelConfig(**parallel),
        precision,
        updates=updates,
    )
    losses = []
    for step, rate in enumerate(RATES):
        # Modules wait for themselves: nothing here does.
        optimizer.begin_step(1)
        tokens, labels = batch_of(model, step)
        loss = gpt(tokens, labels=labels)
        loss.backward()
        losses.append(float(loss))
        optimizer.step(rate, loss.detach(), (labels != -100).sum())
    tensors = {name: state.clone() for name, state in optimizer.states.items()}
    for name, parameter in gpt.named_parameters():
        tensors[name] = parameter.detach().clone()
    return tensors, losses


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_process_gets_the_same_bits(precision: torch.dtype) -> None:
    later = Later()
    expected, expected_losses = trained(None, precision)
    tensors, losses = trained(later, precision)
    assert losses == expected_losses
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert later.begun == len(RATES)
    assert later.order.count("handed over") == later.order.count("waited for") > 5 * len(RATES)


BIASED = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}


@pytest.mark.parametrize(
    "features",
    [{"qk_norm": True}, {"qk_norm": True, "position": "alibi"}, {"tied_embeddings": True}, BIASED],
    ids=str,
)
def test_every_parameter_is_waited_for_by_the_module_that_reads_it(features: Any) -> None:
    """Each parameter has a bucket of its own, so that no wait for another one covers it."""
    parallel = {"bucket_megabytes": 1e-6}
    _, expected = trained(None, torch.float64, parallel=parallel, features=features)
    _, losses = trained(Later(), torch.float64, parallel=parallel, features=features)
    assert losses == expected


def test_a_stream_that_loses_updates_is_noticed() -> None:
    _, expected = trained(None, torch.float64)
    _, losses = trained(Never(), torch.float64)
    assert losses[0] == expected[0]
    assert losses[1:] != expected[1:]


def train_both_ways(
    rank: int, parallel: dict[str, Any]
) -> list[tuple[dict[str, Tensor], list[float]]]:
    context = context_on(rank, ParallelConfig(**parallel))
    return [trained(updates, torch.bfloat16, context, parallel) for updates in (None, Later())]


@pytest.mark.parametrize(
    "sharing",
    [{}, {"optimizer_shard_size": 1}, {"sharding": "gradients"}],
    ids=["two shards", "two replicas", "gradients, too"],
)
def test_ranks_that_share_the_state_gather_the_same_bits(pool: Any, sharing: Any) -> None:
    for at_once, later in pool.run(2, train_both_ways, {**PARALLEL, **sharing}):
        assert later[1] == at_once[1]
        for name, tensor in at_once[0].items():
            assert torch.equal(later[0][name], tensor), name


def optimizer_with(updates: Any, rule: Any = None) -> Any:
    model = model_config()
    table = table_for(model)
    gpt = build_model(model, table)
    optimizer = DistributedOptimizer(
        [gpt],
        table,
        OptimizerConfig(base_lr=1e-2),
        ParallelContext.single(),
        ParallelConfig(**PARALLEL),
        torch.float64,
        rule,
        updates,
    )
    return gpt, optimizer


def test_whoever_reads_the_states_or_the_last_update_sees_this_step() -> None:
    seen = []
    for updates in (None, Later()):
        gpt, optimizer = optimizer_with(updates)
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config))
        states = {name: state.clone() for name, state in optimizer.states.items()}
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, seed=1))
        seen.append((states, update_ratios(optimizer)))
    (states, ratios), (late_states, late_ratios) = seen
    assert ratios == late_ratios
    for name, state in states.items():
        assert torch.equal(late_states[name], state), name


def test_a_rule_that_needs_whole_matrices_is_refused() -> None:
    class WholeMatrices(AdamW):
        by_bucket = False

    with pytest.raises(ConfigError, match=r"training\.overlap_update = true updates bucket by"):
        optimizer_with(Later(), WholeMatrices)
    optimizer_with(None, WholeMatrices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_stream_of_a_gpu_gives_the_same_bits() -> None:
    device = torch.device("cuda")
    outcomes = []
    for updates in (None, CudaUpdateStream(device)):
        torch.manual_seed(0)
        model = model_config()
        table = table_for(model)
        gpt = build_model(model, table, torch.float32).to(device)
        optimizer = DistributedOptimizer(
            [gpt],
            table,
            optimizer_config(),
            ParallelContext.single(device),
            ParallelConfig(**PARALLEL),
            torch.bfloat16,
            updates=updates,
        )
        for step in range(4):
            optimizer.begin_step(1)
            tokens, labels = batch_of(model, step)
            loss = gpt(tokens.to(device), labels=labels.to(device))
            loss.backward()
            optimizer.step(1e-2, loss.detach(), (labels != -100).sum())
        outcomes.append({name: state.clone() for name, state in optimizer.states.items()})
    for name, state in outcomes[0].items():
        assert torch.equal(outcomes[1][name], state), name
