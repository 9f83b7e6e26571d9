"""Saves and resumes one run. All ranks make every call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.distributed_adamw import STEP, DistributedAdamW
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.checkpoint import random_state
from megatron_completep.training.checkpoint.background import Background
from megatron_completep.training.checkpoint.compare import differences, refused
from megatron_completep.training.checkpoint.data_order import DataOrder, compare_order, describe_order
from megatron_completep.training.checkpoint.exchange import Exchange, describe
from megatron_completep.training.checkpoint.identity import describe_layout, identity_for, identity_of, refusal, versions
from megatron_completep.training.checkpoint.joint import JointReader, Source
from megatron_completep.training.checkpoint.manifest import Manifest, committed_steps
from megatron_completep.training.checkpoint.places import (
    Place,
    Snapshot,
    find_snapshots,
    local_place,
    prepare,
    shared_place,
    shared_source,
    snapshot_source,
)
from megatron_completep.training.checkpoint.retention import remove_checkpoint
from megatron_completep.training.checkpoint.save import FailPoint, Staging, write_checkpoint
from megatron_completep.training.checkpoint.shard import STATES, Shard, describe_parameters
from megatron_completep.training.state import RunState

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
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        optimizer: DistributedAdamW,
        table: Table,
        fingerprints: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = print,
        fail_point: FailPoint = no_fail_point,
        order: DataOrder | None = None,
    ):
        self._order = order
        self.config, self.context, self.optimizer = config, context, optimizer
        self._report, self._fail_point = report, fail_point
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
        self._local: Place | None = None
        if settings.local_dir is not None:
            self._local = local_place(Path(settings.local_dir), self._shared, exchange, size, settings.local_keep)
        for place in self._places:
            prepare(place, exchange, report)

    @property
    def _places(self) -> list[Place]:
        return [self._shared, *([self._local] if self._local is not None else [])]

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
        flats: Mapping[str, Tensor] = {name: getattr(self.optimizer, name) for name in STATES}
        if self._background is not None:
            flats = self._staging.copy(flats)
            self._fail_point("save.staged")
            self._background.start(lambda: self._write(place, flats, content))
        else:
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
            self._exchange.together(lambda: place.check_space() if leads else None)
            folder = write_checkpoint(place.folder, leads, self._exchange, self._shard, flats, content, self._fail_point)
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
        try:
            self._exchange.together(lambda: self._retire(place, step))
        except CheckpointError as error:  # the new one is none the worse for it
            self._report(f"warning: the checkpoint of step {step} is saved, but older ones could not be removed: {error}")

    def _retire(self, place: Place, step: int) -> None:
        """Remove what is superseded: by the place's own retention, and snapshots by a checkpoint on the shared disk."""
        if self._exchange.rank == place.leader:
            place.retire()
            self._fail_point("save.older_ones_removed")
        if place is self._shared:
            self._remove(self._local, lambda found: found <= step)

    def _remove(self, place: Place | None, which: Callable[[int], bool]) -> None:
        if place is not None and self._exchange.rank == place.leader:
            for step, folder in committed_steps(place.folder).items():
                if which(step):
                    remove_checkpoint(folder)

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _raise_failure(self) -> None:
        """All ranks come here between the same two steps, so they act alike."""
        failure, self._failure = self._failure, None
        if failure is not None and self.config.checkpoint.on_failure == "stop":
            raise CheckpointError(f"{failure}\nStopped, because checkpoint.on_failure = stop. Older checkpoints are intact.")

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
            "parameters": self._parameters,
        }

    # --- loading ----------------------------------------------------------------------------------------------------------

    def load_latest(self) -> RunState | None:
        """Put the newest state that all ranks can read into optimizer and parameters; None where there is none.

        A snapshot that is not whole, or whose bytes are damaged, is said and left out. Raises CheckpointError on every rank: the
        newest checkpoint on the shared disk is damaged (file and bytes named), or of another model, parameterization or data.
        """
        newest = self._exchange.on_first(lambda: max(committed_steps(self.folder), default=None))
        snapshots = find_snapshots(self._local, self._exchange) if self._local is not None else []
        if not self.config.checkpoint.resume and (newest is not None or snapshots):
            what, step = ("checkpoint", newest) if newest is not None else ("snapshot", snapshots[0].step)
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
        state = self.load(step)  # before anything is removed: it may be damaged
        for place in self._places:
            self._exchange.together(lambda place=place: self._remove(place, lambda found: found > step))  # type: ignore[misc]
        return state

    def _load_snapshot(self, snapshot: Snapshot) -> RunState | None:
        """None, and a line that says why, when it cannot be used."""
        assert self._local is not None
        if snapshot.missing:
            self._report(f"the snapshot of step {snapshot.step} is not used: no rank has {', '.join(snapshot.missing[:4])}")
            return None
        source = snapshot_source(self._local, snapshot, self._exchange)
        self._compare(source)
        try:
            return self._read(source)
        except CheckpointError as error:
            self._report(f"the snapshot of step {snapshot.step} is not used: {error}")
            return None

    def _read(self, source: Source) -> RunState:
        """Read the tensors, each byte once per job, and put them and everything else in place."""
        started = time.perf_counter()
        optimizer, replica = self.optimizer, self.context.replica
        flats = {name: getattr(optimizer, name) for name in STATES}
        reader = JointReader(self._exchange, source)
        own = self._shard.owned if replica.rank == 0 else ()
        reader.fill([(box, name, flat) for name, flat in flats.items() for box in own])
        if replica.group is not None:  # the copies of a shard receive it
            for flat in flats.values():
                dist.broadcast(flat, group=replica.group, group_src=0)
        manifest = source.manifest
        optimizer.control[STEP] = manifest.updates
        optimizer.adopt_masters()
        state = self._exchange.together(lambda: restore(manifest))
        read = sum(self._exchange.all_gather(reader.bytes_read))
        if self.context.is_first:
            share, seconds = read / manifest.total_size, time.perf_counter() - started
            self._report(f"loaded {source.folder} ({manifest.total_size / 1e6:.1f} MB read {share:.2f} times in {seconds:.2f} s)")
        return state

    def _require(self, step: int) -> None:
        if step not in committed_steps(self.folder):
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}.")

    def _compare(self, source: Source) -> None:
        """Refuse what was trained with other settings; say which ones were allowed to change. Every rank comes to the same result."""
        found = differences(identity_of(source.manifest), self._identity)
        if bad := refused(found, self.config.checkpoint.allow_changed):
            raise CheckpointError(refusal(source.folder, bad))
        for difference in found:
            if difference.path.startswith(("model.", "table.", "fingerprints.", "data.")) and "prefix" not in difference.path:
                self._report(f"resuming with {difference.path} = {difference.present}, the checkpoint has {difference.stored}")
        if self._order is not None and not any(d.path.startswith(("data.", "fingerprints.")) for d in refused(found, allowed=())):
            line = compare_order(source.folder, source.manifest, self._order, self.config.checkpoint.allow_changed)
            if line is not None:
                self._report(line)


def restore(manifest: Manifest) -> RunState:
    """Generators as they were; returns the progress. Raises CheckpointError when the manifest's values are none."""
    try:
        state = RunState(**manifest.state)
        random_state.restore(manifest.rng)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the manifest of step {manifest.step} holds no state that this version reads: {error!r}") from None
    return state
