"""Replay a recorded run of the CompleteP authors' reference implementation on this model and optimizer.

A trace is a pair NAME.json (configuration, per-step loss and gradient norm, final weight norms) and NAME.npz (batches, initial
and final weights under GPT-2 names). A right implementation reproduces it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.config.bare import bare_config
from megatron_completep.config.json_text import read_json
from megatron_completep.config.schema import (
    CompletePConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RoleFactors,
)
from megatron_completep.errors import DataError
from megatron_completep.interop.reference_names import reference_name
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stages import build_chunks
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec, spec_of, specs_of
from megatron_completep.roles import Role
from megatron_completep.run.assemble import assemble
from megatron_completep.run.forward_backward import MicroBatch

SETTINGS = (
    *(
        "num_layers",
        "hidden_size",
        "num_heads",
        "vocab_size",
        "seq_length",
        "base_hidden_size",
        "base_num_layers",
        "alpha",
    ),
    *(
        "init_std",
        "lr",
        "weight_decay",
        "eps",
        "betas",
        "grad_clip",
        "loss",
        "grad_norm",
        "param_norm_final",
    ),
)
REPLAYED = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "lr_schedule": "constant",
}  # what the reference knows
TOLERANCES = {  # largest relative error of loss, gradient norm, final weight norms
    "float64": (1e-12, 1e-12, 1e-12),
    "float32": (1e-5, 1e-3, 1e-5),
}


@dataclass(frozen=True)
class Trace:
    """A recorded run: settings and figures from the .json, arrays from the .npz."""

    record: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str) -> Trace:
        """`path` without suffix, or either file. Raises DataError for a missing, unreadable or incomplete file."""
        stem = path.removesuffix(".json").removesuffix(".npz")
        try:
            record = read_json(stem + ".json", finite=False)
            with np.load(stem + ".npz", allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, BadZipFile, DataError) as error:
            reason = (
                f"{error.filename}: {error.strerror}"
                if isinstance(error, OSError) and error.filename
                else str(error).rstrip(".")
            )
            raise DataError(
                f"{path}: not a trace: {reason}. Give NAME, NAME.json or NAME.npz; both files must be there."
            ) from error
        trace = cls(record, arrays)
        if problems := trace._problems():
            raise DataError("\n  ".join([f"{stem}: not a trace that can be replayed", *problems]))
        return trace

    def _problems(self) -> list[str]:
        """What is missing, and what the replay does not know."""
        if not isinstance(self.record, dict):
            return ["the .json holds no object"]
        missing = [key for key in SETTINGS if key not in self.record]
        problems = [f"keys missing in the .json: {', '.join(missing)}"] if missing else []
        absent = [key for key in ("inputs", "targets") if key not in self.arrays]
        problems += [f"arrays missing in the .npz: {', '.join(absent)}"] if absent else []
        for key, known in REPLAYED.items():
            if known not in (found := str(self.record.get(key, known))).lower():
                problems.append(f"{key} = {found}: the replay knows {known} only")
        return problems

    def config(
        self,
        precision: str = "float64",
        parallel: ParallelConfig | None = None,
        micro_batch_size: int | None = None,
    ) -> Config:
        """The reference's settings as ours: layernorm, gelu, learned positions, attention scale 1/head_dim.

        micro_batch_size: sequences that a rank computes at once; None: the whole batch. Raises DataError.
        """
        steps, batch_size = self.arrays["inputs"].shape[:2]
        training = {
            "micro_batch_size": micro_batch_size or batch_size,
            "global_batch_size": batch_size,
            "train_steps": steps,
            "precision": precision,
        }
        try:
            return bare_config(
                self._model(),
                completep=self._completep(),
                optimizer=self._optimizer(),
                parallel=parallel or ParallelConfig(),
                training=training,
            )
        except ValueError as error:
            raise DataError(f"the trace's settings cannot be used: {error}") from error

    def _model(self) -> ModelConfig:
        r = self.record
        up = self.arrays.get("init/transformer.h.0.mlp.c_fc.weight")
        return ModelConfig(
            hidden_size=r["hidden_size"],
            num_layers=r["num_layers"],
            num_attention_heads=r["num_heads"],
            ffn_hidden_size=4 * r["hidden_size"] if up is None else up.shape[0],
            vocab_size=r["vocab_size"],
            seq_length=r["seq_length"],
            norm="layernorm",
            activation="gelu",
            position="learned",
            bias=r.get("bias", True),
            tied_embeddings=r.get("tied_embeddings", True),
            attention_scale=r.get("attention_scale", "1/head_dim"),
        )

    def _completep(self) -> CompletePConfig:
        r = self.record
        if r["alpha"] is not None:
            base = {
                "base_hidden_size": r["base_hidden_size"],
                "base_num_layers": r["base_num_layers"],
            }
            return CompletePConfig(alpha=r["alpha"], **base)
        # The reference's plain muP does not scale the weight decay of hidden weights: our table's m_N is divided out again.
        unscaled = RoleFactors(weight_decay=r["base_hidden_size"] / r["hidden_size"])
        return CompletePConfig(
            parameterization="mup",
            base_hidden_size=r["base_hidden_size"],
            base_num_layers=r["base_num_layers"],
            factors={Role.HIDDEN_WEIGHT: unscaled},
        )

    def _optimizer(self) -> OptimizerConfig:
        r = self.record
        return OptimizerConfig(
            base_lr=r["lr"],
            base_init_std=r["init_std"],
            base_weight_decay=r["weight_decay"],
            base_eps=r["eps"],
            betas=(r["betas"][0], r["betas"][1]),
            grad_clip=r["grad_clip"],
            schedule="constant",
        )

    @property
    def single_eps(self) -> float:
        """The reference's one epsilon for every tensor."""
        groups = self.record.get("groups") or [{}]
        return groups[0].get("eps", self.record["eps"])

    def initial(self, name: str, dtype: torch.dtype) -> Tensor:
        """Initial weight by our name."""
        return torch.from_numpy(self.arrays[f"init/{reference_name(name)}"]).to(dtype)


