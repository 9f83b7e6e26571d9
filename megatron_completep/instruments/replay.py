"""Replay of a recorded run of the CompleteP authors' reference implementation.

A trace is a pair: NAME.json (configuration, loss and gradient norm by step, final weight norms) and
NAME.npz (batches, and initial and final weights under GPT-2 names). A right implementation
reproduces it on this project's model and optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec, spec_of, specs_of
from megatron_completep.roles import Role
from megatron_completep.run.assemble import assemble
from megatron_completep.run.forward_backward import MicroBatch

# The keys that a trace's .json must have.
SETTINGS = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "vocab_size",
    "seq_length",
    "base_hidden_size",
    "base_num_layers",
    "alpha",
    "init_std",
    "lr",
    "weight_decay",
    "eps",
    "betas",
    "grad_clip",
    "loss",
    "grad_norm",
    "param_norm_final",
)
# The only values of these settings that the reference implementation has.
REPLAYED = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "lr_schedule": "constant",
}
# The largest relative errors of loss, gradient norm and final weight norms.
TOLERANCES = {
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
        """Read a trace; `path` is either file, or their common name without suffix.

        Raises DataError for a missing, unreadable or incomplete file.
        """
        stem = path.removesuffix(".json").removesuffix(".npz")
        try:
            record = read_json(stem + ".json", finite=False)
            with np.load(stem + ".npz", allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, BadZipFile, DataError) as error:
            reason = str(error).rstrip(".")
            # The text of an OSError begins with its number, which is of no use to a reader.
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
            raise DataError(
                f"{path}: not a trace: {reason}. "
                "Give NAME, NAME.json or NAME.npz; both files must be there."
            ) from error

        trace = cls(record, arrays)
        problems = trace._problems()
        if problems:
            raise DataError("\n  ".join([f"{stem}: not a trace that can be replayed", *problems]))
        return trace

    def _problems(self) -> list[str]:
        """The keys and arrays that are missing, and the settings that the replay does not know."""
        if not isinstance(self.record, dict):
            return ["the .json holds no object"]
        problems = []
        missing_keys = [key for key in SETTINGS if key not in self.record]
        if missing_keys:
            problems.append(f"keys missing in the .json: {', '.join(missing_keys)}")
        missing_arrays = [name for name in ("inputs", "targets") if name not in self.arrays]
        if missing_arrays:
            problems.append(f"arrays missing in the .npz: {', '.join(missing_arrays)}")
        for key, supported in REPLAYED.items():
            # A trace may leave these settings out, or write them with other words round the name.
            setting = str(self.record.get(key, supported))
            if supported not in setting.lower():
                problems.append(f"{key} = {setting}: the replay knows {supported} only")
        return problems

    def config(
        self,
        precision: str = "float64",
        parallel: ParallelConfig | None = None,
        micro_batch_size: int | None = None,
    ) -> Config:
        """The reference's settings as a configuration of this project.

        The model has layernorm, gelu, learned positions and the attention scale 1/head_dim.
        micro_batch_size: sequences that a rank computes at once; None for the whole batch. Raises
        DataError where the settings cannot be used.
        """
        # The batches are the recorded ones: how they are split does not change the loss.
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
        record = self.record
        # The settings do not name the width of the MLP; its first matrix shows it.
        up = self.arrays.get("init/transformer.h.0.mlp.c_fc.weight")
        return ModelConfig(
            hidden_size=record["hidden_size"],
            num_layers=record["num_layers"],
            num_attention_heads=record["num_heads"],
            ffn_hidden_size=4 * record["hidden_size"] if up is None else up.shape[0],
            vocab_size=record["vocab_size"],
            seq_length=record["seq_length"],
            norm="layernorm",
            activation="gelu",
            position="learned",
            bias=record.get("bias", True),
            tied_embeddings=record.get("tied_embeddings", True),
            attention_scale=record.get("attention_scale", "1/head_dim"),
        )

    def _completep(self) -> CompletePConfig:
        record = self.record
        base_hidden = record["base_hidden_size"]
        base_layers = record["base_num_layers"]
        alpha = record["alpha"]
        if alpha is not None:
            return CompletePConfig(
                alpha=alpha, base_hidden_size=base_hidden, base_num_layers=base_layers
            )
        # The reference's plain muP does not scale the weight decay of hidden weights, so this
        # project's factor m_N is divided out again.
        unscaled = RoleFactors(weight_decay=base_hidden / record["hidden_size"])
        return CompletePConfig(
            parameterization="mup",
            base_hidden_size=base_hidden,
            base_num_layers=base_layers,
            factors={Role.HIDDEN_WEIGHT: unscaled},
        )

    def _optimizer(self) -> OptimizerConfig:
        record = self.record
        betas = record["betas"]
        return OptimizerConfig(
            base_lr=record["lr"],
            base_init_std=record["init_std"],
            base_weight_decay=record["weight_decay"],
            base_eps=record["eps"],
            betas=(betas[0], betas[1]),
            grad_clip=record["grad_clip"],
            schedule="constant",
        )

    @property
    def single_eps(self) -> float:
        """The reference's epsilon, which is the same for every tensor."""
        groups = self.record.get("groups") or [{}]
        eps: float = groups[0].get("eps", self.record["eps"])
        return eps

    def initial(self, name: str, dtype: torch.dtype) -> Tensor:
        """An initial weight, by this project's name of the parameter."""
        return torch.from_numpy(self.arrays[f"init/{reference_name(name)}"]).to(dtype)


