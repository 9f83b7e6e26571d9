"""What other libraries offer for the same operations: Liger, quack, Transformer Engine and apex, each where it is installed.

Every function returns {library: program} for one operation. A library that is not installed, or has nothing for the operation, is
left out; one that is installed and cannot be prepared (another version, a broken build) is left out and named to `say`. The
signatures are those of the libraries' main branches; none of them knows our `scale`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

EPS = 1e-5
Program = Callable[..., Any]
Say = Callable[[str], None]


def _available(
    operation: str, builders: dict[str, Callable[[], Program | None]], say: Say
) -> dict[str, Program]:
    found = {}
    for library, build in builders.items():
        try:
            program = build()
        except ModuleNotFoundError:
            continue
        except (
            Exception
        ) as error:  # whatever a library does when it is imported must not end the run
            say(
                f"{library} is installed, but its {operation} cannot be prepared: {type(error).__name__}: {error}".splitlines()[
                    0
                ]
            )
            continue
        if program is not None:
            found[library] = program
    return found


def _module_norm(norm: torch.nn.Module, weight: Parameter, bias: Parameter | None) -> Program:
    """`norm` with our parameters for its own: it then computes, and differentiates, the same function of the same leaves."""
    norm.to(device=weight.device, dtype=weight.dtype)
    norm.weight = weight
    if bias is not None:
        norm.bias = bias
    return norm


def norms(weight: Parameter, bias: Parameter | None, say: Say) -> dict[str, Program]:
    """norm(x) over [..., H] with `weight` [H]: RMSNorm when `bias` is None, else LayerNorm."""
    hidden, rms = weight.shape[0], bias is None

    def liger() -> Program:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        if (
            rms
        ):  # in_place: its backward would write over the incoming gradient, which all of us share
            return lambda x: functions.liger_rms_norm(x, weight, EPS, in_place=False)
        return lambda x: functions.liger_layer_norm(x, weight, bias, EPS)

    def quack() -> Program | None:
        rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
        return (lambda x: rmsnorm(x, weight, eps=EPS)) if rms else None

    def transformer_engine() -> Program:
        modules = importlib.import_module("transformer_engine.pytorch")
        return _module_norm(
            (modules.RMSNorm if rms else modules.LayerNorm)(hidden, eps=EPS), weight, bias
        )

    def apex() -> Program:
        modules = importlib.import_module("apex.normalization")
        return _module_norm(
            (modules.FusedRMSNorm if rms else modules.FusedLayerNorm)(hidden, eps=EPS), weight, bias
        )

    return _available(
        "norm",
        {"liger": liger, "quack": quack, "transformer engine": transformer_engine, "apex": apex},
        say,
    )


def cross_entropies(say: Say) -> dict[str, Program]:
    """loss(logits [T, V], labels [T]) -> losses [T], or their sum (Liger). Liger and Transformer Engine overwrite the logits at once."""

    def liger() -> Program:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        return lambda logits, labels: functions.liger_cross_entropy(logits, labels, reduction="sum")

    def quack() -> Program:
        cross_entropy = importlib.import_module("quack.cross_entropy").cross_entropy
        return lambda logits, labels: cross_entropy(
            logits, labels, reduction="none", inplace_backward=True
        )

    def transformer_engine() -> Program:
        parallel = importlib.import_module(
            "transformer_engine.pytorch.cross_entropy"
        ).parallel_cross_entropy
        return lambda logits, labels: parallel(
            logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, None
        )

    def apex() -> Program:
        loss = importlib.import_module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss
        return lambda logits, labels: loss.apply(logits, labels, 0.0, -100, True)

    return _available(
        "cross-entropy",
        {"liger": liger, "quack": quack, "transformer engine": transformer_engine, "apex": apex},
        say,
    )


class _TransformerEngineSwiGLU(torch.autograd.Function):
    """Its kernels belong to its modules; this is the least that differentiates them."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, gate_up: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate_up)
        return kernels.swiglu(gate_up, None)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:
        return None, ctx.kernels.dswiglu(d_out, ctx.saved_tensors[0], None)


def swiglus(say: Say) -> dict[str, Program]:
    """swiglu(gate_up [T, 2F]) -> [T, F]. Liger takes the halves apart, so it pays for a copy of each unless they come contiguous."""

    def liger() -> Program:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        return lambda gate_up: functions.liger_swiglu(*gate_up.chunk(2, dim=-1))

    def transformer_engine() -> Program:
        importlib.import_module("transformer_engine.pytorch")  # loads the extension below
        kernels = importlib.import_module("transformer_engine_torch")
        return lambda gate_up: _TransformerEngineSwiGLU.apply(kernels, gate_up)

    return _available("SwiGLU", {"liger": liger, "transformer engine": transformer_engine}, say)


def rotaries(x: Tensor, angle: Tensor, say: Say) -> dict[str, Program]:
    """() -> `x` [S, 1, N, D] rotated by `angle` [S, 1, D/2]. Liger rotates queries and keys in place: half the heads each."""
    whole = torch.cat((angle, angle), dim=-1)  # [S, 1, D]

    def liger() -> Program:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        q, k = (
            half.permute(1, 0, 2, 3).contiguous().transpose(1, 2) for half in x.chunk(2, dim=2)
        )  # [B, N/2, S, D] over [B, S, N/2, D]
        cos, sin = (t.transpose(0, 1).to(x.dtype).contiguous() for t in (whole.cos(), whole.sin()))
        return lambda: functions.liger_rope(q, k, cos, sin)

    def transformer_engine() -> Program:
        apply = importlib.import_module(
            "transformer_engine.pytorch.attention.rope"
        ).apply_rotary_pos_emb
        freqs = whole.unsqueeze(1).float()
        return lambda: apply(x, freqs, tensor_format="sbhd", fused=True)

    def apex() -> Program:
        apply = importlib.import_module(
            "apex.transformer.functional"
        ).fused_apply_rotary_pos_emb_cached
        cos, sin = whole.unsqueeze(1).cos(), whole.unsqueeze(1).sin()
        return lambda: apply(x, cos, sin)

    return _available(
        "rotary embedding",
        {"liger": liger, "transformer engine": transformer_engine, "apex": apex},
        say,
    )


def adamws(parameter: Parameter, lr: float, weight_decay: float, say: Say) -> dict[str, Program]:
    """step() of one parameter that has its gradient: the moments are float32, decoupled weight decay."""
    settings = {
        "lr": lr,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": weight_decay,
        "adam_w_mode": True,
    }

    def transformer_engine() -> Program:
        return (
            importlib.import_module("transformer_engine.pytorch.optimizers")
            .FusedAdam([parameter], **settings)
            .step
        )

    def apex() -> Program:
        return importlib.import_module("apex.optimizers").FusedAdam([parameter], **settings).step

    return _available("AdamW", {"transformer engine": transformer_engine, "apex": apex}, say)