def check_weights(trace: Trace, config: Config) -> None:
    """The trace has the weights of the model that its settings describe, each in its shape, and no others. Raises DataError."""
    specs = specs_of(GPT(config.model, table_of(config), ParallelContext.single("meta")))
    own = {reference_name(name): spec.shape for name, spec in specs.items()}
    recorded = {
        key.removeprefix("init/"): array.shape
        for key, array in trace.arrays.items()
        if key.startswith("init/")
    }
    problems = [f"{name}: not in the .npz" for name in own if name not in recorded]
    problems += [
        f"{name}: no such weight in the model of the .json" for name in recorded if name not in own
    ]
    problems += [
        f"{n}: {recorded[n]} in the .npz, {own[n]} in the .json"
        for n in own
        if n in recorded and recorded[n] != own[n]
    ]
    problems += [
        f"{name}: no norm in param_norm_final"
        for name in own
        if name not in trace.record["param_norm_final"]
    ]
    if problems:
        raise DataError(
            "\n  ".join(
                [
                    "the trace's weights are not those of its settings (bias, tied_embeddings, sizes)",
                    *problems[:20],
                ]
            )
        )


@dataclass(frozen=True)
class Replay:
    """What our implementation computed beside what was recorded."""

    loss: list[float]
    recorded_loss: list[float]
    max_relative_loss_error: float
    max_relative_grad_norm_error: float
    max_relative_weight_norm_error: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """The report's fields under their stable names; what is not finite becomes null."""
        fields = {
            ("pass" if key == "passed" else key): value for key, value in asdict(self).items()
        }
        return {
            key: [_finite(v) for v in value] if isinstance(value, list) else _finite(value)
            for key, value in fields.items()
        }


