"""A window of steps recorded with torch's profiler, on the ranks that the configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_completep.config.schema import ProfilingConfig
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.hook import Hook, StepRecord

FOLDER = "profile"
ALLOCATIONS = 200_000  # newest allocations and frees that a memory snapshot holds


class Profiler(Hook):
    """Writes `trace_*.json.gz` (for chrome://tracing or ui.perfetto.dev) and, with profiling.memory, what was allocated:
    `memory_*.pickle` of a GPU (for pytorch.org/memory_viz), `memory_*.txt` by operation elsewhere."""

    def __init__(
        self,
        settings: ProfilingConfig,
        context: ParallelContext,
        output_dir: Path,
        say: Callable[[str], None],
    ):
        assert settings.first_step is not None
        self._first, self._last = settings.first_step, settings.first_step + settings.steps - 1
        self._on_gpu, self._memory, self._say = context.device.type == "cuda", settings.memory, say
        self._folder = output_dir / FOLDER
        self._name = f"rank_{context.rank:05d}_steps_{self._first}_{self._last}"
        self._running: profile | None = None

    def due(self, step: int) -> bool:
        """The window holds whole steps: the device has nothing to do when it begins and when it ends."""
        return step in (self._first - 1, self._last)

    def before_step(self, step: int) -> None:
        if step != self._first or self._running is not None:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu and self._memory:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self._running = profile(
            activities=activities, record_shapes=True, profile_memory=self._memory
        )
        self._running.start()

    def after_step(self, record: StepRecord) -> None:
        if record.state.step == self._last:
            self.close()

    def close(self) -> None:
        """Write what was recorded; the run may end within the window."""
        if self._running is None:
            return
        recorded, self._running = self._running, None
        recorded.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace_{self._name}.json.gz"
        recorded.export_chrome_trace(str(trace))
        if self._on_gpu and self._memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{self._name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        elif self._memory:
            table = recorded.key_averages(group_by_input_shape=True).table(
                sort_by="self_cpu_memory_usage", row_limit=200
            )
            (self._folder / f"memory_{self._name}.txt").write_text(table)
        self._say(f"profile of steps {self._first} to {self._last}: {trace}")
