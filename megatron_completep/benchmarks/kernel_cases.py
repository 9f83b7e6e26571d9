"""What the kernel benchmark measures: operations with their byte floor, our kernel and baselines.

A case is a dictionary {implementation: function that prepares the call to be timed}. All of them
compute the same from the same random inputs. Whatever a baseline needs first happens while it is
prepared; one that cannot be built, compiled or run is reported and left out. Backward passes are
timed alone, through autograd for every implementation; where a library computes the gradient in its
forward, forward and backward are timed together.

The byte floor is what an implementation has to read and write at least, each tensor once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.benchmarks import library_baselines
from megatron_completep.kernels import reference
from megatron_completep.kernels.control import LEARNING_RATE

SCALE = 0.3
EPS = library_baselines.EPS
JOIN = kernels.Join(SCALE)
BETAS = (0.9, 0.95)
LR = 1e-3
WEIGHT_DECAY = 0.1
IGNORE_INDEX = -100

Program = Callable[..., Any]
Work = Callable[[], Any]
Prepare = Callable[[], Work]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    answer: float64, what the call of `implementations["ours"]` must return.
    """

    kernel: str
    rows: int
    columns: int
    floor_bytes: int
    implementations: dict[str, Prepare]
    answer: Work | None = None


@dataclass(frozen=True)
class Setting:
    """What all cases share. `say` is told of libraries that are installed and cannot be used."""

    dtype: torch.dtype
    device: torch.device
    with_compile: bool
    say: Say = print

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def vector(self, hidden: int) -> Parameter:
        return Parameter(self.random(hidden))

    def with_compiled(self, programs: dict[str, Program], plain: Program) -> dict[str, Program]:
        """`programs`, and `plain` under torch.compile.

        It is compiled when it is first called, once for all the cases that share the result.
        """
        if not self.with_compile:
            return programs
        return {**programs, "torch.compile": _compiled_at_first_call(plain)}


def _compiled_at_first_call(function: Program) -> Program:
    @functools.cache
    def compiled() -> Program:
        # After eight shapes of one function it would run without compilation and not say so.
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return lambda *arguments: compiled()(*arguments)


def forward_of(program: Program, *inputs: Tensor) -> Prepare:
    return lambda: functools.partial(program, *inputs)


def backward_alone(
    program: Program,
    inputs: tuple[Tensor, ...],
    leaves: list[Tensor],
    gradients: tuple[Tensor, ...],
) -> Prepare:
    """The backward alone: the forward is run while the call is prepared, and its graph is kept."""

    def prepare() -> Work:
        outputs = program(*inputs)
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return prepare


def all_of(
    prepare: Callable[..., Prepare], programs: dict[str, Program], *arguments: Any
) -> dict[str, Prepare]:
    return {name: prepare(program, *arguments) for name, program in programs.items()}


