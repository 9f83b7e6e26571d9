"""The report of one training run: what it came to, its curves, and what the parameterization made of the proxy's values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.config.derived import tokens_per_step
from megatron_completep.config.schema import ModelConfig
from megatron_completep.document import Report, new_figure
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.roles import Role

Row = dict[str, Any]


def run_report(config: Config, rows: Sequence[Row], title: str) -> Report:
    """Sections: result, loss, parameterization. `rows` are those of metrics.jsonl."""
    model, last = config.model, rows[-1]
    validation = [row for row in rows if row.get("validation_loss") is not None]
    uniform = math.log(model.vocab_size)
    loss = (
        validation[-1]["validation_loss"]
        if validation
        else [math.nan, *(row["loss"] for row in rows if row["loss"] is not None)][-1]
    )
    kind = "validation loss" if validation else "training loss"
    below = f"{uniform - loss:.2f} nats below ln({model.vocab_size}) = {uniform:.3f}"
    report = Report(title, f"{kind.capitalize()} {loss:.4f} after {last['step']} steps, {below}.")
    throughput = statistics.median(row["tokens_per_second"] for row in rows)
    facts: list[list[Any]] = [
        [
            "model",
            f"{model.num_layers} layers x {model.hidden_size}, {model.norm}, {model.activation}, {model.position}",
        ],
        ["tokens", f"{last['tokens']:,}, {tokens_per_step(config):,} a step"],
        ["model FLOPs", f"{last['tokens'] * training_flops_per_token(model):.3g}"],
        ["tokens a second, median step", f"{throughput:,.0f}"],
    ]
    if last["mfu"] is not None:
        facts.append(
            [
                "model FLOPs utilisation, median step",
                f"{100 * statistics.median(row['mfu'] for row in rows):.1f} %",
            ]
        )
    report.section("Result").table(["", ""], facts)
    section = report.section("Loss")
    section.picture(
        "loss",
        loss_figure({"training": rows}, uniform),
        "Training loss of every step and validation loss.",
    )
    if validation:
        section.table(
            ["step", "tokens", "validation loss", "nats below a uniform guess"],
            [
                [
                    row["step"],
                    row["tokens"],
                    f"{row['validation_loss']:.4f}",
                    f"{uniform - row['validation_loss']:.3f}",
                ]
                for row in validation
            ],
        )
    add_parameterization(report, config)
    return report


def add_parameterization(report: Report, config: Config) -> None:
    """The proxy's base values beside what each role gets at this shape."""
    optimizer = config.optimizer
    completep = config.completep
    table = table_of(config)
    section = report.section("Hyperparameters")
    section.text(
        f"{completep.parameterization}, alpha {completep.alpha:g}: width multiplier {table.width_multiplier:g}, depth multiplier "
        f"{table.depth_multiplier:g}; each branch is multiplied by {table.residual_multiplier:g}, the logits by {table.logit_multiplier:g}."
    )
    base = [
        "tuned at the proxy",
        optimizer.base_init_std,
        optimizer.base_lr,
        optimizer.base_weight_decay,
        f"{optimizer.base_eps:.3g}",
    ]
    rows: list[list[Any]] = [base]
    for role in roles_of(config.model):
        values = table.values(
            role, table.width_multiplier if role == Role.HIDDEN_WEIGHT else 1.0, optimizer
        )
        rows.append(
            [role.value, values.init_std, values.lr, values.weight_decay, f"{values.eps:.3g}"]
        )
    section.table(["role", "initial std", "peak learning rate", "weight decay", "eps"], rows)


def roles_of(model: ModelConfig) -> list[Role]:
    """The roles that parameters of this model have, in the order of the table."""
    absent = {
        Role.HIDDEN_BIAS: not model.bias,
        Role.UNEMBEDDING: model.tied_embeddings,
        Role.QK_NORM: not model.qk_norm,
    }
    return [role for role in Role if not absent.get(role, False)]


def loss_figure(runs: dict[str, Sequence[Row]], uniform: float | None = None) -> Any:
    """Loss by step of several runs; validation as points, `uniform` (the loss of a uniform guess) as a dashed line."""
    figure = new_figure()
    axes = figure.subplots()
    for name, rows in runs.items():
        kept = [row for row in rows if row["loss"] is not None]
        (line,) = axes.plot(
            [row["step"] for row in kept], [row["loss"] for row in kept], linewidth=1.2, label=name
        )
        held_out = [row for row in rows if row.get("validation_loss") is not None]
        if held_out:
            label = "validation" if len(runs) == 1 else f"{name}, validation"
            points = [row["step"] for row in held_out], [row["validation_loss"] for row in held_out]
            axes.plot(
                *points, "o--", color=line.get_color() if len(runs) > 1 else "C1", label=label
            )
    if uniform is not None:
        axes.axhline(
            uniform,
            color="gray",
            linestyle="--",
            linewidth=1,
            label=f"uniform guess, {uniform:.2f}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
