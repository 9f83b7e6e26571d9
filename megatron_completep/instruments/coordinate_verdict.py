"""The verdict of the coordinate check: exponents over depth and width, compared with bands.

Each quantity is fitted with a power of the depth (or width), and its exponent is compared with a
band. A model that is known to be wrong (muP over depth, SP over width) is measured beside it and
must leave the band, or the check cannot tell. It cannot tell either where the interval over seeds
holds both answers. Bands: docs/instruments.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """The limits of a quantity's exponent in a right model; without them it is only reported.

    Small widths, large initial weights and few depths bend a right model's curve by up to MARGIN:
    an exponent that is no farther beyond the band decides nothing.
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
    Band("width", "gradient, hidden matrices"),  # about -1.15, the reason for eps / m_N
    Band("width", "gradient, outside"),  # about -1.1
    # Of mixtures of experts. Where gradients are judged they are of few tokens and unaligned ones.
    Band("depth", "experts' change", -0.25, 0.25),
    Band("depth", "router logits change", -0.25, 0.25),
    Band("depth", "update with large eps, experts up", -0.35, 0.35),
    Band("depth", "update with large eps, experts down", -0.35, 0.35),
    Band("depth", "update with large eps, routers", -0.35, 0.35),
    Band("depth", "load, largest over mean"),
    Band("depth", "choices changed by a step"),
    Band("width", "experts at init", -0.25, 0.25),
    Band("width", "experts' change", -0.35, 0.25),
    Band("width", "score spread at init", -0.75, -0.25),
    Band("width", "router logits change", -0.35, 0.25),
    Band("width", "update with large eps, experts up", -0.35, 0.35),
    Band("width", "update with large eps, experts down", -0.35, 0.35),
    Band("width", "update with large eps, routers"),  # about -.6 at the start: see the table
    Band("width", "update, experts", -1.25, -0.75),
    Band("width", "load, largest over mean"),
    Band("width", "choices changed by a step"),
    # Over their number at a fixed share k / E, the mean of k experts.
    Band("experts", "stream at init"),
    Band("experts", "stream change", -0.25, 0.25),
    Band("experts", "logits change", -0.25, 0.25),
    Band("experts", "experts at init", -0.75, -0.25),
    Band("experts", "experts' change", -0.25, 0.25),
    Band("experts", "router logits change", -0.25, 0.25),
    Band("experts", "update with large eps, experts up", -0.35, 0.35),
    Band("experts", "update with large eps, experts down", -0.35, 0.35),
    Band("experts", "update with large eps, routers", -0.35, 0.35),
    Band("experts", "update, experts", -0.25, 0.25),
    Band("experts", "gradient, experts"),  # about -1, the reason for eps / e
    Band("experts", "load, largest over mean"),
    Band("experts", "choices changed by a step"),
)
# The RMS of an orthogonal matrix [n, n] is n^-1/2, and Muon has no epsilon: its quantities differ.
MUON_BANDS = {
    ("width", "update, hidden matrices"): (-0.75, -0.25),
    ("depth", "update with large eps, in blocks"): None,
    ("width", "update with large eps, in blocks"): None,
}
# The role that a quantity is of, by its end. The one with the most elements represents its kind:
# hidden matrices, and the unembedding, which is the embedding where the two are tied.
ROLES: dict[str, tuple[Role, ...]] = {
    "hidden matrices": (Role.HIDDEN_WEIGHT,),
    "in blocks": (Role.HIDDEN_WEIGHT,),
    "outside": (Role.UNEMBEDDING, Role.EMBEDDING),
    "experts": (Role.EXPERT_UP,),
    "experts up": (Role.EXPERT_UP,),
    "experts down": (Role.EXPERT_DOWN,),
    "routers": (Role.ROUTER,),
}
# What the control of an axis must get wrong. Experts are a small part of the stream.
STREAM_CHANGE = "stream change"
DECISIVE = {"depth": STREAM_CHANGE, "width": STREAM_CHANGE, "experts": "experts' change"}
CONTROL_AT_LEAST = 0.5  # the exponent that a wrong model must show at least
CONTROL_GAP = 0.4  # and its distance from the model's
# Where no stream at the start was measured over depth: nothing is excused by it.
NO_START = Estimate(0.0, 0.0, 0.0)


def quantity(name: str, sample: Sample) -> float | None:
    """The figure that a band names, of one model; None where it was not measured."""
    measured = sample.measured
    if name.startswith(("update", "gradient")):
        return _quantity_of_role(name, sample)
    figures = {
        "stream at init": measured.stream[0],
        "stream change": measured.stream_change[-1],
        "logits at init": measured.logits[0],
        "logits change": measured.logits_change[-1],
    }
    return figures[name] if name in figures else measured.experts.get(name)


def _quantity_of_role(name: str, sample: Sample) -> float | None:
    rms_by_role: dict[str, float] = {}
    if "large eps" not in name:
        measured = sample.measured
        rms_by_role = measured.moved if name.startswith("update") else measured.gradients
    elif sample.with_large_eps is not None:
        rms_by_role = sample.with_large_eps.updates

    _, _, kind = name.rpartition(", ")
    for role in ROLES[kind]:
        if role in rms_by_role:
            return rms_by_role[role]
    return None


