"""The target's configuration, from the best point of a proxy's sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config.derived import head_dim, tokens_per_step
from megatron_completep.config.moe_rules import BASE_KEYS
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.errors import ConfigError
from megatron_completep.files import write_whole
from megatron_completep.instruments import sweep
from megatron_completep.instruments.fits import parabola_optimum
from megatron_completep.instruments.lr_curves import (
    Curve,
    curves_of,
    order_of_shapes,
    setting_of,
    shape_text,
)
from megatron_completep.instruments.trial import (
    PARAMETERIZATIONS,
    change,
    following,
    stretch,
    with_base,
)
from megatron_completep.planning.plan import describe

Say = Callable[[str], None]
# What hyperparameters do not transfer over: these settings must agree in proxy and target.
ALIKE = (
    "norm",
    "activation",
    "position",
    "bias",
    "qkv_bias",
    "rope_scaling",
    "qk_norm",
    "tied_embeddings",
    "attention_scale",
    "vocab_size",
    "seq_length",
)
# Sizes of experts are scaled or refused by the table's own rules. Coefficients are the proxy's.
ALIKE_MOE = (
    "gate",
    "every",
    "first_dense_layers",
    "balance",
    "bias_rate",
    "balance_loss",
    "router_z_loss",
)


def plan(
    folder: Path,
    target: Config,
    path: Path,
    scale_batch: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Write the target's YAML to `path`, with the values of every role in a comment.

    The proxy is the smallest shape of the sweep under the target's parameterization. scale_batch:
    learning rate, weight decay, eps and betas follow the target's tokens a step and in all
    (Complete(d)P); without it they stay.

    Returns the path, the optimizer's settings and the proxy's shape. Raises DataError where the
    folder holds no sweep, and ConfigError where the sweep has no curve under the target's
    parameterization, the shapes cannot be scaled, or the file cannot be written.
    """
    points = sweep.load_points(folder)
    curve = _proxy_curve(points, folder, rule_of(target))
    optimum = parabola_optimum(curve.log2_lr, curve.mean)
    # Only a warning: the value at the edge is still the best one that was run.
    if optimum.at_edge:
        say(
            f"warning: the best learning rate 2^{optimum.log2_lr:g} is at the edge of the grid; "
            "sweep further before you rely on it"
        )
    proxy = next(point for point in points if setting_of(point) == setting_of(curve)).config
    _warn_of_differences(proxy, target, say)

    config = transferred(proxy, target, 2**optimum.log2_lr, curve, scale_batch)
    # The values of every role do not stand in the settings; the comment shows what they come to.
    origin = _origin(folder, curve, optimum.log2_lr)
    header = [f"# {line}".rstrip() for line in [*origin, "", *describe(config).splitlines()]]
    yaml_text = dump_yaml(config.model_dump(mode="json"))
    _write(path, "\n".join([*header, yaml_text]))

    shape = f"{shape_text(*order_of_shapes(curve))} ({curve.losses.shape[1]} seeds)"
    say(f"{path}: base_lr {config.optimizer.base_lr:.4g}, from {shape}")
    return {
        "config": str(path),
        **config.optimizer.model_dump(mode="json"),
        "proxy": [curve.num_layers, curve.hidden_size],
    }


def _proxy_curve(points: Sequence[sweep.Point], folder: Path, rule: str) -> Curve:
    """The curve of the smallest shape under a rule, and of its curves the one of the lowest loss.

    Raises ConfigError where no curve is finished under the rule.
    """
    # Only seeds with every learning rate count, so a sweep that is under way may have no curve yet.
    all_curves = curves_of(sweep.read_results(points, folder))
    curves = [curve for curve in all_curves if curve.parameterization == rule]
    if not curves:
        rules = sorted({point.parameterization for point in points})
        raise ConfigError(
            f"{folder}: no finished curve under {rule}, the target's parameterization; "
            f"the sweep has {', '.join(rules)}."
        )
    # Curves of one shape differ in length, weight decay and initial std, which the loss decides.
    return min(curves, key=lambda c: (*order_of_shapes(c), float(np.min(c.mean))))


