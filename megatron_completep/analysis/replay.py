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

from megatron_completep.completep import Table, table_for
from megatron_completep.config.json_text import read_json
from megatron_completep.config.schema import CompletePConfig, ModelConfig, OptimizerConfig, ParallelConfig, RoleFactors
from megatron_completep.errors import DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.distributed_adamw import DistributedAdamW
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.placement import placement_of
from megatron_completep.training.forward_backward import ForwardBackward, MicroBatch

NAMES = {  # ours -> GPT-2's
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "unembedding": "lm_head",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
SETTINGS = (
    *("num_layers", "hidden_size", "num_heads", "vocab_size", "seq_length", "base_hidden_size", "base_num_layers", "alpha"),
    *("init_std", "lr", "weight_decay", "eps", "betas", "grad_clip", "loss", "grad_norm", "param_norm_final"),
)
REPLAYED = {"position": "learned", "norm": "layernorm", "activation": "gelu", "lr_schedule": "constant"}  # what the reference knows
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
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error).rstrip(".")
            raise DataError(f"{path}: not a trace: {reason}. Give NAME, NAME.json or NAME.npz; both files must be there.") from error
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

    def configs(self) -> tuple[ModelConfig, CompletePConfig, OptimizerConfig]:
        """The reference's settings as ours: layernorm, gelu, learned positions, attention scale 1/head_dim. Raises DataError."""
        try:
            return self._model(), self._completep(), self._optimizer()
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
            base = {"base_hidden_size": r["base_hidden_size"], "base_num_layers": r["base_num_layers"]}
            return CompletePConfig(alpha=r["alpha"], **base)
        # The reference's plain muP does not scale the weight decay of hidden weights: our table's m_N is divided out again.
        unscaled = RoleFactors(weight_decay=r["base_hidden_size"] / r["hidden_size"])
        return CompletePConfig(
            parameterization="mup",
            base_hidden_size=r["base_hidden_size"],
            base_num_layers=r["base_num_layers"],
            factors={"hidden_weight": unscaled},
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


def check_weights(trace: Trace, model: ModelConfig, table: Table) -> None:
    """The trace has the weights of the model that its settings describe, each in its shape, and no others. Raises DataError."""
    whole = GPT(model, table, ParallelContext.single("meta"))
    own = {reference_name(name): placement_of(p).global_shape for name, p in whole.named_parameters()}
    recorded = {key.removeprefix("init/"): array.shape for key, array in trace.arrays.items() if key.startswith("init/")}
    problems = [f"{name}: not in the .npz" for name in own if name not in recorded]
    problems += [f"{name}: no such weight in the model of the .json" for name in recorded if name not in own]
    problems += [f"{n}: {recorded[n]} in the .npz, {own[n]} in the .json" for n in own if n in recorded and recorded[n] != own[n]]
    problems += [f"{name}: no norm in param_norm_final" for name in own if name not in trace.record["param_norm_final"]]
    if problems:
        raise DataError("\n  ".join(["the trace's weights are not those of its settings (bias, tied_embeddings, sizes)", *problems[:20]]))


def reference_name(name: str) -> str:
    """Our parameter name -> the reference's."""
    parts = name.split(".")
    prefix, inner = (f"transformer.h.{parts[1]}.", ".".join(parts[2:-1])) if parts[0] == "layers" else ("", ".".join(parts[:-1]))
    return f"{prefix}{NAMES[inner]}.{parts[-1]}"


def local_part(whole: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """The rows or columns of a logical tensor that this rank's parameter holds, padding rows zero."""
    placement = placement_of(parameter)
    if placement.dim is None:
        return whole
    limit = whole.shape[placement.dim]
    pieces = [whole.narrow(placement.dim, start, max(0, min(stop, limit) - start)) for start, stop in placement.ranges if start < limit]
    part = torch.cat(pieces, placement.dim) if pieces else whole.narrow(placement.dim, 0, 0)
    local = torch.zeros(parameter.shape, dtype=whole.dtype)
    local.narrow(placement.dim, 0, part.shape[placement.dim]).copy_(part)
    return local


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
        fields = {("pass" if key == "passed" else key): value for key, value in asdict(self).items()}
        return {key: [_finite(v) for v in value] if isinstance(value, list) else _finite(value) for key, value in fields.items()}


def replay(
    trace: Trace, precision: str = "float64", context: ParallelContext | None = None, parallel: ParallelConfig | None = None
) -> Replay:
    """Train as the trace did, from its initial weights on its batches, with its single eps for every tensor."""
    context, parallel = context or ParallelContext.single(), parallel or ParallelConfig()
    dtype = torch.float64 if precision == "float64" else torch.float32
    model, completep, settings = trace.configs()
    table = table_for(model, completep)
    check_weights(trace, model, table)
    chunks = build_chunks(model, table, parallel, context)
    for chunk in chunks:
        chunk.to(dtype)
        for name, parameter in chunk.named_parameters():
            logical = placement_of(parameter).tied_to or name
            parameter.data.copy_(local_part(trace.initial(logical, dtype), parameter))
    optimizer = DistributedAdamW(chunks, table, settings, context, parallel, dtype)
    optimizer.group_table[:, 2] = trace.single_eps
    pieces = context.pipeline.size  # micro-batches: as many as a schedule needs at least
    run = ForwardBackward(chunks, model, parallel, context, trace.arrays["inputs"].shape[1] // context.data.size // pieces)
    losses, norms = [], []
    for inputs, targets in zip(trace.arrays["inputs"], trace.arrays["targets"], strict=True):
        tokens, labels = (torch.from_numpy(x).chunk(context.data.size)[context.data.rank] for x in (inputs, targets))
        optimizer.begin_step(pieces)
        total = run([MicroBatch(t, y) for t, y in zip(tokens.chunk(pieces), labels.chunk(pieces), strict=True)])
        counted = torch.tensor(labels.numel() if context.pipeline.rank == 0 else 0)
        result = optimizer.step(settings.base_lr, total, counted)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    optimizer.wait_for_parameters()
    weights = {
        reference_name(name): _counted_weight(name, whole_of(p, context), precision)
        for name, p in optimizer.parameters.items()
        if placement_of(p).tied_to in (None, name)
    }
    return compare(trace, losses, norms, weights, precision)


def whole_of(parameter: torch.nn.Parameter, context: ParallelContext) -> Tensor:
    """The logical tensor, on every tensor rank of the stage that holds the parameter."""
    placement, local = placement_of(parameter), parameter.detach()
    if placement.dim is None or context.tensor.size == 1:
        return local.narrow(0, 0, placement.global_shape[0])
    whole = local.new_zeros(placement.global_shape)
    position = 0
    for start, stop in placement.ranges:
        held = max(0, min(stop, whole.shape[placement.dim]) - start)
        if held:
            whole.narrow(placement.dim, start, held).copy_(local.narrow(placement.dim, position, held))
        position += stop - start
    return all_reduce(whole, context.tensor)


def _counted_weight(name: str, parameter: Tensor, precision: str) -> Tensor:
    """In float32 the key third of the QKV bias is left out: its true gradient is zero, and Adam amplifies noise there."""
    if precision == "float32" and name.endswith("qkv.bias"):
        third = parameter.shape[0] // 3
        parameter = torch.cat((parameter[:third], parameter[2 * third :]))
    return parameter.detach().double()


def compare(trace: Trace, losses: list[float], norms: list[float], weights: dict[str, Tensor], precision: str) -> Replay:
    """Largest relative errors, and whether they are within the precision's tolerances."""
    record = trace.record
    expected = {name: _recorded_norm(trace, name, precision) for name in weights}
    errors = (
        relative_error(losses, record["loss"]),
        relative_error(norms, record["grad_norm"]),
        relative_error([weight.norm().item() for weight in weights.values()], list(expected.values())),
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
    return max((abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, recorded, strict=True)), default=0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
