"""Gradients of routers: that of their own losses over that of the tokens' loss, by size.

    python docs/results/experts_router_losses.py docs/results/experts.yaml OUT.json

Of all routers, the root mean square over their elements: at the start, and after 30 steps without
the losses. Exponents of the ratio, with the coefficients as the table has them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_completep.config import load_config
from megatron_completep.instruments.trial import Trial, for_short_runs, read_batches
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import main_grad_of

STEPS = 30
INPUT_MULTIPLIER = 50.0  # the embedding carries the stream
SIZES = {"layers": (2, 4, 8, 16), "width": (128, 256, 512), "experts": (8, 16, 32, 64)}
LOSSES = {"balance_loss": ("loss", 1.0, 0.0), "router_z_loss": ("none", 0.0, 1.0)}


def overrides_of(axis: str, size: int, gate: str) -> list[str]:
    """A model of one size, of which the proxy is 2 x 128 with 2 of 8 experts."""
    layers = size if axis == "layers" else 2
    width = size if axis == "width" else 128
    experts = size if axis == "experts" else 8
    settings: dict[str, Any] = {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.ffn_hidden_size": 2 * width,
        "model.input_multiplier": INPUT_MULTIPLIER,
        "model.moe.num_experts": experts,
        "model.moe.top_k": experts // 4,
        "model.moe.ffn_hidden_size": width,
        "model.moe.gate": gate,
        "completep.base_hidden_size": 128,
        "completep.base_expert_ffn_hidden_size": 128,
        "optimizer.base_init_std": 0.02,
        "training.micro_batch_size": 16,
        "training.global_batch_size": 16,
    }
    return [f"{name}={setting}" for name, setting in settings.items()]


def trial_of(path: str, overrides: list[str], balance: str, losses: tuple[float, float]) -> Trial:
    own = [
        f"model.moe.balance={balance}",
        f"model.moe.balance_loss={losses[0]}",
        f"model.moe.router_z_loss={losses[1]}",
    ]
    config = for_short_runs(load_config(path, [*overrides, *own]), STEPS, base_lr=2**-8)
    return Trial.build(config, ParallelContext.single())


def router_gradients(trial: Trial, batch: Any) -> Tensor:
    """All elements of the routers' gradients of one micro-batch."""
    model: Any = trial.chunks[0]
    model.queue.begin_step(model.parameters(), 1)
    model(batch.tokens, labels=batch.labels).backward()
    model.queue.finish_step()
    names = [(n, p) for n, p in model.named_parameters() if n.endswith("router.weight")]
    return torch.cat([main_grad_of(parameter).double().flatten() for _, parameter in names])


def ratios(path: str, overrides: list[str], steps: int) -> dict[str, float]:
    """The size of each loss's gradient over that of the tokens' loss."""
    plain = trial_of(path, overrides, "none", (0.0, 0.0))
    batches = read_batches(plain.config, plain.context, STEPS + 1)
    for number in range(1, steps + 1):
        plain.step.run(batches[number - 1], number).read()
    plain.optimizer.wait_for_parameters()
    trained = [parameter.detach().clone() for parameter in plain.chunks[0].parameters()]
    (batch,) = batches[STEPS]
    of_tokens = router_gradients(trial_with(path, overrides, trained), batch)
    measured = {}
    for name, (balance, *losses) in LOSSES.items():
        trial = trial_with(path, overrides, trained, balance, (losses[0], losses[1]))
        own = router_gradients(trial, batch) - of_tokens
        measured[name] = float(own.norm() / of_tokens.norm())
    return measured


def trial_with(
    path: str,
    overrides: list[str],
    parameters: list[Tensor],
    balance: str = "none",
    losses: tuple[float, float] = (0.0, 0.0),
) -> Trial:
    trial = trial_of(path, overrides, balance, losses)
    for parameter, trained in zip(trial.chunks[0].parameters(), parameters, strict=True):
        parameter.data.copy_(trained)
    return trial


def exponent(sizes: tuple[int, ...], figures: list[float]) -> float:
    """The slope of a straight line through the logarithms."""
    x = torch.tensor(sizes).double().log()
    y = torch.tensor(figures).double().log()
    centred = x - x.mean()
    return float((centred * y).sum() / centred.square().sum())


def main(path: str, out: str) -> None:
    results = []
    for axis, sizes in SIZES.items():
        for gate in ("sigmoid", "softmax"):
            for steps in (0, STEPS):
                rows = []
                for size in sizes:
                    overrides = overrides_of(axis, size, gate)
                    rows.append(ratios(path, overrides, steps))
                exponents = {}
                for name in LOSSES:
                    slope = exponent(sizes, [row[name] for row in rows])
                    assert math.isfinite(slope)
                    exponents[name] = round(slope, 3)
                case = {"axis": axis, "input_multiplier": INPUT_MULTIPLIER, "gate": gate}
                results.append({**case, "steps": steps, **exponents})
                print(results[-1], flush=True)
    Path(out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