def _warn_of_differences(proxy: Config, target: Config, say: Say) -> None:
    """Name the settings of the model that differ although nothing transfers over them."""
    names = [name for name in ALIKE if getattr(proxy.model, name) != getattr(target.model, name)]
    names += unlike_experts(proxy.model, target.model)
    if names:
        say(
            f"warning: proxy and target differ in model.{', model.'.join(names)}; "
            "hyperparameters transfer over width, depth and numbers of experts alone"
        )


def unlike_experts(proxy: ModelConfig, target: ModelConfig) -> list[str]:
    """The settings of experts that differ although nothing transfers over them."""
    if proxy.moe is None or target.moe is None:
        return [] if proxy.moe is target.moe else ["moe"]
    names = [name for name in ALIKE_MOE if getattr(proxy.moe, name) != getattr(target.moe, name)]
    # The table takes the proxy's shared MLP to be as large a share of its width, if there is one.
    of_proxy = (proxy.moe.shared_ffn_hidden_size or 0) * target.hidden_size
    of_target = (target.moe.shared_ffn_hidden_size or 0) * proxy.hidden_size
    if of_proxy != of_target:
        names.append("shared_ffn_hidden_size")
    return [f"moe.{name}" for name in names]


def _write(path: Path, content: str) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another file with --to."
        ) from None


def rule_of(config: Config) -> str:
    """The name, in PARAMETERIZATIONS, of a configuration's rule. Raises ConfigError without one."""
    completep = config.completep
    settings = {"parameterization": completep.parameterization, "alpha": completep.alpha}
    for name, rule_settings in PARAMETERIZATIONS.items():
        if rule_settings == settings:
            return name
    raise ConfigError(
        f"completep.alpha = {completep.alpha} is not among those that sweeps know. Use 1.0 or 0.5."
    )


def transferred(
    proxy: Config, target: Config, base_lr: float, curve: Curve, scale_batch: bool
) -> Config:
    """The target with the proxy's shape as its base and the proxy's base values.

    The proxy's own factors by role and by name go with them. Raises ConfigError where the shapes
    cannot be scaled.
    """
    proxy = with_base(proxy)
    completep = proxy.completep
    base = {
        "base_hidden_size": completep.base_hidden_size,
        "base_num_layers": completep.base_num_layers,
        "base_ffn_hidden_size": completep.base_ffn_hidden_size,
        "base_head_dim": completep.base_head_dim or head_dim(proxy.model),
        "factors": completep.factors,
    }
    # Without experts in the target the sizes of the proxy's have no meaning, as a warning says.
    if target.model.moe is not None:
        base |= {name: getattr(completep, name) for name in BASE_KEYS}
    # The table scales with the target's tokens over these, a step and in all.
    if scale_batch:
        tokens = tokens_per_step(proxy)
        base["base_batch_tokens"] = tokens
        base["base_total_tokens"] = tokens * curve.train_steps

    # An override of a single layer goes to the target's layers at the same part of the depth.
    optimizer = proxy.optimizer
    overrides = stretch(optimizer.overrides, proxy.model.num_layers, target.model.num_layers)
    settings = {
        # More digits than the sweep can tell would make the file hard to read.
        "base_lr": float(f"{base_lr:.6g}"),
        "base_weight_decay": curve.base_weight_decay,
        "base_init_std": curve.base_init_std,
        "base_eps": optimizer.base_eps,
        "betas": optimizer.betas,
        "overrides": overrides,
        # The rule is the one that was swept.
        "type": optimizer.type,
        "muon": None,
    }
    settings |= following(optimizer, settings)
    return change(target, completep=base, optimizer=settings)


def _origin(folder: Path, curve: Curve, log2_lr: float) -> list[str]:
    """The header's lines on where the values are from."""
    seeds = curve.losses.shape[1]
    shape = f"{curve.num_layers} layers x {curve.hidden_size}"
    return [
        f"Found on {shape} in {curve.train_steps} steps, {seeds} seed(s): {folder}",
        f"best learning rate 2^{log2_lr:.3f}, loss {float(np.min(curve.mean)):.4f}",
    ]
