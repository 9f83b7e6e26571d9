"""A picture of one optimizer step: who computes what when, and what the network does meanwhile.

The schedules are those of the trainer, asked of the library that runs them; the buckets are those
of the optimizer's layout. Durations are model units: a micro-batch's forward, input gradient and
weight gradient of a whole rank take one unit each.
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

# Importing it registers the backend "fake".
from torch.testing._internal.distributed.fake_pg import FakeStore

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
MEANING = {
    "F": "forward",
    "I": "input gradient",
    "W": "weight gradient",
    "B": "both gradients",
    "S": "reduce-scatter of a bucket",
    "U": "norm, AdamW",
    "G": "all-gather of a bucket",
}
DURATION = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
UPDATE = 0.15  # duration of norm and AdamW


@dataclass(frozen=True)
class Span:
    """One box of the picture: from `start` to `stop` in one lane. kind: a key of COLORS."""

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
    """By rank, what the library's schedule does, in order.

    Joins a process group that sends nothing, and leaves it.
    """
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        x = torch.empty(1, device="meta", requires_grad=True)
        stages = []
        for chunk in range(virtual):
            stage = PipelineStage(
                nn.Identity(),
                chunk * ranks,
                ranks * virtual,
                torch.device("cpu"),
                input_args=x,
                output_args=x,
                group=dist.group.WORLD,
            )
            stages.append(stage)
        schedule: Any = make_schedule(name, stages, micro_batches)
        # The order of all ranks: schedules of several stages have it, the others make it.
        order = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
    finally:
        dist.destroy_process_group()
    actions = []
    for rank in range(ranks):
        actions.append(_numbered([str(step) for step in order[rank] if step is not None]))
    return actions


def _numbered(names: list[str]) -> list[Action]:
    """The actions of names such as 2F0, with micro-batches counted anew.

    torch 2.13 numbers the forward passes of 1F1B's last rank from 1.
    """
    counts: Counter[tuple[int, str]] = Counter()
    actions = []
    for name in names:
        if match := re.fullmatch(r"(\d+)([FIWB])\d+", name):
            stage = int(match[1])
            kind = match[2]
            actions.append(Action(stage, kind, counts[stage, kind]))
            counts[stage, kind] += 1
    return actions


def simulate(actions: list[list[Action]], virtual: int) -> list[Span]:
    """Start and end of every action, each as early as its rank is free and its inputs are there."""
    stages = len(actions) * virtual
    done: dict[tuple[int, str, int], float] = {}
    positions = [0] * len(actions)
    free = [0.0] * len(actions)
    spans: list[Span] = []
    remaining = sum(map(len, actions))
    while len(spans) < remaining:
        before = len(spans)
        for rank, queue in enumerate(actions):
            # A rank works through its queue until an action waits for another rank.
            for action in queue[positions[rank] :]:
                ready = _ready(action, done, stages)
                if ready is None:
                    break
                start = max(free[rank], ready)
                stop = start + DURATION[action.kind] / virtual
                free[rank] = stop
                # Both gradients are an input gradient for the stage before.
                kind = "I" if action.kind == "B" else action.kind
                done[action.stage, kind, action.micro_batch] = stop
                label = str(action.micro_batch)
                spans.append(Span(rank, start, stop, action.kind, label, action.stage))
                positions[rank] += 1
        assert len(spans) > before, "the schedule waits for itself"
    return spans


def _ready(action: Action, done: dict[tuple[int, str, int], float], stages: int) -> float | None:
    """When all that the action needs is there; None while that is not known."""
    stage = action.stage
    number = action.micro_batch
    if action.kind == "F":
        needs = [(stage - 1, "F", number)] if stage else []
    elif action.kind == "W":
        needs = [(stage, "I", number)]
    else:
        needs = [(stage, "F", number)]
        if stage < stages - 1:
            needs.append((stage + 1, "I", number))
    if any(need not in done for need in needs):
        return None
    return max((done[need] for need in needs), default=0.0)


def bubble(spans: list[Span]) -> float:
    """Share of all ranks' time until the last one is done in which nothing is computed."""
    # Ranks that are done early wait for the slowest one.
    lanes = 1 + max(span.lane for span in spans)
    end = _end_of(spans)
    busy = sum(span.stop - span.start for span in spans)
    return 1 - busy / (lanes * end)


