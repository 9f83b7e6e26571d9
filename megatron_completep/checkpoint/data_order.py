"""Whether a resumed run goes on with the samples that its checkpoint has not read.

The order of the data may depend on the planned length of the run, which a user may change.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.errors import CheckpointError

SETTING = "data.order_samples"


class DataOrder(Protocol):
    """The order of a run's training samples, such as `data.corpus.Corpus`."""

    @property
    def planned_samples(self) -> int:
        """For how many samples the order was planned."""

    def order_digest(self, consumed_samples: int) -> str:
        """Equal for orders that begin with the same samples, so many of them."""


def describe_order(order: DataOrder, consumed_samples: int) -> dict[str, Any]:
    """What a checkpoint stores of an order, see `manifest.StoredOrder`."""
    digest = order.order_digest(consumed_samples)
    return {"planned_samples": order.planned_samples, "digest": digest}


def compare_order(
    folder: Path, manifest: Manifest, order: DataOrder, allow_changed: Iterable[str]
) -> str | None:
    """A line for the user, or None where the present order begins with the consumed samples.

    The other settings of the data must be the checkpoint's. Raises CheckpointError for another
    order, unless a pattern in `allow_changed` names SETTING.
    """
    stored = manifest.order
    consumed = manifest.state.consumed_samples
    if consumed == 0:
        return None
    # Earlier versions stored none.
    if stored is None:
        return (
            f"{folder} does not say in which order its data were read: "
            "that this run begins with the same samples is not checked"
        )
    # The order may well go on differently after these, as another planned length asks for.
    if stored.digest == order.order_digest(consumed):
        return None

    # The order is another one. It may be meant, so the user can allow it.
    difference = (
        f"{folder} has read {consumed:,} samples in an order that was planned for "
        f"{stored.planned_samples:,}; planned for {order.planned_samples:,}, as now, "
        "the order begins with other samples"
    )
    allowed = list(allow_changed)
    if any(fnmatchcase(SETTING, pattern) for pattern in allowed):
        return f"{difference}: some are read twice, others never"
    raise CheckpointError(
        f"{difference}: some would be read twice, others never.\n"
        f"Keep the order with {SETTING}={stored.planned_samples} (docs/data.md says what "
        f"follows sample {stored.planned_samples:,}), go back to the planned length, "
        "or, if the change is meant: "
        f"'checkpoint.allow_changed=[{', '.join([*allowed, SETTING])}]'."
    )
