"""The timescale of weight decay, as a fraction of the run: tau = 1 / (peak lr x decay x steps).

After the share tau of a run at its peak rate, what a weight was has decayed to 1 / e of it. Under
AdamW the best tau was found to be the same across widths and depths, and to fall with tokens a
parameter (arXiv 2405.13698, 2505.13738), so that a run whose tau is far from its proxy's is not the
run that was tuned. The peak rate counts, and not the mean over the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_completep.completep.parameterization import Table
from megatron_completep.completep.table import Matrix
from megatron_completep.config.schema import Config, RoleFactors
from megatron_completep.roles import Role

BAND = (0.5, 2.0)  # of the run's tau over the proxy's, without a warning
SQUARE: Matrix = (1, 1)  # neither shape nor width matter: they cancel in rate x decay


class Timescale(NamedTuple):
    """The tau of one role: of the run, and of its proxy where its number of steps is known."""

    role: Role
    run: float
    proxy: float | None

    @property
    def leaves_band(self) -> bool:
        """Whether the run's is far from the proxy's."""
        low, high = BAND
        return self.proxy is not None and not low <= self.run / self.proxy <= high

    def __str__(self) -> str:
        proxy = "" if self.proxy is None else f" (proxy {self.proxy:.4g})"
        return f"{self.role} {self.run:.4g}{proxy}"


def timescales(config: Config, table: Table) -> Iterator[Timescale]:
    """The tau of every role that decays, without factors of single parameters."""
    steps = config.training.train_steps
    experts = (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN) if config.model.moe else ()
    for role in (Role.EMBEDDING, Role.HIDDEN_WEIGHT, *experts, Role.UNEMBEDDING):
        if role is Role.UNEMBEDDING and config.model.tied_embeddings:
            continue
        matrix = SQUARE if role is Role.HIDDEN_WEIGHT else None
        values = table.values(role, 1.0, config.optimizer, matrix)
        if values.lr * values.weight_decay == 0:
            continue
        tau = 1 / (values.lr * values.weight_decay * steps)
        yield Timescale(role, tau, _of_proxy(config, table, role, matrix))


def _of_proxy(config: Config, table: Table, role: Role, matrix: Matrix | None) -> float | None:
    """The proxy's tau; None where its number of steps is not configured."""
    completep = config.completep
    own = table.own_factors.get(role, RoleFactors())
    if config.optimizer.weight_decay_rule == "tau":
        target = config.optimizer.target_tau
        return None if target is None else target / (own.lr * own.weight_decay)
    if completep.base_batch_tokens is None and completep.base_total_tokens is None:
        return None
    steps = config.training.train_steps * table.batch.batch_ratio / table.batch.duration_ratio
    base = table.base_values(role, matrix, config.optimizer)
    return 1 / (base.lr * own.lr * base.weight_decay * own.weight_decay * steps)


def tau_warnings(config: Config, table: Table) -> list[str]:
    """A sentence for each role whose tau is far from the proxy's."""
    warnings = []
    for scale in timescales(config, table):
        if scale.leaves_band:
            assert scale.proxy is not None
            warnings.append(
                f"tau of {scale.role} is {scale.run:.4g}, {scale.run / scale.proxy:.3g} times the "
                f"proxy's {scale.proxy:.4g}: its decay acts over another part of the run. "
                "optimizer.weight_decay_rule = tau with "
                f"optimizer.target_tau = {scale.proxy:.4g} keeps it."
            )
    return warnings
