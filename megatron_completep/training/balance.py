"""Whether the ranks that share a sequence have equally much attention to compute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_completep.data.loader import Batch
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context_part import ContextPart

LARGEST_RATIO = 1.25  # of the busiest rank's pairs of queries and keys to the mean, without warning


def pairs_by_rank(positions: Tensor, ranks: int) -> list[int]:
    """Pairs of queries and keys of each context rank, for positions [B, W] in documents."""
    pairs = []
    for rank in range(ranks):
        part = ContextPart(Axis("context", rank, ranks))
        # A token sees the tokens of its document before it, and itself.
        pairs.append(int((part.cut(positions) + 1).sum()))
    return pairs


def balance_warning(batches: Sequence[Batch], ranks: int) -> str | None:
    """What to say of a step in whose documents some context ranks have much more to compute.

    Ranks wait for each other in every micro-batch, so the largest ratio of one counts.
    """
    ratio = 1.0
    for batch in batches:
        pairs = pairs_by_rank(batch.positions, ranks)
        ratio = max(ratio, max(pairs) * ranks / sum(pairs))
    if ratio <= LARGEST_RATIO:
        return None
    return (
        f"documents leave one of {ranks} context ranks {ratio:.2f} times the mean's pairs of "
        f"queries and keys in a micro-batch of the first step, above {LARGEST_RATIO:g}: the others "
        "wait for it. A larger training.micro_batch_size or fewer context ranks even it out."
    )
