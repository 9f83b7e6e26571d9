"""A complete configuration of a new run from a tuned proxy, every derived value explained.

And back: the proxy that belongs to a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completep.completep import table_of
from megatron_completep.completep.batch import batch_scaling_of
from megatron_completep.completep.tau import BAND, Timescale, timescales
from megatron_completep.config.check import check_config
from megatron_completep.config.derived import (
    head_dim,
    num_query_groups,
    total_tokens,
)
from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.errors import ConfigError
from megatron_completep.files import write_whole
from megatron_completep.instruments.derive import Scaling, derived, duration_of
from megatron_completep.instruments.run_shape import CLOSE, Asked, Choice, Family, Shape
from megatron_completep.instruments.trial import change, on_one_process, reshape
from megatron_completep.planning.layout_search import Layout, Say, search
from megatron_completep.planning.scaling import Gpu

# Exponents of the best learning rate in tokens, and where they were fitted. The sign is contested,
# see docs/parameterization.md.
PUBLISHED = {
    0.30: "Marin's Delphi runs, second-hand",
    0.32: "arXiv 2409.19913",
    0.351: "arXiv 2601.05049",
    0.5: "Complete(d)P, arXiv 2512.22382, at a fixed batch",
}
# Power Lines (arXiv 2505.13738): the best tau over tokens per parameter. The exponent is the
# paper's; the constant was seen second-hand only.
TAU_AT_ONE = 1.084
TAU_EXPONENT = -0.527
PROXY_LAYERS = 2  # of the proxy of a target that names none
PROXY_PART = 8  # of the target's width that such a proxy has
PROXY_HEADS = 2  # that it has at least


@dataclass(frozen=True)
class Gpus:
    """How many GPUs of which kind."""

    count: int
    kind: Gpu


@dataclass(frozen=True)
class NewRun:
    """A run that was derived, and what it was chosen among."""

    proxy: Config
    config: Config
    choice: Choice
    asked: Asked
    scaling: Scaling
    layouts: tuple[Layout, ...]  # fastest first; the first one is the configuration's
    gpus: Gpus | None

    @property
    def shape(self) -> Shape:
        """The shape that was chosen."""
        return self.choice.shape


def new_run(
    proxy: Config,
    asked: Asked,
    scaling: Scaling,
    gpus: Gpus | None = None,
    say: Say = lambda text: None,
) -> NewRun:
    """The run of a proxy's family that is nearest to what is asked.

    `say` gets lines on the search of a layout, where it takes longer.

    Raises ConfigError where no shape is near, no layout fits the GPUs, or the settings do not fit
    the new size.
    """
    choice = Family(proxy).choose(asked)
    count = None if gpus is None else gpus.count
    config = derived(proxy, choice.shape, scaling, count)
    layouts: tuple[Layout, ...] = ()
    if gpus is not None:
        say(f"searching the layout of {choice.shape} on {gpus.count} GPUs")
        layouts = tuple(search(config, gpus.count, gpus.kind, say=say))
        config = layouts[0].config
    check_config(config)
    return NewRun(proxy, config, choice, asked, scaling, layouts, gpus)


def rates(run: NewRun) -> dict[float, float]:
    """The peak learning rate before the table's factors, by published exponent of the duration."""
    batch = batch_scaling_of(run.config)
    base = run.config.optimizer.base_lr
    scaled = {}
    for exponent in PUBLISHED:
        scale = batch.batch_ratio**batch.exponent / batch.duration_ratio**exponent
        scaled[exponent] = base * scale
    return scaled


def law_tau(tokens_per_parameter: float) -> float:
    """The best tau by Power Lines."""
    return float(TAU_AT_ONE * tokens_per_parameter**TAU_EXPONENT)


