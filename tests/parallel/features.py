"""All features that a model and a run may have, level by level,
and a short run of any combination in any layout.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.data.loader import (
    Batch,
    DocumentEnds,
    Loader,
    SampleAssignment,
    ValidationBatches,
)
from megatron_completep.data.samples import Sample
from megatron_completep.guards.replicas import replica_hashes, who_differs
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.groups import Group
from megatron_completep.parallel.parameter import Spec
from megatron_completep.run.assemble import assemble
from megatron_completep.run.state import RunState
from megatron_completep.run.step import StepFigures
from megatron_completep.training.loop import launch_step
from tests.parallel.covering_array import Row
from tests.parallel.layouts import SPREAD_MODEL, joined
from tests.support.configs import merged, small_config
from tests.support.ranks import context_on

STEPS = 3
SEQ_LENGTH = 16
Settings = dict[str, dict[str, Any]]  # section -> key -> value

TENSOR = {"tensor_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
VIRTUAL = {**PIPELINE, "virtual_pipeline_size": 2}
CONTEXT = {"context_parallel_size": 2}
BY_HEADS = {"context_heads_at_once": 1}
BUCKETS = {"bucket_megabytes": 0.03}  # several of them

# name -> (ranks, settings under `parallel`)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, TENSOR),
    "tensor 2, sequence": (2, SEQUENCE),
    "tensor 4": (4, {"tensor_parallel_size": 4}),
    "tensor 4, sequence": (4, {"tensor_parallel_size": 4, "sequence_parallel": True}),
    "pipeline 2, gpipe": (2, {**PIPELINE, "schedule": "gpipe"}),
    "pipeline 2, 1f1b, split 3 and 1": (2, {**PIPELINE, "pipeline_split": [3, 1]}),
    "pipeline 2, zero-bubble": (2, {**PIPELINE, "schedule": "zero_bubble"}),
    "pipeline 2 x 2, interleaved": (2, {**VIRTUAL, "schedule": "interleaved_1f1b"}),
    "pipeline 2 x 2, zero-bubble, empty ends": (
        2,
        {**VIRTUAL, "schedule": "zero_bubble", "pipeline_split": [0, 1, 3, 0]},
    ),
    "pipeline 3, 1f1b": (3, {"pipeline_parallel_size": 3}),
    "pipeline 4, 1f1b": (4, {"pipeline_parallel_size": 4}),
    "data 2": (2, BUCKETS),
    "data 4": (4, BUCKETS),
    "data 4, optimizer over 2": (4, {**BUCKETS, "optimizer_shard_size": 2}),
    "data 2, optimizer over 1": (2, {**BUCKETS, "optimizer_shard_size": 1}),
    "tensor 2, data 2": (4, {**TENSOR, **BUCKETS}),
    "tensor 2, sequence, data 2": (4, {**SEQUENCE, **BUCKETS}),
    "tensor 2, sequence, pipeline 2, 1f1b": (4, {**SEQUENCE, **PIPELINE}),
    "pipeline 2, 1f1b, data 2": (4, {**PIPELINE, **BUCKETS}),
    "pipeline 2, zero-bubble, data 2, optimizer over 1": (
        4,
        {**PIPELINE, **BUCKETS, "schedule": "zero_bubble", "optimizer_shard_size": 1},
    ),
    "context 2": (2, {**CONTEXT, **BUCKETS}),
    "context 4": (4, {**BUCKETS, "context_parallel_size": 4}),
    "context 2, data 2, optimizer over 2": (4, {**CONTEXT, **BUCKETS, "optimizer_shard_size": 2}),
    "context 2 by heads, tensor 2, sequence": (4, {**CONTEXT, **BY_HEADS, **SEQUENCE}),
    "context 2 by heads, pipeline 2, zero-bubble": (
        4,
        {**CONTEXT, **BY_HEADS, **PIPELINE, "schedule": "zero_bubble"},
    ),
    "context 2, pipeline 2 x 2, interleaved": (
        4,
        {**CONTEXT, **VIRTUAL, "schedule": "interleaved_1f1b"},
    ),
    "tensor 2, sequence, pipeline 2, 1f1b, data 2": (8, {**SEQUENCE, **PIPELINE, **BUCKETS}),
    "tensor 2, pipeline 2 x 2, interleaved, data 2": (
        8,
        {**TENSOR, **VIRTUAL, **BUCKETS, "schedule": "interleaved_1f1b"},
    ),
}

OWN_FACTORS = {
    "embedding": {"lr": 2.0, "init_std": 0.5, "weight_decay": 0.0},
    "hidden_weight": {"lr": 0.5, "weight_decay": 2.0, "eps": 3.0},
    "final_norm": {"lr": 3.0},
    "pre_norm": {"lr": 0.25, "eps": 0.5},
}
EVERYWHERE = {"lr": 3.0, "init_std": 0.5, "weight_decay": 2.0, "eps": 2.0}
MULTIPLIERS = {
    "input_multiplier": 1.5,
    "residual_multiplier": 0.75,
    "attention_multiplier": 1.25,
    "logit_multiplier": 2.0,
}

# Every other layer has experts, so that dense layers stand beside them.
EXPERTS = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 24, "every": 2, "bias_rate": 0.01}
SOFTMAX_EXPERTS = {
    **EXPERTS,
    "gate": "softmax",
    "balance": "loss",
    "balance_loss": 0.02,
    "router_z_loss": 0.01,
    "shared_ffn_hidden_size": 32,
    "first_dense_layers": 2,
}

# factor -> level -> settings that differ from the base. The first level of each goes with
# everything.
FEATURES: dict[str, dict[str, Settings]] = {
    "layout": {name: {} for name in LAYOUTS},
    "norm": {"rmsnorm": {}, "layernorm": {"model": {"norm": "layernorm"}}},
    "activation": {
        name: {"model": {"activation": name}}
        for name in ("swiglu", "gelu", "gelu_tanh", "squared_relu")
    },
    "position": {name: {"model": {"position": name}} for name in ("rope", "learned", "alibi")},
    "mlp": {
        "dense": {},
        "experts": {"model": {"moe": EXPERTS}},
        "experts, 2 ranks": {"model": {"moe": {**EXPERTS, "balance_loss": 0.02}}},
        "softmax, shared, all ranks": {"model": {"moe": SOFTMAX_EXPERTS}},
    },
    "biases": {"none": {}, "all": {"model": {"bias": True}}},
    "qk-norm": {"off": {}, "on": {"model": {"qk_norm": True}}},
    "embeddings": {"untied": {}, "tied": {"model": {"tied_embeddings": True}}},
    "heads": {
        "4": {},
        "4 in 2 groups": {"model": {"num_query_groups": 2}},
        "4 in 1 group": {"model": {"num_query_groups": 1}},
        "6 of 10 in 2 groups": {
            "model": {"num_attention_heads": 6, "num_query_groups": 2, "head_dim": 10}
        },
        "4 of 12": {"model": {"head_dim": 12}},
    },
    "vocabulary": {
        "61, padded": {},
        "64": {"model": {"vocab_size": 64}},
        "9, a rank without any": {"model": {"vocab_size": 9}},
    },
    "inner width": {"64": {}, "60": {"model": {"ffn_hidden_size": 60}}},
    "overrides": {
        "none": {},
        "first layer": {"optimizer": {"overrides": [{"pattern": "layers.0.*", **EVERYWHERE}]}},
        "last layer": {
            "optimizer": {
                "overrides": [
                    {"pattern": "layers.3.*.weight", "lr": 0.5},
                    {"pattern": "*.3.mlp.up.*", "eps": 4.0},
                ]
            }
        },
        "ends": {"optimizer": {"overrides": [{"pattern": "[ef]*", **EVERYWHERE}]}},
    },
    "factors": {"none": {}, "own": {"completep": {"factors": OWN_FACTORS}}},
    "multipliers": {"none": {}, "own": {"model": MULTIPLIERS}},
    "parameterization": {
        "completep": {},
        "alpha 0.5": {"completep": {"alpha": 0.5}},
        "mup": {"completep": {"parameterization": "mup"}},
        "sp": {"completep": {"parameterization": "sp"}},
        "batch and duration": {"completep": {"base_batch_tokens": 128, "base_total_tokens": 512}},
    },
    "attention scale": {
        name: {"model": {"attention_scale": name}}
        for name in ("base_head_dim", "1/head_dim", "1/sqrt(head_dim)")
    },
    "loss": {
        "plain": {},
        "z-loss": {"training": {"z_loss": 0.01}},
        "label smoothing": {"training": {"label_smoothing": 0.2}},
        "both": {"training": {"z_loss": 0.01, "label_smoothing": 0.2}},
    },
    "recomputation": {
        name: {"training": {"recompute": name}} for name in ("none", "selective", "full")
    },
    "micro-batch": {"1": {}, "2": {"training": {"micro_batch_size": 2}}},
    "batch ramp": {
        "none": {},
        "from 8": {"training": {"batch_ramp": {"start": 8, "increment": 8, "steps": 2}}},
    },
    "skipped steps": {"none": {}, "the second": {"training": {"skip_steps": [{"first": 2}]}}},
    "gradient type": {"float32": {}, "bf16": {"parallel": {"gradient_dtype": "bf16"}}},
    "dropout": {"none": {}, "0.2": {"model": {"dropout": 0.2}}},
    "documents": {
        "joined": {},
        "apart": {"data": {"reset_at_document_ends": True}},
        "masked": {"data": {"mask_loss_at_document_ends": True}},
    },
    "schedule": {
        name: {"optimizer": {"schedule": name}}
        for name in ("constant", "linear", "cosine", "warmup_stable_decay")
    },
    "update rule": {
        "adamw": {},
        "muon": {"optimizer": {"type": "muon", "muon": {"base_lr": 0.02}}},
        "muon by heads": {
            "optimizer": {
                "type": "muon",
                "muon": {"base_lr": 0.02, "parts": "per_head", "exchange_megabytes": 0.05},
            }
        },
    },
    "sharding": {"optimizer": {}, "gradients": {"parallel": {"sharding": "gradients"}}},
    "clipping": {"on": {}, "off": {"optimizer": {"grad_clip": 0.0}}},
}
FACTORS = {factor: list(levels) for factor, levels in FEATURES.items()}


def ranks_of(row: Row) -> int:
    return LAYOUTS[row["layout"]][0]


def parallel_of(layout: str) -> dict[str, Any]:
    return LAYOUTS[layout][1]


def expert_size(layout: str, mlp: str) -> int:
    """Ranks that share the experts of a layer: as many as the level asks for and there are."""
    ranks, parallel = LAYOUTS[layout]
    stage = ranks // parallel.get("pipeline_parallel_size", 1)
    shards = parallel.get("optimizer_shard_size")
    if shards is not None:
        stage = shards * parallel.get("tensor_parallel_size", 1)
    most = {"experts, 2 ranks": 2, "softmax, shared, all ranks": 8}.get(mlp, 1)
    return math.gcd(stage, most)


def data_size(layout: str) -> int:
    ranks, parallel = LAYOUTS[layout]
    return (
        ranks
        // parallel.get("tensor_parallel_size", 1)
        // parallel.get("pipeline_parallel_size", 1)
        // parallel.get("context_parallel_size", 1)
    )


def forbidden(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """What the configuration refuses."""
    levels = dict((a, b))
    if levels.get("mlp", "dense") != "dense":
        no_biases = levels.get("biases", "none") == "none"
        adamw = levels.get("update rule", "adamw") == "adamw"
        parallel = parallel_of(levels.get("layout", "data 2"))
        splits_alone = "tensor_parallel_size" in parallel and "sequence_parallel" not in parallel
        return splits_alone or not (no_biases and adamw)
    if "layout" not in levels:
        return False
    parallel = parallel_of(levels["layout"])
    tensor = parallel.get("tensor_parallel_size", 1)
    if levels.get("sharding") == "gradients":
        several_stages = parallel.get("pipeline_parallel_size", 1) > 1
        return several_stages or parallel.get("optimizer_shard_size") == 1
    if "heads" in levels:
        shape = FEATURES["heads"][levels["heads"]].get("model", {})
        return (
            shape.get("num_query_groups", 4) % tensor
            or shape.get("num_attention_heads", 4) % tensor
        ) > 0
    return False


def is_rounded(row: Row) -> bool:
    """Whether gradients really travel in bf16, so that a comparison to the last digits is none."""
    ranks, parallel = LAYOUTS[row["layout"]]
    travel = data_size(row["layout"]) * parallel.get("context_parallel_size", 1) > 1
    if row["mlp"] != "dense":
        # Those of experts are summed over tensor ranks as well, which have tokens of their own.
        stage = ranks // parallel.get("pipeline_parallel_size", 1)
        travel |= stage > expert_size(row["layout"], row["mlp"])
    return row["gradient type"] == "bf16" and travel


def config_of(row: Row, one_process: bool = False) -> Config:
    """The run of a row in its layout, or the same in one process."""
    base: Settings = {
        "model": {**SPREAD_MODEL, "seq_length": SEQ_LENGTH},
        # A large epsilon: where the true gradient is zero, Adam would otherwise make a step of
        # rounding noise.
        "optimizer": {
            "base_eps": 1e-3,
            "base_init_std": 0.2,
            "warmup_steps": 1,
            "grad_clip": 0.1,
        },
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 16,
            "train_steps": STEPS,
            "precision": "float64",
        },
    }
    levels = [FEATURES[factor][level] for factor, level in row.items()]
    experts = {"expert_parallel_size": expert_size(row["layout"], row["mlp"])}
    settings = merged(base, *levels, {"parallel": parallel_of(row["layout"]) | experts})
    if one_process:
        settings["parallel"] = {}
    return small_config(**without_idle_epsilons(settings))


def without_idle_epsilons(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without factors on an epsilon that Muon's matrices do not have: are refused."""
    if settings.get("optimizer", {}).get("type") != "muon":
        return settings
    settings = copy.deepcopy(settings)
    settings.get("completep", {}).get("factors", {}).get("hidden_weight", {}).pop("eps", None)
    overrides = settings["optimizer"].get("overrides", [])
    acting = [override for override in overrides if override["pattern"] != "*.3.mlp.up.*"]
    settings["optimizer"]["overrides"] = acting
    return settings


