"""What the coordinate check's measurements say: exponents over depth and width, their bands, and the verdict.

Each quantity is fitted with a power of the depth (or width) and its exponent compared with a band; a model that is known to be wrong
(muP over depth, SP over width) runs beside it and must leave the band, or the check cannot tell. Bands: docs/instruments.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any

from megatron_completep.analysis.coordinate_check import Sample
from megatron_completep.analysis.fits import Estimate, log_log_slope, mean_estimate
from megatron_completep.completep import Role


class Verdict(IntEnum):
    """Exit codes of the check."""

    RIGHT = 0
    WRONG = 1
    CANNOT_TELL = 3


@dataclass(frozen=True)
class Band:
    """A quantity's exponent and where a right model's lies. Without bounds it is only reported.

    Small widths, large initial weights and few depths bend a right model's curve by up to MARGIN: so far beyond the band nothing is said.
    Nor is anything where the largest sizes alone are in the band: a right model's curve may bend more, but it levels off.
    """

    axis: str
    quantity: str
    low: float = -math.inf
    high: float = math.inf


MARGIN, LARGEST = 0.1, 3
BANDS = (
    Band("depth", "stream at init"),
    Band("depth", "stream change", -0.2, 0.2),
    Band("depth", "logits at init"),
    Band("depth", "logits change"),
    Band("depth", "update with large eps, in blocks", -0.25, 0.25),
    Band("depth", "update with large eps, outside", -0.25, 0.25),
    Band("depth", "update, hidden matrices", -0.25, 0.25),
    Band("depth", "update, outside", -0.25, 0.25),
    Band("depth", "gradient, hidden matrices"),  # -alpha, the reason for eps * m_L^-alpha
    Band("depth", "gradient, outside"),  # 0
    Band("width", "stream at init", -0.25, 0.25),
    Band("width", "stream change", -0.35, 0.25),
    Band("width", "logits at init", -0.75, -0.25),
    Band("width", "logits change", -0.25, 0.25),
    Band("width", "update with large eps, in blocks", -0.25, 0.25),
    Band("width", "update with large eps, outside", -0.25, 0.25),
    Band("width", "update, hidden matrices", -1.25, -0.75),
    Band("width", "update, outside", -0.25, 0.25),
    Band("width", "gradient, hidden matrices"),  # about -1.15, and outside about -1.1: the reason for eps / m_N
    Band("width", "gradient, outside"),
)
DECISIVE = "stream change"  # what the control must get wrong
EXACT = ("update, hidden matrices", "update, outside")  # Adam's, whatever the size of the steps
LARGE_STEPS = 10  # times the stream's size at the start
CONTROL_AT_LEAST, CONTROL_GAP = 0.5, 0.4


def quantity(name: str, sample: Sample) -> float | None:
    """A figure of one model; None where it was not measured."""
    measured = sample.measured
    if name.startswith(("update", "gradient")):
        with_eps = sample.with_large_eps.updates if sample.with_large_eps else {}
        found = with_eps if "large eps" in name else measured.moved if name.startswith("update") else measured.gradients
        # The roles with the most elements speak for their kind: hidden matrices, and the unembedding.
        roles = (Role.UNEMBEDDING, Role.EMBEDDING) if name.endswith("outside") else (Role.HIDDEN_WEIGHT,)
        return next((found[role] for role in roles if role in found), None)
    values = {
        "stream at init": measured.stream[0],
        "stream change": measured.stream_change[-1],
        "logits at init": measured.logits[0],
        "logits change": measured.logits_change[-1],
    }
    return values[name]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    band: Band
    model: Estimate
    control: Estimate | None
    passed: bool | None  # None: only reported
    beside: dict[str, Estimate] = field(default_factory=dict)  # by parameterization
    largest: Estimate | None = None  # the model's exponent over its LARGEST sizes alone; None where there are no more

    @property
    def levels_off(self) -> bool:
        """Outside the band over all sizes, inside it over the largest."""
        return self.passed is False and self.largest is not None and self.band.low <= self.largest.value <= self.band.high

    @property
    def wrong(self) -> bool:
        """Beyond the band and its margin (an exponent that is no number is), and not levelling off."""
        near = self.band.low - MARGIN <= self.model.value <= self.band.high + MARGIN
        return self.passed is False and not near and not self.levels_off


@dataclass(frozen=True)
class Result:
    """The whole check."""

    verdict: Verdict
    reason: str
    findings: list[Finding]
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.name.lower(), "exit_code": int(self.verdict)}


def judge(samples: Sequence[Sample], alpha: float = 1.0) -> Result:
    """Fit exponents over each axis, seed by seed, and compare them with the bands; `alpha` is the model's."""
    findings = []
    others = [rule for rule in dict.fromkeys(s.rule for s in samples) if rule not in ("model", "control")]
    for band in (_shifted(band, alpha) for band in BANDS):
        model = exponent(samples, band, "model")
        if model is None:
            continue
        bounded = math.isfinite(band.low)
        passed = band.low <= model.value <= band.high if bounded else None
        found = {rule: exponent(samples, band, rule) for rule in others}
        beside = {rule: estimate for rule, estimate in found.items() if estimate is not None}
        control, largest = exponent(samples, band, "control"), exponent(samples, band, "model", LARGEST)
        findings.append(Finding(band, model, control, passed, beside, largest))
    verdict, reason = _verdict(findings, samples)
    return Result(verdict, reason, findings, list(samples))


