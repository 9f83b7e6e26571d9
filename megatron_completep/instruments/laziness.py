"""Laziness: how far each block's first update is from being linear in its parameters.

A block learns features completely when its change is not described by its linearization alone, at any depth. For block k with its
input x_k at the initial weights held fixed, one Adam step d = theta_1 - theta_0 gives

    r_k = |F(theta_1) - F(theta_0) - J d| / |J d|,      J d ~ (F(theta_0 + h d) - F(theta_0 - h d)) / 2h

with F the whole block, residual included. Theory: r does not depend on depth at alpha = 1 and falls as L^-0.5 at alpha = 0.5. In
float64: the numerator is a difference of nearly equal things. (arXiv 2505.01618, section on complete feature learning.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.coordinate_verdict import Verdict
from megatron_completep.instruments.fits import Estimate, log_log_slope, mean_estimate
from megatron_completep.instruments.trial import (
    Design,
    Trial,
    for_short_runs,
    read_batches,
    reshape,
    under,
    with_seed,
)
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.block import Block
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.telemetry.measure import layer_entries

STEP = 1e-4  # h: in float64 the truncation error of the central difference is then about 1e-8, and rounding about 1e-11
FIRST_DEPTH = 4  # in base depths: below, finite-depth terms bend the curve
MODEL_ABOVE, CONTROL_BELOW = -0.25, -0.4
Say = Callable[[str], None]


@torch.no_grad()
def block_output(model: GPT, block: Block, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """The stream after a block whose input is the stream x [S, B, H]."""
    return block(Stream(x, site=0), inputs).settle(model.join, model.queue)


def block_laziness(trial: Trial) -> list[float]:
    """r_k of every block after one step on the trial's first batch; float64, one process."""
    model = cast(GPT, trial.chunks[0])
    optimizer = trial.optimizer
    (batches,) = read_batches(trial.config, trial.context, 1)
    with trial.taps.recording() as taps, torch.no_grad():
        model(batches[0].tokens)
        streams = [taps.streams[name][0] for name in layer_entries(model)]
    inputs = model._attention_inputs(streams[0], batches[0].tokens, None, None, None)
    before = optimizer.shards.flat.clone()
    trial.step.run(batches, 1).read()
    step = optimizer.shards.flat - before

    def outputs(along: float) -> list[Tensor]:
        optimizer.shards.flat.copy_(before + along * step)
        return [
            block_output(model, block, x, inputs)
            for (_, block), x in zip(model.blocks(), streams, strict=True)
        ]

    start, end = outputs(0.0), outputs(1.0)
    linear = [
        (ahead - behind) / (2 * STEP)
        for ahead, behind in zip(outputs(STEP), outputs(-STEP), strict=True)
    ]
    triples = zip(start, end, linear, strict=True)
    return [((f1 - f0 - jd).norm() / jd.norm()).item() for f0, f1, jd in triples]


@dataclass(frozen=True)
class LazinessSample:
    """All blocks of one model."""

    rule: str
    num_layers: int
    seed: int
    blocks: list[float]


@dataclass(frozen=True)
class LazinessResult:
    """Medians over blocks and seeds by depth, exponents over the deeper ones, and what follows."""

    verdict: Verdict
    reason: str
    slopes: dict[str, Estimate]
    medians: dict[str, dict[int, float]]
    first_depth: int  # layers from which exponents are fitted
    samples: list[LazinessSample]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "verdict": self.verdict.name.lower(),
            "exit_code": int(self.verdict),
        }


def collect(
    config: Config,
    depths: Sequence[int],
    seeds: int = 3,
    rules: Sequence[str] = ("own", "alpha_0.5", "mup"),
    design: Design | None = None,
    say: Say = lambda text: None,
) -> list[LazinessSample]:
    """Measure every depth under every rule ("own": as configured, with `design`; others by name, right). One process, CPU or GPU."""
    if config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            "laziness is measured in one process: set parallel.tensor_parallel_size and pipeline_parallel_size to 1."
        )
    context = ParallelContext.create(config.parallel, config.training.device)
    samples = []
    for depth in depths:
        for seed in range(seeds):
            for rule in rules:
                shaped = under(with_seed(reshape(config, num_layers=depth), seed), rule)
                settings = {"base_weight_decay": 0.0, "base_eps": 1e-30}
                short = for_short_runs(shaped, 1, "float64", **settings)
                trial = Trial.build(short, context, design if rule == "own" else None)
                samples.append(LazinessSample(rule, depth, seed, block_laziness(trial)))
            medians = ", ".join(
                f"{s.rule} {np.median(s.blocks):.4f}" for s in samples[-len(rules) :]
            )
            say(f"{depth} layers, seed {seed}: {medians}")
    return samples


