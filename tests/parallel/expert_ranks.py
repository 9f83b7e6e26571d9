"""Steps of a model with experts on several ranks, for tests of uneven loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.guards.replicas import replica_hashes
from megatron_completep.model.routing import fixing, observing
from megatron_completep.optim.balance import gather_loads
from megatron_completep.parallel.cross_entropy import IGNORED
from megatron_completep.run.assemble import assemble
from tests.support.configs import small_config
from tests.support.models import batch_of
from tests.support.ranks import context_on

MODEL = {"num_layers": 2, "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a step."""

    counted: int  # tokens of the step
    loss: float
    grad_norm: float
    biases: dict[str, Tensor]
    choices: dict[int, list[Tensor]]  # [T, k] of this rank's tokens, by layer and micro-batch
    global_loads: dict[str, Tensor]  # of the step, by the name of the bias
    rows: int  # that came to this rank's experts in the first layer


def one_step(
    rank: int, parallel: dict[str, Any], recompute: str, precision: str, forced: list[int] | None
) -> Outcome:
    """A step over a batch of two sequences a data rank's share, in the group at hand or alone.

    forced: the experts of every token; None: those of the router.
    """
    config = small_config(
        model=MODEL,
        parallel=parallel,
        training={
            "precision": precision,
            "recompute": recompute,
            "micro_batch_size": 1,
            "global_batch_size": 4,
        },
    )
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context, table_of(config))
    (gpt,) = assembly.chunks
    optimizer = assembly.optimizer
    tokens, labels = batch_of(config.model, batch=4)
    seen: dict[int, list[Tensor]] = {}
    rows = 0

    def count(layer: int, routing: Any) -> None:
        seen.setdefault(layer, []).append(routing.experts)

    own = range(4)[context.data.rank :: context.data.size]
    local = context.sequence.length(config.model.seq_length)
    choices = {}
    if forced is not None:
        choices = dict.fromkeys((0, 1), torch.tensor([forced]).expand(local, 2))
    optimizer.begin_step(len(own))
    loss_sum = torch.zeros((), dtype=torch.float64)
    experts = gpt.blocks()[0][1].mlp.experts

    def note(module: Any, inputs: Any) -> None:
        nonlocal rows
        rows += inputs[0].shape[0]

    handle = experts.register_forward_pre_hook(note)
    with observing(gpt, count), fixing(gpt, choices):
        for sample in own:
            loss = gpt(tokens[sample : sample + 1], labels=labels[sample : sample + 1])
            loss.backward()
            loss_sum += loss.detach()
    handle.remove()
    counted = int((labels[list(own)] != IGNORED).sum())
    result = optimizer.step(1e-2, loss_sum, torch.tensor(counted))
    optimizer.wait_for_parameters()
    biases = {n: p.detach().clone() for n, p in gpt.named_parameters() if "router.bias" in n}
    summed = gather_loads(optimizer.shards, optimizer.loads)
    figures = int(result.tokens), float(result.loss), float(result.grad_norm)
    return Outcome(*figures, biases, seen, summed, rows)


def hashes_with_a_wrong_expert(rank: int, wrong_rank: int) -> dict[str, list[int]]:
    """What the replica check compares, on four data ranks of which two share the experts.

    One rank's copy of an expert is off by a bit.
    """
    config = small_config(model=MODEL, parallel={"expert_parallel_size": 2})
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context, table_of(config))
    if rank == wrong_rank:
        down = assembly.chunks[0].get_parameter("layers.1.mlp.experts.down")
        down.data.view(torch.int32)[1, 2, 3] ^= 1
    return replica_hashes(assembly.optimizer, context)
