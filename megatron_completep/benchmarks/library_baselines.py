"""What Liger, quack, Transformer Engine and apex offer for the same operations, where installed.

Every function returns {library: program} for one operation. A library that is not installed, or has
nothing for the operation, is left out. One that is installed and cannot be prepared (another
version, a broken build) is left out and reported to `say`. The signatures are those of the
libraries' main branches; none of them knows our `scale`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

EPS = 1e-5
Program = Callable[..., Any]
Say = Callable[[str], None]


def _available(
    operation: str, builders: Mapping[str, Callable[[], Program | None]], say: Say
) -> dict[str, Program]:
    programs = {}
    for library, build in builders.items():
        try:
            program = build()
        except ModuleNotFoundError:
            continue
        # Whatever a library raises when it is imported must not end the run.
        except Exception as error:
            message = (
                f"{library} is installed, but its {operation} cannot be prepared: "
                f"{type(error).__name__}: {error}"
            )
            say(message.splitlines()[0])
            continue
        if program is not None:
            programs[library] = program
    return programs


def _member(module: str, name: str) -> Any:
    """`name` of a library's module. Libraries are optional, so they are imported when asked for."""
    return getattr(importlib.import_module(module), name)


def _module_norm(norm: torch.nn.Module, weight: Parameter, bias: Parameter | None) -> Program:
    """`norm` with our parameters in place of its own.

    It then computes the same function of the same leaves, and differentiates them.
    """
    norm.to(device=weight.device, dtype=weight.dtype)
    norm.weight = weight
    if bias is not None:
        norm.bias = bias
    return norm


def norms(weight: Parameter, bias: Parameter | None, say: Say) -> dict[str, Program]:
    """norm(x) over [..., H] with `weight` [H]: RMSNorm when `bias` is None, else LayerNorm."""
    hidden = weight.shape[0]
    rms = bias is None

    def liger() -> Program:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        # With in_place its backward would write over the incoming gradient, which is shared by
        # all implementations of a case.
        if rms:
            return lambda x: functions.liger_rms_norm(x, weight, EPS, in_place=False)
        return lambda x: functions.liger_layer_norm(x, weight, bias, EPS)

    def quack() -> Program | None:
        rmsnorm = _member("quack.rmsnorm", "rmsnorm")
        if not rms:
            return None
        return lambda x: rmsnorm(x, weight, eps=EPS)

    def transformer_engine() -> Program:
        norm_class = _member("transformer_engine.pytorch", "RMSNorm" if rms else "LayerNorm")
        return _module_norm(norm_class(hidden, eps=EPS), weight, bias)

    def apex() -> Program:
        norm_class = _member("apex.normalization", "FusedRMSNorm" if rms else "FusedLayerNorm")
        return _module_norm(norm_class(hidden, eps=EPS), weight, bias)

    builders = {
        "liger": liger,
        "quack": quack,
        "transformer engine": transformer_engine,
        "apex": apex,
    }
    return _available("norm", builders, say)