def judge(samples: Sequence[LazinessSample], base_num_layers: int) -> LazinessResult:
    """Exponents over depth of the median over blocks, seed by seed, from FIRST_DEPTH base depths on."""
    rules = list(dict.fromkeys(s.rule for s in samples))
    medians = {rule: median_by_depth([s for s in samples if s.rule == rule]) for rule in rules}
    slopes, first_depth = {}, FIRST_DEPTH * base_num_layers
    for rule in rules:
        own = [s for s in samples if s.rule == rule and s.num_layers >= first_depth]
        by_seed = [
            median_by_depth([s for s in own if s.seed == seed])
            for seed in sorted({s.seed for s in own})
        ]
        fitted = [log_log_slope(list(m), list(m.values())) for m in by_seed if len(m) > 1]
        if fitted:
            slopes[rule] = mean_estimate(fitted)
    verdict, reason = _verdict(slopes)
    return LazinessResult(verdict, reason, slopes, medians, first_depth, list(samples))


def median_by_depth(samples: Sequence[LazinessSample]) -> dict[int, float]:
    """Median over all blocks of all seeds, by depth."""
    depths = sorted({s.num_layers for s in samples})
    return {
        depth: float(np.median([r for s in samples if s.num_layers == depth for r in s.blocks]))
        for depth in depths
    }


def _verdict(slopes: dict[str, Estimate]) -> tuple[Verdict, str]:
    if "own" not in slopes or "alpha_0.5" not in slopes:
        return (
            Verdict.CANNOT_TELL,
            f"cannot tell: give at least two depths of {FIRST_DEPTH} base depths and more",
        )
    model, lazy = slopes["own"], slopes["alpha_0.5"]
    own, control = model.value, lazy.value
    if not math.isfinite(own) or (own < CONTROL_BELOW and model.high < MODEL_ABOVE):
        return (
            Verdict.WRONG,
            f"wrong: blocks become lazy with depth, exponent {own:+.2f}; it must be above {MODEL_ABOVE}",
        )
    if not model.repeated:
        return (
            Verdict.CANNOT_TELL,
            f"cannot tell: exponent {own:+.2f} has no interval, for there is one seed. Use --seeds 3 or more.",
        )
    if own < CONTROL_BELOW or (own > MODEL_ABOVE and model.low <= CONTROL_BELOW):
        return Verdict.CANNOT_TELL, (
            f"cannot tell: the interval of the exponent, {model}, holds both what a complete model has (above {MODEL_ABOVE}) and what "
            f"a lazy one has (below {CONTROL_BELOW}). Use more seeds or more depths."
        )
    if own <= MODEL_ABOVE:
        return Verdict.CANNOT_TELL, (
            f"cannot tell: exponent {own:+.2f}, between {MODEL_ABOVE} of a complete model and {CONTROL_BELOW} of a lazy one. "
            "Use deeper models: terms that fall as 1 / L are still to be seen."
        )
    if control >= CONTROL_BELOW:
        return Verdict.CANNOT_TELL, (
            f"cannot tell: the control, alpha 0.5, has the exponent {control:+.2f}, which must be below {CONTROL_BELOW}. "
            "Use more depths or seeds, or another learning rate."
        )
    if not lazy.high < MODEL_ABOVE:
        return Verdict.CANNOT_TELL, (
            f"cannot tell: the interval of the control's exponent, alpha 0.5, {lazy}, reaches above {MODEL_ABOVE}: "
            "it has not been seen to be lazy. Use more seeds or more depths."
        )
    return (
        Verdict.RIGHT,
        f"right: exponent {own:+.2f} above {MODEL_ABOVE}, and the control's {control:+.2f} below {CONTROL_BELOW}",
    )