def check_weights(trace: Trace, config: Config) -> None:
    """Compare the trace's weights with those of the model that its settings describe.

    Raises DataError where a weight is missing, superfluous or of another shape.
    """
    model = GPT(config.model, table_of(config), ParallelContext.single("meta"))
    expected = {reference_name(name): spec.shape for name, spec in specs_of(model).items()}
    recorded = {
        key.removeprefix("init/"): array.shape
        for key, array in trace.arrays.items()
        if key.startswith("init/")
    }

    # All problems at once: together they show which setting is wrong.
    problems = [f"{name}: not in the .npz" for name in expected if name not in recorded]
    for name in recorded:
        if name not in expected:
            problems.append(f"{name}: no such weight in the model of the .json")
    for name, shape in expected.items():
        if name in recorded and recorded[name] != shape:
            problems.append(f"{name}: {recorded[name]} in the .npz, {shape} in the .json")
    for name in expected:
        if name not in trace.record["param_norm_final"]:
            problems.append(f"{name}: no norm in param_norm_final")
    if not problems:
        return

    # One wrong setting concerns every layer, so the first problems are enough.
    title = "the trace's weights are not those of its settings (bias, tied_embeddings, sizes)"
    raise DataError("\n  ".join([title, *problems[:20]]))


@dataclass(frozen=True)
class Replay:
    """The figures of this implementation beside the recorded ones."""

    loss: list[float]
    recorded_loss: list[float]
    max_relative_loss_error: float
    max_relative_grad_norm_error: float
    max_relative_weight_norm_error: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """The report's fields under their stable names; what is not finite becomes null."""
        fields: dict[str, Any] = {}
        for key, field_value in asdict(self).items():
            name = "pass" if key == "passed" else key
            if isinstance(field_value, list):
                fields[name] = [_finite(item) for item in field_value]
            else:
                fields[name] = _finite(field_value)
        return fields


def replay(
    trace: Trace,
    precision: str = "float64",
    context: ParallelContext | None = None,
    parallel: ParallelConfig | None = None,
) -> Replay:
    """Train as the trace did and compare: its initial weights, its batches, its single eps.

    Communicates as training does, over all ranks of the layout. Raises DataError where the trace's
    settings cannot be used or its weights are not those of its settings.
    """
    context = context or ParallelContext.single()
    parallel = parallel or ParallelConfig()
    # As many micro-batches as a pipeline schedule needs at least.
    micro_batches = context.pipeline.size
    batch_size = trace.arrays["inputs"].shape[1]
    micro_batch_size = batch_size // context.data.size // micro_batches
    config = trace.config(precision, parallel, micro_batch_size)
    check_weights(trace, config)

    table = table_of(config)
    chunks = build_chunks(config.model, table, parallel, context)
    # Before the optimizer is made, which copies the weights into its masters.
    dtype = torch.float64 if precision == "float64" else torch.float32
    _load_initial_weights(chunks, trace, dtype)
    assembly = assemble(config, context, table, chunks)
    optimizer = assembly.optimizer
    # This project's eps follows the parameterization; the reference has one for all tensors.
    optimizer.rule.column("eps").fill_(trace.single_eps)

    losses = []
    grad_norms = []
    for inputs, targets in zip(trace.arrays["inputs"], trace.arrays["targets"], strict=True):
        tokens = _rank_sequences(inputs, context)
        labels = _rank_sequences(targets, context)
        optimizer.begin_step(micro_batches)
        pairs = zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True)
        total_loss = assembly.step.forward_backward([MicroBatch(*pair) for pair in pairs])
        # Every pipeline stage sees the same tokens, so only the first one counts them.
        counted = torch.tensor(labels.numel() if context.pipeline.rank == 0 else 0)
        result = optimizer.step(config.optimizer.base_lr, total_loss, counted)
        losses.append(result.loss.item())
        grad_norms.append(result.grad_norm.item())

    optimizer.wait_for_parameters()
    weights = _final_weights(optimizer, context, precision)
    return compare(trace, losses, grad_norms, weights, precision)


