"""How much of the ideal a run keeps that is killed again and again:
effective training time at a stated kill rate.

    python -m tests.faults.effective_time --kill-every 120 --kills 2

Two ranks train the harness's tiny model, with asynchronous checkpoints and snapshots; every so
often one of them is killed with signal 9, and the run is started again. Ideal: the same number of
steps at the pace of two runs that save nothing and are not interrupted, one before and one after.
Restart cost: from each start until the first step is done.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_completep.telemetry.metrics import read_metrics
from tests.faults.harness import Fault, Ranks, start, write_corpus

COMMON = [
    "guards.replica_check_interval=null",
    "logging.parameterization_interval=null",
    "logging.interval=1000",
]
SAVING = ["checkpoint.interval=1000", "checkpoint.local_interval=400", "checkpoint.async_save=true"]


@dataclass(frozen=True)
class Effect:
    """Seconds, and shares of the ideal."""

    kills: int
    seconds_between_kills: float
    steps: int
    steps_done_again: int
    ideal_seconds: float
    wall_seconds: float
    restart_seconds: float  # of all restarts, not of the first start
    first_start_seconds: float

    @property
    def with_restarts(self) -> float:
        """Share of the time from the end of the first start that an ideal run would have needed."""
        return self.ideal_seconds / (self.wall_seconds - self.first_start_seconds)

    @property
    def without_restarts(self) -> float:
        return self.ideal_seconds / (
            self.wall_seconds - self.first_start_seconds - self.restart_seconds
        )


def measure(folder: Path, kill_every: float, kills: int, seed: int = 0) -> Effect:
    """Train about kills * kill_every seconds, killed so often."""
    before = seconds_a_step(folder / "before", kill_every / 4)
    steps = round((kills + 0.5) * kill_every / before)
    config = new_run(folder / "killed")
    overrides = [
        *COMMON,
        *SAVING,
        f"training.train_steps={steps}",
        f"checkpoint.local_dir={folder}/node_RANK",
    ]
    random_times, restarts, again, reached, killed = random.Random(seed), [], 0, 0, 0
    began = time.monotonic()
    while reached < steps:
        ranks = start(config, Fault(), overrides=overrides, restart_count=len(restarts))
        resumed_at = wait_for_first_step(config, ranks)
        restarts.append(time.monotonic() - ranks.started)
        again += max(0, reached - resumed_at)
        if killed < kills:
            victim = ranks.processes[killed % 2]
            victim.join(max(0.0, kill_every * random_times.uniform(0.6, 1.4) - restarts[-1]))
            killed += victim.is_alive()
            victim.kill()
        outcome = ranks.wait(600 + 20 * kill_every)
        assert killed or outcome.exit_codes == [0, 0], outcome.output
        reached = last_step(config)
    wall = time.monotonic() - began
    after = seconds_a_step(folder / "after", kill_every / 4)
    ideal = steps * statistics.mean((before, after))
    return Effect(killed, kill_every, steps, again, ideal, wall, sum(restarts[1:]), restarts[0])


def seconds_a_step(folder: Path, seconds: float) -> float:
    """Of a run of about so many seconds that saves nothing:
    from its first step to its end, everything counted.
    """
    steps, mean = 100, 0.0
    for name in ("short", "long"):  # the short run says how long the long one is
        config = new_run(folder / name)
        ranks = start(
            config, overrides=[*COMMON, "checkpoint.interval=null", f"training.train_steps={steps}"]
        )
        wait_for_first_step(config, ranks)
        began = time.monotonic()
        outcome = ranks.wait(600)
        assert outcome.exit_codes == [0, 0], outcome.output
        mean = (time.monotonic() - began) / (steps - 1)
        steps = max(200, round(seconds / mean))
    return mean


def new_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return write_corpus(folder)


def last_step(config: Path) -> int:
    """The last step in the metrics, 0 where there is none."""
    path = config.parent / "run" / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def wait_for_first_step(config: Path, ranks: Ranks) -> int:
    """Wait until the first step after a start is done;
    returns the step that the run resumed from.
    """
    path = config.parent / "run" / "metrics.jsonl"
    while True:
        alive = all(process.is_alive() for process in ranks.processes)
        text = "".join(log.read_text() for log in ranks.logs)
        if "first step" in text and path.exists():
            _, _, rest = text.partition("resumed after step ")
            return int(rest.split()[0]) if rest else 0
        if not alive:
            raise AssertionError(ranks.wait().output)
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kill-every", type=float, default=120.0, help="mean seconds between kills (default: 120)"
    )
    parser.add_argument("--kills", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        effect = measure(Path(folder), arguments.kill_every, arguments.kills)
    if arguments.json:
        print(
            json.dumps(
                {
                    **asdict(effect),
                    "with_restarts": effect.with_restarts,
                    "without_restarts": effect.without_restarts,
                }
            )
        )
        return
    print(
        f"effective training time with a kill -9 every {effect.seconds_between_kills:g} s "
        f"({effect.kills} kills, {effect.steps} steps, "
        f"{effect.steps_done_again} of them done again):\n"
        f"  {100 * effect.with_restarts:.1f} % of the ideal, the cost of restarts included "
        f"({effect.restart_seconds / max(1, effect.kills):.2f} s each)\n"
        f"  {100 * effect.without_restarts:.1f} % without it"
    )


if __name__ == "__main__":
    main()
