"""Back to a checkpoint after a loss spike, and past the data that led there.

A rollback is written down before the run goes on, as a fact about the data order: "after step s, where sample a would come next, sample
b comes". Whoever passes that place again, after a kill or from an older checkpoint, jumps alike, so that the order of the data stays a
function of the run's folder and never of when the run was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_completep.config.derived import samples_before
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.training.checkpoint.exchange import Exchange
from megatron_completep.training.state import Checkpointer, RunState

ROLLBACKS = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """After step `after_step`, samples `first_left_out` .. `next_sample` - 1 are left out."""

    after_step: int
    first_left_out: int
    next_sample: int
    spike_step: int


class Rollbacks:
    """Those of one run's folder; every rank has the same."""

    def __init__(self, config: Config, exchange: Exchange, checkpointer: Checkpointer, say: Callable[[str], None]):
        self._config, self._exchange, self._checkpointer, self._say = config, exchange, checkpointer, say
        self._path = Path(config.training.output_dir) / ROLLBACKS
        self._done = [Rollback(**entry) for entry in exchange.on_first(lambda: read_entries(self._path))]

    @property
    def left(self) -> int:
        """How many more guards.max_rollbacks allows."""
        return self._config.guards.max_rollbacks - len(self._done)

    def past(self, state: RunState) -> RunState:
        """The state from which the next step starts: with the data behind it that rollbacks to this step left out."""
        for done in self._done:
            if (state.step, state.consumed_samples) == (done.after_step, done.first_left_out):
                state = replace(state, consumed_samples=done.next_sample)
        return state

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
        beyond = samples_before(training, after + self._config.guards.rollback_skip_steps) - samples_before(training, after)
        done = Rollback(state.step, self.past(state).consumed_samples, spike.consumed_samples + beyond, spike.step)
        self._done.append(done)
        self._exchange.on_first(lambda: write_entries(self._path, self._done))
        self._say(
            f"went back from step {spike.step} to step {state.step}; samples {done.first_left_out}-{done.next_sample - 1} are left out "
            f"({self.left} more rollbacks allowed)"
        )
        return state


def read_entries(path: Path) -> list[dict[str, int]]:
    """What the file holds; nothing where there is none. Raises CheckpointError for a file that says something else."""
    try:
        entries = json.loads(path.read_text()) if path.exists() else []
        return [asdict(Rollback(**{name: int(value) for name, value in entry.items()})) for entry in entries]
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a list of rollbacks ({error}). It says which data the run leaves out: restore it, or remove it to leave out none."
        ) from None


def write_entries(path: Path, entries: list[Rollback]) -> None:
    """Replace the file in one move, on disk before this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump([asdict(entry) for entry in entries], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