def norm_of(rms: bool) -> kernels.Norm:
    return kernels.Norm("rmsnorm" if rms else "layernorm", EPS)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The norm over the last dimension in torch: RMSNorm when `bias` is None, else LayerNorm."""
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, EPS)
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def residual_norm_cases(rows: int, hidden: int, rms: bool, setting: Setting) -> Iterator[Case]:
    """Forward, then backward alone, of `y = residual + s * branch; out = norm(y)`."""
    residual = setting.random(rows, hidden).requires_grad_()
    branch = setting.random(rows, hidden).requires_grad_()
    d_y = setting.random(rows, hidden)
    d_out = setting.random(rows, hidden)
    weight = setting.vector(hidden)
    bias = None if rms else setting.vector(hidden)
    leaves = [leaf for leaf in (residual, branch, weight, bias) if leaf is not None]

    programs, plain = _residual_norm_programs(weight, bias, setting)
    programs = setting.with_compiled(programs, plain)

    def answer() -> tuple[Tensor, Tensor]:
        # Our kernel rounds the stream to the working precision before it takes the statistics.
        exact = residual.detach().double() + SCALE * branch.detach().double()
        y = exact.to(setting.dtype).double()
        bias64 = None if bias is None else bias.detach().double()
        return y, _torch_norm(y, weight.detach().double(), bias64)

    name = norm_of(rms).kind
    tensor_bytes = residual.numel() * residual.element_size()

    # Reads residual and branch, writes y and out.
    forward = all_of(forward_of, programs, residual, branch)
    yield Case(f"residual {name} forward", rows, hidden, 4 * tensor_bytes, forward, answer)

    # Reads y and the gradients of y and out, writes those of residual and branch.
    backward = all_of(backward_alone, programs, (residual, branch), leaves, (d_y, d_out))
    yield Case(f"residual {name} backward", rows, hidden, 5 * tensor_bytes, backward)


def _residual_norm_programs(
    weight: Parameter, bias: Parameter | None, setting: Setting
) -> tuple[dict[str, Program], Program]:
    """({name: (residual, branch) -> (y, out)}, the plain one among them)."""
    norm = norm_of(bias is None)

    def ours(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.scaled_residual_norm(residual, branch, None, weight, bias, JOIN, norm)

    def torch_norm(y: Tensor) -> Tensor:
        return _torch_norm(y, weight, bias)

    def plain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y = residual + SCALE * branch
        return y, torch_norm(y)

    programs: dict[str, Program] = {
        "ours": ours,
        "eager": plain,
        "torch.add + norm": _add_then(torch_norm),
    }
    # The libraries have no scaled add in front of their norms, so torch's best one stands there.
    library_norms = library_baselines.norms(weight, bias, setting.say)
    for name, library_norm in library_norms.items():
        programs[f"add + {name}"] = _add_then(library_norm)
    return programs, plain


def _add_then(norm: Program) -> Program:
    def chain(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.add(residual, branch, alpha=SCALE)
        return y, norm(y)

    return chain


def norm_and_add_cases(rows: int, hidden: int, rms: bool, setting: Setting) -> Iterator[Case]:
    """The norm alone; with `rms` also the add alone and the reduction of partial sums."""
    x = setting.random(rows, hidden).requires_grad_()
    branch = setting.random(rows, hidden)
    d_out = setting.random(rows, hidden)
    yield from _norm_cases(x, d_out, rms, setting)

    # These do not depend on the norm, so they are measured beside one of the two only.
    if rms:
        yield from _add_cases(x, branch.requires_grad_(), d_out)
        yield _reduction_case(hidden, setting)


def _norm_cases(x: Tensor, d_out: Tensor, rms: bool, setting: Setting) -> Iterator[Case]:
    """Forward and backward of out = norm(x) over x [rows, hidden]."""
    rows, hidden = x.shape
    weight = setting.vector(hidden)
    bias = None if rms else setting.vector(hidden)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    norm = norm_of(rms)

    def ours(x: Tensor) -> Tensor:
        return kernels.norm(x, weight, bias, norm)

    def plain(x: Tensor) -> Tensor:
        return _torch_norm(x, weight, bias)

    libraries = library_baselines.norms(weight, bias, setting.say)
    programs = setting.with_compiled({"ours": ours, "eager": plain, **libraries}, plain)
    tensor_bytes = x.numel() * x.element_size()

    # Reads x, writes out; then reads x and the gradient of out, writes that of x.
    forward = all_of(forward_of, programs, x)
    yield Case(f"{norm.kind} forward", rows, hidden, 2 * tensor_bytes, forward)
    backward = all_of(backward_alone, programs, (x,), leaves, (d_out,))
    yield Case(f"{norm.kind} backward", rows, hidden, 3 * tensor_bytes, backward)


def _add_cases(x: Tensor, branch: Tensor, d_out: Tensor) -> Iterator[Case]:
    """Forward and backward of out = x + s * branch, all [rows, hidden]."""
    rows, hidden = x.shape
    programs: dict[str, Program] = {
        "ours": lambda x, branch: kernels.scaled_add(x, branch, None, JOIN),
        "torch.add": lambda x, branch: torch.add(x, branch, alpha=SCALE),
    }
    tensor_bytes = x.numel() * x.element_size()
    forward = all_of(forward_of, programs, x, branch)
    yield Case("scaled add forward", rows, hidden, 3 * tensor_bytes, forward)

    # The gradient of x is that of out: nothing is computed for it, and it is not asked for.
    backward = all_of(backward_alone, programs, (x, branch), [branch], (d_out,))
    yield Case("scaled add backward", rows, hidden, 2 * tensor_bytes, backward)


def _reduction_case(hidden: int, setting: Setting) -> Case:
    """The sum of a vector's gradient over the partial sums of 512 programs."""
    programs = 512
    partials = torch.randn(programs, 1, hidden, device=setting.device)
    total = torch.zeros(hidden, device=setting.device)
    sums: dict[str, Program] = {
        "ours": lambda: kernels.reduce_partials(partials, [total], [False]),
        "eager": lambda: total.add_(partials[:, 0].sum(0)),
    }
    floor = partials.numel() * partials.element_size()
    return Case("reduce partials", programs, hidden, floor, all_of(forward_of, sums))


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def pointwise_cases(rows: int, ffn: int, setting: Setting) -> Iterator[Case]:
    """SwiGLU and squared ReLU, forward and backward; the output is [rows, ffn]."""
    swiglus: dict[str, Program] = {"ours": kernels.swiglu, "eager": _swiglu}
    swiglus |= library_baselines.swiglus(setting.say)
    yield from _activation_cases("swiglu", swiglus, (rows, 2 * ffn), ffn, setting)
    squared_relus: dict[str, Program] = {"ours": kernels.squared_relu, "eager": _squared_relu}
    yield from _activation_cases("squared relu", squared_relus, (rows, ffn), ffn, setting)