@dataclass(frozen=True)
class Finding:
    """The exponents of one quantity over one axis."""

    band: Band
    model: Estimate
    control: Estimate | None
    passed: bool | None  # None: only reported
    beside: dict[str, Estimate] = field(default_factory=dict)  # by parameterization

    @property
    def beyond(self) -> bool:
        """Whether the exponent is beyond the band and its margin, whatever its interval."""
        low = self.band.low - MARGIN
        high = self.band.high + MARGIN
        # Written so that an exponent that is no number is beyond.
        return self.passed is False and not low <= self.model.value <= high

    @property
    def wrong(self) -> bool:
        """Whether it is beyond the band and its margin, and its whole interval outside the band."""
        if not self.beyond:
            return False
        # No interval excuses an exponent that is no number: a run diverged, or nothing moved.
        if not math.isfinite(self.model.value):
            return True
        return self.model.outside(self.band.low, self.band.high)

    @property
    def vague(self) -> bool:
        """Whether the exponent is in the band with an interval that is wider than the band.

        With other seeds it may then lie on either side.
        """
        return self.passed is True and self.model.wider_than(self.band.high - self.band.low)

    @property
    def mark(self) -> str:
        """What the report shows of the finding in its last column."""
        if self.passed is None:
            return ""
        if not self.model.repeated:
            return "no interval"
        if self.vague:
            return "too wide"
        return "pass" if self.passed else "FAIL"


@dataclass(frozen=True)
class Result:
    """The verdict with its reason, the findings that it follows from, and the measurements."""

    verdict: Verdict
    reason: str
    findings: list[Finding]
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict's name and exit code."""
        fields = asdict(self)
        fields["verdict"] = self.verdict.name.lower()
        fields["exit_code"] = int(self.verdict)
        return fields


def bands_of(rule: str) -> Iterator[Band]:
    """The bands of a model that is trained by an update rule, by its name."""
    for band in BANDS:
        key = (band.axis, band.quantity)
        if rule != "muon" or key not in MUON_BANDS:
            yield band
        elif (limits := MUON_BANDS[key]) is not None:
            yield replace(band, low=limits[0], high=limits[1])


def judge(samples: Sequence[Sample], alpha: float = 1.0, update_rule: str = "adamw") -> Result:
    """Fit exponents over each axis, seed by seed, and compare them with the bands.

    `alpha` and `update_rule` are those of the model under check.
    """
    rules = dict.fromkeys(sample.rule for sample in samples)
    rules_beside = [rule for rule in rules if rule not in ("model", "control")]
    findings = []
    for alpha_one_band in bands_of(update_rule):
        band = _shifted(alpha_one_band, alpha)
        model = exponent(samples, band, "model")
        # Over an axis with one size, and without the runs with a large eps, there is no figure.
        if model is None:
            continue
        control = exponent(samples, band, "control")
        bounded = math.isfinite(band.low)
        passed = band.low <= model.value <= band.high if bounded else None
        beside = {}
        for rule in rules_beside:
            estimate = exponent(samples, band, rule)
            if estimate is not None:
                beside[rule] = estimate
        findings.append(Finding(band, model, control, passed, beside))
    verdict, reason = _verdict(findings)
    return Result(verdict, reason, findings, list(samples))


def _shifted(band: Band, alpha: float) -> Band:
    """The band for another alpha: the learning rate of hidden matrices is m_L^(alpha - 1)."""
    if (band.axis, band.quantity) != ("depth", "update, hidden matrices"):
        return band
    return replace(band, low=band.low + alpha - 1, high=band.high + alpha - 1)


def exponent(samples: Sequence[Sample], band: Band, rule: str) -> Estimate | None:
    """The exponent of one quantity, mean over seeds; None where it was not measured.

    A quantity without a band that is 0, such as changed choices where all experts are chosen, has
    none either.
    """
    rule_samples = [s for s in samples if s.axis == band.axis and s.rule == rule]
    slopes = []
    for seed in sorted({sample.seed for sample in rule_samples}):
        sizes: list[float] = []
        figures: list[float] = []
        for sample in rule_samples:
            if sample.seed != seed:
                continue
            figure = quantity(band.quantity, sample)
            if figure is None or (figure == 0 and band == Band(band.axis, band.quantity)):
                return None
            sizes.append(sample.size)
            figures.append(figure)
        slopes.append(log_log_slope(sizes, figures))
    return mean_estimate(slopes) if slopes else None


def _verdict(findings: Sequence[Finding]) -> tuple[Verdict, str]:
    start = _start_exponent(findings)
    wrong = [finding for finding in findings if finding.wrong]
    # One wrong exponent that nothing excuses decides, however uncertain the others are.
    if not all(_follows(finding, start.low) for finding in wrong):
        return Verdict.WRONG, "wrong: " + _outside(wrong)

    doubt = _doubt_about_model(findings, wrong, start) or _doubt_about_control(findings)
    if doubt is not None:
        return Verdict.CANNOT_TELL, f"cannot tell: {doubt}"
    return Verdict.RIGHT, "right: every exponent is in its band, and the control's is not"