def _shifted(band: Band, alpha: float) -> Band:
    """Hidden matrices learn with m_L^(alpha - 1)."""
    if (band.axis, band.quantity) != ("depth", "update, hidden matrices"):
        return band
    return replace(band, low=band.low + alpha - 1, high=band.high + alpha - 1)


def times_its_size(samples: Sequence[Sample], axis: str) -> float:
    """How far training moves the stream of an axis's smallest model, over its size at the start; mean over seeds."""
    own = [s for s in samples if s.axis == axis and s.rule == "model"]
    smallest = [s.measured for s in own if s.size == min(s.size for s in own)]
    return sum(m.stream_change[-1] / m.stream[0] for m in smallest) / len(smallest)


def exponent(samples: Sequence[Sample], band: Band, rule: str, largest: int = 0) -> Estimate | None:
    """The exponent of one quantity, mean over seeds; None where it was not measured. `largest`: over so many of the largest sizes
    alone, None where that is all of them."""
    chosen = [s for s in samples if s.axis == band.axis and s.rule == rule]
    sizes = sorted({s.size for s in chosen})
    if largest and len(sizes) <= largest:
        return None
    chosen = [s for s in chosen if s.size in sizes[-largest:]]
    slopes = []
    for seed in sorted({s.seed for s in chosen}):
        pairs = [(s.size, quantity(band.quantity, s)) for s in chosen if s.seed == seed]
        if any(value is None for _, value in pairs):
            return None
        slopes.append(log_log_slope([size for size, _ in pairs], [value for _, value in pairs if value is not None]))
    return mean_estimate(slopes) if slopes else None


def _verdict(findings: Sequence[Finding], samples: Sequence[Sample]) -> tuple[Verdict, str]:
    if wrong := [f for f in findings if f.wrong]:
        excuses = [_excuse(finding, findings, samples) for finding in wrong]
        if not all(excuses):
            return Verdict.WRONG, "wrong: " + _outside(wrong)
        return Verdict.CANNOT_TELL, f"cannot tell: {_outside(wrong)}, but {' And '.join(dict.fromkeys(excuses))}"
    if near := [f for f in findings if f.passed is False]:
        remedy = "Use more tokens a step, larger depths or widths, a smaller learning rate or smaller initial weights."
        return Verdict.CANNOT_TELL, f"cannot tell: {_outside(near)}, which a right model may show too. {remedy}"
    if not any(f.band.quantity == DECISIVE for f in findings):
        return Verdict.CANNOT_TELL, "cannot tell: give at least two depths or two widths"
    for finding in findings:
        if finding.band.quantity != DECISIVE or finding.control is None:
            continue
        control, gap = finding.control.value, finding.control.value - finding.model.value
        if not (control >= CONTROL_AT_LEAST and gap >= CONTROL_GAP):
            return Verdict.CANNOT_TELL, (
                f"cannot tell: the control's {DECISIVE} over {finding.band.axis} has the exponent {control:+.2f}, {gap:+.2f} from the "
                f"model's; a wrong model must show at least +{CONTROL_AT_LEAST} and +{CONTROL_GAP} more. "
                "Use more depths or widths, or a larger learning rate."
            )
    return Verdict.RIGHT, "right: every exponent is in its band, and the control's is not"


def _excuse(finding: Finding, findings: Sequence[Finding], samples: Sequence[Sample]) -> str:
    """Why a right model may show this too, and what to do; empty where it may not."""
    band = finding.band
    if band.quantity in EXACT:
        return ""
    if (moved := times_its_size(samples, band.axis)) > LARGE_STEPS:
        return (
            f"training moves the smallest model's stream by {moved:.0f} times its size; beyond {LARGE_STEPS} times a right model's curve "
            "may bend as far. Use a smaller learning rate (optimizer.base_lr)."
        )
    # Blocks' random outputs add up to m_L^-1 L^1/2: while they outweigh the embedding, all that passes through them may fall alike.
    start = next(f.model.value for f in findings if (f.band.axis, f.band.quantity) == (band.axis, "stream at init"))
    if (band.axis, band.quantity) == ("depth", DECISIVE) and start - MARGIN <= finding.model.value < band.low:
        return (
            f"the stream at the start falls like it ({start:+.2f}): the blocks' random outputs outweigh the embedding. "
            "Use deeper models or smaller initial weights (optimizer.base_init_std)."
        )
    return ""


def _outside(findings: Sequence[Finding]) -> str:
    def say(finding: Finding) -> str:
        band = finding.band
        text = f"{band.quantity} over {band.axis} {finding.model.value:+.2f} outside [{band.low:+.2f}, {band.high:+.2f}]"
        levels_off = f", but {finding.largest.value:+.2f} over the {LARGEST} largest" if finding.levels_off and finding.largest else ""
        return text + levels_off

    return "; ".join(map(say, findings))
