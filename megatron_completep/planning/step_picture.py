"""A picture of one optimizer step: who computes what when under each pipeline schedule, and what the network does meanwhile.

The schedules are those of the trainer, asked of the library that runs them; the buckets are those of the optimizer's layout.
Durations are model units: a micro-batch's forward, input gradient and weight gradient of a whole rank take one unit each.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import (
    FakeStore,
)  # importing it registers the backend "fake"

from megatron_completep.outputs import MARK
from megatron_completep.parallel.pipeline import make_schedule

COLORS = {
    "F": "#7aa6d8",
    "I": "#f2b66d",
    "W": "#8cc79a",
    "B": "#e58f72",
    "S": "#b79ad1",
    "G": "#c9b18a",
    "U": "#999999",
}
MEANING = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "both gradients"}
DURATION = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


@dataclass(frozen=True)
class Span:
    """One box of the picture."""

    lane: int
    start: float
    stop: float
    kind: str
    label: str
    stage: int = 0


@dataclass(frozen=True)
class Action:
    """What a pipeline rank does next: F, I, W or B of one stage and micro-batch."""

    stage: int
    kind: str
    micro_batch: int


def schedule_actions(name: str, ranks: int, virtual: int, micro_batches: int) -> list[list[Action]]:
    """By rank, what the library's schedule does, in order. Joins a process group that sends nothing, and leaves it."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        x = torch.empty(1, device="meta", requires_grad=True)
        cpu, group, stages = torch.device("cpu"), dist.group.WORLD, ranks * virtual
        own = [
            PipelineStage(
                nn.Identity(), i * ranks, stages, cpu, input_args=x, output_args=x, group=group
            )
            for i in range(virtual)
        ]
        schedule: Any = make_schedule(name, own, micro_batches)
        order = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
        return [
            _numbered([str(action) for action in order[rank] if action is not None])
            for rank in range(ranks)
        ]
    finally:
        dist.destroy_process_group()


def _numbered(texts: list[str]) -> list[Action]:
    """Micro-batches counted anew: torch 2.13 numbers the forward passes of 1F1B's last rank from 1."""
    counts: Counter[tuple[int, str]] = Counter()
    actions = []
    for text in texts:
        if match := re.fullmatch(r"(\d+)([FIWB])\d+", text):
            stage, kind = int(match[1]), match[2]
            actions.append(Action(stage, kind, counts[stage, kind]))
            counts[stage, kind] += 1
    return actions


def simulate(actions: list[list[Action]], virtual: int) -> list[Span]:
    """Start and end of every action, each as early as its rank is free and what it needs is there."""
    stages = len(actions) * virtual
    done: dict[tuple[int, str, int], float] = {}
    position, free = [0] * len(actions), [0.0] * len(actions)
    spans: list[Span] = []
    while any(position[rank] < len(queue) for rank, queue in enumerate(actions)):
        before = len(spans)
        for rank, queue in enumerate(actions):
            while (
                position[rank] < len(queue)
                and (ready := _ready(queue[position[rank]], done, stages)) is not None
            ):
                action = queue[position[rank]]
                start = max(free[rank], ready)
                free[rank] = start + DURATION[action.kind] / virtual
                done[
                    action.stage, "I" if action.kind == "B" else action.kind, action.micro_batch
                ] = free[rank]
                spans.append(
                    Span(
                        rank, start, free[rank], action.kind, str(action.micro_batch), action.stage
                    )
                )
                position[rank] += 1
        assert len(spans) > before, "the schedule waits for itself"
    return spans


def _ready(action: Action, done: dict[tuple[int, str, int], float], stages: int) -> float | None:
    """When what the action needs is there; None while it is not known."""
    stage, number = action.stage, action.micro_batch
    needs = {
        "F": [(stage - 1, "F", number)] if stage else [],
        "W": [(stage, "I", number)],
    }.get(
        action.kind,
        [(stage, "F", number)] + ([(stage + 1, "I", number)] if stage < stages - 1 else []),
    )
    return (
        None
        if any(need not in done for need in needs)
        else max([0.0, *(done[need] for need in needs)])
    )


def bubble(spans: list[Span]) -> float:
    """Share of all ranks' time until the last one is done in which nothing is computed."""
    lanes = 1 + max(span.lane for span in spans)
    return 1 - sum(span.stop - span.start for span in spans) / (
        lanes * max(span.stop for span in spans)
    )


def overlap(buckets: list[int], transfer: float = 0.8) -> list[Span]:
    """One data rank: backward, update, next forward, and the buckets' traffic. `buckets`: elements, in backward order.

    transfer: time of all reduce-scatters, as a share of a forward pass.
    """
    whole, backward = sum(buckets), 2.0
    spans = [Span(0, 0.0, backward, "B", "backward of the last micro-batch")]
    end = network = 0.0
    for index, size in enumerate(buckets):
        end += size / whole * backward
        network = max(network, end) + transfer * size / whole
        spans.append(Span(1, network - transfer * size / whole, network, "S", str(index)))
    spans.append(Span(0, network, network + 0.15, "U", ""))
    network += 0.15
    gathered = {}
    for index, size in reversed(list(enumerate(buckets))):
        spans.append(Span(1, network, network + transfer / 2 * size / whole, "G", str(index)))
        network = gathered[index] = spans[-1].stop
    clock = spans[len(buckets) + 1].stop
    for index, size in reversed(list(enumerate(buckets))):
        start = max(clock, gathered[index])
        clock = start + size / whole
        spans.append(Span(0, start, clock, "F", "forward" if index == len(buckets) // 2 else ""))
    return spans


def draw(panels: list[tuple[str, list[Span], list[str]]], path: Path) -> None:
    """One row of axes a panel (title, spans, names of the lanes), written as .svg or .png."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    heights = [len(lanes) + 1 for _, _, lanes in panels]
    figure = Figure(figsize=(11, 0.42 * sum(heights) + 0.6), layout="constrained")
    rows = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    pipelines = [
        spans for _, spans, lanes in panels if lanes[0].startswith("rank")
    ]  # these share one scale of time
    longest = max((span.stop for spans in pipelines for span in spans), default=0.0)
    for axes, (title, spans, lanes) in zip(rows, panels, strict=True):
        for span in spans:
            shade = 1.0 if span.stage < len(lanes) else 0.6
            size = span.stop - span.start
            axes.add_patch(
                Rectangle(
                    (span.start, span.lane + 0.08),
                    size,
                    0.84,
                    color=COLORS[span.kind],
                    alpha=shade,
                    linewidth=0,
                )
            )
            axes.add_patch(
                Rectangle(
                    (span.start, span.lane + 0.08),
                    size,
                    0.84,
                    fill=False,
                    edgecolor="white",
                    linewidth=0.6,
                )
            )
            axes.text(
                span.start + size / 2,
                span.lane + 0.5,
                span.label,
                ha="center",
                va="center",
                fontsize=7,
            )
        axes.set(
            xlim=(0, longest if spans in pipelines else max(s.stop for s in spans)),
            ylim=(len(lanes), 0),
            xticks=[],
        )
        axes.set_yticks([i + 0.5 for i in range(len(lanes))], lanes, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    meaning = {
        **MEANING,
        "S": "reduce-scatter of a bucket",
        "U": "norm, AdamW",
        "G": "all-gather of a bucket",
    }
    used = {span.kind for _, spans, _ in panels for span in spans}
    handles = [
        Patch(color=COLORS[kind], label=label) for kind, label in meaning.items() if kind in used
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path,
        dpi=130,
        metadata={"Date": None, "Creator": MARK} if path.suffix == ".svg" else {"Software": MARK},
    )