def overlap(buckets: list[int], transfer: float = 0.8) -> list[Span]:
    """One data rank: backward, update, next forward, and the buckets' traffic.

    buckets: elements, in backward order.
    transfer: time of all reduce-scatters, as a share of a forward pass; all-gathers take half.
    """
    elements = sum(buckets)
    backward = 2.0
    spans = [Span(0, 0.0, backward, "B", "backward of the last micro-batch")]

    # A bucket is reduced once backward has filled it and the network is free.
    filled = network = 0.0
    for index, size in enumerate(buckets):
        duration = transfer * size / elements
        filled += size / elements * backward
        network = max(network, filled) + duration
        spans.append(Span(1, network - duration, network, "S", str(index)))

    # The norm of all gradients comes before any update.
    update = Span(0, network, network + UPDATE, "U", "")
    spans.append(update)
    forward_order = list(enumerate(buckets))[::-1]
    gathered = {}
    network = update.stop
    for index, size in forward_order:
        start = network
        network = start + transfer / 2 * size / elements
        gathered[index] = network
        spans.append(Span(1, start, network, "G", str(index)))

    # Forward waits for the parameters of the bucket that it reaches.
    clock = update.stop
    for index, size in forward_order:
        start = max(clock, gathered[index])
        clock = start + size / elements
        label = "forward" if index == len(buckets) // 2 else ""
        spans.append(Span(0, start, clock, "F", label))
    return spans


def draw(panels: list[tuple[str, list[Span], list[str]]], path: Path) -> None:
    """One row of axes a panel (title, spans, names of the lanes), written as .svg or .png."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [len(lanes) + 1 for _, _, lanes in panels]
    figure = Figure(figsize=(11, 0.42 * sum(heights) + 0.6), layout="constrained")
    rows = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    longest = 0.0
    kinds: set[str] = set()
    for _, spans, lanes in panels:
        kinds.update(span.kind for span in spans)
        if _is_pipeline(lanes):
            longest = max(longest, _end_of(spans))
    for axes, (title, spans, lanes) in zip(rows, panels, strict=True):
        # Pipelines share one scale of time.
        end = longest if _is_pipeline(lanes) else _end_of(spans)
        _draw_panel(axes, title, spans, lanes, end)

    handles = [
        Patch(color=COLORS[kind], label=label) for kind, label in MEANING.items() if kind in kinds
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    is_svg = path.suffix == ".svg"
    metadata = {"Date": None, "Creator": MARK} if is_svg else {"Software": MARK}
    figure.savefig(path, dpi=130, metadata=metadata)


def _is_pipeline(lanes: list[str]) -> bool:
    return lanes[0].startswith("rank")


def _end_of(spans: list[Span]) -> float:
    return max(span.stop for span in spans)


def _draw_panel(axes: Any, title: str, spans: list[Span], lanes: list[str], end: float) -> None:
    for span in spans:
        _draw_span(axes, span, 1.0 if span.stage < len(lanes) else 0.6)
    axes.set(xlim=(0, end), ylim=(len(lanes), 0), xticks=[])
    axes.set_yticks([lane + 0.5 for lane in range(len(lanes))], lanes, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_span(axes: Any, span: Span, alpha: float) -> None:
    from matplotlib.patches import Rectangle

    size = span.stop - span.start
    corner = (span.start, span.lane + 0.08)
    box = Rectangle(corner, size, 0.84, color=COLORS[span.kind], alpha=alpha, linewidth=0)
    # The frame is a patch of its own, because the box may be translucent.
    frame = Rectangle(corner, size, 0.84, fill=False, edgecolor="white", linewidth=0.6)
    axes.add_patch(box)
    axes.add_patch(frame)
    center = (span.start + size / 2, span.lane + 0.5)
    axes.text(*center, span.label, ha="center", va="center", fontsize=7)
