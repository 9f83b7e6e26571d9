"""Back to a checkpoint after a loss spike, and past the data that led there (see data/left_out.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_completep.config.derived import samples_before
from megatron_completep.config.schema import Config
from megatron_completep.data.left_out import LeftOut, past, read_left_out, write_left_out
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.run.state import Checkpointer, RunState


class Rollbacks:
    """Those of one run's folder; every rank knows the same. Raises CheckpointError when they cannot be read."""

    def __init__(
        self,
        config: Config,
        exchange: Exchange,
        checkpointer: Checkpointer,
        say: Callable[[str], None],
    ):
        self._config, self._exchange, self._checkpointer, self._say = (
            config,
            exchange,
            checkpointer,
            say,
        )
        self._folder = Path(config.training.output_dir)
        self._done = [LeftOut(**entry) for entry in exchange.on_first(self._read)]

    def _read(self) -> list[dict[str, Any]]:
        try:
            return [asdict(entry) for entry in read_left_out(self._folder)]
        except DataError as error:  # of the kind that every rank hears of
            raise CheckpointError(str(error)) from None

    @property
    def left(self) -> int:
        """How many more guards.max_rollbacks allows."""
        return self._config.guards.max_rollbacks - len(self._done)

    def past(self, state: RunState) -> RunState:
        """The state from which the next step starts: with the data behind it that rollbacks to this step left out."""
        return replace(state, consumed_samples=past(self._done, state.step, state.consumed_samples))

    def go_back(self, spike: RunState) -> RunState | None:
        """After the step with a spike: load a checkpoint from before it; None, and nothing done, where there is none.

        A checkpoint of the step just before may hold the weights that made the spike: the newest one whose next loss was seen counts.
        Left out are the data from there up to the spike, and guards.rollback_skip_steps more. Communicates over all ranks.
        """
        good = [step for step in self._checkpointer.settled_steps() if step <= spike.step - 2]
        if not good:
            return None
        state = self._checkpointer.go_back(max(good))
        training, after = self._config.training, spike.step + 1
        beyond = samples_before(
            training, after + self._config.guards.rollback_skip_steps
        ) - samples_before(training, after)
        done = LeftOut(
            state.step,
            self.past(state).consumed_samples,
            spike.consumed_samples + beyond,
            spike.step,
        )
        self._done.append(done)
        self._exchange.on_first(lambda: write_left_out(self._folder, self._done))
        self._say(
            f"went back from step {spike.step} to step {state.step}; samples {done.first_sample}-{done.next_sample - 1} are left out "
            f"({self.left} more rollbacks allowed)"
        )
        return state
