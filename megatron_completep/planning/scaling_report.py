"""A scaling plan for a reader, and as a JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from megatron_completep.config.schema import Config
from megatron_completep.planning.communication import Collective, collectives_per_step
from megatron_completep.planning.scaling import (
    GPUS,
    MATRIX_EFFICIENCY,
    NETWORK_EFFICIENCY,
    RankMemory,
    ScalingPlan,
)

SHOWN_RANKS = 8  # pipeline ranks listed one by one; of more, the ends and the fullest


def scaling_to_json(config: Config, plan: ScalingPlan, gpu: str) -> dict[str, Any]:
    """Every figure of the plan, the assumptions, and the collectives of the first pipeline rank."""
    memory = [{**asdict(rank), "total": rank.total} for rank in plan.memory]
    collectives = [asdict(c) for c in merged(collectives_per_step(config, plan.world_size))]
    return {
        **asdict(plan),
        "memory": memory,
        "gpu": gpu,
        "assumptions": assumptions(gpu),
        "collectives": collectives,
    }


def describe_scaling(config: Config, plan: ScalingPlan, gpu: str) -> str:
    """The plan as text: layout, memory, traffic, time, warnings."""
    parallel, training = config.parallel, config.training
    lines = [
        f"{plan.world_size} {gpu}: tensor {parallel.tensor_parallel_size} x pipeline {parallel.pipeline_parallel_size} x "
        f"data {plan.data_parallel_size}; {plan.micro_batches} micro-batches of {training.micro_batch_size} a rank and step; "
        f"recompute {training.recompute}",
        "",
        *_memory(plan),
        "",
        *_traffic(config, plan),
        "",
        *_time(config, plan),
        "",
        "Assumed:",
        *(f"  {assumption}" for assumption in assumptions(gpu)),
    ]
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in plan.warnings)])


def assumptions(gpu: str) -> list[str]:
    """What the predicted time rests on."""
    sheet = GPUS[gpu]
    return [
        f"matrix products reach {MATRIX_EFFICIENCY:.0%} of {sheet.peak_flops / 1e12:g} TFLOP/s",
        f"collectives reach {NETWORK_EFFICIENCY:.0%} of {sheet.node_bandwidth / 1e9:g} GB/s inside a node of {sheet.per_node} "
        f"and of {sheet.network_bandwidth / 1e9:g} GB/s between nodes",
        "tensor collectives are hidden in half of the backward pass, data and pipeline traffic altogether",
        "memory leaves out the CUDA context, the allocator's rounding and temporaries of single operations",
    ]


def merged(collectives: Iterable[Collective]) -> list[Collective]:
    """Calls of one axis, operation and purpose as one entry with their mean payload, in order of first appearance."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for c in collectives:
        count, total = found.get((c.axis, c.operation, c.what), (0, 0))
        found[c.axis, c.operation, c.what] = count + c.count, total + c.count * c.payload
    return [
        Collective(axis, operation, total // count, count, what)
        for (axis, operation, what), (count, total) in found.items()
    ]


def _memory(plan: ScalingPlan) -> list[str]:
    kinds = [f.name for f in fields(RankMemory)]
    fullest = max(range(len(plan.memory)), key=lambda rank: plan.memory[rank].total)
    ranks = (
        range(len(plan.memory))
        if len(plan.memory) <= SHOWN_RANKS
        else sorted({0, fullest, len(plan.memory) - 1})
    )
    rows = [
        [str(rank), *(gigabytes(getattr(plan.memory[rank], kind)) for kind in [*kinds, "total"])]
        for rank in ranks
    ]
    return table(["GB a GPU, on pipeline rank", *kinds, "total"], rows)


def _traffic(config: Config, plan: ScalingPlan) -> list[str]:
    totals = [
        ("tensor", plan.tensor_bytes),
        ("pipeline", plan.pipeline_bytes),
        ("data", plan.data_bytes),
    ]
    sent = table(
        ["GB sent a step by the busiest rank, along", "GB"],
        [[axis, gigabytes(size)] for axis, size in totals],
    )
    calls = merged(collectives_per_step(config, plan.world_size))
    rows = [[c.axis, c.operation, f"{c.count:,}", megabytes(c.payload), c.what] for c in calls]
    return [
        *sent,
        "",
        *table(
            ["collectives a step, pipeline rank 0", "operation", "calls", "MB each", "what"], rows
        ),
    ]


def _time(config: Config, plan: ScalingPlan) -> list[str]:
    days = plan.step_seconds * config.training.train_steps / 86400
    lasting = f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"
    return [
        f"{plan.flops_per_token / 1e9:,.2f} GFLOP a token; {plan.step_seconds:,.3f} s a step: "
        f"{plan.compute_seconds:,.3f} s of computation, {plan.communication_seconds:,.3f} s of tensor communication that",
        f"nothing hides, and a pipeline bubble of {plan.bubble:.1%}",
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.model_flops_utilisation:.1%} of the peak; "
        f"{config.training.train_steps:,} steps take {lasting}; a checkpoint is {plan.checkpoint_bytes / 1e9:,.1f} GB",
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as they must be: numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [
        bool(rows) and all(row[i][:1].isdigit() for row in rows) and i > 0 for i in range(len(head))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"
