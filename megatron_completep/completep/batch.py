"""Scaling of the batch and of the run's length, after Complete(d)P (arXiv 2512.22382).

    m_B = tokens a step / those of the proxy's run
    m_D = tokens of the run / those of the proxy's run
    S = (m_B / m_D)^exponent, at the default of 1/2 their square root

Every learning rate and weight decay is multiplied by S, every epsilon divided by it, and 1 - beta scales with m_B / m_D. All of
it depends on the number of steps alone. Without the proxy's token counts both ratios are 1 and nothing is scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_completep.config.derived import tokens_per_step, total_tokens
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError


@dataclass(frozen=True)
class BatchScaling:
    """Ratios of this run to the proxy's."""

    batch_ratio: float = 1.0  # m_B
    duration_ratio: float = 1.0  # m_D
    exponent: float = 0.5

    @property
    def scale(self) -> float:
        """S: multiplies learning rates and weight decays, divides epsilons. ConfigError where it is no positive number."""
        try:
            scale = float((self.batch_ratio / self.duration_ratio) ** self.exponent)
        except (OverflowError, ZeroDivisionError):
            scale = math.inf
        if not 0 < scale < math.inf:
            raise ConfigError(
                f"completep.batch_exponent = {self.exponent:g}: S = (m_B / m_D)^exponent with "
                f"m_B = {self.batch_ratio:g} and m_D = {self.duration_ratio:g} is no positive number. "
                "Use an exponent such as 0.5, or check completep.base_batch_tokens and base_total_tokens "
                "(in tokens)."
            )
        return scale

    def betas(self, base: tuple[float, float]) -> tuple[float, float]:
        """The decay rates of the moments, so that they average over as many tokens as the proxy's did.

        Raises ConfigError where a rate would fall below 0.
        """
        ratio = self.batch_ratio / self.duration_ratio
        if ratio == 1.0:
            return base
        scaled = 1 - (1 - base[0]) * ratio, 1 - (1 - base[1]) * ratio
        if min(scaled) < 0:
            raise ConfigError(
                f"optimizer.betas = {list(base)}: scaled by m_B / m_D = {ratio:g} they become "
                f"{scaled[0]:g} and {scaled[1]:g}, below 0. Train longer or with a smaller batch, or "
                "check completep.base_batch_tokens and base_total_tokens (in tokens)."
            )
        return scaled


def batch_scaling_of(config: Config) -> BatchScaling:
    """The ratios of a run; 1 where the proxy's token counts are not configured."""
    base = config.completep
    return BatchScaling(
        batch_ratio=_ratio(tokens_per_step(config), base.base_batch_tokens),
        duration_ratio=_ratio(total_tokens(config), base.base_total_tokens),
        exponent=base.batch_exponent,
    )


def _ratio(tokens: int, base_tokens: int | None) -> float:
    return 1.0 if base_tokens is None else tokens / base_tokens