def float8_cases(rows: int, hidden: int, setting: Setting) -> Iterator[Case]:
    """The two passes over an operand [rows, hidden]: its magnitude, and the cast to two copies."""
    x = setting.random(rows, hidden)
    amax = x.abs().amax().float()

    def eager_cast() -> tuple[Tensor, Tensor]:
        data, _ = reference.float8_cast(x, amax, False)
        return data, data.t().contiguous()

    largest: dict[str, Program] = {
        "ours": lambda: kernels.largest_magnitude(x),
        "eager": lambda: x.abs().amax().float(),
    }
    casts: dict[str, Program] = {
        "ours": lambda: kernels.float8_cast(x, amax, False, True),
        "eager": eager_cast,
    }
    size = x.numel() * x.element_size()
    yield Case("float8 magnitude", rows, hidden, size, all_of(forward_of, largest))
    # Two copies of one byte an element are written.
    yield Case("float8 cast", rows, hidden, size + 2 * x.numel(), all_of(forward_of, casts))


def _activation_cases(
    name: str, programs: dict[str, Program], shape: tuple[int, int], ffn: int, setting: Setting
) -> Iterator[Case]:
    """Forward and backward of an activation of x with this shape."""
    rows, _ = shape
    x = setting.random(*shape).requires_grad_()
    d_out = setting.random(rows, ffn)
    plain = programs["eager"]
    programs = setting.with_compiled(programs, plain)
    answer = functools.partial(plain, x.detach().double())
    x_bytes = x.numel() * x.element_size()
    out_bytes = d_out.numel() * d_out.element_size()

    forward = all_of(forward_of, programs, x)
    yield Case(f"{name} forward", rows, ffn, x_bytes + out_bytes, forward, answer)

    # Reads x and the gradient of the output, writes the gradient of x.
    backward = all_of(backward_alone, programs, (x,), [x], (d_out,))
    yield Case(f"{name} backward", rows, ffn, 2 * x_bytes + out_bytes, backward)


def _plain_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass(frozen=True)
class _CrossEntropy:
    """Programs of losses(logits [T, V], labels [T]) -> [T], ours and those of libraries.

    Several write over their logits, so each backward is prepared with a copy of them.
    """

    logits: Tensor
    labels: Tensor
    ones: Tensor  # float32 [T]: the gradient of each loss

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[1]

    def _stats(self, logits: Tensor, labels: Tensor) -> Tensor:
        return kernels.cross_entropy_forward(logits, labels, 0, self.vocabulary)

    def _write_gradient(self, logits: Tensor, lse: Tensor) -> None:
        """Write the gradient of the logits over them, without label smoothing and z loss."""
        kernels.cross_entropy_backward_(
            logits, self.labels, 0, lse, self.ones, IGNORE_INDEX, 0.0, 0.0, self.vocabulary
        )

    def our_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        maximum, sum_exp, label_logit = self._stats(logits, labels).unbind()
        return maximum + sum_exp.log() - label_logit

    def our_backward(self) -> Work:
        scratch = self.logits.clone()
        lse = torch.logsumexp(self.logits.float(), 1)
        return lambda: self._write_gradient(scratch, lse)

    def our_forward_and_backward(self) -> Work:
        scratch = self.logits.clone()

        def work() -> None:
            maximum, sum_exp, _ = self._stats(scratch, self.labels).unbind()
            self._write_gradient(scratch, maximum + sum_exp.log())

        return work

    def backward(self, program: Program) -> Prepare:
        def prepare() -> Work:
            leaf = self.logits.clone().requires_grad_()
            losses = program(leaf, self.labels)
            gradients = torch.ones_like(losses)
            return lambda: torch.autograd.grad(losses, leaf, gradients, retain_graph=True)

        return prepare

    def forward_and_backward(self, program: Program) -> Prepare:
        def prepare() -> Work:
            leaf = self.logits.clone().requires_grad_()
            return lambda: torch.autograd.grad(program(leaf, self.labels).sum(), leaf)

        return prepare


