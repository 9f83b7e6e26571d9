"""What settings of the update rule, and of weight decay, do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_completep.config.remedies import Problem
from megatron_completep.config.schema import Config


def muon_problems(config: Config) -> Iterator[Problem]:
    """Muon's section is there where Muon is, and only there."""
    optimizer = config.optimizer
    muon = optimizer.muon
    if optimizer.type == "muon" and muon is None:
        yield (
            "optimizer.type = muon has no base_lr for its matrices: optimizer.muon is null. "
            "Give optimizer.muon.base_lr, tuned at the proxy."
        )
    if muon is None:
        return
    if optimizer.type != "muon":
        yield (
            f"optimizer.muon is given, but optimizer.type = {optimizer.type} does not read it. "
            "Use optimizer.type = muon, or optimizer.muon = null."
        )
    if optimizer.type == "muon" and config.training.overlap_update:
        yield (
            "training.overlap_update = true updates bucket by bucket, but optimizer.type = muon "
            "needs whole matrices. Use overlap_update = false, or optimizer.type = adamw."
        )
    if muon.momentum >= 1:
        yield (
            f"optimizer.muon.momentum = {muon.momentum} is not less than 1, so the mean would "
            "never move. Use a value such as 0.95."
        )


def decay_problems(config: Config) -> Iterator[Problem]:
    """The rule of weight decay, its target, and the scaling by duration."""
    optimizer = config.optimizer
    completep = config.completep
    rule = optimizer.weight_decay_rule
    if rule == "tau" and optimizer.target_tau is None:
        yield (
            "optimizer.weight_decay_rule = tau has no target: optimizer.target_tau is null. "
            "Give the proxy's tau, which tools/show_plan.py prints."
        )
    if rule != "tau" and optimizer.target_tau is not None:
        yield (
            f"optimizer.target_tau = {optimizer.target_tau:g} is not read under "
            f"optimizer.weight_decay_rule = {rule}. Use tau, or target_tau = null."
        )
    if rule == "tau":
        for name, decay in _base_decays(config).items():
            if decay == 0:
                yield (
                    f"{name} = 0 asks for no decay, but optimizer.weight_decay_rule = tau solves "
                    "for one. Use weight_decay_rule = table, or give a decay."
                )
    if rule == "inverse_width" and completep.base_total_tokens is not None:
        yield (
            "optimizer.weight_decay_rule = inverse_width and completep.base_total_tokens = "
            f"{completep.base_total_tokens} both lower the decay of a longer run. "
            "Use weight_decay_rule = table, or base_total_tokens = null."
        )
    exponent = completep.duration_exponent
    if exponent is not None and completep.base_total_tokens is None:
        yield (
            f"completep.duration_exponent = {exponent:g} has nothing to act on: "
            "completep.base_total_tokens is null. Give it, or remove the exponent."
        )


def _base_decays(config: Config) -> dict[str, float]:
    """The proxy's weight decays, by the name of their setting."""
    decays = {"optimizer.base_weight_decay": config.optimizer.base_weight_decay}
    if config.optimizer.muon is not None:
        decays["optimizer.muon.base_weight_decay"] = config.optimizer.muon.base_weight_decay
    return decays
