"""Laziness: how nearly linear in its parameters each block's first update is.

A block learns features completely when its change is not described by its linearization alone, at
any depth. For block k with its input x_k at the initial weights held fixed, one Adam step
d = theta_1 - theta_0 gives

    r_k = |F(theta_1) - F(theta_0) - J d| / |J d|
    J d ~ (F(theta_0 + h d) - F(theta_0 - h d)) / 2h

with F the whole block, residual included. In a layer with experts tokens stay with those that they
have at theta_0: F would jump where a choice changes, and have no linearization. Theory: r does not
depend on depth at alpha = 1 and falls as L^-0.5 at alpha = 0.5. Computed in float64, for the
numerator is a difference of nearly equal numbers. (arXiv 2505.01618, section on complete feature
learning.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_completep.config.derived import model_parallel_size
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
from megatron_completep.model.routing import Routing, fixing, observing
from megatron_completep.model.stream import Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.telemetry.measure import layer_entries

# h: in float64 the truncation error of the central difference is then about 1e-8, and its rounding
# error about 1e-11.
STEP = 1e-4
FIRST_DEPTH = 4  # in base depths: below, terms that fall as 1 / L bend the curve
MODEL_ABOVE = -0.25  # the exponent of a complete model is above this
CONTROL_BELOW = -0.4  # and that of a lazy one below this
Say = Callable[[str], None]


@torch.no_grad()
def block_output(model: GPT, block: Block, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """The stream [S, B, H] after a block whose input is the stream x [S, B, H]."""
    stream: Tensor = block(Stream(x, branch_index=0), inputs).add_pending(model.join, model.queue)
    return stream


def block_laziness(trial: Trial) -> list[float]:
    """r_k of every block, after one step on the trial's first batch, in the order of the model.

    The trial is in float64 on one process; its weights are changed.
    """
    model = cast(GPT, trial.chunks[0])
    optimizer = trial.optimizer
    (batches,) = read_batches(trial.config, trial.context, 1)
    tokens = batches[0].tokens

    # Every block's input at the initial weights stays fixed in all that follows, and so do the
    # experts of every token.
    choices: dict[int, Tensor] = {}

    def keep(layer: int, routing: Routing) -> None:
        choices[layer] = routing.experts

    with trial.taps.recording() as taps, observing(model, keep), torch.no_grad():
        model(tokens)
        streams = [taps.streams[name][0] for name in layer_entries(model)]
    inputs = model._attention_inputs(streams[0], tokens.shape[1], None, None, None)

    weights_before = optimizer.shards.flat.clone()
    trial.step.run(batches, 1).read()
    step = optimizer.shards.flat - weights_before

    def outputs(fraction: float) -> list[Tensor]:
        """Every block's output at the initial weights plus a fraction of the step."""
        # The blocks' parameters are views of the flat tensor, so this sets them all.
        optimizer.shards.flat.copy_(weights_before + fraction * step)
        block_outputs = []
        for (_, block), stream in zip(model.blocks(), streams, strict=True):
            block_outputs.append(block_output(model, block, stream, inputs))
        return block_outputs

    with fixing(model, choices):
        start = outputs(0.0)
        end = outputs(1.0)
        ahead = outputs(STEP)
        behind = outputs(-STEP)
    laziness = []
    for f0, f1, f_ahead, f_behind in zip(start, end, ahead, behind, strict=True):
        linear = (f_ahead - f_behind) / (2 * STEP)
        remainder = f1 - f0 - linear
        laziness.append((remainder.norm() / linear.norm()).item())
    return laziness


@dataclass(frozen=True)
class LazinessSample:
    """r_k of all blocks of one model."""

    rule: str
    num_layers: int
    seed: int
    blocks: list[float]


@dataclass(frozen=True)
class LazinessResult:
    """The verdict with its reason, and the figures that it follows from."""

    verdict: Verdict
    reason: str
    slopes: dict[str, Estimate]  # by rule: exponents over the depths from first_depth on
    medians: dict[str, dict[int, float]]  # by rule and depth: over blocks and seeds
    first_depth: int  # layers from which exponents are fitted
    samples: list[LazinessSample]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict's name and exit code."""
        fields = asdict(self)
        fields["verdict"] = self.verdict.name.lower()
        fields["exit_code"] = int(self.verdict)
        return fields


def collect(
    config: Config,
    depths: Sequence[int],
    seeds: int = 3,
    rules: Sequence[str] = ("own", "alpha_0.5", "mup"),
    design: Design | None = None,
    say: Say = lambda text: None,
) -> list[LazinessSample]:
    """Measure every depth and seed under every rule, in one process on CPU or GPU.

    The rule "own" is the configuration's, with `design`; others are by their names in
    PARAMETERIZATIONS, with the right table. `say` gets one line a depth and seed. Raises
    ConfigError for a layout that splits the model.
    """
    parallel = config.parallel
    if model_parallel_size(parallel) > 1:
        raise ConfigError(
            "laziness is measured in one process: set parallel.tensor_parallel_size, "
            "pipeline_parallel_size and context_parallel_size to 1."
        )
    context = ParallelContext.create(parallel, config.training.device)
    # With decay the step would not be Adam's alone, and with a larger eps it would depend on the
    # size of the gradients.
    settings = {"base_weight_decay": 0.0, "base_eps": 1e-30}
    samples = []
    for depth, seed in product(depths, range(seeds)):
        seeded = with_seed(reshape(config, num_layers=depth), seed)
        texts = []
        for rule in rules:
            short = for_short_runs(under(seeded, rule), 1, "float64", **settings)
            trial = Trial.build(short, context, design if rule == "own" else None)
            blocks = block_laziness(trial)
            samples.append(LazinessSample(rule, depth, seed, blocks))
            texts.append(f"{rule} {np.median(blocks):.4f}")
        say(f"{depth} layers, seed {seed}: {', '.join(texts)}")
    return samples


