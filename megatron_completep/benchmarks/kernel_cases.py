"""What the kernel benchmark measures: for each operation its byte floor, our implementation, and every baseline there is.

A case is a dictionary {implementation: function that prepares the call to be timed}; all of them compute the same from the same random
inputs. Preparing is part of the measurement's care: a baseline that cannot be built, compiled or run is reported and left out. Backward
passes are timed alone, through autograd for everybody; where a library makes the gradient in its forward, both are timed together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.benchmarks import library_baselines
from megatron_completep.kernels.control import LEARNING_RATE

SCALE, EPS = 0.3, library_baselines.EPS
JOIN = kernels.Join(SCALE)
Work = Callable[[], Any]
Prepare = Callable[[], Work]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `answer`, in float64, is what the call of `implementations["ours"]` must return."""

    kernel: str
    rows: int
    columns: int
    floor_bytes: int
    implementations: dict[str, Prepare]
    answer: Work | None = None


@dataclass(frozen=True)
class Setting:
    """What all cases share. `say` hears of libraries that are installed and cannot be used."""

    dtype: torch.dtype
    device: torch.device
    with_compile: bool
    say: Say = print

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def vector(self, hidden: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.random(hidden))

    def with_compiled(
        self, programs: dict[str, Callable[..., Any]], plain: Callable[..., Any]
    ) -> dict[str, Callable[..., Any]]:
        """And `plain` under torch.compile: compiled when it is first called, once for all the cases that share it."""
        return (
            {**programs, "torch.compile": _compiled_at_first_call(plain)}
            if self.with_compile
            else programs
        )


def _compiled_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()  # after eight shapes of one function it would quietly run without compilation
        return torch.compile(function, dynamic=False)

    return lambda *arguments: compiled()(*arguments)


def _forward(program: Callable[..., Any], *inputs: Tensor) -> Prepare:
    return lambda: functools.partial(program, *inputs)


def _backward(
    program: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    leaves: list[Tensor],
    gradients: tuple[Tensor, ...],
) -> Prepare:
    def prepare() -> Work:
        outputs = program(*inputs)
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return prepare


def _all(
    prepare: Callable[..., Prepare], programs: dict[str, Callable[..., Any]], *arguments: Any
) -> dict[str, Prepare]:
    return {name: prepare(program, *arguments) for name, program in programs.items()}


def norm_of(rms: bool) -> kernels.Norm:
    return kernels.Norm("rmsnorm" if rms else "layernorm", EPS)