def warnings(run: NewRun) -> list[str]:
    """What a reader should know before the run is paid for."""
    sentences = []
    if abs(run.choice.miss) > CLOSE:
        sentences.append(
            f"the nearest shape, {run.shape}, is {run.choice.miss:+.1%} from what was asked"
        )
    law = law_tau(run.scaling.tokens_per_parameter)
    for scale in timescales(run.config, table_of(run.config)):
        if not BAND[0] <= scale.run / law <= BAND[1]:
            sentences.append(
                f"tau of {scale.role} is {scale.run:.3g}, {scale.run / law:.3g} times that of "
                f"Power Lines' law ({law:.3g})"
            )
            break
    return sentences


def summary(run: NewRun) -> list[str]:
    """What was derived and why, a line each."""
    config = run.config
    shape = run.shape
    tokens = total_tokens(config)
    lines = [
        f"{shape}: {shape.parameters:,} parameters ({shape.inner_parameters:,} without "
        f"embeddings), N : L = {shape.ratio:.4g}; asked: {_asked_text(run.asked)}, "
        f"{run.choice.miss:+.2%}",
        f"neighbours: {_neighbour(run.choice.smaller)}; {_neighbour(run.choice.larger)}",
        f"{tokens:,} tokens ({tokens / shape.parameters:.4g} a parameter), "
        f"{shape.flops_per_token * tokens:.4g} FLOPs with attention",
        f"peak learning rate before the table's factors, by exponent of the duration: "
        f"{_rates_text(run)}; this file has {_rate(config):.4g}",
        *_tau_lines(run),
        *_layout_lines(run),
    ]
    return lines + [f"warning: {sentence}" for sentence in warnings(run)]


def _asked_text(asked: Asked) -> str:
    if asked.parameters is not None:
        return f"{asked.parameters:.4g} parameters"
    if asked.flops is not None:
        return f"{asked.flops:.4g} FLOPs"
    return f"{asked.depth} layers"


def _neighbour(shape: Shape | None) -> str:
    return "none" if shape is None else f"{shape}, {shape.parameters:,}"


def _rate(config: Config) -> float:
    return config.optimizer.base_lr * batch_scaling_of(config).scale


def _rates_text(run: NewRun) -> str:
    texts = [
        f"{rate:.4g} ({exponent:g}, {PUBLISHED[exponent]})" for exponent, rate in rates(run).items()
    ]
    return "; ".join(texts)


def _tau_lines(run: NewRun) -> list[str]:
    scales = list(timescales(run.config, table_of(run.config)))
    if not scales:
        return ["nothing decays"]
    law = law_tau(run.scaling.tokens_per_parameter)
    taus = ", ".join(map(str, scales))
    return [f"tau = 1 / (peak lr x decay x steps): {taus}; Power Lines' law has {law:.4g}"]


def _layout_lines(run: NewRun) -> list[str]:
    if run.gpus is None:
        return ["no layout was searched (parallel is that of one process): name --gpus and --gpu"]
    best = run.layouts[0].plan
    steps = run.config.training.train_steps
    days = best.step_seconds * steps / 86400
    gpu_hours = best.step_seconds * steps / 3600 * run.gpus.count
    lines = [
        f"{run.gpus.count} {run.gpus.kind.name}, predicted and not measured: {days:,.2f} days, "
        f"{gpu_hours:,.0f} GPU hours, {best.tokens_per_second:,.0f} tokens/s",
        f"fastest layout that fits: {run.layouts[0]}",
    ]
    return lines + [f"next: {layout}" for layout in run.layouts[1:]]


