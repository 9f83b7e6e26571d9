"""Scaling of the batch and of the run's length, after Complete(d)P (arXiv 2512.22382).

    m_B = tokens a step / those of the proxy's run
    m_D = tokens of the run / those of the proxy's run
    S = (m_B / m_D)^exponent, at the default of 1/2 their square root

The two ratios may have exponents of their own: S = m_B^b / m_D^d. Complete(d)P derives 1/2 for
both; that of m_D is contested, see docs/parameterization.md.

Every learning rate and weight decay is multiplied by S, every epsilon is divided by it, and
1 - beta scales with m_B / m_D. All of these depend on the number of steps alone. Without the
proxy's token counts both ratios are 1 and nothing is scaled.
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
    exponent: float = 0.5  # of m_B
    duration_exponent: float | None = None  # of m_D; None: the same

    @property
    def scale(self) -> float:
        """S, which multiplies learning rates and weight decays and divides epsilons.

        Raises ConfigError where S is not a positive number.
        """
        # An extreme exponent overflows, or the power of a ratio that rounds to 0 is infinite.
        try:
            scale = self._scale()
        except (OverflowError, ZeroDivisionError):
            scale = math.inf
        if not 0 < scale < math.inf:
            raise ConfigError(
                f"{self._setting}: S = {self._formula} with "
                f"m_B = {self.batch_ratio:g} and m_D = {self.duration_ratio:g} is no positive "
                "number. Use an exponent such as 0.5, or check completep.base_batch_tokens and "
                "base_total_tokens (in tokens)."
            )
        return scale

    def _scale(self) -> float:
        # The power of the quotient rounds otherwise than the quotient of the powers: runs with one
        # exponent keep their numbers.
        if self.has_one_exponent:
            return float((self.batch_ratio / self.duration_ratio) ** self.exponent)
        assert self.duration_exponent is not None
        return float(self.batch_ratio**self.exponent / self.duration_ratio**self.duration_exponent)

    @property
    def has_one_exponent(self) -> bool:
        """Whether both ratios have the same exponent."""
        return self.duration_exponent in (None, self.exponent)

    @property
    def _setting(self) -> str:
        batch = f"completep.batch_exponent = {self.exponent:g}"
        if self.has_one_exponent:
            return batch
        return f"{batch}, duration_exponent = {self.duration_exponent:g}"

    @property
    def _formula(self) -> str:
        if self.has_one_exponent:
            return "(m_B / m_D)^exponent"
        return "m_B^batch_exponent / m_D^duration_exponent"

    def momentum(self, base: float) -> float:
        """Muon's decay rate of the mean gradient, by the rule of `betas`.

        For Muon it is an extrapolation: the derivation in arXiv 2512.22382 is AdamW's. Raises
        ConfigError where the rate would fall below 0.
        """
        ratio = self.batch_ratio / self.duration_ratio
        if ratio == 1.0:
            return base
        momentum = 1 - (1 - base) * ratio
        if momentum < 0:
            raise ConfigError(
                f"optimizer.muon.momentum = {base:g}: scaled by m_B / m_D = {ratio:g} it becomes "
                f"{momentum:g}, below 0. Train longer or with a smaller batch, or check "
                "completep.base_batch_tokens and base_total_tokens (in tokens)."
            )
        return momentum

    def betas(self, base: tuple[float, float]) -> tuple[float, float]:
        """The decay rates of the moments, so that they average over as many tokens as the proxy's.

        Raises ConfigError where a rate would fall below 0.
        """
        ratio = self.batch_ratio / self.duration_ratio
        # 1 - (1 - beta) rounds: an unscaled run keeps the configured numbers to the last bit.
        if ratio == 1.0:
            return base

        beta1 = 1 - (1 - base[0]) * ratio
        beta2 = 1 - (1 - base[1]) * ratio
        if min(beta1, beta2) < 0:
            raise ConfigError(
                f"optimizer.betas = {list(base)}: scaled by m_B / m_D = {ratio:g} they become "
                f"{beta1:g} and {beta2:g}, below 0. Train longer or with a smaller batch, or check "
                "completep.base_batch_tokens and base_total_tokens (in tokens)."
            )
        return beta1, beta2


def batch_scaling_of(config: Config) -> BatchScaling:
    """The ratios of a run; 1 where the proxy's token counts are not configured."""
    completep = config.completep
    return BatchScaling(
        batch_ratio=_ratio(tokens_per_step(config), completep.base_batch_tokens),
        duration_ratio=_ratio(total_tokens(config), completep.base_total_tokens),
        exponent=completep.batch_exponent,
        duration_exponent=completep.duration_exponent,
    )


def _ratio(tokens: int, base_tokens: int | None) -> float:
    return 1.0 if base_tokens is None else tokens / base_tokens
