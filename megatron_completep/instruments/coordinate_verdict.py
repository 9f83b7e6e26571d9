"""What the coordinate check's measurements say: exponents over depth and width, their bands, and the verdict.

Each quantity is fitted with a power of the depth (or width) and its exponent compared with a band; a model that is known to be wrong
(muP over depth, SP over width) runs beside it and must leave the band, or the check cannot tell. Nor can it where the interval over
seeds leaves both open. Bands: docs/instruments.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any

from megatron_completep.instruments.coordinate_check import Sample
from megatron_completep.instruments.fits import Estimate, log_log_slope, mean_estimate
from megatron_completep.roles import Role


class Verdict(IntEnum):
    """Exit codes of the check."""

    RIGHT = 0
    WRONG = 1
    CANNOT_TELL = 3


@dataclass(frozen=True)
class Band:
    """A quantity's exponent and where a right model's lies. Without bounds it is only reported.

    Small widths, large initial weights and few depths bend a right model's curve by up to MARGIN: so far beyond the band nothing is said.
    """

    axis: str
    quantity: str
    low: float = -math.inf
    high: float = math.inf


MARGIN = 0.1
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
    Band(
        "width", "gradient, hidden matrices"
    ),  # about -1.15, and outside about -1.1: the reason for eps / m_N
    Band("width", "gradient, outside"),
)
DECISIVE = "stream change"  # what the control must get wrong
CONTROL_AT_LEAST, CONTROL_GAP = 0.5, 0.4


def quantity(name: str, sample: Sample) -> float | None:
    """A figure of one model; None where it was not measured."""
    measured = sample.measured
    if name.startswith(("update", "gradient")):
        with_eps = sample.with_large_eps.updates if sample.with_large_eps else {}
        found = (
            with_eps
            if "large eps" in name
            else measured.moved
            if name.startswith("update")
            else measured.gradients
        )
        # The roles with the most elements speak for their kind: hidden matrices, and the unembedding.
        roles = (
            (Role.UNEMBEDDING, Role.EMBEDDING)
            if name.endswith("outside")
            else (Role.HIDDEN_WEIGHT,)
        )
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

    @property
    def beyond(self) -> bool:
        """Beyond the band and its margin (an exponent that is no number is), whatever its interval."""
        return (
            self.passed is False
            and not self.band.low - MARGIN <= self.model.value <= self.band.high + MARGIN
        )

    @property
    def wrong(self) -> bool:
        """Beyond the band and its margin, and the whole interval outside the band."""
        return self.beyond and (
            not math.isfinite(self.model.value) or self.model.outside(self.band.low, self.band.high)
        )

    @property
    def vague(self) -> bool:
        """In the band, with an interval wider than it: with other seeds the exponent may as well be on either side."""
        return self.passed is True and self.model.wider_than(self.band.high - self.band.low)

    @property
    def mark(self) -> str:
        """What the table says of it."""
        if self.passed is None:
            return ""
        if not self.model.repeated:
            return "no interval"
        return "too wide" if self.vague else "pass" if self.passed else "FAIL"


@dataclass(frozen=True)
class Result:
    """The whole check."""

    verdict: Verdict
    reason: str
    findings: list[Finding]
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "verdict": self.verdict.name.lower(),
            "exit_code": int(self.verdict),
        }


def judge(samples: Sequence[Sample], alpha: float = 1.0) -> Result:
    """Fit exponents over each axis, seed by seed, and compare them with the bands; `alpha` is the model's."""
    findings = []
    others = [
        rule for rule in dict.fromkeys(s.rule for s in samples) if rule not in ("model", "control")
    ]
    for band in (_shifted(band, alpha) for band in BANDS):
        model = exponent(samples, band, "model")
        if model is None:
            continue
        bounded = math.isfinite(band.low)
        passed = band.low <= model.value <= band.high if bounded else None
        found = {rule: exponent(samples, band, rule) for rule in others}
        beside = {rule: estimate for rule, estimate in found.items() if estimate is not None}
        findings.append(Finding(band, model, exponent(samples, band, "control"), passed, beside))
    verdict, reason = _verdict(findings)
    return Result(verdict, reason, findings, list(samples))


def _shifted(band: Band, alpha: float) -> Band:
    """Hidden matrices learn with m_L^(alpha - 1)."""
    if (band.axis, band.quantity) != ("depth", "update, hidden matrices"):
        return band
    return replace(band, low=band.low + alpha - 1, high=band.high + alpha - 1)