def reasons(run: NewRun) -> dict[tuple[str, str], str]:
    """Why a setting has its value, by section and key."""
    proxy = run.proxy
    config = run.config
    batch = batch_scaling_of(config)
    scales: list[Timescale] = list(timescales(config, table_of(config)))
    power = run.scaling.batch_power
    growth = total_tokens(config) / total_tokens(proxy)
    texts = {
        ("model", "hidden_size"): f"N : L = {run.shape.ratio:.4g}, asked {run.asked.ratio:.4g}",
        ("model", "num_layers"): f"nearest to {_asked_text(run.asked)}",
        ("model", "num_attention_heads"): "heads keep the proxy's size",
        ("model", "num_query_groups"): "as many heads a group as at the proxy",
        ("model", "ffn_hidden_size"): "the proxy's ratio to hidden_size",
        (
            "completep",
            "base_hidden_size",
        ): f"the proxy's: m_N = {table_of(config).width_multiplier:g}",
        (
            "completep",
            "base_num_layers",
        ): f"the proxy's: m_L = {table_of(config).depth_multiplier:g}",
        ("completep", "base_batch_tokens"): f"the proxy's: m_B = {batch.batch_ratio:.4g}",
        ("completep", "base_total_tokens"): f"the proxy's: m_D = {batch.duration_ratio:.4g}",
        ("completep", "batch_exponent"): f"S = {batch.scale:.4g} on lr and decay",
        ("optimizer", "base_lr"): f"the proxy's; times S = {_rate(config):.4g} before the table",
        (
            "training",
            "global_batch_size",
        ): f"the proxy's x {growth:.4g}^{power:g} (tokens), rounded",
        ("training", "train_steps"): f"{run.scaling.tokens_per_parameter:g} tokens a parameter",
    }
    return {**texts, **_base_reasons(run), **_decay_reasons(run, scales), **_layout_reasons(run)}


def _base_reasons(run: NewRun) -> dict[tuple[str, str], str]:
    """Of what is taken from the proxy, or cannot be."""
    texts = {("model", "head_dim"): "the proxy's size of heads"}
    texts["model", "shared_ffn_hidden_size"] = "the proxy's ratio to hidden_size"
    for key in ("ffn_hidden_size", "head_dim", "num_experts", "top_k", "expert_ffn_hidden_size"):
        texts["completep", f"base_{key}"] = "the proxy's"
    if run.scaling.duration_exponent is not None:
        texts["completep", "duration_exponent"] = "asked: of m_D in S, in place of batch_exponent"
    texts["training", "output_dir"] = "the proxy's, with this shape and length"
    training = run.proxy.training
    dropped = {
        "batch_ramp": training.batch_ramp,
        "stop_at_step": training.stop_at_step,
        "skip_steps": training.skip_steps,
    }
    for key, setting in dropped.items():
        if setting:
            texts["training", key] = "dropped: the proxy's counts its own steps and sequences"
    if run.config.optimizer.overrides != run.proxy.optimizer.overrides:
        texts["optimizer", "overrides"] = "the proxy's, those of single layers over this depth"
    return texts


def _decay_reasons(run: NewRun, scales: Sequence[Timescale]) -> dict[tuple[str, str], str]:
    """Of weight decay: its rule, and what the rule reads."""
    texts = {}
    asked = run.scaling.weight_decay_rule is not None
    rule = run.config.optimizer.weight_decay_rule
    texts["optimizer", "weight_decay_rule"] = "asked" if asked else "the proxy's"
    if rule == "tau":
        texts["optimizer", "target_tau"] = "the proxy's tau of its hidden weights, kept"
        texts["optimizer", "base_weight_decay"] = "not read: target_tau says how much decays"
    elif scales:
        texts["optimizer", "base_weight_decay"] = f"the proxy's; tau of {scales[0]}"
    return texts


def _layout_reasons(run: NewRun) -> dict[tuple[str, str], str]:
    """Of the division over ranks: what was searched, or that of one process."""
    sizes = [f"{axis}_parallel_size" for axis in ("tensor", "pipeline", "context")]
    sizes += ["virtual_pipeline_size", "optimizer_shard_size"]
    if not run.layouts:
        proxy = run.proxy.parallel
        keys = [*sizes, "schedule", "pipeline_split", "sequence_parallel"]
        differing = [
            key for key in keys if getattr(proxy, key) != getattr(run.config.parallel, key)
        ]
        texts = {("parallel", key): "one process: --gpus was not named" for key in differing}
        texts["training", "micro_batch_size"] = "the proxy's, or what divides the batch"
        return texts
    texts = {("parallel", key): "searched" for key in sizes}
    texts["parallel", "schedule"] = "that of the virtual stages"
    texts["parallel", "sequence_parallel"] = "with tensor ranks: it saves activations"
    texts["parallel", "pipeline_split"] = "layers are shared evenly"
    texts["training", "micro_batch_size"] = "searched"
    texts["training", "recompute"] = "searched"
    return texts


