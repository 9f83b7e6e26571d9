"""A run of another size, from a proxy: shape, tokens, batch and steps, with the proxy as its base.

The table does the rest: the configuration names the proxy's shape, batch and duration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_completep.completep import table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.config.derived import tokens_per_step, total_tokens
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.run_shape import Shape
from megatron_completep.instruments.trial import change, on_one_process, reshape, with_base

# Exponent of the batch in tokens: that of Power Lines (arXiv 2505.13738), as nanochat uses it.
BATCH_POWER = 0.383
TOKENS_PER_PARAMETER = 20.0  # of arXiv 2203.15556, embeddings included
# How far a batch may be rounded, so that many numbers of data ranks divide it.
BATCH_ROUNDING = 8


@dataclass(frozen=True)
class Scaling:
    """What follows from the length of a run. None: as the proxy's file has it.

    batch_power: of the batch over the run's tokens. duration_exponent: of the learning rate over
    them (`completep.duration_exponent`).
    """

    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    batch_power: float = BATCH_POWER
    duration_exponent: float | None = None
    weight_decay_rule: str | None = None


@dataclass(frozen=True)
class Duration:
    """Sequences a step, and steps."""

    batch: int
    steps: int


def duration_of(proxy: Config, tokens: int, scaling: Scaling, gpus: int | None = None) -> Duration:
    """Batch and steps of a run of `tokens` tokens.

    Unless it is the proxy's own, the batch is rounded to a number that many data ranks divide, by
    less than a sixteenth, or to whole micro-batches of the proxy's size. gpus: the ranks that must
    be able to share it, whose micro-batches are searched.
    """
    training = proxy.training
    exact_batch = unrounded_batch(proxy, tokens, scaling)
    batch = max(1, round(exact_batch))
    if batch != training.global_batch_size:
        granule = _granule(batch, gpus)
        # Where no layout is searched, the proxy's micro-batches stay whole.
        if gpus is None:
            granule = -(-granule // training.micro_batch_size) * training.micro_batch_size
        batch = max(granule, round(exact_batch / granule) * granule)
    steps = max(1, round(tokens / (batch * proxy.model.seq_length)))
    return Duration(batch, steps)


def unrounded_batch(proxy: Config, tokens: int, scaling: Scaling) -> float:
    """The sequences a step that the power law asks for in a run of `tokens` tokens."""
    growth = tokens / total_tokens(proxy)
    return float(proxy.training.global_batch_size * growth**scaling.batch_power)


def _granule(batch: int, gpus: int | None) -> int:
    """The largest step of batches that rounds by no more than a sixteenth.

    It divides the number of GPUs, or is a power of two where that is not known.
    """
    largest = max(1, batch // BATCH_ROUNDING)
    if gpus is None:
        return 1 << (largest.bit_length() - 1)
    return max(size for size in range(1, min(largest, gpus) + 1) if gpus % size == 0)


def derived(proxy: Config, shape: Shape, scaling: Scaling, gpus: int | None = None) -> Config:
    """The proxy's configuration at another shape and length, with the proxy's values as its base.

    It is divided over no ranks. Raises ConfigError where the shape does not divide, or a rule of
    decay has nothing to keep.
    """
    base = with_base(on_one_process(proxy))
    duration = duration_of(proxy, shape.tokens(scaling.tokens_per_parameter), scaling, gpus)
    shaped = reshape(base, shape.hidden_size, shape.num_layers)
    completep: dict[str, Any] = {
        "base_batch_tokens": base.completep.base_batch_tokens or tokens_per_step(proxy),
        "base_total_tokens": base.completep.base_total_tokens or total_tokens(proxy),
    }
    if scaling.duration_exponent is not None:
        completep["duration_exponent"] = scaling.duration_exponent
    training: dict[str, Any] = {
        "global_batch_size": duration.batch,
        "train_steps": duration.steps,
        "micro_batch_size": _micro_batch(proxy.training.micro_batch_size, duration.batch),
        # These count steps or sequences of the proxy.
        "batch_ramp": None,
        "stop_at_step": None,
        "skip_steps": [],
    }
    # A run must not resume from the proxy's checkpoints.
    model = proxy.model
    proxy_sizes = (model.hidden_size, model.num_layers, proxy.training.train_steps)
    if proxy_sizes != (shape.hidden_size, shape.num_layers, duration.steps):
        name = f"{shape.num_layers}x{shape.hidden_size}_{duration.steps}_steps"
        training["output_dir"] = f"{proxy.training.output_dir}_{name}"
    return change(
        shaped,
        # `reshape` is for instruments, which compare on any device.
        model={"attention_backend": proxy.model.attention_backend},
        completep=completep,
        training=training,
        optimizer=_decay(base, scaling),
    )


def _micro_batch(wanted: int, batch: int) -> int:
    """The largest micro-batch up to `wanted` sequences that divides the batch."""
    return max(size for size in range(1, min(wanted, batch) + 1) if batch % size == 0)


def _decay(base: Config, scaling: Scaling) -> dict[str, Any]:
    """The settings of weight decay under another rule; nothing where the rule stays.

    Under `tau` the run keeps the tau of the proxy's hidden weights.
    """
    rule = scaling.weight_decay_rule
    if rule is None or rule == base.optimizer.weight_decay_rule:
        return {}
    if rule != "tau":
        return {"weight_decay_rule": rule, "target_tau": None}
    scales = list(timescales(base, table_of(base)))
    if not scales:
        raise ConfigError(
            "--weight-decay-rule tau: nothing decays at the proxy, so there is no tau to keep. "
            "Set optimizer.base_weight_decay, or use the rule table."
        )
    tau = scales[0].proxy or scales[0].run
    return {"weight_decay_rule": "tau", "target_tau": float(f"{tau:.6g}")}