def exponent(samples: Sequence[Sample], band: Band, rule: str) -> Estimate | None:
    """The exponent of one quantity, mean over seeds; None where it was not measured."""
    chosen = [s for s in samples if s.axis == band.axis and s.rule == rule]
    slopes = []
    for seed in sorted({s.seed for s in chosen}):
        pairs = [(s.size, quantity(band.quantity, s)) for s in chosen if s.seed == seed]
        if any(value is None for _, value in pairs):
            return None
        slopes.append(
            log_log_slope(
                [size for size, _ in pairs], [value for _, value in pairs if value is not None]
            )
        )
    return mean_estimate(slopes) if slopes else None


def _verdict(findings: Sequence[Finding]) -> tuple[Verdict, str]:
    start = next(
        (
            f.model
            for f in findings
            if (f.band.axis, f.band.quantity) == ("depth", "stream at init")
        ),
        NO_START,
    )
    wrong = [f for f in findings if f.wrong]
    if not all(_follows(f, start.low) for f in wrong):
        return Verdict.WRONG, "wrong: " + _outside(wrong)
    if single := [f for f in findings if f.passed is not None and not f.model.repeated]:
        return (
            Verdict.CANNOT_TELL,
            f"cannot tell: {_listed(single[:1])}, has no interval, for there is one seed. Use --seeds 3 or more.",
        )
    if wrong:
        return Verdict.CANNOT_TELL, (
            f"cannot tell: {_outside(wrong)}, but the stream at the start falls as much ({start}): the blocks' random outputs "
            "outweigh the embedding, and what depends on them follows. Use deeper models or smaller optimizer.base_init_std."
        )
    if vague := [f for f in findings if f.beyond or f.vague]:
        return Verdict.CANNOT_TELL, (
            f"cannot tell: {_listed(vague)}: with other seeds it may be in its band or outside. "
            "Use more seeds, more depths or widths, or more tokens a step."
        )
    if near := [f for f in findings if f.passed is False]:
        remedy = "Use more tokens a step, larger depths or widths, a smaller learning rate or smaller initial weights."
        return (
            Verdict.CANNOT_TELL,
            f"cannot tell: {_outside(near)}, which a right model may show too. {remedy}",
        )
    if not any(f.band.quantity == DECISIVE for f in findings):
        return Verdict.CANNOT_TELL, "cannot tell: give at least two depths or two widths"
    for finding in findings:
        if finding.band.quantity != DECISIVE or finding.control is None:
            continue
        control, gap = finding.control, finding.control.value - finding.model.value
        if not (control.value >= CONTROL_AT_LEAST and gap >= CONTROL_GAP):
            return Verdict.CANNOT_TELL, (
                f"cannot tell: the control's {DECISIVE} over {finding.band.axis} has the exponent {control.value:+.2f}, {gap:+.2f} from "
                f"the model's; a wrong model must show at least +{CONTROL_AT_LEAST} and +{CONTROL_GAP} more. "
                "Use more depths or widths, or a larger learning rate."
            )
        if not control.low > finding.band.high:
            return Verdict.CANNOT_TELL, (
                f"cannot tell: the control's {DECISIVE} over {finding.band.axis} has the exponent {control}, whose interval reaches into "
                f"the model's band (up to {finding.band.high:+.2f}): the check might not have seen a wrong model. "
                "Use more seeds, or more depths or widths."
            )
    return Verdict.RIGHT, "right: every exponent is in its band, and the control's is not"


NO_START = Estimate(
    0.0, 0.0, 0.0
)  # where no stream at the start was measured over depth: nothing follows it


def _follows(finding: Finding, start: float) -> bool:
    """Whether a right model may show this because its stream at the start falls with depth, with an exponent down to `start`.

    The blocks' random outputs add up to m_L^-1 L^1/2, so the stream falls while they outweigh the embedding. What passes through them
    may change less by as much, and gradients, which the final norm divides by the stream, be larger by as much. No other exponent and
    no other direction is excused: a stream that grows, or an update of the wrong size, is wrong.
    """
    band, value = finding.band, finding.model.value
    if (band.axis, band.quantity) == ("depth", DECISIVE):
        return start - MARGIN <= value < band.low
    if (band.axis, band.quantity) == ("depth", "update with large eps, in blocks"):
        return band.high < value <= MARGIN - start
    return False


def _listed(findings: Sequence[Finding]) -> str:
    return "; ".join(
        f"{f.band.quantity} over {f.band.axis} {f.model}, band {f.band.low:+.2f} to {f.band.high:+.2f}"
        for f in findings
    )


def _outside(findings: Sequence[Finding]) -> str:
    return "; ".join(
        f"{f.band.quantity} over {f.band.axis} {f.model.value:+.2f} outside [{f.band.low:+.2f}, {f.band.high:+.2f}]"
        for f in findings
    )