def _load_initial_weights(chunks: Sequence[GPT], trace: Trace, dtype: torch.dtype) -> None:
    """Copy this rank's segments of the trace's initial weights into the model."""
    for chunk in chunks:
        chunk.to(dtype)
        for name, parameter in chunk.named_parameters():
            spec = spec_of(parameter, name)
            logical_weight = trace.initial(spec.stored_name(name), dtype)
            parameter.data.copy_(spec.to_local(logical_weight))


def _rank_sequences(batch: np.ndarray, context: ParallelContext) -> Tensor:
    """The tokens [b, S] of a batch [B, W] that this rank trains on, on its device."""
    own = torch.from_numpy(batch).chunk(context.data.size)[context.data.rank]
    return context.context_part.cut(own).to(context.device)


def _final_weights(
    optimizer: DistributedOptimizer, context: ParallelContext, precision: str
) -> dict[str, Tensor]:
    """The trained weights of this rank's stage by the reference's names, joined over tensor ranks.

    Communicates over the tensor group.
    """
    weights = {}
    for name, spec in optimizer.shards.specs.items():
        # The copy of a tied embedding on another stage is no weight of its own.
        if spec.is_copy(name):
            continue
        parameter = optimizer.shards.parameters[name].detach()
        logical_weight = spec.gather_logical(parameter, context)
        weights[reference_name(name)] = _counted_weight(spec, logical_weight, precision)
    return weights


def _counted_weight(spec: Spec, weight: Tensor, precision: str) -> Tensor:
    """The elements of a weight that are compared, in float64.

    In float32 the key's part of a bias is left out: its true gradient is zero, and Adam amplifies
    the rounding noise there.
    """
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
    """The largest relative errors, and whether they are within the precision's tolerances.

    losses, norms: the loss and the gradient norm of every step. weights: by the reference's names.
    """
    record = trace.record
    weight_norms = [weight.norm().item() for weight in weights.values()]
    recorded_norms = [_recorded_norm(trace, name, precision) for name in weights]
    errors = (
        relative_error(losses, record["loss"]),
        relative_error(norms, record["grad_norm"]),
        relative_error(weight_norms, recorded_norms),
    )
    passed = all(error <= bound for error, bound in zip(errors, TOLERANCES[precision], strict=True))
    return Replay(losses, list(record["loss"]), *errors, passed)


def _recorded_norm(trace: Trace, name: str, precision: str) -> float:
    """The norm of a final weight, in float32 without the key's third of the QKV bias."""
    final = trace.arrays.get(f"final/{name}")
    if precision == "float32" and name.endswith("c_attn.bias") and final is not None:
        # The recorded norm is of the whole bias, so that of the two other thirds is computed here.
        third = final.shape[0] // 3
        counted = np.delete(final.astype(np.float64), np.s_[third : 2 * third])
        return float(np.linalg.norm(counted))
    return float(trace.record["param_norm_final"][name])


def relative_error(values: list[float], recorded: list[float]) -> float:
    """The largest |a - b| / |b|, or |a| where b is 0.

    Infinite where the lengths differ or a value is not finite.
    """
    if len(values) != len(recorded) or not all(map(math.isfinite, values)):
        return math.inf
    errors = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, recorded, strict=True)]
    return max(errors, default=0.0)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
