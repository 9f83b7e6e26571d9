"""Saves and resumes one run. Unless a method says otherwise, all ranks must call it.

A save writes the optimizer's states, each rank its own part, to the shared disk or as a snapshot to
the disks of the nodes. It may go on in the background while training continues. A load reads each
byte once per job, checks all of it, and puts it in place only when every rank has its part.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_completep.checkpoint import random_state
from megatron_completep.checkpoint.background import Background
from megatron_completep.checkpoint.data_order import DataOrder, describe_order
from megatron_completep.checkpoint.identity import (
    describe_layout,
    identity_for,
    versions,
)
from megatron_completep.checkpoint.joint import JointReader, Source
from megatron_completep.checkpoint.manifest import committed_steps
from megatron_completep.checkpoint.places import (
    Place,
    Snapshot,
    find_snapshots,
    local_place,
    prepare,
    shared_place,
    shared_source,
    snapshot_source,
    snapshots_of_others,
)
from megatron_completep.checkpoint.resume_check import ResumeCheck, progress_of
from megatron_completep.checkpoint.retention import Removal
from megatron_completep.checkpoint.run_number import Run, identify_run, renumber
from megatron_completep.checkpoint.save import FailPoint, Staging, write_checkpoint
from megatron_completep.checkpoint.shard import Shard, describe_parameters
from megatron_completep.completep import Table
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.kernels.control import STEP
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.exchange import Exchange, LongWork, describe
from megatron_completep.run.state import RunState

CHECKPOINTS = "checkpoints"


def no_fail_point(name: str) -> None:
    """The fail point that production passes: nothing happens."""


@dataclass(frozen=True)
class SaveReport:
    """What a call of `save` cost the training loop."""

    blocked_seconds: float  # waiting for the save before this one, and copying
    bytes: int  # written by this rank


class Checkpointer:
    """Saves and loads the state of one run, which the optimizer holds.

    Of a parameter only the master is stored: the weight is the rounded master. Construction is
    collective.

    Args:
        optimizer: owns the parameters, the masters and the states of the update rule.
        fingerprints: what identifies data and tokenizer; it must agree at resume.
        report: told what happens, on every rank.
        fail_point: called at named places; only tests pass one that does something.
        data_order: the order of the training samples, stored with each checkpoint and compared at
            resume.
        heartbeat: called while training waits for a save or a load that makes progress.
        products: the library that computes the run's matrix products.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        optimizer: DistributedOptimizer,
        table: Table,
        fingerprints: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = print,
        fail_point: FailPoint = no_fail_point,
        data_order: DataOrder | None = None,
        heartbeat: Callable[[], None] = lambda: None,
        products: str = "torch",
    ):
        self.config = config
        self.context = context
        self.optimizer = optimizer
        self._report = report
        self._fail_point = fail_point
        self._data_order = data_order
        self._heartbeat = heartbeat
        self._products = products

        settings = config.checkpoint
        self._exchange = Exchange(context, settings.timeout_minutes)
        # Ranks whose writing takes long tell each other so, well before one takes another for dead.
        hang_minutes = config.guards.hang_timeout_minutes or math.inf
        self._round_seconds = 60 * min(settings.timeout_minutes, hang_minutes) / 5

        self._shard = Shard.of(optimizer, context)
        self._staging = Staging()
        self._background = Background() if settings.async_save else None
        # What the save in the background leaves for the training thread.
        self._failure: str | None = None
        self._figures: dict[str, float] = {}
        self._training_waits = False

        # Together the ranks know all parameters of the model.
        own_parameters = describe_parameters(optimizer, self._shard.dtype)
        self._parameters: dict[str, dict[str, Any]] = {}
        for parameters_of_rank in self._exchange.all_gather(own_parameters):
            self._parameters |= parameters_of_rank
        self._identity = identity_for(config, table, fingerprints or {}, self._parameters)
        self._resume_check = ResumeCheck(
            config, self._identity, optimizer.states, data_order, report, products
        )

        self.folder = Path(config.training.output_dir) / CHECKPOINTS
        own_bytes = self._shard.bytes_to_write
        self._shared = shared_place(
            self.folder, self._exchange, own_bytes, settings.keep, settings.keep_every
        )
        self._run = self._identify()
        self._local: Place | None = None
        if settings.local_dir is not None:
            self._local = self._local_place(Path(settings.local_dir), own_bytes)
        for place in self._places:
            prepare(place, self._exchange, report)

    @property
    def _places(self) -> list[Place]:
        return [self._shared] if self._local is None else [self._shared, self._local]

    def _identify(self) -> Run:
        """Which run this is, the same on every rank; a copy of another one gets a new number."""

        def identify() -> list[Any]:
            run, line = identify_run(self.folder.parent)
            return [run.to_json(), line]  # the exchange sends JSON

        run_fields, line = self._exchange.on_rank_0(identify)
        if line is not None:
            self._report(line)
        return Run.from_json(run_fields)

    def _local_place(self, local_dir: Path, own_bytes: int) -> Place:
        """The place of this run's snapshots.

        If it holds another run's snapshots, this run takes another number, and with it another
        place.
        """
        exchange = self._exchange
        keep = self.config.checkpoint.local_keep
        place = local_place(local_dir, self._run, exchange, own_bytes, keep)
        foreign_snapshots = snapshots_of_others(place, self._run, exchange)
        if not foreign_snapshots:
            return place
        for line in foreign_snapshots:
            self._report(f"left out: {line}")
        run_fields = exchange.on_rank_0(lambda: renumber(self.folder.parent).to_json())
        self._run = Run.from_json(run_fields)
        self._report(
            f"{self.folder.parent} had the same run number as that run; "
            f"its number is {self._run.number} from now on"
        )
        return local_place(local_dir, self._run, exchange, own_bytes, keep)

    # --- saving --------------------------------------------------------------------------------

    def save(self, state: RunState, local: bool = False) -> SaveReport:
        """Save the run as it stands. Waits for the save before it.

        With checkpoint.async_save the files are written while training goes on. Raises
        CheckpointError, on every rank, when the save before failed (or this one, without
        async_save) and checkpoint.on_failure is `stop`.

        local: save a snapshot in checkpoint.local_dir.
        """
        started = time.perf_counter()
        self._wait()
        self._raise_failure()
        # Without a place for snapshots, every save goes to the shared disk.
        place = self._local if local and self._local is not None else self._shared
        content = self._content(state)
        if place is not self._shared:
            content["run"] = self._run.writer.model_dump()

        flats: Mapping[str, Tensor] = self.optimizer.states
        if self._background is not None:
            # Training changes the states when this call returns, so a copy of them is written.
            flats = self._staging.copy(flats)
            self._fail_point("save.staged")
            self._background.start(lambda: self._write(place, flats, content))
        else:
            with self._waiting():
                self._write(place, flats, content)
            self._raise_failure()

        blocked = time.perf_counter() - started
        self._figures["checkpoint_blocked_seconds"] = blocked
        return SaveReport(blocked, self._shard.bytes_to_write)

    def take_figures(self) -> dict[str, float]:
        """This rank's figures for the metrics, since the last call. Not collective.

        They are the seconds that `save` blocked and that writing took, and whether a save failed.
        """
        figures = self._figures
        self._figures = {}
        return figures

    def close(self) -> None:
        """Wait until what was handed to `save` is on disk.

        Raises CheckpointError when it is not, unless another error is on its way already.
        """
        self._wait()
        if self._failure is not None and sys.exc_info()[0] is None:
            failure = self._failure
            self._failure = None
            raise CheckpointError(failure)

    finish = close

    def _write(self, place: Place, flats: Mapping[str, Tensor], content: dict[str, Any]) -> None:
        """One save, in the training thread or in the background.

        It raises nothing: a failure is kept for the training thread to act on.
        """
        started = time.perf_counter()
        leads = self._exchange.rank == place.leader
        try:
            warning = self._exchange.together(lambda: place.make_room() if leads else None)
            if warning is not None:
                self._report(warning)
            work = LongWork(self._exchange, self._round_seconds, self._progress)
            folder = write_checkpoint(
                place.folder,
                leads,
                self._exchange,
                self._shard,
                flats,
                content,
                self._fail_point,
                work,
            )
            self._remove_older(place, content["step"])
        # After the death of a rank this may be a RuntimeError of the exchange. It is handled like a
        # failed save, because training communicates with that rank as well and fails by itself.
        except Exception as error:
            self._failure = f"checkpoint of step {content['step']} failed: {describe(error)}"
            self._figures["checkpoint_failed"] = 1.0
            self._report(self._failure)
            return
        seconds = time.perf_counter() - started
        self._figures["checkpoint_seconds"] = seconds
        if self.context.is_first:
            self._report(f"saved {folder} ({place.bytes / 1e6:.1f} MB in {seconds:.2f} s)")

    def _remove_older(self, place: Place, step: int) -> None:
        """Remove what the new checkpoint of `step` supersedes.

        These are older checkpoints of its place that need not be kept and, if it is on the shared
        disk, the snapshots up to its step. One that cannot be removed does no harm to the new
        checkpoint: it is reported, after every save.
        """

        def remove_own() -> list[str]:
            problems = []
            if self._exchange.rank == place.leader:
                problems += place.retire(self._progress).problems
                self._fail_point("save.older_ones_removed")
            if place is self._shared:
                # A checkpoint that every rank can read supersedes a snapshot of the same step too.
                problems += self._remove(self._local, lambda snapshot_step: snapshot_step <= step)
            return problems

        problems = []
        try:
            for own_problems in self._exchange.all_gather(self._exchange.together(remove_own)):
                problems += own_problems
        except CheckpointError as error:  # the same on every rank
            problems = [str(error)]
        for problem in problems:
            self._report(
                f"warning: the checkpoint of step {step} is saved, "
                f"but an older one could not be removed: {problem}"
            )

    def _remove(self, place: Place | None, doomed: Callable[[int], bool]) -> list[str]:
        """Remove checkpoints where this rank leads; returns what could not be removed, and why.

        doomed: whether to remove the checkpoint of a step.
        """
        removal = Removal()
        if place is not None and self._exchange.rank == place.leader:
            for step, folder in committed_steps(place.folder).items():
                if doomed(step):
                    removal.remove(folder)
        return removal.problems

    def _wait(self) -> None:
        """Wait for the save in the background."""
        if self._background is not None:
            with self._waiting():
                self._background.wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While training waits here no step ends, so `heartbeat` is called at each progress."""
        before = self._training_waits
        self._training_waits = True
        try:
            yield
        finally:
            self._training_waits = before

    def _progress(self) -> None:
        """Called after each block of a save or a load, by the thread that does the work."""
        if self._training_waits:
            self._heartbeat()

    def _raise_failure(self) -> None:
        """Act on the failure of the last save, if any.

        All ranks come here between the same two steps, so they act alike.
        """
        failure = self._failure
        self._failure = None
        if failure is not None and self.config.checkpoint.on_failure == "stop":
            raise CheckpointError(
                f"{failure}\nStopped, because checkpoint.on_failure = stop. "
                "Older checkpoints are intact."
            )

    def _content(self, state: RunState) -> dict[str, Any]:
        """The fields of the manifest that are known before anything is written."""
        order = None
        if self._data_order is not None:
            order = describe_order(self._data_order, state.consumed_samples)
        return {
            "step": state.step,
            "state": asdict(state),
            "updates": float(self.optimizer.control[STEP]),
            "config": self.config.model_dump(mode="json"),
            "table": self._identity["table"],
            "fingerprints": self._identity["fingerprints"],
            "order": order,
            "layout": describe_layout(self.config, self.context),
            "rng": random_state.capture(),
            "versions": versions(self._products),
            "states": self.optimizer.rule.all_powers(),
            "parameters": self._parameters,
        }

    # --- loading -------------------------------------------------------------------------------

    def load_latest(self) -> RunState | None:
        """Load the newest state that all ranks can read; None if there is none.

        A snapshot that is not complete, or whose bytes are damaged, is reported and left out.
        Raises CheckpointError, on every rank, if the newest checkpoint on the shared disk is
        damaged (the error names the file and the bytes), or belongs to another model,
        parameterization or data.
        """
        newest = self._exchange.on_rank_0(lambda: max(committed_steps(self.folder), default=None))
        snapshots = []
        if self._local is not None:
            snapshots = find_snapshots(self._local, self._exchange, self._report)
        if not self.config.checkpoint.resume:
            self._refuse_existing(newest, snapshots)

        # A snapshot that is no newer than the checkpoint has nothing to offer.
        for snapshot in snapshots:
            if newest is not None and snapshot.step <= newest:
                break
            state = self._load_snapshot(snapshot)
            if state is not None:
                return state
        return None if newest is None else self.load(newest)

    def _refuse_existing(self, newest: int | None, snapshots: list[Snapshot]) -> None:
        """Raise CheckpointError if there is a state, although the run must not resume."""
        if newest is not None:
            existing = f"checkpoint of step {newest}"
        elif snapshots:
            existing = f"snapshot of step {snapshots[0].step}"
        else:
            return
        raise CheckpointError(
            f"{self.folder} holds a {existing}, but checkpoint.resume = false. "
            "Use another training.output_dir, or move the folder away."
        )

    def load(self, step: int) -> RunState:
        """Load one checkpoint of the shared disk. Raises CheckpointError as `load_latest` does."""
        self._wait()
        self._exchange.on_rank_0(lambda: self._require(step))
        source = shared_source(self._shared, step, self._exchange)
        # Before any tensor is read: reading a large checkpoint takes minutes.
        self._resume_check.compare(source.folder, source.manifest)
        return self._read(source)

    def settled_steps(self) -> list[int]:
        """The steps of the checkpoints on the shared disk, lowest first, the same on every rank.

        Waits for the save that is under way.
        """
        self._wait()
        steps: list[int] = self._exchange.on_rank_0(lambda: list(committed_steps(self.folder)))
        return steps

    def go_back(self, step: int) -> RunState:
        """Load the checkpoint of `step`, and remove later ones at every place.

        Those belong to the trajectory that is abandoned, and a restart must not find them.
        """
        self._wait()
        self._exchange.on_rank_0(lambda: self._require(step))
        # Parameters that are still on their way belong to the step that is undone.
        self.optimizer.wait_for_parameters()
        # The load comes before anything is removed, as the checkpoint may be damaged.
        with self._waiting():
            state = self.load(step)
        for place in self._places:
            self._exchange.together(partial(self._remove_later, place, step))
        return state

    def _remove_later(self, place: Place, step: int) -> None:
        problems = self._remove(place, lambda later_step: later_step > step)
        if problems:
            title = "these checkpoints must go, or a restart would continue from them:"
            raise CheckpointError("\n".join([title, *problems]))

    def _load_snapshot(self, snapshot: Snapshot) -> RunState | None:
        """Load a snapshot. If its bytes cannot be read, report why and return None.

        Raises CheckpointError if it can be read, but belongs to another model or other data.
        """
        assert self._local is not None
        prefix = f"the snapshot of step {snapshot.step} is not used"
        if snapshot.missing:
            self._report(f"{prefix}: no rank has {', '.join(snapshot.missing[:4])}")
            return None
        try:
            source = snapshot_source(self._local, snapshot, self._exchange)
        except CheckpointError as error:
            self._report(f"{prefix}: {error}")
            return None
        # Outside of a try: a mistake of the user must not look like an unreadable snapshot.
        self._resume_check.compare(source.folder, source.manifest)
        try:
            return self._read(source)
        except CheckpointError as error:
            self._report(f"{prefix}: {error}")
            return None

    def _read(self, source: Source) -> RunState:
        """Read everything, each byte once per job, and check it; only then put it in place.

        A CheckpointError leaves weights, states and generators as they were, on every rank.
        """
        started = time.perf_counter()
        optimizer = self.optimizer
        replica = self.context.replica
        manifest = source.manifest
        reader = JointReader(self._exchange, source, self._progress)
        state = self._exchange.together(lambda: progress_of(manifest))

        # Tensors are read into host memory; saves in the background have allocated it anyway. It
        # first gets a copy of the present states, because a checkpoint does not hold every element
        # of them: the padding of the vocabulary keeps its values.
        staged: dict[str, Tensor] = {}
        if replica.rank == 0:
            staging = self._staging if self._background is not None else Staging()
            staged = staging.copy(optimizer.states)
        targets = []
        for name, flat in staged.items():
            targets += [(box, name, flat) for box in self._shard.owned[name]]
        reader.fill(targets)

        # `fill` has raised on every rank or on none, so from here on nothing can be refused.
        for name, flat in optimizer.states.items():
            if staged:
                flat.copy_(staged[name])
            # The other replicas of a shard have read nothing; they receive its states here.
            if replica.group is not None:
                dist.broadcast(flat, group=replica.group, group_src=0)
        optimizer.control[STEP] = manifest.updates
        optimizer.shards.load_from_masters()
        random_state.restore(manifest.rng)

        bytes_read = sum(self._exchange.all_gather(reader.bytes_read))
        if self.context.is_first:
            share = bytes_read / manifest.total_size
            seconds = time.perf_counter() - started
            self._report(
                f"loaded {source.folder} ({manifest.total_size / 1e6:.1f} MB "
                f"read {share:.2f} times in {seconds:.2f} s)"
            )
        return state

    def _require(self, step: int) -> None:
        """Raise CheckpointError if there is no checkpoint of this step."""
        if step not in committed_steps(self.folder):
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}.")
