"""Rollbacks: back to a checkpoint after a loss spike, and past the data that led to it.

What a rollback leaves out of the data is recorded in the run's folder, see data/left_out.py.
"""

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
    """The rollbacks of one run, those of earlier launches included; every rank knows the same.

    Construction is collective. Raises CheckpointError when the record of them cannot be read.
    """

    def __init__(
        self,
        config: Config,
        exchange: Exchange,
        checkpointer: Checkpointer,
        say: Callable[[str], None],
    ):
        self._config = config
        self._exchange = exchange
        self._checkpointer = checkpointer
        self._say = say
        self._folder = Path(config.training.output_dir)
        self._done = [LeftOut(**entry) for entry in exchange.on_rank_0(self._read)]

    def _read(self) -> list[dict[str, Any]]:
        try:
            return [asdict(entry) for entry in read_left_out(self._folder)]
        except DataError as error:
            # `on_rank_0` raises a CheckpointError with this text on every rank.
            raise CheckpointError(str(error)) from None

    @property
    def remaining(self) -> int:
        """How many more rollbacks guards.max_rollbacks allows."""
        return self._config.guards.max_rollbacks - len(self._done)

    def skip_left_out_data(self, state: RunState) -> RunState:
        """`state`, moved behind the data that a rollback removed there: the next step's start."""
        next_sample = past(self._done, state.step, state.consumed_samples)
        return replace(state, consumed_samples=next_sample)

    def go_back(self, spike: RunState) -> RunState | None:
        """Load a checkpoint from before the step with the spike, and return its state.

        The data from there up to the spike are left out, and those of guards.rollback_skip_steps
        more steps. Communicates over all ranks. Returns None, with nothing changed, where there is
        no such checkpoint.

        spike: the state after the step with the spike.
        """
        # The weights saved just before that step may be what caused the spike. Those of a
        # checkpoint whose next loss was seen are sound.
        steps = [step for step in self._checkpointer.settled_steps() if step <= spike.step - 2]
        if not steps:
            return None
        state = self._checkpointer.go_back(max(steps))

        # Counted from the planned start of the next step, as batch_ramp changes the batch size.
        training = self._config.training
        next_step = spike.step + 1
        resumed_step = next_step + self._config.guards.rollback_skip_steps
        skipped = samples_before(training, resumed_step) - samples_before(training, next_step)

        # The checkpoint may lie where an earlier rollback leaves data out already: this one begins
        # behind them.
        first_sample = self.skip_left_out_data(state).consumed_samples
        next_sample = spike.consumed_samples + skipped
        self._done.append(LeftOut(state.step, first_sample, next_sample, spike.step))
        self._exchange.on_rank_0(lambda: write_left_out(self._folder, self._done))
        self._say(
            f"went back from step {spike.step} to step {state.step}; "
            f"samples {first_sample}-{next_sample - 1} are left out "
            f"({self.remaining} more rollbacks allowed)"
        )
        return state