def yaml_of(run: NewRun) -> str:
    """The configuration as YAML, with the summary above and a reason beside every derived value."""
    header = [f"# {line}" for line in summary(run)]
    return "\n".join([*header, annotated(run.config, reasons(run))])


def annotated(config: Config, texts: dict[tuple[str, str], str]) -> str:
    """The YAML of a configuration with comments beside settings, by section and key."""
    section = ""
    lines = []
    for line in dump_yaml(config.model_dump(mode="json")).splitlines():
        if not line.startswith(" "):
            section = line.partition(":")[0]
        reason = texts.get((section, line.strip().partition(":")[0]))
        lines.append(f"{line}  # {reason}" if reason and line.startswith("  ") else line)
    return "\n".join([*lines, ""])


def write(path: Path, text: str) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another file with --to."
        ) from None


def proxy_of(target: Config, scaling: Scaling, depth: int | None = None) -> Config:
    """The proxy that belongs to a target: small, of its family, with its tokens a parameter.

    The shape is that of completep.base_* where the target names one, else `depth` layers (2) of an
    eighth of its width; batch and steps are those of base_batch_tokens and base_total_tokens, or
    follow from the target's by the same rules. Raises ConfigError where the proxy would be no
    smaller.
    """
    target = on_one_process(target)
    model = target.model
    completep = target.completep
    width = completep.base_hidden_size or _proxy_width(target)
    layers = depth or completep.base_num_layers or min(PROXY_LAYERS, model.num_layers)
    if width >= model.hidden_size and layers >= model.num_layers:
        raise ConfigError(
            f"a proxy of {layers} layers x {width} is no smaller than the target of "
            f"{model.num_layers} x {model.hidden_size}. Name a smaller one in completep.base_*."
        )
    family = Family(target)
    shape = family.shape(width, layers)
    target_shape = family.shape(model.hidden_size, model.num_layers)
    per_parameter = total_tokens(target) / target_shape.parameters
    tokens = completep.base_total_tokens or shape.tokens(per_parameter)
    duration = duration_of(target, tokens, scaling)
    batch = duration.batch
    steps = duration.steps
    if completep.base_batch_tokens is not None:
        batch = max(1, completep.base_batch_tokens // model.seq_length)
        steps = max(1, round(tokens / (batch * model.seq_length)))
    return _alone(target, shape, batch, steps)


def _proxy_width(target: Config) -> int:
    """An eighth of the target's width in whole heads and groups, and two heads at least."""
    model = target.model
    heads_per_group = model.num_attention_heads // num_query_groups(model)
    heads = max(PROXY_HEADS, round(model.hidden_size / PROXY_PART / head_dim(model)))
    return -(-heads // heads_per_group) * heads_per_group * head_dim(model)


def _alone(target: Config, shape: Shape, batch: int, steps: int) -> Config:
    """The proxy's configuration on one process, with its own shape as the base."""
    small = reshape(target, shape.hidden_size, shape.num_layers)
    own_base: dict[str, Any] = {
        "base_hidden_size": shape.hidden_size,
        "base_num_layers": shape.num_layers,
        "base_ffn_hidden_size": small.model.ffn_hidden_size,
        "base_head_dim": head_dim(small.model),
        "base_batch_tokens": None,
        "base_total_tokens": None,
    }
    micro = target.training.micro_batch_size
    micro = max(size for size in range(1, min(micro, batch) + 1) if batch % size == 0)
    training: dict[str, Any] = {
        "global_batch_size": batch,
        "micro_batch_size": micro,
        "train_steps": steps,
        "batch_ramp": None,
        "stop_at_step": None,
        "skip_steps": [],
        "recompute": "none",
        "output_dir": f"{target.training.output_dir}_proxy",
    }
    return change(
        small,
        model={"attention_backend": target.model.attention_backend},
        completep=own_base,
        training=training,
    )
