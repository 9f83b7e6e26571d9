"""Whether a run that goes on reads the samples that its checkpoint has not read: the order may depend on the run's planned length."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.errors import CheckpointError

SETTING = "data.order_samples"


class DataOrder(Protocol):
    """The order of a run's training samples; `data.corpus.Corpus` is one."""

    @property
    def planned_samples(self) -> int:
        """For how many samples it was planned."""

    def order_digest(self, consumed_samples: int) -> str:
        """Equal for orders that begin with the same samples, this many of them."""


def describe_order(order: DataOrder, consumed_samples: int) -> dict[str, Any]:
    """What a checkpoint keeps of it: `manifest.StoredOrder`."""
    return {
        "planned_samples": order.planned_samples,
        "digest": order.order_digest(consumed_samples),
    }


def compare_order(
    folder: Path, manifest: Manifest, order: DataOrder, allow_changed: Iterable[str]
) -> str | None:
    """A line for the user, or None where the present order begins with the samples that were consumed.

    For a run whose other settings of the data are the checkpoint's. Raises CheckpointError for another order, unless it is allowed
    by name.
    """
    stored, consumed = manifest.order, manifest.state.consumed_samples
    if consumed == 0:
        return None
    if stored is None:
        return f"{folder} does not say in which order its data were read: that this run begins with the same samples is not checked"
    if stored.digest == order.order_digest(consumed):
        return None
    what = (
        f"{folder} has read {consumed:,} samples in an order that was planned for {stored.planned_samples:,}; planned for "
        f"{order.planned_samples:,}, as now, the order begins with other samples"
    )
    allowed = list(allow_changed)
    if any(fnmatchcase(SETTING, pattern) for pattern in allowed):
        return f"{what}: some are read twice, others never"
    raise CheckpointError(
        f"{what}: some would be read twice, others never.\nKeep the order with {SETTING}={stored.planned_samples} (docs/data.md says what "
        f"follows sample {stored.planned_samples:,}), go back to the planned length, or, if the change is meant: "
        f"'checkpoint.allow_changed=[{', '.join([*allowed, SETTING])}]'."
    )