def cross_entropies(say: Say) -> dict[str, Program]:
    """loss(logits [T, V], labels [T]) -> losses [T], or their sum (Liger).

    Liger and Transformer Engine overwrite the logits in their forward.
    """

    def liger() -> Program:
        loss = _member("liger_kernel.transformers.functional", "liger_cross_entropy")
        return lambda logits, labels: loss(logits, labels, reduction="sum")

    def quack() -> Program:
        loss = _member("quack.cross_entropy", "cross_entropy")
        settings = {"reduction": "none", "inplace_backward": True}
        return lambda logits, labels: loss(logits, labels, **settings)

    def transformer_engine() -> Program:
        loss = _member("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")
        # It takes [S, B, V]: our tokens stand for S. No label smoothing, no reduction, no group.
        return lambda logits, labels: loss(
            logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, None
        )

    def apex() -> Program:
        loss = _member("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
        # No label smoothing, the index of ignored labels, losses in float32.
        return lambda logits, labels: loss.apply(logits, labels, 0.0, -100, True)

    builders = {
        "liger": liger,
        "quack": quack,
        "transformer engine": transformer_engine,
        "apex": apex,
    }
    return _available("cross-entropy", builders, say)


class _TransformerEngineSwiGLU(torch.autograd.Function):
    """The library exposes its kernels through modules only; this is the least that uses them."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, gate_up: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate_up)
        out: Tensor = kernels.swiglu(gate_up, None)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:
        (gate_up,) = ctx.saved_tensors
        return None, ctx.kernels.dswiglu(d_out, gate_up, None)


def swiglus(say: Say) -> dict[str, Program]:
    """swiglu(gate_up [T, 2F]) -> [T, F].

    Liger takes the halves as two tensors, so it pays for a copy of each unless they are contiguous.
    """

    def liger() -> Program:
        swiglu = _member("liger_kernel.transformers.functional", "liger_swiglu")
        return lambda gate_up: swiglu(*gate_up.chunk(2, dim=-1))

    def transformer_engine() -> Program:
        # Importing the package loads the extension module with the kernels.
        importlib.import_module("transformer_engine.pytorch")
        kernels = importlib.import_module("transformer_engine_torch")
        swiglu: Program = _TransformerEngineSwiGLU.apply
        return lambda gate_up: swiglu(kernels, gate_up)

    return _available("SwiGLU", {"liger": liger, "transformer engine": transformer_engine}, say)


def rotaries(x: Tensor, angle: Tensor, say: Say) -> dict[str, Program]:
    """() -> `x` [S, 1, N, D] rotated by `angle` [S, 1, D/2].

    Liger rotates queries and keys in place: each gets half of the heads.
    """
    full_angle = torch.cat((angle, angle), dim=-1)  # [S, 1, D]

    def liger() -> Program:
        rope = _member("liger_kernel.transformers.functional", "liger_rope")

        # [B, N/2, S, D] as views of [B, S, N/2, D], as attention makes them.
        def heads_first(half: Tensor) -> Tensor:
            return half.permute(1, 0, 2, 3).contiguous().transpose(1, 2)

        def batch_first(factor: Tensor) -> Tensor:
            return factor.transpose(0, 1).to(x.dtype).contiguous()

        first_heads, last_heads = x.chunk(2, dim=2)
        q = heads_first(first_heads)
        k = heads_first(last_heads)
        cos = batch_first(full_angle.cos())
        sin = batch_first(full_angle.sin())
        return lambda: rope(q, k, cos, sin)

    def transformer_engine() -> Program:
        rope = _member("transformer_engine.pytorch.attention.rope", "apply_rotary_pos_emb")
        freqs = full_angle.unsqueeze(1).float()  # [S, 1, 1, D], for x [S, B, N, D]
        return lambda: rope(x, freqs, tensor_format="sbhd", fused=True)

    def apex() -> Program:
        rope = _member("apex.transformer.functional", "fused_apply_rotary_pos_emb_cached")
        # The cached variant takes [S, 1, 1, D] of cos and sin in place of the angles.
        cos = full_angle.unsqueeze(1).cos()
        sin = full_angle.unsqueeze(1).sin()
        return lambda: rope(x, cos, sin)

    builders = {"liger": liger, "transformer engine": transformer_engine, "apex": apex}
    return _available("rotary embedding", builders, say)


def adamws(parameter: Parameter, lr: float, weight_decay: float, say: Say) -> dict[str, Program]:
    """step() of one parameter that has its gradient: float32 moments, decoupled weight decay."""
    settings = {
        "lr": lr,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": weight_decay,
        "adam_w_mode": True,
    }

    def step_of(module: str) -> Program:
        optimizer = _member(module, "FusedAdam")([parameter], **settings)
        step: Program = optimizer.step
        return step

    def transformer_engine() -> Program:
        return step_of("transformer_engine.pytorch.optimizers")

    def apex() -> Program:
        return step_of("apex.optimizers")

    return _available("AdamW", {"transformer engine": transformer_engine, "apex": apex}, say)
