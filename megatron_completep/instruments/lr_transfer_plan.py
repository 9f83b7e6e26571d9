"""From the winning point of a proxy's sweep to the target's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config.derived import head_dim, tokens_per_step
from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.errors import ConfigError
from megatron_completep.files import write_whole
from megatron_completep.instruments import sweep
from megatron_completep.instruments.fits import parabola_optimum
from megatron_completep.instruments.lr_transfer import Curve, curves_of
from megatron_completep.instruments.trial import PARAMETERIZATIONS, change, stretch, with_base
from megatron_completep.planning.plan import describe

Say = Callable[[str], None]
ALIKE = (
    "norm",
    "activation",
    "position",
    "bias",
    "qk_norm",
    "tied_embeddings",
    "attention_scale",
    "vocab_size",
    "seq_length",
)


def plan(
    folder: Path,
    target: Config,
    path: Path,
    scale_batch: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Write the target's YAML to `path`, the values of every role in a comment; returns what was chosen.

    The proxy is the smallest shape of the sweep under the target's parameterization. scale_batch: learning rate, weight decay, eps
    and betas follow the target's tokens a step and in all (Complete(d)P); without it they stay.

    Raises ConfigError where the sweep has no curve under the target's parameterization, or the shapes cannot be scaled.
    """
    points = sweep.load_points(folder)
    rule = rule_of(target)
    curves = [
        c for c in curves_of(sweep.read_results(points, folder)) if c.parameterization == rule
    ]
    if not curves:
        done = sorted({p.parameterization for p in points})
        raise ConfigError(
            f"{folder}: no finished curve under {rule}, the target's parameterization; the sweep has {', '.join(done)}."
        )
    smallest = min((c.num_layers, c.hidden_size) for c in curves)
    curve = min(
        (c for c in curves if (c.num_layers, c.hidden_size) == smallest),
        key=lambda c: float(np.min(c.mean)),
    )
    optimum = parabola_optimum(curve.log2_lr, curve.mean)
    if optimum.at_edge:
        say(
            f"warning: the best learning rate 2^{optimum.log2_lr:g} is at the edge of the grid; sweep further before you rely on it"
        )
    proxy = next(p for p in points if p.parameterization == rule and _is_of(p, curve)).config
    unlike = [name for name in ALIKE if getattr(proxy.model, name) != getattr(target.model, name)]
    if unlike:
        say(
            f"warning: proxy and target differ in model.{', model.'.join(unlike)}; hyperparameters transfer over width and depth alone"
        )
    config = transferred(proxy, target, 2**optimum.log2_lr, curve, scale_batch)
    header = "\n".join(
        f"# {line}".rstrip()
        for line in [*_origin(folder, curve, optimum.log2_lr), "", *describe(config).splitlines()]
    )
    text = f"{header}\n{dump_yaml(config.model_dump(mode='json'))}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another file with --to."
        ) from None
    say(
        f"{path}: base_lr {config.optimizer.base_lr:.4g}, from {curve.num_layers} x {curve.hidden_size} ({curve.losses.shape[1]} seeds)"
    )
    return {
        "config": str(path),
        **config.optimizer.model_dump(mode="json"),
        "proxy": [curve.num_layers, curve.hidden_size],
    }


def rule_of(config: Config) -> str:
    """The name, in PARAMETERIZATIONS, of a configuration's rule."""
    completep = config.completep
    own = {"parameterization": completep.parameterization, "alpha": completep.alpha}
    for name, settings in PARAMETERIZATIONS.items():
        if settings == own:
            return name
    raise ConfigError(
        f"completep.alpha = {completep.alpha} is not among those that sweeps know. Use 1.0 or 0.5."
    )


def _is_of(point: sweep.Point, curve: Curve) -> bool:
    names = ("hidden_size", "num_layers", "train_steps", "base_weight_decay", "base_init_std")
    return all(getattr(point, name) == getattr(curve, name) for name in names)


def transferred(
    proxy: Config, target: Config, base_lr: float, curve: Curve, scale_batch: bool
) -> Config:
    """The target with the proxy's shape as its base, the proxy's base values, and its own factors by role and name."""
    proxy = with_base(proxy)
    base = {
        "base_hidden_size": proxy.completep.base_hidden_size,
        "base_num_layers": proxy.completep.base_num_layers,
        "base_ffn_hidden_size": proxy.completep.base_ffn_hidden_size,
        "base_head_dim": proxy.completep.base_head_dim or head_dim(proxy.model),
        "factors": proxy.completep.factors,
    }
    if scale_batch:
        tokens = tokens_per_step(proxy)
        base |= {"base_batch_tokens": tokens, "base_total_tokens": tokens * curve.train_steps}
    values = {
        "base_lr": float(f"{base_lr:.6g}"),
        "base_weight_decay": curve.base_weight_decay,
        "base_init_std": curve.base_init_std,
        "base_eps": proxy.optimizer.base_eps,
        "betas": proxy.optimizer.betas,
        "overrides": stretch(
            proxy.optimizer.overrides, proxy.model.num_layers, target.model.num_layers
        ),
    }
    return change(target, completep=base, optimizer=values)


def _origin(folder: Path, curve: Curve, log2_lr: float) -> list[str]:
    seeds = curve.losses.shape[1]
    return [
        f"Found on {curve.num_layers} layers x {curve.hidden_size} in {curve.train_steps} steps, {seeds} seed(s): {folder}",
        f"best learning rate 2^{log2_lr:.3f}, loss {float(np.min(curve.mean)):.4f}",
    ]
