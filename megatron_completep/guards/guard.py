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
    """Makes the guards of one run, and holds the lock on its output folder from construction on.

    The lock is taken before anything is written to the folder. Rank 0 writes there through
    `on_rank_0`, so that every rank ends with the same message if it fails.

    Args:
        watchdog: already watching; the guards report progress to it.
        say: prints a line for the user.

    Raises:
        ConfigError: another run uses the folder, or it cannot be written to.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        launch: Launch,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ):
        self.config = config
        self.context = context
        self.launch = launch
        self._watchdog = watchdog
        self._say = say
        self.folder = Path(config.training.output_dir)
        # A process group of its own, so that guards never mix with what training communicates.
        self.exchange = Exchange(context, config.parallel.timeout_minutes)
        self._lock: OutputLock | None = None
        self.on_rank_0(self._take_lock)

    def _take_lock(self) -> None:
        self._lock = OutputLock(self.folder, self.config.guards.lock_wait_seconds)

    def on_rank_0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 alone. A user error that it raises is raised on every rank."""

        def act() -> None:
            action()  # its result is dropped: the exchange would have to send it as JSON

        self.exchange.on_rank_0(act)

    def check_restart_progress(self, step: int) -> None:
        """Record that the run resumed at `step`, and check that restarts make progress.

        Raises RunStopped, on every rank, if several restarts have got no further than this step.
        """
        # The launcher counts restarts within one launch: after a start by hand the count is 0.
        limit = self.config.guards.max_restarts_without_progress
        self.on_rank_0(lambda: note_start(self.folder, self.launch.restart_count, step, limit))

    def rollbacks(self, checkpointer: Checkpointer) -> Rollbacks:
        """Makes the run go back to a checkpoint; counts the rollbacks of earlier launches, too."""
        return Rollbacks(self.config, self.exchange, checkpointer, self._say)

    def hooks(self, step: TrainingStep, state: RunState, rollbacks: Rollbacks) -> list[Hook]:
        """The hooks that watch every step after `state`."""
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

    def heartbeat(self) -> None:
        """Tell the watchdog that the save or load that training waits for makes progress."""
        self._watchdog.heartbeat()

    def close(self) -> None:
        """Release the folder: the run is over, and another may have it."""
        if self._lock is not None:
            self._lock.release()