def residual_norm_cases(rows: int, hidden: int, rms: bool, setting: Setting) -> Iterator[Case]:
    """Forward, then backward alone, of `y = residual + s * branch; out = norm(y)`."""
    residual, branch, d_y, d_out = (setting.random(rows, hidden) for _ in range(4))
    weight, bias = setting.vector(hidden), None if rms else setting.vector(hidden)
    norm = norm_of(rms)
    leaves = [
        leaf.requires_grad_() for leaf in (residual, branch, weight, bias) if leaf is not None
    ]

    def torch_norm(y: Tensor) -> Tensor:
        return (
            F.rms_norm(y, (hidden,), weight, EPS)
            if rms
            else F.layer_norm(y, (hidden,), weight, bias, EPS)
        )

    def with_norm(
        library_norm: Callable[[Tensor], Tensor],
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def chain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.add(residual, branch, alpha=SCALE)
            return y, library_norm(y)

        return chain

    def plain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y = residual + SCALE * branch
        return y, torch_norm(y)

    programs: dict[str, Callable[..., Any]] = {
        "ours": lambda r, b: kernels.scaled_residual_norm(r, b, None, weight, bias, JOIN, norm),
        "eager": plain,
        "torch.add + norm": with_norm(torch_norm),
        **{
            f"add + {name}": with_norm(library_norm)
            for name, library_norm in library_baselines.norms(weight, bias, setting.say).items()
        },
    }
    programs = setting.with_compiled(programs, plain)
    size, name = rows * hidden * residual.element_size(), norm.kind

    def answer() -> Any:
        exact = [leaf.detach().double() for leaf in leaves]
        y = (exact[0] + SCALE * exact[1]).to(setting.dtype).double()
        return y, F.rms_norm(y, (hidden,), exact[2], EPS) if rms else F.layer_norm(
            y, (hidden,), exact[2], exact[3], EPS
        )

    yield Case(
        f"residual {name} forward",
        rows,
        hidden,
        4 * size,
        _all(_forward, programs, residual, branch),
        answer,
    )
    yield Case(
        f"residual {name} backward", rows, hidden, 5 * size, _all(_backward, programs, (residual, branch), leaves, (d_y, d_out))
    )  # fmt: skip


def norm_and_add_cases(rows: int, hidden: int, rms: bool, setting: Setting) -> Iterator[Case]:
    """The norm alone, the add alone, and the reduction of a vector's partial sums."""
    x, branch, d_out = (setting.random(rows, hidden) for _ in range(3))
    weight, bias = setting.vector(hidden), None if rms else setting.vector(hidden)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    norm = norm_of(rms)
    size, name = rows * hidden * x.element_size(), norm.kind

    def plain(x: Tensor) -> Tensor:
        return (
            F.rms_norm(x, (hidden,), weight, EPS)
            if rms
            else F.layer_norm(x, (hidden,), weight, bias, EPS)
        )

    programs: dict[str, Callable[..., Any]] = {
        "ours": lambda x: kernels.norm(x, weight, bias, norm),
        "eager": plain,
        **library_baselines.norms(weight, bias, setting.say),
    }
    programs = setting.with_compiled(programs, plain)
    yield Case(f"{name} forward", rows, hidden, 2 * size, _all(_forward, programs, x))
    yield Case(
        f"{name} backward",
        rows,
        hidden,
        3 * size,
        _all(_backward, programs, (x,), leaves, (d_out,)),
    )
    if not rms:
        return
    branch.requires_grad_()
    adds = {
        "ours": lambda x, branch: kernels.scaled_add(x, branch, None, JOIN),
        "torch.add": lambda x, branch: torch.add(x, branch, alpha=SCALE),
    }
    yield Case("scaled add forward", rows, hidden, 3 * size, _all(_forward, adds, x, branch))
    yield Case(
        "scaled add backward",
        rows,
        hidden,
        2 * size,
        _all(_backward, adds, (x, branch), [branch], (d_out,)),
    )
    partials, total = (
        torch.randn(512, 1, hidden, device=setting.device),
        torch.zeros(hidden, device=setting.device),
    )
    sums = {
        "ours": lambda: kernels.reduce_partials(partials, 0, total),
        "eager": lambda: total.add_(partials[:, 0].sum(0)),
    }
    yield Case("reduce partials", 512, hidden, partials.numel() * 4, _all(_forward, sums))


def pointwise_cases(rows: int, ffn: int, setting: Setting) -> Iterator[Case]:
    """SwiGLU and squared ReLU, forward and backward."""
    size = rows * ffn * setting.dtype.itemsize

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def squared_relu(x: Tensor) -> Tensor:
        return F.relu(x).square()

    for name, ours, plain, width, floors, libraries in (
        ("swiglu", kernels.swiglu, swiglu, 2 * ffn, (3, 5), library_baselines.swiglus(setting.say)),
        ("squared relu", kernels.squared_relu, squared_relu, ffn, (2, 3), {}),
    ):
        x = setting.random(rows, width).requires_grad_()
        d_out = setting.random(rows, ffn)
        programs = setting.with_compiled({"ours": ours, "eager": plain, **libraries}, plain)
        answer = functools.partial(plain, x.detach().double())
        yield Case(
            f"{name} forward", rows, ffn, floors[0] * size, _all(_forward, programs, x), answer
        )
        yield Case(
            f"{name} backward",
            rows,
            ffn,
            floors[1] * size,
            _all(_backward, programs, (x,), [x], (d_out,)),
        )


def rotary_cases(rows: int, heads: int, head_dim: int, setting: Setting) -> Iterator[Case]:
    """The rotation of [rows, 1, heads, head_dim]; its backward is the same kernel."""
    x = setting.random(rows, 1, heads, head_dim)
    angle = torch.rand(rows, 1, head_dim // 2, device=setting.device) * 6.3
    cos, sin = angle.cos(), angle.sin()

    def plain(x: Tensor) -> Tensor:
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    programs = setting.with_compiled(
        {"ours": lambda x: kernels.rotary(x, cos, sin), "eager": plain}, plain
    )
    implementations = _all(_forward, programs, x)
    implementations |= {
        name: _forward(program)
        for name, program in library_baselines.rotaries(x, angle, setting.say).items()
    }
    floor = 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()
    yield Case("rotary", rows, heads * head_dim, floor, implementations, lambda: plain(x.double()))


def cross_entropy_cases(rows: int, vocabulary: int, setting: Setting) -> Iterator[Case]:
    """Cross-entropy of given logits: forward and backward each alone, and both (ours writes the gradient over the logits)."""
    logits = setting.random(rows, vocabulary)
    labels = torch.randint(vocabulary, (rows,), device=setting.device)
    ones = torch.ones(rows, device=setting.device)
    size = logits.numel() * logits.element_size()

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        stats = kernels.cross_entropy_forward(logits, labels, 0, vocabulary)
        return stats[0] + stats[1].log() - stats[2]

    def our_backward() -> Work:
        scratch, lse = logits.clone(), torch.logsumexp(logits.float(), 1)
        return lambda: kernels.cross_entropy_backward_(
            scratch, labels, 0, lse, ones, -100, 0.0, 0.0, vocabulary
        )

    def our_both() -> Work:
        scratch = logits.clone()

        def both() -> None:
            stats = kernels.cross_entropy_forward(scratch, labels, 0, vocabulary)
            kernels.cross_entropy_backward_(
                scratch, labels, 0, stats[0] + stats[1].log(), ones, -100, 0.0, 0.0, vocabulary
            )

        return both

    def both(program: Callable[..., Any]) -> Prepare:
        def prepare() -> Work:
            leaf = logits.clone().requires_grad_()  # of its own: some write over it
            return lambda: torch.autograd.grad(program(leaf, labels).sum(), leaf)

        return prepare

    def backward(program: Callable[..., Any]) -> Prepare:
        def prepare() -> Work:
            leaf = logits.clone().requires_grad_()
            losses = program(leaf, labels)
            return lambda: torch.autograd.grad(
                losses, leaf, torch.ones_like(losses), retain_graph=True
            )

        return prepare

    libraries = library_baselines.cross_entropies(setting.say)
    others = setting.with_compiled({"eager": plain}, plain)
    separate = others | {name: libraries[name] for name in ("quack", "apex") if name in libraries}
    name = "cross-entropy"
    yield Case(
        f"{name} forward", rows, vocabulary, size, _all(_forward, {"ours": ours, **separate}, logits, labels),
        lambda: F.cross_entropy(logits.double(), labels, reduction="none"),
    )  # fmt: skip
    yield Case(
        f"{name} backward",
        rows,
        vocabulary,
        2 * size,
        {"ours": our_backward, **_all(backward, separate)},
    )
    yield Case(
        f"{name} forward + backward",
        rows,
        vocabulary,
        3 * size,
        {"ours": our_both, **_all(both, others | libraries)},
    )


def optimizer_cases(parameters: int, setting: Setting) -> Iterator[Case]:
    """AdamW (float32 master, m, v, gradient; bf16 copy written) and the gradient norm of one flat buffer."""
    device, lr, weight_decay = setting.device, 1e-3, 0.1
    master, grad = (torch.randn(parameters, device=device) for _ in range(2))

    def ours() -> Work:
        state = (
            master.bfloat16(),
            master.clone(),
            torch.zeros_like(master),
            torch.zeros_like(master),
            grad,
        )
        pieces = torch.tensor([[0, parameters // 2, 0], [parameters // 2, parameters // 2, 1]])
        segments = kernels.device_segments(pieces, device)
        groups = torch.tensor(
            [[1.0, weight_decay, 1e-12], [0.5, weight_decay, 1e-12]],
            dtype=torch.float64,
            device=device,
        )
        control = kernels.new_control(device)
        control[LEARNING_RATE] = lr
        kernels.begin_step_(control, kernels.sum_of_squares(grad), 1.0, 0.9, 0.95)
        return lambda: kernels.adamw_(*state, segments, groups, control, 0.9, 0.95)

    def with_copy(name: str) -> Prepare:
        """A step of one float32 parameter, then the bf16 copy that the model computes with."""

        def prepare() -> Work:
            parameter, half = torch.nn.Parameter(master.clone()), master.bfloat16()
            parameter.grad = grad
            torch_fused = torch.optim.AdamW(
                [parameter], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
            ).step
            step = {
                "torch fused": torch_fused,
                **library_baselines.adamws(parameter, lr, weight_decay, setting.say),
            }[name]

            def work() -> None:
                step()
                half.copy_(parameter.detach())

            return work

        return prepare

    installed = library_baselines.adamws(
        torch.nn.Parameter(grad[:64].clone()), lr, weight_decay, setting.say
    )
    baselines = {f"{name} + copy": with_copy(name) for name in ("torch fused", *installed)}
    yield Case("adamw", parameters, 1, 30 * parameters, {"ours": ours, **baselines})
    norms = {
        "ours": lambda: kernels.sum_of_squares(grad),
        "eager": lambda: torch.linalg.vector_norm(grad),
    }
    yield Case(
        "gradient norm",
        parameters,
        1,
        4 * parameters,
        _all(_forward, norms),
        lambda: grad.double().square().sum(),
    )