def replay(
    trace: Trace,
    precision: str = "float64",
    context: ParallelContext | None = None,
    parallel: ParallelConfig | None = None,
) -> Replay:
    """Train as the trace did, from its initial weights on its batches, with its single eps for every tensor."""
    context, parallel = context or ParallelContext.single(), parallel or ParallelConfig()
    dtype = torch.float64 if precision == "float64" else torch.float32
    pieces = context.pipeline.size  # micro-batches: as many as a schedule needs at least
    batch_size = trace.arrays["inputs"].shape[1]
    config = trace.config(precision, parallel, batch_size // context.data.size // pieces)
    check_weights(trace, config)
    table = table_of(config)
    chunks = build_chunks(config.model, table, parallel, context)
    for chunk in chunks:
        chunk.to(dtype)
        for name, parameter in chunk.named_parameters():
            spec = spec_of(parameter, name)
            parameter.data.copy_(spec.cut(trace.initial(spec.stored_name(name), dtype)))
    assembly = assemble(config, context, table, chunks)
    optimizer, run = assembly.optimizer, assembly.step.passes
    optimizer.rule.column("eps").fill_(trace.single_eps)
    losses, norms = [], []
    for inputs, targets in zip(trace.arrays["inputs"], trace.arrays["targets"], strict=True):
        tokens, labels = (
            torch.from_numpy(x).chunk(context.data.size)[context.data.rank]
            for x in (inputs, targets)
        )
        optimizer.begin_step(pieces)
        total = run(
            [
                MicroBatch(t, y)
                for t, y in zip(tokens.chunk(pieces), labels.chunk(pieces), strict=True)
            ]
        )
        counted = torch.tensor(labels.numel() if context.pipeline.rank == 0 else 0)
        result = optimizer.step(config.optimizer.base_lr, total, counted)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    optimizer.wait_for_parameters()
    weights = {
        reference_name(name): _counted_weight(
            spec, spec.join(optimizer.shards.parameters[name].detach(), context), precision
        )
        for name, spec in optimizer.shards.specs.items()
        if not spec.is_copy(name)
    }
    return compare(trace, losses, norms, weights, precision)


def _counted_weight(spec: Spec, weight: Tensor, precision: str) -> Tensor:
    """In float32 the key's part of a bias is left out: its true gradient is zero, and Adam amplifies noise there."""
    if precision == "float32" and len(spec.shape) == 1 and "k" in spec.parts:
        start, stop = spec.part_range("k")
        weight = torch.cat((weight[:start], weight[stop:]))
    return weight.double()


def compare(
    trace: Trace,
    losses: list[float],
    norms: list[float],
    weights: dict[str, Tensor],
    precision: str,
) -> Replay:
    """Largest relative errors, and whether they are within the precision's tolerances."""
    record = trace.record
    expected = {name: _recorded_norm(trace, name, precision) for name in weights}
    errors = (
        relative_error(losses, record["loss"]),
        relative_error(norms, record["grad_norm"]),
        relative_error(
            [weight.norm().item() for weight in weights.values()], list(expected.values())
        ),
    )
    passed = all(error <= bound for error, bound in zip(errors, TOLERANCES[precision], strict=True))
    return Replay(losses, list(record["loss"]), *errors, passed)


def _recorded_norm(trace: Trace, name: str, precision: str) -> float:
    """The norm of a final weight, in float32 without the key third of the QKV bias."""
    final = trace.arrays.get(f"final/{name}")
    if precision == "float32" and name.endswith("c_attn.bias") and final is not None:
        third = final.shape[0] // 3
        return float(np.linalg.norm(np.delete(final.astype(np.float64), np.s_[third : 2 * third])))
    return float(trace.record["param_norm_final"][name])


def relative_error(values: list[float], recorded: list[float]) -> float:
    """Largest |a - b| / |b| (|a| where b is 0); infinite when the lengths differ or a value is not finite."""
    if len(values) != len(recorded) or not all(map(math.isfinite, values)):
        return math.inf
    return max(
        (abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, recorded, strict=True)), default=0.0
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