def judge(samples: Sequence[LazinessSample], base_num_layers: int) -> LazinessResult:
    """Fit exponents over depth to the medians over blocks, seed by seed, and judge them.

    Only depths from FIRST_DEPTH base depths on are fitted.
    """
    first_depth = FIRST_DEPTH * base_num_layers
    medians: dict[str, dict[int, float]] = {}
    slopes: dict[str, Estimate] = {}
    for rule in dict.fromkeys(sample.rule for sample in samples):
        rule_samples = [sample for sample in samples if sample.rule == rule]
        medians[rule] = median_by_depth(rule_samples)
        deep = [sample for sample in rule_samples if sample.num_layers >= first_depth]
        seed_slopes = _seed_slopes(deep)
        if seed_slopes:
            slopes[rule] = mean_estimate(seed_slopes)
    verdict, reason = _verdict(slopes)
    return LazinessResult(verdict, reason, slopes, medians, first_depth, list(samples))


def _seed_slopes(samples: Sequence[LazinessSample]) -> list[float]:
    """The exponent of every seed that has at least two depths."""
    slopes = []
    for seed in sorted({sample.seed for sample in samples}):
        medians = median_by_depth([sample for sample in samples if sample.seed == seed])
        if len(medians) > 1:
            slopes.append(log_log_slope(list(medians), list(medians.values())))
    return slopes


def median_by_depth(samples: Sequence[LazinessSample]) -> dict[int, float]:
    """By depth, ascending: the median over all blocks of all seeds."""
    blocks: dict[int, list[float]] = {}
    for sample in samples:
        blocks.setdefault(sample.num_layers, []).extend(sample.blocks)
    return {depth: float(np.median(blocks[depth])) for depth in sorted(blocks)}


def _verdict(slopes: dict[str, Estimate]) -> tuple[Verdict, str]:
    if "own" not in slopes or "alpha_0.5" not in slopes:
        doubt = f"give at least two depths of {FIRST_DEPTH} base depths and more"
        return Verdict.CANNOT_TELL, f"cannot tell: {doubt}"
    model = slopes["own"]
    control = slopes["alpha_0.5"]
    exponent = model.value
    # The whole interval must be below MODEL_ABOVE, so one seed shows this only where its exponent
    # is no number.
    lazy = exponent < CONTROL_BELOW and model.high < MODEL_ABOVE
    if lazy or not math.isfinite(exponent):
        return Verdict.WRONG, (
            f"wrong: blocks become lazy with depth, exponent {exponent:+.2f}; "
            f"it must be above {MODEL_ABOVE}"
        )

    why_open = _doubt_about_model(model) or _doubt_about_control(control)
    if why_open is not None:
        return Verdict.CANNOT_TELL, f"cannot tell: {why_open}"
    return Verdict.RIGHT, (
        f"right: exponent {exponent:+.2f} above {MODEL_ABOVE}, "
        f"and the control's {control.value:+.2f} below {CONTROL_BELOW}"
    )


def _doubt_about_model(model: Estimate) -> str | None:
    """Why the exponent under check leaves the verdict open; None where it does not."""
    exponent = model.value
    if not model.repeated:
        return (
            f"exponent {exponent:+.2f} has no interval, for there is one seed. "
            "Use --seeds 3 or more."
        )
    # The exponent is on one side, and its interval reaches the other.
    below = exponent < CONTROL_BELOW
    if below or (exponent > MODEL_ABOVE and model.low <= CONTROL_BELOW):
        return (
            f"the interval of the exponent, {model}, holds both what a complete model has "
            f"(above {MODEL_ABOVE}) and what a lazy one has (below {CONTROL_BELOW}). "
            "Use more seeds or more depths."
        )
    if exponent <= MODEL_ABOVE:
        return (
            f"exponent {exponent:+.2f}, between {MODEL_ABOVE} of a complete model "
            f"and {CONTROL_BELOW} of a lazy one. "
            "Use deeper models: terms that fall as 1 / L are still to be seen."
        )
    return None


def _doubt_about_control(control: Estimate) -> str | None:
    """Why the control leaves the verdict open: it does not show that it is lazy."""
    if control.value >= CONTROL_BELOW:
        return (
            f"the control, alpha 0.5, has the exponent {control.value:+.2f}, "
            f"which must be below {CONTROL_BELOW}. "
            "Use more depths or seeds, or another learning rate."
        )
    if not control.high < MODEL_ABOVE:
        return (
            f"the interval of the control's exponent, alpha 0.5, {control}, "
            f"reaches above {MODEL_ABOVE}: it has not been seen to be lazy. "
            "Use more seeds or more depths."
        )
    return None