class Documents:
    """Samples that are pure functions of their number, with document ends at uneven places."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.num_samples = vocab_size, 1000

    def __getitem__(self, number: int) -> Sample:
        generator = np.random.default_rng(number)
        starts = np.flatnonzero(generator.random(SEQ_LENGTH - 1) < 0.2) + 1
        return Sample(generator.integers(0, self.vocab_size, SEQ_LENGTH + 1), (), starts)


class SyntheticLoader(Loader):
    """Leaves out some labels, unevenly over samples:
    data ranks count different numbers of tokens.
    """

    def next_step(self, global_batch_size: int | None = None) -> list[Batch]:
        return [
            replace(batch, loss_mask=partly(batch))
            for batch in super().next_step(global_batch_size)
        ]


def partly(batch: Batch) -> Tensor:
    first = batch.sample_ids[:, None] % 5
    return batch.loss_mask * (torch.arange(SEQ_LENGTH)[None, :] >= first)


@dataclass(frozen=True)
class Trained:
    """What one rank saw of a run."""

    position: tuple[int, int, int]  # rank on the tensor, data and pipeline axis
    figures: list[StepFigures]
    validation: float
    parameters: dict[str, Tensor]
    specs: dict[str, Spec]
    groups: dict[str, Group]
    hashes: dict[str, list[int]]


# What the tests must catch.
FORGOTTEN_SUM = "a sum of gradients over tensor ranks is forgotten"
OVERRIDES_ON_FIRST_STAGE = "overrides are seen by the first stage alone"
ENDS_ALONE = "the ends of a tied embedding do not exchange gradients"
ROWS_OF_THE_RANK = "masks of dropout number the rows of the rank instead of those of the batch"


def run_row(rank: int, config: Config, mutation: str = "") -> Trained:
    """Train, through the loop's own `launch`,
    in the process group at hand or alone, and evaluate.
    """
    context = context_on(rank, config.parallel)
    table = table_of(config)
    check_parameters(config, table)
    if mutation == OVERRIDES_ON_FIRST_STAGE and context.pipeline.rank > 0:
        settings = config.optimizer.model_copy(update={"overrides": []})
        config = config.model_copy(update={"optimizer": settings})
    assembly = assemble(config, context, table)
    optimizer = assembly.optimizer
    step = assembly.step
    if mutation == FORGOTTEN_SUM:
        optimizer.shards.partial_segments = []
    if mutation == ENDS_ALONE:
        optimizer.shards.tied_buckets = []
    if mutation == ROWS_OF_THE_RANK:
        seeds_of = step.seeds_of
        step.seeds_of = lambda number, batch: rows_of_the_rank(seeds_of(number, batch))
    assignment = SampleAssignment(
        config.training.micro_batch_size, context.data.rank, context.data.size
    )
    corpus: Any = Documents(config.model.vocab_size)
    settings_of_data = {
        "seq_length": SEQ_LENGTH,
        "document_ends": DocumentEnds.of(config.data),
    }
    loader = SyntheticLoader(
        corpus,
        assignment,
        global_batch_size=config.training.global_batch_size,
        prefetch=0,
        **settings_of_data,
    )
    state, figures, nobody_asks = RunState(), [], SimpleNamespace(asked=False)
    for _ in range(config.training.train_steps):
        launched = launch_step(config, step, loader, state, nobody_asks)
        figures.append(launched.figures.read())
        state = launched.after
    validation = step.evaluate(ValidationBatches(corpus, assignment, 7, **settings_of_data))
    return Trained(
        (context.tensor.rank, context.data.rank, context.pipeline.rank),
        figures,
        validation,
        {name: p.detach().clone() for name, p in optimizer.shards.parameters.items()},
        optimizer.shards.specs,
        optimizer.groups,
        replica_hashes(optimizer, context),
    )


def rows_of_the_rank(seeds: Tensor | None) -> Tensor | None:
    """Seeds of dropout as if the rank's first sample and position were the run's."""
    if seeds is not None:
        seeds[..., 2] = 0
        seeds[..., 4] = 0
    return seeds


@dataclass(frozen=True)
class Tolerance:
    """How far a layout may be from one process.

    figures: relative, of losses (terms: to the whole loss) and norms. parameters: of any element,
    in base learning rates.
    """

    figures: float
    parameters: float


EXACT = Tolerance(1e-11, 1e-9)
# Gradients travelled in bf16; three steps of Adam move an element by up to 18 learning rates.
ROUNDED = Tolerance(2e-2, 3.0)


def differences(
    ranks: list[Trained], truth: Trained, base_lr: float, tolerance: Tolerance
) -> list[str]:
    """What is not as in one process, in words."""
    lines = []
    for rank, trained in enumerate(ranks):
        for number, figures in enumerate(zip(trained.figures, truth.figures, strict=True), 1):
            place = f"rank {rank}, step {number}: "
            lines += [place + line for line in differing_figures(*figures, tolerance.figures)]
        if not close(trained.validation, truth.validation, tolerance.figures * truth.validation):
            lines.append(
                f"rank {rank}: validation {trained.validation!r} is not {truth.validation!r}"
            )
        for name, group in trained.groups.items():
            if group != truth.groups[group.name]:
                lines.append(f"rank {rank}: {name} {group} is not {truth.groups[group.name]}")
    lines += differing_parameters(ranks, truth, base_lr, tolerance.parameters)
    return lines + who_differs([trained.hashes for trained in ranks])


def differing_figures(own: StepFigures, true: StepFigures, tolerance: float) -> list[str]:
    """What a rank reports of a step otherwise than one process does."""
    named = {
        "loss": (own.loss, true.loss, true.loss),
        "gradient norm": (own.grad_norm, true.grad_norm, true.grad_norm),
    }
    for name, term in true.terms.items():
        named[name] = (own.terms[name], term, true.loss)
    lines = []
    for name, (figure, expected, size) in named.items():
        if not close(figure, expected, tolerance * size):
            lines.append(f"{name} {figure!r} is not {expected!r}")
    is_same_step = (
        own.counted_tokens == true.counted_tokens
        and own.passed_over == true.passed_over
        and set(own.terms) == set(true.terms)
    )
    return lines if is_same_step else [*lines, f"{own} is not {true}"]


def differing_parameters(
    ranks: list[Trained], truth: Trained, base_lr: float, tolerance: float
) -> list[str]:
    """Logical parameters that are off by more than so many learning rates, or on no rank."""
    lines = []
    logical_names: dict[str, str] = {}  # a tied embedding has two names
    for trained in ranks:
        for name, spec in trained.specs.items():
            logical_names[name] = spec.stored_name(name)
    for name, logical in logical_names.items():
        expected = joined([truth], "parameters", logical)
        error = (joined(ranks, "parameters", name) - expected).abs().max().item() / base_lr
        if not error <= tolerance:
            lines.append(f"{name} is off by {error:.2g} learning rates")
    missing_names = set(truth.parameters) - set(logical_names.values())
    return [*lines, *(f"{name} is on no rank" for name in missing_names)]


def close(a: float, b: float, tolerance: float) -> bool:
    """Steps that are passed over have no figures (NaN) in any layout."""
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance
