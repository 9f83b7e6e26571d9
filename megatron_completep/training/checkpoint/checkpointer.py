"""Saves and resumes one run. All ranks make every call."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_completep
from megatron_completep.completep import Table
from megatron_completep.config.schema import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.distributed_adamw import STEP, DistributedAdamW
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.checkpoint import random_state
from megatron_completep.training.checkpoint.background import Background
from megatron_completep.training.checkpoint.compare import Difference, differences, refused, table_of
from megatron_completep.training.checkpoint.exchange import Exchange, describe
from megatron_completep.training.checkpoint.load import StoredCheckpoint
from megatron_completep.training.checkpoint.manifest import committed_steps
from megatron_completep.training.checkpoint.retention import prune
from megatron_completep.training.checkpoint.save import FailPoint, Staging, check_space, clean_up, jsonable, write_checkpoint
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
    fail_point: called at named places; tests break them.
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
    ):
        self.config, self.context, self.optimizer = config, context, optimizer
        self.folder = Path(config.training.output_dir) / CHECKPOINTS
        self._report, self._fail_point = report, fail_point
        self._exchange = Exchange(context, config.checkpoint.timeout_minutes)
        self._shard = Shard.of(optimizer, context)
        self._staging = Staging()
        self._background = Background() if config.checkpoint.async_save else None
        self._failure: str | None = None
        parts = self._exchange.all_gather((describe_parameters(optimizer, self._shard.dtype), self._shard.written_bytes))
        self._parameters = {name: value for described, _ in parts for name, value in described.items()}
        self._total_bytes = sum(size for _, size in parts)
        self._identity = jsonable(
            {
                "model": config.model.model_dump(mode="json"),
                "table": describe_table(table),
                "data": config.data.model_dump(mode="json"),
                "fingerprints": dict(fingerprints or {}),
                "parameters": {name: [p["role"], p["width_ratio"], p["shape"]] for name, p in self._parameters.items()},
            }
        )
        self._exchange.on_first(self._prepare_folder)

    # --- saving -----------------------------------------------------------------------------------------------------------

    def save(self, state: RunState) -> SaveReport:
        """Save the run as it stands; with checkpoint.async_save the files are written while training goes on.

        Waits for the save before it. Raises CheckpointError, on every rank, when that one failed (or this one, without
        async_save) and checkpoint.on_failure is `stop`.
        """
        started = time.perf_counter()
        self._wait()
        self._raise_failure()
        content = self._content(state)
        flats: Mapping[str, Tensor] = {name: getattr(self.optimizer, name) for name in STATES}
        if self._background is not None:
            flats = self._staging.copy(flats)
            self._fail_point("save.staged")
            self._background.start(lambda: self._write(flats, content))
        else:
            self._write(flats, content)
            self._raise_failure()
        return SaveReport(time.perf_counter() - started, self._shard.written_bytes)

    def close(self) -> None:
        """Wait until what was handed to `save` is on disk. Raises CheckpointError when it is not, unless another error is under way."""
        self._wait()
        if self._failure is not None and sys.exc_info()[0] is None:
            failure, self._failure = self._failure, None
            raise CheckpointError(failure)

    finish = close

    def _write(self, flats: Mapping[str, Tensor], content: dict[str, Any]) -> None:
        """One save, in the training thread or in its own; what goes wrong is kept for the training thread to act on."""
        started = time.perf_counter()
        try:
            self._exchange.on_first(lambda: check_space(self.folder, self._total_bytes))
            folder = write_checkpoint(self.folder, self._exchange, self._shard, flats, content, self._fail_point)
            self._exchange.on_first(self._retire)
        except Exception as error:  # a peer that died ends the exchange with a RuntimeError; training itself will notice
            self._failure = f"checkpoint of step {content['step']} failed: {describe(error)}"
            self._report(self._failure)
            return
        if self.context.is_first:
            seconds = time.perf_counter() - started
            self._report(f"saved {folder} ({self._total_bytes / 1e6:.1f} MB in {seconds:.2f} s)")

    def _retire(self) -> list[str]:
        removed = prune(self.folder, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        self._fail_point("save.older_ones_removed")
        return [folder.name for folder in removed]

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _raise_failure(self) -> None:
        """All ranks come here between the same two steps, so they act alike."""
        failure, self._failure = self._failure, None
        if failure is not None and self.config.checkpoint.on_failure == "stop":
            raise CheckpointError(f"{failure}\nStopped, because checkpoint.on_failure = stop. Older checkpoints are intact.")

    def _content(self, state: RunState) -> dict[str, Any]:
        context = self.context
        axes = {axis.name: axis.size for axis in (context.tensor, context.pipeline, context.data)}
        return {
            "step": state.step,
            "state": asdict(state),
            "updates": float(self.optimizer.control[STEP]),
            "config": self.config.model_dump(mode="json"),
            "table": self._identity["table"],
            "fingerprints": self._identity["fingerprints"],
            "layout": {**axes, "world": context.world_size, "virtual": self.config.parallel.virtual_pipeline_size},
            "rng": random_state.capture(),
            "versions": {
                "megatron_completep": megatron_completep.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "parameters": self._parameters,
        }

    # --- loading ----------------------------------------------------------------------------------------------------------

    def load_latest(self) -> RunState | None:
        """Put the newest committed checkpoint into optimizer and parameters; None where there is none.

        Raises CheckpointError on every rank: it is damaged (file and bytes named), or of another model, parameterization or data.
        """
        step = self._exchange.on_first(self._newest)
        return None if step is None else self.load(step)

    def load(self, step: int) -> RunState:
        """Put one committed checkpoint into optimizer and parameters. Raises CheckpointError as `load_latest`."""
        started = time.perf_counter()
        stored = StoredCheckpoint.from_json(self._exchange.on_first(lambda: self._open(step)))
        optimizer, replica = self.optimizer, self.context.replica
        flats = {name: getattr(optimizer, name) for name in STATES}
        if replica.rank == 0:
            self._exchange.together(lambda: stored.read_states(self._shard.owned, flats))
        else:
            self._exchange.together(lambda: None)
        if replica.group is not None:  # each byte is read once; the copies of a shard receive it
            for flat in flats.values():
                dist.broadcast(flat, group=replica.group, group_src=0)
        optimizer.control[STEP] = stored.manifest.updates
        optimizer.adopt_masters()
        random_state.restore(stored.manifest.rng)
        read = sum(self._exchange.all_gather(stored.bytes_read))
        if self.context.is_first:
            share = read / stored.manifest.total_size
            seconds = time.perf_counter() - started
            self._report(f"loaded {stored.folder} ({stored.manifest.total_size / 1e6:.1f} MB read {share:.2f} times in {seconds:.2f} s)")
        return RunState(**stored.manifest.state)

    def _prepare_folder(self) -> None:
        """Find out at the start, not at the first save, that nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error.strerror}. Choose another training.output_dir.") from None
        for name in clean_up(self.folder):
            self._report(f"removed {name}, left by an interrupted save")
        try:
            check_space(self.folder, self._total_bytes)
        except CheckpointError as error:
            self._report(f"warning: {error}")

    def _newest(self) -> int | None:
        steps = committed_steps(self.folder)
        if steps and not self.config.checkpoint.resume:
            raise CheckpointError(
                f"{self.folder} holds a checkpoint of step {max(steps)}, but checkpoint.resume = false. "
                "Use another training.output_dir, or move the folder away."
            )
        return max(steps, default=None)

    def _open(self, step: int) -> dict[str, Any]:
        """On one rank: open, check and compare; the others receive the result."""
        folder = committed_steps(self.folder).get(step)
        if folder is None:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}.")
        stored = StoredCheckpoint.open(folder)
        found = differences(identity_of(stored), self._identity)
        if bad := refused(found, self.config.checkpoint.allow_changed):
            raise CheckpointError(refusal(folder, bad))
        for difference in found:
            if difference.path.startswith(("model.", "table.", "fingerprints.", "data.")) and "prefix" not in difference.path:
                self._report(f"resuming with {difference.path} = {difference.present}, the checkpoint has {difference.stored}")
        return stored.to_json()


def describe_table(table: Table) -> dict[str, Any]:
    """The parameterization as plain values: what was configured, and what follows from it for the forward pass."""
    values = {field.name: getattr(table, field.name) for field in fields(table) if field.name != "own_factors"}
    values |= {name: getattr(table, name) for name in ("residual_multiplier", "logit_multiplier")}
    own = {role: factors.model_dump() for role, factors in table.own_factors.items()}
    return {**values, "own_factors": own}


def identity_of(stored: StoredCheckpoint) -> dict[str, Any]:
    """What `Checkpointer` compares at resume, as a checkpoint holds it."""
    manifest = stored.manifest
    return {
        "model": manifest.config.get("model", {}),
        "table": manifest.table,
        "data": manifest.config.get("data", {}),
        "fingerprints": manifest.fingerprints,
        "parameters": {name: [p.role, p.width_ratio, p.shape] for name, p in manifest.parameters.items()},
    }


def refusal(folder: Path, found: list[Difference]) -> str:
    shown = found[:40]
    more = f"\n  ... and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    patterns = sorted({d.path for d in found if not d.path.startswith("parameters.")})
    remedy = f"checkpoint.allow_changed={patterns[:8]}" if patterns else "a model with these parameters"
    return (
        f"{folder} was trained with other settings:\n{table_of(shown)}{more}\n"
        f"Continue with the checkpoint's settings, start in another training.output_dir, or, if the change is meant: {remedy}."
    )
