"""The report of one training run: its result, its losses, and the hyperparameters of each role."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.config.derived import has_qkv_bias, tokens_per_step
from megatron_completep.config.schema import ModelConfig
from megatron_completep.document import Report, new_figure
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.roles import LAYER_MATRICES, Role
from megatron_completep.run.hook import AT_POSITIONS

Row = dict[str, Any]
PARAMETERIZATION_HEADERS = ["role", "initial std", "peak learning rate", "weight decay", "eps"]


def run_report(config: Config, rows: Sequence[Row], title: str) -> Report:
    """The report of a run: its result, its losses, and its hyperparameters.

    `rows` are those of metrics.jsonl, at least one.
    """
    validation = [row for row in rows if row.get("validation_loss") is not None]
    # The loss of a model that has learned nothing, against which all others are read.
    uniform = math.log(config.model.vocab_size)
    report = Report(title, _result_sentence(config, rows, validation))
    report.section("Result").table(["", ""], _facts(config, rows))

    section = report.section("Loss")
    figure = loss_figure({"training": rows}, uniform)
    section.picture("loss", figure, "Training loss of every step and validation loss.")
    if validation:
        table_rows = [_validation_row(row, uniform) for row in validation]
        headers = ["step", "tokens", "validation loss", "nats below a uniform guess"]
        section.table(headers, table_rows)
        by_position = _positions(validation[-1])
        if by_position:
            section.table(["positions", "validation loss, last"], by_position)
    add_parameterization(report, config)
    return report


def _result_sentence(config: Config, rows: Sequence[Row], validation: Sequence[Row]) -> str:
    """The final loss and its distance from a uniform guess.

    validation: the rows with a validation loss.
    """
    if validation:
        kind = "Validation loss"
        loss = validation[-1]["validation_loss"]
    else:
        # A step that was skipped has no loss; NaN where no step has one.
        kind = "Training loss"
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        loss = losses[-1] if losses else math.nan
    vocab_size = config.model.vocab_size
    uniform = math.log(vocab_size)
    below = f"{uniform - loss:.2f} nats below ln({vocab_size}) = {uniform:.3f}"
    return f"{kind} {loss:.4f} after {rows[-1]['step']} steps, {below}."


def _facts(config: Config, rows: Sequence[Row]) -> list[list[str]]:
    """What the run came to in figures: rows of a name and a text."""
    model = config.model
    tokens = rows[-1]["tokens"]
    shape = f"{model.num_layers} layers x {model.hidden_size}"
    flops = tokens * training_flops_per_token(model)
    # The median leaves out the slow steps: the first ones, and those that saved a checkpoint.
    # A validation before the first step has none.
    steps = [row for row in rows if row["step"]]
    throughput = statistics.median(row["tokens_per_second"] for row in steps)
    facts = [
        ["model", f"{shape}, {model.norm}, {model.activation}, {model.position}"],
        ["tokens", f"{tokens:,}, {tokens_per_step(config):,} a step"],
        ["model FLOPs", f"{flops:.3g}"],
        ["tokens a second, median step", f"{throughput:,.0f}"],
    ]
    # Known only of devices whose peak throughput is known.
    if rows[-1]["mfu"] is not None:
        utilisation = statistics.median(row["mfu"] for row in steps)
        facts.append(["model FLOPs utilisation, median step", f"{100 * utilisation:.1f} %"])
    return facts


def _validation_row(row: Row, uniform: float) -> list[Any]:
    loss = row["validation_loss"]
    return [row["step"], row["tokens"], f"{loss:.4f}", f"{uniform - loss:.3f}"]


def _positions(row: Row) -> list[list[Any]]:
    """The positions of a validation and the loss of each part, as far as they were recorded."""
    positions = []
    for name, loss in row.items():
        if name.startswith(AT_POSITIONS):
            positions.append([name.removeprefix(AT_POSITIONS), f"{loss:.4f}"])
    return positions


def add_parameterization(report: Report, config: Config) -> None:
    """Add a section with the proxy's base values and what each role gets at this shape."""
    section = report.section("Hyperparameters")
    section.text(multipliers_sentence(config))
    section.table(PARAMETERIZATION_HEADERS, parameterization_rows(config))


