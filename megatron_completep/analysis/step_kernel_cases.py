"""What the kernel benchmark and the tuner time of the optimizer and the loss: ours, its byte floor, and what to compare with.

A case holds its own data (never zeros) and callables without arguments. Needs torch and Triton only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels

PARAMETERS = (1 << 22, 1 << 25, 1 << 28)  # of a shard
LOGITS = ((8192, 32_000), (8192, 50_304), (8192, 131_072))  # tokens x vocabulary
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size. `run` is ours; `floor_bytes` the least it can move; `error` compares it with float64."""

    kernel: str
    size: str
    floor_bytes: int
    run: Callable[[], object]
    baselines: Mapping[str, Callable[[], object]]
    error: Callable[[], float]


def step_kernel_cases(
    device: torch.device | str, parameters: tuple[int, ...] = PARAMETERS, logits: tuple[tuple[int, int], ...] = LOGITS
) -> Iterator[KernelCase]:
    """The cases one after the other; the data of one is dropped when the next is asked for."""
    device = torch.device(device)
    for count in parameters:
        yield _adamw(device, count)
        yield _gradient_norm(device, count)
    for tokens, vocabulary in logits:
        yield from _cross_entropy(device, tokens, vocabulary)


def _matrices(count: int) -> Tensor:
    """Segments of 4096 x 1023 elements each, four groups in turn: ends that are not multiples of 64 do occur."""
    length = min(count, 4096 * 1023 + 7)
    starts = torch.arange(0, count - length + 1, (length + 63) // 64 * 64)
    return torch.stack([starts, torch.full_like(starts, length), torch.arange(len(starts)) % 4], dim=1)


def _adamw(device: torch.device, count: int) -> KernelCase:
    generator = torch.Generator(device).manual_seed(0)
    master, grad = (torch.randn(count, device=device, generator=generator) for _ in range(2))
    exp_avg, exp_avg_sq = 0.1 * grad, 0.1 * grad.square()
    out = master.bfloat16()
    plain = _matrices(count)
    segments = kernels.device_segments(plain, device)
    groups = torch.tensor([[1.0, 0.1, 1e-12], [0.5, 0.0, 1e-12], [0.25, 0.1, 1e-14], [1.0, 0.1, 1e-10]], dtype=torch.float64)
    control = torch.tensor([1e-4, 10, 0.5, 0, 1 - BETAS[0] ** 10, 1 - BETAS[1] ** 10, 2.0, 0], dtype=torch.float64)
    tables = (segments, groups.to(device), control.to(device))
    pieces = [slice(start, start + length) for start, length, _ in plain.tolist()]
    owned = sum(piece.stop - piece.start for piece in pieces)

    def error() -> float:
        """Of one step of the first piece, over the distance travelled."""
        piece = pieces[0]
        p, m, v, g = (t[: piece.stop].clone() for t in (master, exp_avg, exp_avg_sq, grad))
        exact_p, exact_m, exact_v, exact_g = (t.double().cpu() for t in (p, m, v, g))
        one = plain[:1]
        kernels.adamw_(None, p, m, v, g, kernels.device_segments(one, device), groups.to(device), control.to(device), *BETAS)
        kernels.reference.adamw_(None, exact_p, exact_m, exact_v, exact_g, one, groups, control, *BETAS)
        start = master[: piece.stop].double().cpu()
        return ((p.double().cpu() - exact_p).norm() / (exact_p - start).norm()).item()

    def torch_fused() -> None:
        """As torch.optim.AdamW(fused=True) calls it, one group: no bf16 copy, no segment table."""
        masters, grads, averages, squares = ([t[piece] for piece in pieces] for t in (master, grad, exp_avg, exp_avg_sq))
        torch._fused_adamw_(
            masters,
            grads,
            averages,
            squares,
            [],
            [step] * len(pieces),
            lr=1e-4,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.1,
            eps=1e-12,
            amsgrad=False,
            maximize=False,
        )

    step = torch.full((), 10.0, device=device)
    return KernelCase(
        "adamw",
        f"{count:,} parameters",
        30 * owned,
        lambda: kernels.adamw_(out, master, exp_avg, exp_avg_sq, grad, *tables, *BETAS),
        {"torch fused AdamW (28 bytes)": torch_fused},
        error,
    )


def _gradient_norm(device: torch.device, count: int) -> KernelCase:
    flat = torch.randn(count, device=device, generator=torch.Generator(device).manual_seed(0))
    segments = kernels.device_segments(_matrices(count), device)
    owned = int(_matrices(count)[:, 1].sum())

    def error() -> float:
        exact = sum(flat[start : start + length].double().square().sum().item() for start, length, _ in _matrices(count).tolist())
        return abs(kernels.sum_of_squares(flat, segments).item() / exact - 1)

    baselines = {"torch vector_norm": lambda: torch.linalg.vector_norm(flat)}
    return KernelCase("gradient norm", f"{count:,} parameters", 4 * owned, lambda: kernels.sum_of_squares(flat, segments), baselines, error)


def _cross_entropy(device: torch.device, tokens: int, vocabulary: int) -> Iterator[KernelCase]:
    generator = torch.Generator(device).manual_seed(0)
    source = (4 * torch.randn(tokens, vocabulary, device=device, generator=generator)).bfloat16()
    logits = source.clone()
    labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    grad_scale = torch.full((1,), 1.0 / tokens, device=device)
    kept = {"lse": torch.zeros(tokens, device=device)}

    def forward() -> None:
        stats = kernels.cross_entropy_forward(logits, labels, 0, vocabulary, 0.5)
        kept["lse"] = kernels.cross_entropy_loss(stats, labels)[1]

    def backward() -> None:
        kernels.cross_entropy_backward_(logits, labels, 0, kept["lse"], grad_scale, -100, 0.0, 0.0, vocabulary, 0.5)

    def both() -> None:
        forward()
        backward()

    def error() -> float:
        """Of the gradient of the first rows."""
        rows = slice(0, 16)
        ours, exact = source[rows].clone(), source[rows].double().requires_grad_()
        stats = kernels.cross_entropy_forward(ours, labels[rows], 0, vocabulary, 0.5)
        lse = kernels.cross_entropy_loss(stats, labels[rows])[1]
        kernels.cross_entropy_backward_(ours, labels[rows], 0, lse, grad_scale, -100, 0.0, 0.0, vocabulary, 0.5)
        (F.cross_entropy(0.5 * exact, labels[rows], reduction="sum") / tokens).backward()
        assert exact.grad is not None
        return ((ours.double() - exact.grad).norm() / exact.grad.norm()).item()

    size, elements = f"{tokens:,} x {vocabulary:,}", tokens * vocabulary
    yield KernelCase("cross-entropy forward", size, 2 * elements, forward, {}, error)
    yield KernelCase("cross-entropy backward", size, 4 * elements, backward, {}, error)
    yield KernelCase("cross-entropy forward + backward", size, 6 * elements, both, _cross_entropy_baselines(source, labels), error)


def _cross_entropy_baselines(source: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    leaf = source.detach().requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(0.5 * logits.float(), labels)

    def eager() -> None:
        leaf.grad = None
        loss(leaf).backward()

    baselines: dict[str, Callable[[], object]] = {"eager": eager}
    if source.is_cuda:  # on a CPU it would need a C++ compiler
        compiled_loss = torch.compile(loss, dynamic=False)

        def compiled() -> None:
            leaf.grad = None
            compiled_loss(leaf).backward()

        baselines["torch.compile"] = compiled
    if source.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        liger_cross_entropy = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy

        def liger() -> None:
            leaf.grad = None
            liger_cross_entropy(leaf, labels).backward()  # it has no logit multiplier: less work than ours

        baselines["Liger"] = liger
    return baselines
