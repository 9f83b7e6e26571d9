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
    """Writes what the profiler recorded to the folder `profile` of the run.

    `trace_*.json.gz` is for chrome://tracing or ui.perfetto.dev. With profiling.memory, allocations
    are in `memory_*.pickle` of a GPU (for pytorch.org/memory_viz), or in `memory_*.txt`, by
    operation, elsewhere.
    """

    def __init__(
        self,
        settings: ProfilingConfig,
        context: ParallelContext,
        output_dir: Path,
        say: Callable[[str], None],
    ):
        assert settings.first_step is not None
        self._first_step = settings.first_step
        self._last_step = settings.first_step + settings.steps - 1
        self._on_gpu = context.device.type == "cuda"
        self._memory = settings.memory
        self._say = say
        self._folder = output_dir / FOLDER
        self._name = f"rank_{context.rank:05d}_steps_{self._first_step}_{self._last_step}"
        self._running: profile | None = None

    def due(self, step: int) -> bool:
        """True before the window and at its end: it must hold complete steps of the device."""
        return step in (self._first_step - 1, self._last_step)

    def before_step(self, step: int) -> None:
        if step != self._first_step or self._running is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        if self._on_gpu and self._memory:
            # Private functions: torch has no public ones for the history.
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self._running = profile(
            activities=activities, record_shapes=True, profile_memory=self._memory
        )
        self._running.start()

    def after_step(self, record: StepRecord) -> None:
        if record.state.step == self._last_step:
            self.close()

    def close(self) -> None:
        """Write what was recorded. The run may end within the window."""
        if self._running is None:
            return
        recorded = self._running
        self._running = None
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
        self._say(f"profile of steps {self._first_step} to {self._last_step}: {trace}")
