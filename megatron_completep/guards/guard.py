"""All guards of one run, from its start to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_completep.config.schema import Config
from megatron_completep.guards.hooks import guard_hooks
from megatron_completep.guards.lock import OutputLock
from megatron_completep.guards.restarts import note_start
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.guards.watchdog import Watchdog
from megatron_completep.launch import Launch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.run.hook import Hook
from megatron_completep.run.state import Checkpointer, RunState
from megatron_completep.run.step import TrainingStep


class Guard:
    """Takes the output folder's lock at once, before anything is written there. Raises ConfigError when another run has it.

    What only rank 0 does in that folder, and may not be able to do, goes through `on_first`: every rank leaves with the same message.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        launch: Launch,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ):
        self.config, self.context, self.launch, self._watchdog, self._say = (
            config,
            context,
            launch,
            watchdog,
            say,
        )
        self.folder = Path(config.training.output_dir)
        self.exchange = Exchange(context, config.parallel.timeout_minutes)
        self._lock: OutputLock | None = None
        self.on_first(self._take_lock)

    def _take_lock(self) -> None:
        self._lock = OutputLock(self.folder, self.config.guards.lock_wait_seconds)

    def on_first(self, action: Callable[[], object]) -> None:
        """Do something on rank 0 alone. A mistake of the user's that it finds is raised on every rank."""

        def act() -> None:
            action()

        self.exchange.on_first(act)

    def note_start(self, step: int) -> None:
        """The run resumed at `step`. Every rank leaves with the code of RunStopped when restarts get nowhere."""
        limit = self.config.guards.max_restarts_without_progress
        self.on_first(lambda: note_start(self.folder, self.launch.restart_count, step, limit))

    def rollbacks(self, checkpointer: Checkpointer) -> Rollbacks:
        """Returns to checkpoints, those of earlier starts in this folder included."""
        return Rollbacks(self.config, self.exchange, checkpointer, self._say)

    def hooks(self, step: TrainingStep, state: RunState, rollbacks: Rollbacks) -> list[Hook]:
        """The guards that watch every step after `state`."""
        return guard_hooks(
            self.config,
            self.context,
            step.optimizer,
            state,
            self._watchdog,
            rollbacks,
            self.exchange,
            self._say,
        )

    def still_here(self) -> None:
        """What training waits for gets on: no hang, although no step comes."""
        self._watchdog.stay()

    def close(self) -> None:
        """The run is over: another may have the folder."""
        if self._lock is not None:
            self._lock.release()
