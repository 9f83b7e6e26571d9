"""Saves and resumes one run. All ranks make every call."""

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
from megatron_completep.checkpoint.compare import changed_settings, differences, refused, show
from megatron_completep.checkpoint.data_order import DataOrder, compare_order, describe_order
from megatron_completep.checkpoint.identity import (
    describe_layout,
    identity_for,
    identity_of,
    refusal,
    versions,
)
from megatron_completep.checkpoint.joint import JointReader, Source
from megatron_completep.checkpoint.manifest import Manifest, committed_steps
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
    """What production passes: nothing happens at a named place."""


@dataclass(frozen=True)
class SaveReport:
    """What a call of `save` cost the training loop."""

    blocked_seconds: float  # waiting for the save before this one, and copying
    bytes: int  # written by this rank


class Checkpointer:
    """Over one run's optimizer (which owns the parameters) and configuration. Weights are not stored beside the masters they are
    rounded from.

    fingerprints: what identifies data and tokenizer; must agree at resume. report: told what happens, on every rank.
    fail_point: called at named places; tests break them. order: of the training samples, kept with each checkpoint and compared.
    still_here: called while training waits for a save or a load that gets on.
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
        order: DataOrder | None = None,
        still_here: Callable[[], None] = lambda: None,
    ):
        self._order = order
        self.config, self.context, self.optimizer = config, context, optimizer
        self._report, self._fail_point, self._still_here = report, fail_point, still_here
        self._training_waits = False
        patience = min(
            config.checkpoint.timeout_minutes, config.guards.hang_timeout_minutes or math.inf
        )  # of whoever waits for others
        self._round_seconds = 60 * patience / 5
        self._exchange = exchange = Exchange(context, config.checkpoint.timeout_minutes)
        self._shard = Shard.of(optimizer, context)
        self._staging = Staging()
        self._background = Background() if config.checkpoint.async_save else None
        self._failure: str | None = None
        self._figures: dict[str, float] = {}
        described = exchange.all_gather(describe_parameters(optimizer, self._shard.dtype))
        self._parameters = {name: value for part in described for name, value in part.items()}
        self._identity = identity_for(config, table, fingerprints or {}, self._parameters)
        settings, size = config.checkpoint, self._shard.written_bytes
        self.folder = Path(config.training.output_dir) / CHECKPOINTS
        self._shared = shared_place(self.folder, exchange, size, settings.keep, settings.keep_every)
        self._run = self._identify()
        self._local: Place | None = None
        if settings.local_dir is not None:
            self._local = self._local_place(Path(settings.local_dir), size)
        for place in self._places:
            prepare(place, exchange, report)

    @property
    def _places(self) -> list[Place]:
        return [self._shared, *([self._local] if self._local is not None else [])]

    def _identify(self) -> Run:
        """Which run this is, the same on every rank; a copy of another one gets a number of its own."""

        def on_first() -> list[Any]:
            run, said = identify_run(self.folder.parent)
            return [run.to_json(), said]

        run, said = self._exchange.on_first(on_first)
        if said is not None:
            self._report(said)
        return Run.from_json(run)

    def _local_place(self, local_dir: Path, size: int) -> Place:
        """The place of this run's snapshots. Where another run's lie in it, this run takes another number, and with it another place."""
        exchange, keep = self._exchange, self.config.checkpoint.local_keep
        place = local_place(local_dir, self._run, exchange, size, keep)
        others = snapshots_of_others(place, self._run, exchange)
        if not others:
            return place
        for line in others:
            self._report(f"left out: {line}")
        self._run = Run.from_json(exchange.on_first(lambda: renumber(self.folder.parent).to_json()))
        self._report(
            f"{self.folder.parent} and that run had one number; this one has {self._run.number} from now on"
        )
        return local_place(local_dir, self._run, exchange, size, keep)

    # --- saving -----------------------------------------------------------------------------------------------------------

    def save(self, state: RunState, local: bool = False) -> SaveReport:
        """Save the run as it stands; with checkpoint.async_save the files are written while training goes on.

        local: as a snapshot in checkpoint.local_dir. Waits for the save before it. Raises CheckpointError, on every rank, when
        that one failed (or this one, without async_save) and checkpoint.on_failure is `stop`.
        """
        started = time.perf_counter()
        self._wait()
        self._raise_failure()
        place = self._local if local and self._local is not None else self._shared
        content = self._content(state)
        if place is not self._shared:
            content["run"] = self._run.writer.model_dump()
        flats: Mapping[str, Tensor] = self.optimizer.states
        if self._background is not None:
            flats = self._staging.copy(flats)
            self._fail_point("save.staged")
            self._background.start(lambda: self._write(place, flats, content))
        else:
            with self._waiting():
                self._write(place, flats, content)
            self._raise_failure()
        blocked = time.perf_counter() - started
        self._figures["checkpoint_blocked_seconds"] = blocked
        return SaveReport(blocked, self._shard.written_bytes)

    def take_figures(self) -> dict[str, float]:
        """For metrics, of this rank, what ended since the last call: seconds that `save` blocked and that writing took, failure."""
        figures, self._figures = self._figures, {}
        return figures

    def close(self) -> None:
        """Wait until what was handed to `save` is on disk. Raises CheckpointError when it is not, unless another error is under way."""
        self._wait()
        if self._failure is not None and sys.exc_info()[0] is None:
            failure, self._failure = self._failure, None
            raise CheckpointError(failure)

    finish = close

    def _write(self, place: Place, flats: Mapping[str, Tensor], content: dict[str, Any]) -> None:
        """One save, in the training thread or in its own; what goes wrong is kept for the training thread to act on."""
        started = time.perf_counter()
        leads = self._exchange.rank == place.leader
        try:
            remade = self._exchange.together(lambda: place.make_room() if leads else None)
            if remade is not None:
                self._report(remade)
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
        except Exception as error:  # a peer that died ends the exchange with a RuntimeError; training itself will notice
            self._failure = f"checkpoint of step {content['step']} failed: {describe(error)}"
            self._figures["checkpoint_failed"] = 1.0
            self._report(self._failure)
            return
        seconds = time.perf_counter() - started
        self._figures["checkpoint_seconds"] = seconds
        if self.context.is_first:
            self._report(f"saved {folder} ({place.bytes / 1e6:.1f} MB in {seconds:.2f} s)")

    def _remove_older(self, place: Place, step: int) -> None:
        """What is superseded: by the place's own retention, and snapshots by a checkpoint on the shared disk.

        The new checkpoint is none the worse for what stays: that is said, after every save.
        """

        def own() -> list[str]:
            problems = []
            if self._exchange.rank == place.leader:
                problems += place.retire(self._progress).problems
                self._fail_point("save.older_ones_removed")
            if place is self._shared:
                problems += self._remove(self._local, lambda found: found <= step)
            return problems

        try:
            problems = [
                problem
                for found in self._exchange.all_gather(self._exchange.together(own))
                for problem in found
            ]
        except CheckpointError as error:
            problems = [str(error)]
        for problem in problems:
            self._report(
                f"warning: the checkpoint of step {step} is saved, but an older one could not be removed: {problem}"
            )

    def _remove(self, place: Place | None, which: Callable[[int], bool]) -> list[str]:
        """Remove the checkpoints of these steps where this rank leads; returns what could not be removed, and why."""
        removal = Removal()
        if place is not None and self._exchange.rank == place.leader:
            for step, folder in committed_steps(place.folder).items():
                if which(step):
                    removal.remove(folder)
        return removal.problems

    def _wait(self) -> None:
        if self._background is not None:
            with self._waiting():
                self._background.wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While training waits here no step comes, and whoever watches the steps is told of the progress made here instead."""
        before, self._training_waits = self._training_waits, True
        try:
            yield
        finally:
            self._training_waits = before

    def _progress(self) -> None:
        """A piece of a save or a load is done. Called by the thread that does it."""
        if self._training_waits:
            self._still_here()

    def _raise_failure(self) -> None:
        """All ranks come here between the same two steps, so they act alike."""
        failure, self._failure = self._failure, None
        if failure is not None and self.config.checkpoint.on_failure == "stop":
            raise CheckpointError(
                f"{failure}\nStopped, because checkpoint.on_failure = stop. Older checkpoints are intact."
            )

    def _content(self, state: RunState) -> dict[str, Any]:
        return {
            "step": state.step,
            "state": asdict(state),
            "updates": float(self.optimizer.control[STEP]),
            "config": self.config.model_dump(mode="json"),
            "table": self._identity["table"],
            "fingerprints": self._identity["fingerprints"],
            "order": self._order and describe_order(self._order, state.consumed_samples),
            "layout": describe_layout(self.config, self.context),
            "rng": random_state.capture(),
            "versions": versions(),
            "states": self.optimizer.rule.all_powers(),
            "parameters": self._parameters,
        }

    # --- loading ----------------------------------------------------------------------------------------------------------

    def load_latest(self) -> RunState | None:
        """Put the newest state that all ranks can read into optimizer and parameters; None where there is none.

        A snapshot that is not whole, or whose bytes are damaged, is said and left out. Raises CheckpointError on every rank: the
        newest checkpoint on the shared disk is damaged (file and bytes named), or of another model, parameterization or data.
        """
        newest = self._exchange.on_first(lambda: max(committed_steps(self.folder), default=None))
        snapshots = (
            find_snapshots(self._local, self._exchange, self._report)
            if self._local is not None
            else []
        )
        if not self.config.checkpoint.resume and (newest is not None or snapshots):
            what, step = (
                ("checkpoint", newest) if newest is not None else ("snapshot", snapshots[0].step)
            )
            raise CheckpointError(
                f"{self.folder} holds a {what} of step {step}, but checkpoint.resume = false. "
                "Use another training.output_dir, or move the folder away."
            )
        for snapshot in snapshots:
            if newest is not None and snapshot.step <= newest:
                break
            state = self._load_snapshot(snapshot)
            if state is not None:
                return state
        return None if newest is None else self.load(newest)

    def load(self, step: int) -> RunState:
        """Put one checkpoint of the shared disk into optimizer and parameters. Raises CheckpointError as `load_latest`."""
        self._wait()
        self._exchange.on_first(lambda: self._require(step))
        source = shared_source(self._shared, step, self._exchange)
        self._compare(source)
        return self._read(source)

    def settled_steps(self) -> list[int]:
        """Wait for the save under way; the steps of the checkpoints on the shared disk, lowest first, the same on every rank."""
        self._wait()
        return self._exchange.on_first(lambda: list(committed_steps(self.folder)))

    def go_back(self, step: int) -> RunState:
        """Put the checkpoint of `step` into optimizer and parameters, and remove later ones at every place.

        They are of the path that is left, and a restart must not find them.
        """
        self._wait()
        self._exchange.on_first(lambda: self._require(step))
        self.optimizer.wait_for_parameters()  # what is still on its way belongs to the step that is undone
        with self._waiting():
            state = self.load(step)  # before anything is removed: it may be damaged
        for place in self._places:
            self._exchange.together(partial(self._remove_later, place, step))
        return state

    def _remove_later(self, place: Place, step: int) -> None:
        problems = self._remove(place, lambda found: found > step)
        if problems:
            raise CheckpointError(
                "\n".join(
                    [
                        "a restart must not find these, which are of the path that is left:",
                        *problems,
                    ]
                )
            )

    def _load_snapshot(self, snapshot: Snapshot) -> RunState | None:
        """None, and a line that says why, when it cannot be used."""
        assert self._local is not None
        if snapshot.missing:
            self._report(
                f"the snapshot of step {snapshot.step} is not used: no rank has {', '.join(snapshot.missing[:4])}"
            )
            return None
        try:
            source = snapshot_source(self._local, snapshot, self._exchange)
        except CheckpointError as error:
            self._report(f"the snapshot of step {snapshot.step} is not used: {error}")
            return None
        self._compare(source)
        try:
            return self._read(source)
        except CheckpointError as error:
            self._report(f"the snapshot of step {snapshot.step} is not used: {error}")
            return None

    def _read(self, source: Source) -> RunState:
        """Read everything, each byte once per job, and check it; only then put it in place.

        Tensors are read into host memory, which a save that goes on in the background takes anyway, and move from there when every
        rank has all of its own: a CheckpointError leaves weights, moments and generators as they were, on every rank.
        """
        started = time.perf_counter()
        optimizer, replica, manifest = self.optimizer, self.context.replica, source.manifest
        flats = optimizer.states
        reader = JointReader(self._exchange, source, self._progress)
        state = self._exchange.together(lambda: progress_of(manifest))
        staged: dict[str, Tensor] = {}
        if replica.rank == 0:
            staging = self._staging if self._background is not None else Staging()
            staged = staging.copy(
                flats
            )  # what is not stored, such as the padding of the vocabulary, stays
        reader.fill(
            [(box, name, flat) for name, flat in staged.items() for box in self._shard.owned]
        )
        for name, flat in flats.items():
            if staged:
                flat.copy_(staged[name])
            if replica.group is not None:  # the copies of a shard receive it
                dist.broadcast(flat, group=replica.group, group_src=0)
        optimizer.control[STEP] = manifest.updates
        optimizer.shards.adopt_masters()
        random_state.restore(manifest.rng)
        read = sum(self._exchange.all_gather(reader.bytes_read))
        if self.context.is_first:
            share, seconds = read / manifest.total_size, time.perf_counter() - started
            self._report(
                f"loaded {source.folder} ({manifest.total_size / 1e6:.1f} MB read {share:.2f} times in {seconds:.2f} s)"
            )
        return state

    def _require(self, step: int) -> None:
        if step not in committed_steps(self.folder):
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}.")

    def _compare(self, source: Source) -> None:
        """Refuse what was trained with other settings; say which ones were allowed to change. Every rank comes to the same result."""
        self._compare_states(source)
        found = differences(identity_of(source.manifest), self._identity)
        allowed = self.config.checkpoint.allow_changed
        if bad := refused(found, allowed):
            raise CheckpointError(refusal(source.folder, bad, allowed))
        settings = changed_settings(source.manifest.config, self.config)
        settings += [
            d
            for d in found
            if d.path.startswith(("table.", "fingerprints.")) and "prefix" not in d.path
        ]
        for difference in settings:
            self._report(
                f"resuming with {difference.path} = {show(difference.present)}, the checkpoint has {show(difference.stored)}"
            )
        if self._order is not None and not any(
            d.path.startswith(("data.", "fingerprints.")) for d in refused(found, allowed=())
        ):
            line = compare_order(source.folder, source.manifest, self._order, allowed)
            if line is not None:
                self._report(line)

    def _compare_states(self, source: Source) -> None:
        """Refuse what another update rule wrote: what one keeps of a tensor means nothing to another."""
        stored, kept = sorted(source.manifest.states), sorted(self.optimizer.states)
        if stored != kept:
            raise CheckpointError(
                f"{source.folder} holds the states {', '.join(stored)}, but the update rule of this run keeps {', '.join(kept)}. "
                "Continue with the rule that wrote it, or start from the weights alone: tools/checkpoint.py adapt --start-anew."
            )


def progress_of(manifest: Manifest) -> RunState:
    """How far the run was, once its generator states prove readable. Raises CheckpointError when they are not."""
    try:
        random_state.check(manifest.rng)
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"the manifest of step {manifest.step} holds no state that this version reads: {error!r}"
        ) from None
    return RunState(**manifest.state.model_dump())