def multipliers_sentence(config: Config) -> str:
    """How many times the proxy's size the model is, and what follows for its forward pass."""
    completep = config.completep
    table = table_of(config)
    return (
        f"{completep.parameterization}, alpha {completep.alpha:g}: "
        f"width multiplier {table.width_multiplier:g}, "
        f"depth multiplier {table.depth_multiplier:g}; "
        f"each branch is multiplied by {table.residual_multiplier:g}, "
        f"the logits by {table.logit_multiplier:g}."
    )


def parameterization_rows(config: Config) -> list[list[Any]]:
    """The base values, then those of each role, under PARAMETERIZATION_HEADERS."""
    optimizer = config.optimizer
    table = table_of(config)
    base_row = [
        "tuned at the proxy",
        optimizer.base_init_std,
        optimizer.base_lr,
        optimizer.base_weight_decay,
        f"{optimizer.base_eps:.3g}",
    ]
    rows: list[list[Any]] = [base_row]
    muon = optimizer.muon
    if muon is not None:
        rows.append(["Muon's, at the proxy", "", muon.base_lr, muon.base_weight_decay, ""])
    for role in roles_of(config.model):
        # Of the roles only hidden weights scale with their own fan-in; the model's width stands
        # for all of them.
        width_ratio = table.width_multiplier if role in LAYER_MATRICES else 1.0
        # Muon's rates depend on the shape of the matrix: a square one stands for all.
        side = config.model.hidden_size
        matrix = (side, side) if role == Role.HIDDEN_WEIGHT else None
        row = table.values(role, width_ratio, optimizer, matrix)
        rows.append([role.value, row.init_std, row.lr, row.weight_decay, f"{row.eps:.3g}"])
    return rows


def roles_of(model: ModelConfig) -> list[Role]:
    """The roles that parameters of this model have, in the order of the table."""
    absent = {
        Role.HIDDEN_BIAS: not has_qkv_bias(model),
        Role.UNEMBEDDING: model.tied_embeddings,
        Role.QK_NORM: not model.qk_norm,
    }
    experts = (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN)
    absent |= dict.fromkeys(experts, model.moe is None)
    absent[Role.BALANCE_BIAS] = True  # it has no rates of the table
    return [role for role in Role if not absent.get(role, False)]


def loss_figure(runs: dict[str, Sequence[Row]], uniform: float | None = None) -> Any:
    """A figure of the loss by step of several runs.

    Validation losses are points; `uniform`, the loss of a uniform guess, is a dashed line.
    """
    figure = new_figure()
    axes = figure.subplots()
    for name, rows in runs.items():
        color = _draw_series(axes, rows, "loss", linewidth=1.2, label=name)
        validation = [row for row in rows if row.get("validation_loss") is not None]
        if not validation:
            continue
        # Of one run the two series have colours of their own; of several, one colour is a run's.
        alone = len(runs) == 1
        label = "validation" if alone else f"{name}, validation"
        points_color = "C1" if alone else color
        _draw_series(axes, validation, "validation_loss", "o--", color=points_color, label=label)
    if uniform is not None:
        label = f"uniform guess, {uniform:.2f}"
        axes.axhline(uniform, color="gray", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _draw_series(axes: Any, rows: Sequence[Row], key: str, *style: str, **settings: Any) -> Any:
    """Draw one figure by step, where the rows have it; returns the line's colour."""
    drawn_rows = [row for row in rows if row.get(key) is not None]
    steps = [row["step"] for row in drawn_rows]
    figures = [row[key] for row in drawn_rows]
    (line,) = axes.plot(steps, figures, *style, **settings)
    return line.get_color()