def _start_exponent(findings: Sequence[Finding]) -> Estimate:
    """The exponent over depth of the stream at the initial weights."""
    for finding in findings:
        if (finding.band.axis, finding.band.quantity) == ("depth", "stream at init"):
            return finding.model
    return NO_START


def _doubt_about_model(
    findings: Sequence[Finding], wrong: Sequence[Finding], start: Estimate
) -> str | None:
    """Why the model's exponents leave the verdict open; None where they do not.

    `wrong`: the findings that are wrong, all of which follow the stream at the start.
    """
    # Without an interval nothing is known of what another seed would show.
    judged = [finding for finding in findings if finding.passed is not None]
    single = [finding for finding in judged if not finding.model.repeated]
    if single:
        return (
            f"{_listed(single[:1])}, has no interval, for there is one seed. Use --seeds 3 or more."
        )
    if wrong:
        return (
            f"{_outside(wrong)}, but the stream at the start falls as much ({start}): "
            "the blocks' random outputs outweigh the embedding, and what depends on them follows. "
            "Use deeper models or smaller optimizer.base_init_std."
        )

    vague = [finding for finding in findings if finding.beyond or finding.vague]
    if vague:
        return (
            f"{_listed(vague)}: with other seeds it may be in its band or outside. "
            "Use more seeds, more depths or widths, or more tokens a step."
        )
    # What is left is within the margin of its band, where a right model's curve may bend.
    near = [finding for finding in findings if finding.passed is False]
    if near:
        return (
            f"{_outside(near)}, which a right model may show too. "
            "Use more tokens a step, larger depths or widths, a smaller learning rate "
            "or smaller initial weights."
        )
    if not _decisive(findings):
        return "give at least two depths, widths or numbers of experts"
    return None


def _decisive(findings: Sequence[Finding]) -> list[Finding]:
    """Of each axis the finding that its control must get wrong."""
    return [finding for finding in findings if finding.band.quantity == DECISIVE[finding.band.axis]]


def _doubt_about_control(findings: Sequence[Finding]) -> str | None:
    """Why the control leaves the verdict open: it does not show that it is wrong."""
    decisive = _decisive(findings)
    if all(finding.control is None for finding in decisive):
        return "no control was measured, so that nothing shows what a wrong model would look like."
    for finding in decisive:
        control = finding.control
        if control is None:
            continue
        name = f"the control's {finding.band.quantity} over {finding.band.axis}"
        gap = control.value - finding.model.value
        # Written so that an exponent that is no number shows nothing.
        if not (control.value >= CONTROL_AT_LEAST and gap >= CONTROL_GAP):
            return (
                f"{name} has the exponent {control.value:+.2f}, {gap:+.2f} from the model's; "
                f"a wrong model must show at least +{CONTROL_AT_LEAST} and +{CONTROL_GAP} more. "
                "Use more depths or widths, or a larger learning rate."
            )
        if not control.low > finding.band.high:
            return (
                f"{name} has the exponent {control}, whose interval reaches into the model's band "
                f"(up to {finding.band.high:+.2f}): the check might not have seen a wrong model. "
                "Use more seeds, or more depths or widths."
            )
    return None


def _follows(finding: Finding, start: float) -> bool:
    """Whether the stream at the start explains a wrong exponent, so that a right model may show it.

    `start` is the lower end of that stream's exponent over depth. The blocks' random outputs add up
    to m_L^-1 L^1/2, so the stream falls with depth while they outweigh the embedding. What passes
    through the blocks may then change less by as much, and gradients, which the final norm divides
    by the stream, be larger by as much. No other exponent and no other direction is excused: a
    stream that grows, or an update of the wrong size, is wrong.
    """
    band = finding.band
    model = finding.model.value
    if (band.axis, band.quantity) == ("depth", STREAM_CHANGE):
        return start - MARGIN <= model < band.low
    if (band.axis, band.quantity) == ("depth", "update with large eps, in blocks"):
        return band.high < model <= MARGIN - start
    return False


def _listed(findings: Sequence[Finding]) -> str:
    """Each exponent with its interval and its band."""
    texts = []
    for finding in findings:
        band = finding.band
        limits = f"band {band.low:+.2f} to {band.high:+.2f}"
        texts.append(f"{band.quantity} over {band.axis} {finding.model}, {limits}")
    return "; ".join(texts)


def _outside(findings: Sequence[Finding]) -> str:
    """Each exponent without its interval, and the band that it is outside of."""
    texts = []
    for finding in findings:
        band = finding.band
        limits = f"[{band.low:+.2f}, {band.high:+.2f}]"
        figure = f"{band.quantity} over {band.axis} {finding.model.value:+.2f}"
        texts.append(f"{figure} outside {limits}")
    return "; ".join(texts)
