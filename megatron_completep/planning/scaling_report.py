"""A scaling plan for a reader, and as a JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from megatron_completep.config.schema import Config
from megatron_completep.planning.communication import Collective, collectives_per_step
from megatron_completep.planning.scaling import (
    MATRIX_EFFICIENCY,
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    Gpu,
    RankMemory,
    ScalingPlan,
    stated_load,
)

SHOWN_RANKS = 8  # pipeline ranks listed one by one; of more, the ends and the fullest


def scaling_to_json(config: Config, plan: ScalingPlan, gpu: Gpu) -> dict[str, Any]:
    """Every figure of the plan, the assumptions, and the collectives of the first pipeline rank."""
    memory = [{**asdict(rank), "total": rank.total} for rank in plan.memory]
    collectives = merged(collectives_per_step(config, plan.world_size))
    return {
        **asdict(plan),
        "memory": memory,
        "gpu": gpu.name,
        "assumptions": assumptions(gpu),
        "collectives": [_collective_to_json(collective) for collective in collectives],
    }


def _collective_to_json(collective: Collective) -> dict[str, Any]:
    """The fields of a collective; its purpose has the key `what`."""
    entry = asdict(collective)
    entry["what"] = entry.pop("purpose")
    return entry


def describe_scaling(config: Config, plan: ScalingPlan, gpu: Gpu) -> str:
    """The plan as text: layout, memory, traffic, time, warnings."""
    parallel = config.parallel
    training = config.training
    shares_sequences = parallel.context_parallel_size > 1
    context = f" x context {parallel.context_parallel_size}" if shares_sequences else ""
    lines = [
        f"{plan.world_size} {gpu.name}: tensor {parallel.tensor_parallel_size} x "
        f"pipeline {parallel.pipeline_parallel_size} x data {plan.data_parallel_size}"
        f"{context}; "
        f"{plan.micro_batches} micro-batches of {training.micro_batch_size} a rank and step; "
        f"recompute {training.recompute}",
        "",
        *_memory(plan),
        *_imbalance(config, plan),
        "",
        *_traffic(config, plan),
        "",
        *_time(config, plan),
        *_orthogonal(plan),
        "",
        "Assumed:",
        *(f"  {assumption}" for assumption in assumptions(gpu)),
    ]
    lines += [f"Warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def assumptions(gpu: Gpu) -> list[str]:
    """What the predicted time rests on."""
    return [
        f"matrix products and attention reach {MATRIX_EFFICIENCY:.0%} of "
        f"{gpu.peak_flops / 1e12:g} TFLOP/s",
        f"norms, activations, rotations, loss and optimizer reach {MEMORY_EFFICIENCY:.0%} of "
        f"{gpu.memory_bandwidth / 1e12:g} TB/s; embeddings and dropout are left out",
        f"collectives reach {NETWORK_EFFICIENCY:.0%} of {gpu.node_bandwidth / 1e9:g} GB/s "
        f"inside a node of {gpu.per_node} and of {gpu.network_bandwidth / 1e9:g} GB/s between "
        "nodes",
        "tensor collectives are hidden in half of the backward pass, data and pipeline traffic "
        "altogether, keys and values of context ranks and tokens of expert ranks not at all",
        "memory leaves out the CUDA context, the allocator's rounding and temporaries of single "
        "operations",
    ]


def merged(collectives: Iterable[Collective]) -> list[Collective]:
    """Calls of one axis, operation and purpose as one entry with their mean payload.

    In the order in which they first appear.
    """
    totals: dict[tuple[str, str, str], tuple[int, int]] = {}
    for collective in collectives:
        key = (collective.axis, collective.operation, collective.purpose)
        count, payload = totals.get(key, (0, 0))
        payload += collective.count * collective.payload
        totals[key] = (count + collective.count, payload)
    # Chunks of the loss and buckets differ in size: one entry has their mean.
    entries = []
    for (axis, operation, purpose), (count, payload) in totals.items():
        entries.append(Collective(axis, operation, payload // count, count, purpose))
    return entries


def _memory(plan: ScalingPlan) -> list[str]:
    kinds = [*(field.name for field in fields(RankMemory)), "total"]
    # The ends differ from the ranks between them by embedding, unembedding and what is in flight.
    ranks = list(range(len(plan.memory)))
    if len(ranks) > SHOWN_RANKS:
        fullest = max(ranks, key=lambda rank: plan.memory[rank].total)
        ranks = sorted({0, fullest, ranks[-1]})
    rows = []
    for rank in ranks:
        sizes = [gigabytes(getattr(plan.memory[rank], kind)) for kind in kinds]
        rows.append([str(rank), *sizes])
    return table(["GB a GPU, on pipeline rank", *kinds], rows)


def _imbalance(config: Config, plan: ScalingPlan) -> list[str]:
    """Activations at uneven loads, in a line; nothing where loads cannot be uneven."""
    if not plan.imbalanced_activations:
        return []
    sizes = ", ".join(gigabytes(size) for size in plan.imbalanced_activations)
    recomputed = ""
    if config.training.recompute == "full":
        recomputed = ", with one layer under recomputation"
    return [
        f"activations if a rank's experts get {stated_load(config):g} times their share of the "
        f"tokens in every layer{recomputed}: {sizes} GB, by pipeline rank; above, loads are equal"
    ]


def _traffic(config: Config, plan: ScalingPlan) -> list[str]:
    totals = [
        ["tensor", gigabytes(plan.tensor_bytes)],
        ["pipeline", gigabytes(plan.pipeline_bytes)],
        ["data", gigabytes(plan.data_bytes)],
    ]
    if config.parallel.context_parallel_size > 1:
        totals.append(["context", gigabytes(plan.context_bytes)])
    if config.parallel.expert_parallel_size > 1:
        totals.append(["expert", gigabytes(plan.expert_bytes)])
    rows = []
    for calls in merged(collectives_per_step(config, plan.world_size)):
        count = f"{calls.count:,}"
        size = megabytes(calls.payload)
        rows.append([calls.axis, calls.operation, count, size, calls.purpose])
    head = ["collectives a step, pipeline rank 0", "operation", "calls", "MB each", "what"]
    sent = table(["GB sent a step by the busiest rank, along", "GB"], totals)
    return [*sent, "", *table(head, rows)]


def _time(config: Config, plan: ScalingPlan) -> list[str]:
    days = plan.step_seconds * config.training.train_steps / 86400
    duration = f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"
    sizes = {
        "context": config.parallel.context_parallel_size,
        "expert": config.parallel.expert_parallel_size,
    }
    axes = " and ".join(["tensor", *(name for name, size in sizes.items() if size > 1)])
    return [
        f"{plan.flops_per_token / 1e9:,.2f} GFLOP a token; {plan.step_seconds:,.3f} s a step: "
        f"{plan.compute_seconds:,.3f} s of products and attention, {plan.memory_seconds:,.3f} s of "
        "kernels between them,",
        f"{plan.communication_seconds:,.3f} s of {axes} communication that nothing hides, "
        f"{plan.optimizer_seconds:,.3f} s of the optimizer,",
        f"and a pipeline bubble of {plan.bubble:.1%}",
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.model_flops_utilisation:.1%} of the peak; "
        f"{config.training.train_steps:,} steps take {duration}; a checkpoint is "
        f"{plan.checkpoint_bytes / 1e9:,.1f} GB",
    ]


def _orthogonal(plan: ScalingPlan) -> list[str]:
    """What Muon adds, in two lines; nothing under another rule."""
    if not plan.orthogonal:
        return []
    busiest = max(plan.orthogonal, key=lambda stage: stage.flops)
    idle = [f"{stage.idle} of {stage.ranks}" for stage in plan.orthogonal]
    if len(set(idle)) == 1:
        idle = idle[:1]
    imbalance = busiest.flops / busiest.mean_flops if busiest.mean_flops else 1.0
    return [
        f"Muon: {busiest.matrices} matrices in {busiest.batches} batches of two all-to-alls; "
        f"{busiest.flops / 1e12:,.3g} TFLOP of Newton-Schulz a step on the busiest rank, "
        f"{imbalance:,.2f} times the mean;",
        f"{', '.join(idle)} ranks of a stage own no matrix and wait",
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines with columns as wide as they must be: numbers to the right, words to the left."""
    columns = []
    for index, name in enumerate(head):
        cells = [row[index] for row in rows]
        width = max(map(len, [name, *cells]))
        # The column of names stays to the left, numbers or not.
        is_number = index > 0 and bool(cells) and all(cell[:1].isdigit() for cell in cells)
        align = str.rjust if is_number else str.ljust
        columns.append([align(cell, width) for cell in [name, *cells]])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def gigabytes(size: float) -> str:
    """Bytes as GB, to three digits."""
    return f"{size / 1e9:,.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


def megabytes(size: float) -> str:
    """Bytes as MB, to three digits."""
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"