def cross_entropy_cases(rows: int, vocabulary: int, setting: Setting) -> Iterator[Case]:
    """Cross-entropy of logits [rows, vocabulary]: forward alone, backward alone, and both.

    Our backward writes the gradient over the logits.
    """
    logits = setting.random(rows, vocabulary)
    labels = torch.randint(vocabulary, (rows,), device=setting.device)
    operation = _CrossEntropy(logits, labels, torch.ones(rows, device=setting.device))
    logit_bytes = logits.numel() * logits.element_size()

    torch_programs = setting.with_compiled({"eager": _plain_losses}, _plain_losses)
    libraries = library_baselines.cross_entropies(setting.say)
    # Liger and Transformer Engine compute the gradient in their forward, so that neither of their
    # passes can be timed alone.
    separate = dict(torch_programs)
    for library in ("quack", "apex"):
        if library in libraries:
            separate[library] = libraries[library]

    def answer() -> Tensor:
        return F.cross_entropy(logits.double(), labels, reduction="none")

    def case(name: str, floor: int, ours: Prepare, baselines: dict[str, Prepare]) -> Case:
        implementations = {"ours": ours, **baselines}
        checked = answer if name == "forward" else None
        return Case(f"cross-entropy {name}", rows, vocabulary, floor, implementations, checked)

    # Reads the logits; then reads them and writes their gradient.
    our_forward = forward_of(operation.our_losses, logits, labels)
    yield case("forward", logit_bytes, our_forward, all_of(forward_of, separate, logits, labels))
    backward = all_of(operation.backward, separate)
    yield case("backward", 2 * logit_bytes, operation.our_backward, backward)
    both_passes = all_of(operation.forward_and_backward, {**torch_programs, **libraries})
    our_passes = operation.our_forward_and_backward
    yield case("forward + backward", 3 * logit_bytes, our_passes, both_passes)


def optimizer_cases(parameters: int, setting: Setting) -> Iterator[Case]:
    """AdamW (float32 master, m, v, gradient; bf16 copy written) and the norm of a flat gradient."""
    master = torch.randn(parameters, device=setting.device)
    grad = torch.randn(parameters, device=setting.device)

    # Which libraries have one is asked with a small parameter: each state is made when it is timed.
    small_parameter = Parameter(grad[:64].clone())
    libraries = library_baselines.adamws(small_parameter, LR, WEIGHT_DECAY, setting.say)
    implementations: dict[str, Prepare] = {"ours": lambda: _our_adamw(master, grad)}
    for name in ("torch fused", *libraries):
        implementations[f"{name} + copy"] = _adamw_and_copy(name, master, grad, setting.say)

    # Reads master, m, v and gradient, writes master, m and v, all of 4 bytes, and 2 of the copy.
    yield Case("adamw", parameters, 1, 30 * parameters, implementations)

    norms: dict[str, Program] = {
        "ours": lambda: kernels.sum_of_squares(grad),
        "eager": lambda: torch.linalg.vector_norm(grad),
    }

    def answer() -> Tensor:
        return grad.double().square().sum()

    yield Case("gradient norm", parameters, 1, 4 * parameters, all_of(forward_of, norms), answer)


def _our_adamw(master: Tensor, grad: Tensor) -> Work:
    """A step over a shard of two segments, each with a group of its own."""
    device = master.device
    beta1, beta2 = BETAS
    copy = master.bfloat16()
    state = (copy, master.clone(), torch.zeros_like(master), torch.zeros_like(master), grad)
    half = len(master) // 2
    segment_table = torch.tensor([[0, half, 0], [half, half, 1]])  # start, length, group
    segments = kernels.device_segments(segment_table, device)
    rows = [[1.0, WEIGHT_DECAY, 1e-12], [0.5, WEIGHT_DECAY, 1e-12]]  # lr factor, decay, eps
    groups = torch.tensor(rows, dtype=torch.float64, device=device)

    # The record of the step is filled once, outside the timing, as in a run by `begin_step_`.
    control = kernels.new_control(device)
    control[LEARNING_RATE] = LR
    kernels.begin_step_(control, kernels.sum_of_squares(grad), 1.0, beta1, beta2)
    return lambda: kernels.adamw_(*state, segments, groups, control, beta1, beta2)


def _adamw_and_copy(name: str, master: Tensor, grad: Tensor, say: Say) -> Prepare:
    """A step of one float32 parameter, then the bf16 copy that the model computes with."""

    def prepare() -> Work:
        parameter = Parameter(master.clone())
        parameter.grad = grad
        copy = master.bfloat16()
        step: Work
        if name == "torch fused":
            optimizer = torch.optim.AdamW(
                [parameter], lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
            )
            step = optimizer.step
        else:
            step = library_baselines.adamws(parameter, LR, WEIGHT_DECAY, say)[name]

        def work() -> None:
            step()
            copy.copy_(parameter.detach())

        return work

    return prepare
