"""What the kernel benchmark measures: for each operation its byte floor, our implementation, and every baseline there is.

A case is a dictionary {implementation: callable of no arguments}; all of them compute the same from the same random inputs.
Backward passes are timed alone, through autograd for everybody. A library that is not installed is left out.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels

SCALE, EPS = 0.3, 1e-5
Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `answer`, in float64, is what `implementations["ours"]` must return."""

    kernel: str
    rows: int
    columns: int
    floor_bytes: int
    implementations: dict[str, Work]
    answer: Work | None = None


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _module_norm(norm: torch.nn.Module, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`norm` with our weights in it: it then computes, and differentiates, the same function."""
    norm.to(device=weight.device, dtype=weight.dtype)
    parameters = dict(norm.named_parameters())
    parameters["weight"].data.copy_(weight.detach())
    if bias is not None:
        parameters["bias"].data.copy_(bias.detach())
    return norm


def library_norms(weight: Tensor, bias: Tensor | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """The norms of Liger, quack, Transformer Engine and apex, of those that are installed; RMSNorm when `bias` is None."""
    hidden, rms = weight.shape[0], bias is None

    def liger() -> Callable[[Tensor], Tensor]:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        if rms:
            return lambda x: functions.liger_rms_norm(x, weight, EPS)
        return lambda x: functions.liger_layer_norm(x, weight, bias, EPS)

    def quack() -> Callable[[Tensor], Tensor] | None:
        rmsnorm = importlib.import_module("quack").rmsnorm
        return (lambda x: rmsnorm(x, weight, eps=EPS)) if rms else None

    def transformer_engine() -> Callable[[Tensor], Tensor]:
        modules = importlib.import_module("transformer_engine.pytorch")
        return _module_norm((modules.RMSNorm if rms else modules.LayerNorm)(hidden, eps=EPS), weight, bias)

    def apex() -> Callable[[Tensor], Tensor]:
        modules = importlib.import_module("apex.normalization")
        return _module_norm((modules.FusedRMSNorm if rms else modules.FusedLayerNorm)(hidden, eps=EPS), weight, bias)

    found = {}
    for name, build in (("liger", liger), ("quack", quack), ("transformer engine", transformer_engine), ("apex", apex)):
        try:
            norm = build()
        except (ImportError, AttributeError):  # not installed, or another package of that name
            continue
        if norm is not None:
            found[name] = norm
    return found


def residual_norm_cases(rows: int, hidden: int, dtype: torch.dtype, device: torch.device, rms: bool, with_compile: bool) -> Iterator[Case]:
    """Forward, then backward alone, of `y = residual + s * branch; out = norm(y)`."""
    residual, branch, d_y, d_out = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(4))
    weight, bias = torch.randn(hidden, device=device).to(dtype), None if rms else torch.randn(hidden, device=device).to(dtype)
    leaves = [leaf.requires_grad_() for leaf in (residual, branch, weight, bias) if leaf is not None]

    def with_norm(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def chain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.add(residual, branch, alpha=SCALE)
            return y, norm(y)

        return chain

    def torch_norm(y: Tensor) -> Tensor:
        return F.rms_norm(y, (hidden,), weight, EPS) if rms else F.layer_norm(y, (hidden,), weight, bias, EPS)

    def plain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y = residual + SCALE * branch
        return y, torch_norm(y)

    programs: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "ours": lambda r, b: kernels.scaled_residual_norm(r, b, None, weight, bias, scale=SCALE, eps=EPS, rms=rms),
        "eager": plain,
        "torch.add + norm": with_norm(torch_norm),
        **{name: with_norm(norm) for name, norm in library_norms(weight, bias).items()},
    }
    if with_compile:
        programs["torch.compile"] = _compiled(plain)
    size, name = rows * hidden * residual.element_size(), "rmsnorm" if rms else "layernorm"

    def answer() -> Any:
        from_ = [leaf.detach().double() for leaf in leaves]
        y = from_[0] + SCALE * from_[1]
        y = y.to(dtype).double()
        return y, F.rms_norm(y, (hidden,), from_[2], EPS) if rms else F.layer_norm(y, (hidden,), from_[2], from_[3], EPS)

    def forward_of(program: Callable[..., Any]) -> Work:
        return lambda: program(residual, branch)

    yield Case(f"residual {name} forward", rows, hidden, 4 * size, {k: forward_of(p) for k, p in programs.items()}, answer)

    def backward_of(program: Callable[..., Any]) -> Work:
        outputs = program(residual, branch)
        return lambda: torch.autograd.grad(outputs, leaves, (d_y, d_out), retain_graph=True)

    yield Case(f"residual {name} backward", rows, hidden, 5 * size, {k: backward_of(p) for k, p in programs.items()})


def pointwise_cases(rows: int, ffn: int, dtype: torch.dtype, device: torch.device, with_compile: bool) -> Iterator[Case]:
    """SwiGLU and squared ReLU, forward and backward, and RoPE."""
    size = rows * ffn * torch.finfo(dtype).bits // 8

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def squared_relu(x: Tensor) -> Tensor:
        return F.relu(x).square()

    for name, ours, plain, width, floors in (
        ("swiglu", kernels.swiglu, swiglu, 2 * ffn, (3, 5)),
        ("squared relu", kernels.squared_relu, squared_relu, ffn, (2, 3)),
    ):
        x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
        d_out = torch.randn(rows, ffn, device=device).to(dtype)
        programs = {"ours": ours, "eager": plain, **({"torch.compile": _compiled(plain)} if with_compile else {})}
        yield Case(
            f"{name} forward", rows, ffn, floors[0] * size,
            {key: functools.partial(program, x) for key, program in programs.items()},
            functools.partial(plain, x.detach().double()),
        )  # fmt: skip
        outputs = {key: program(x) for key, program in programs.items()}
        yield Case(
            f"{name} backward", rows, ffn, floors[1] * size,
            {key: functools.partial(torch.autograd.grad, out, x, d_out, retain_graph=True) for key, out in outputs.items()},
        )  # fmt: skip
    yield from _rotary_case(rows, dtype, device, with_compile)


def _rotary_case(rows: int, dtype: torch.dtype, device: torch.device, with_compile: bool) -> Iterator[Case]:
    heads, head_dim = 16, 128
    x = torch.randn(rows, 1, heads, head_dim, device=device).to(dtype)
    angle = torch.rand(rows, 1, head_dim // 2, device=device) * 6.3
    cos, sin = angle.cos(), angle.sin()

    def plain(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    programs: dict[str, Work] = {"ours": lambda: kernels.rotary(x, cos, sin), "eager": lambda: plain(x)}
    if with_compile:
        compiled = _compiled(plain)
        programs["torch.compile"] = lambda: compiled(x)
    yield Case("rotary", rows, heads * head_dim, 2 * x.numel() * x.element_size(), programs, lambda: plain(x.double()))


def _gradient_of_sum(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(function(x).sum(), x)[0]


def cross_entropy_cases(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, with_compile: bool) -> Iterator[Case]:
    """Cross-entropy of given logits, forward alone and forward + backward (ours writes the gradient over the logits)."""
    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    labels = torch.randint(vocabulary, (rows,), device=device)
    size = logits.numel() * logits.element_size()
    scratch, leaf = logits.clone(), logits.clone().requires_grad_()

    def plain(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def ours() -> Tensor:
        stats = kernels.cross_entropy_forward(logits, labels, 0, vocabulary)
        return stats[0] + stats[1].log() - stats[2]

    def ours_both() -> None:
        stats = kernels.cross_entropy_forward(scratch, labels, 0, vocabulary)
        ones = torch.ones_like(stats[0])
        kernels.cross_entropy_backward_(scratch, labels, 0, stats[0] + stats[1].log(), ones, -100, 0.0, 0.0, vocabulary)

    compiled = _compiled(plain) if with_compile else None
    others = {"eager": plain, **({"torch.compile": compiled} if compiled else {})}
    yield Case(
        "cross-entropy forward", rows, vocabulary, size,
        {"ours": ours, **{key: functools.partial(p, logits) for key, p in others.items()}},
        lambda: F.cross_entropy(logits.double(), labels, reduction="none"),
    )  # fmt: skip
    yield Case(
        "cross-entropy forward + backward", rows, vocabulary, 3 * size,
        {"ours": ours_both, **{key: functools.partial(_gradient_of_sum, p, leaf) for key, p in others.items()}},
    )  # fmt: skip


def optimizer_cases(parameters: int, device: torch.device) -> Iterator[Case]:
    """AdamW (float32 master, m, v, gradient; bf16 copy written) and the gradient norm of one flat buffer."""
    master, grad = (torch.randn(parameters, device=device) for _ in range(2))
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    half = master.bfloat16()
    pieces = torch.tensor([[0, parameters // 2, 0], [parameters // 2, parameters // 2, 1]])
    segments = kernels.device_segments(pieces, device)
    groups = torch.tensor([[1.0, 0.1, 1e-12], [0.5, 0.1, 1e-12]], dtype=torch.float64, device=device)
    control = torch.zeros(kernels.CONTROL_SIZE, dtype=torch.float64, device=device)
    control[0], control[2] = 1e-3, 1.0
    kernels.begin_step_(control, kernels.sum_of_squares(grad), 1.0, 0.9, 0.95)
    twin = torch.nn.Parameter(master.clone())
    twin.grad = grad
    fused = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.1, fused=True)

    def torch_fused() -> None:
        fused.step()
        half.copy_(twin.detach())

    def ours() -> None:
        kernels.adamw_(half, master, exp_avg, exp_avg_sq, grad, segments, groups, control, 0.9, 0.95)

    yield Case("adamw", parameters, 1, 30 * parameters, {"ours": ours, "torch fused AdamW + copy": torch_fused})
    yield Case(
        "gradient norm", parameters, 1, 4 * parameters,
        {"ours": lambda: kernels.sum_of_squares(grad), "eager": lambda: torch.linalg.vector_norm(grad)},
        lambda: grad.double().square().sum(),
    )  # fmt: skip
