"""What every layer of a model chunk is handed."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_completep import kernels
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.parallel.own_losses import LossLedger
from megatron_completep.parallel.products import Products


@dataclass(frozen=True)
class LayerContext:
    """The ranks of a layer, where its gradients and own losses go, and what computes them.

    compiled: what runs between the products in place of the operators; None: the operators.
    """

    ranks: ParallelContext
    queue: GradientQueue = field(default_factory=GradientQueue)  # one a chunk
    products: Products = field(default_factory=Products)
    own_losses: LossLedger = field(default_factory=LossLedger)  # one a chunk
    compiled: kernels.CompiledDefinitions | None = None
