"""What Muon's orthogonal factors ask of the ranks: collectives, computation, and who is idle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_completep.config.schema import Config
from megatron_completep.optim.layout import Layout
from megatron_completep.optim.matrices import Division, divide
from megatron_completep.optim.muon import MATRIX, Muon, batch_elements, section_of
from megatron_completep.optim.newton_schulz import newton_schulz_flops
from megatron_completep.parallel.parameter import Spec
from megatron_completep.planning.sizes import (
    backward_specs,
    rank_layout,
    rank_models,
    shard_count,
    wide_bytes,
)


@dataclass(frozen=True)
class OrthogonalPlan:
    """One pipeline rank's ranks together.

    flops: of the rank that computes most, a step. mean_flops: of all ranks of the stage.
    idle: ranks that own no matrix. batches: of two all-to-alls each.
    """

    ranks: int
    matrices: int
    batches: int
    flops: float
    mean_flops: float
    idle: int


def has_matrices(config: Config) -> bool:
    """Whether the run's update rule makes matrices orthogonal."""
    return config.optimizer.type == "muon"


def iteration_bytes(config: Config) -> int:
    """Bytes of an element in the iterations and the exchange, on a GPU that multiplies bf16."""
    precision = section_of(config.optimizer).precision
    if precision == "bf16" or (precision == "auto" and config.training.precision != "float64"):
        return 2
    return wide_bytes(config)


def division_of(
    config: Config, specs: Mapping[str, Spec], layout: Layout, gradient_size: int
) -> Division:
    """The division of the matrices of one pipeline rank."""
    muon = section_of(config.optimizer)
    return divide(
        layout,
        specs,
        [name for name, spec in specs.items() if Muon.kind_of(spec) == MATRIX],
        shard_count(config, gradient_size),
        config.parallel.tensor_parallel_size,
        muon.parts == "per_head",
        batch_elements(muon, iteration_bytes(config)),
    )


def orthogonal_plan(config: Config, pipeline_rank: int, gradient_size: int) -> OrthogonalPlan:
    """What the ranks of one pipeline rank compute."""
    specs = backward_specs(rank_models(config, pipeline_rank))
    layout = rank_layout(config, specs, gradient_size)
    division = division_of(config, specs, layout, gradient_size)
    iterations = section_of(config.optimizer).iterations
    flops = [0.0] * division.ranks
    for matrix, owner in zip(division.matrices, division.owners, strict=True):
        flops[owner] += newton_schulz_flops(*matrix.shape, iterations)
    return OrthogonalPlan(
        ranks=division.ranks,
        matrices=len(division.matrices),
        batches=len(division.batches),
        flops=max(flops),
        mean_flops=sum(flops) / len(flops),
        idle=flops.count(0.0),
    )


def exchanged_elements(division: Division, rank: int) -> Iterator[tuple[int, int]]:
    """What a rank of the stage sends in each batch: to the owners, and as one of them."""
    for batch in division.batches:
        packed = 0
        scattered = 0
        for number in batch:
            for holding in division.holdings[rank].get(number, ()):
                packed += holding.numel if holding.sends else 0
            if division.owners[number] != rank:
                continue
            for of_rank in division.holdings:
                scattered += sum(holding.numel for holding in of_rank.get(number, ()))
        yield packed, scattered
