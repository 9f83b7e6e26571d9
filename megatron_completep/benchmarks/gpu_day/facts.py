"""What the machine is and what it reaches: copies, products of a step's shapes, attention.

Example:

    python -m megatron_completep.benchmarks.gpu_day.facts --out gpu_day

Needs torch and Triton alone.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megatron_completep import kernels
from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.expected import Rates, rates_of
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting
from megatron_completep.benchmarks.kernel_report import versions

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
# The least share of the assumed rate, and of one way of adding a weight gradient to another.
PRODUCTS_AT_LEAST = 0.91
FLOAT32_AT_LEAST = 0.92
# What torch 2.11 with cuDNN 9.19 is thought to choose on Hopper.
DEFAULT_NODE = "ScaledDotProductCudnnAttentionBackward0"


@dataclass(frozen=True)
class Product:
    """A product of the step: x [tokens, inner] W^T -> [tokens, columns]."""

    name: str
    tokens: int
    inner: int
    columns: int


@dataclass(frozen=True)
class AttentionShape:
    heads: int
    groups: int
    sequence: int
    sequences: int
    head_dim: int


PRODUCTS = (
    Product("queries, keys, values", 8192, 2048, 6144),
    Product("out", 8192, 2048, 2048),
    Product("up", 8192, 2048, 8192),
    Product("down", 8192, 8192, 2048),
    Product("logits", 8192, 2048, 50_304),
    Product("cube", 8192, 8192, 8192),
)
ATTENTIONS = (
    AttentionShape(16, 16, 2048, 4, 128),
    AttentionShape(16, 4, 2048, 4, 128),
    AttentionShape(16, 16, 8192, 1, 128),
)
# One rank of four that share a sequence, in its two calls.
SHARED = AttentionShape(8, 1, 32_768, 1, 128)
CONTEXT_RANKS = 4
TWO_CALLS_AT_LEAST = 0.9  # of the rate of one call over the whole sequence
BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def measure(setting: Setting) -> None:
    """All facts of the machine."""
    rates = rates_of(setting.device_name)
    with setting.attempt("machine"):
        _machine(setting)
    with setting.attempt("copy"):
        _copy(setting, rates)
    products = (Product("tiny", 16, 8, 24),) if setting.trial else PRODUCTS
    for product in products:
        with setting.attempt(f"product {product.name}"):
            _product(setting, product, rates)
    shapes = (AttentionShape(2, 1, 16, 2, 8),) if setting.trial else ATTENTIONS
    for shape in shapes:
        for backend in ("default",) if setting.trial else BACKENDS:
            with setting.attempt(f"attention {backend} {shape.heads}/{shape.groups}"):
                _attention(setting, shape, backend, rates)
    shared = AttentionShape(2, 1, 32, 1, 8) if setting.trial else SHARED
    with setting.attempt("attention of a context rank"):
        _two_calls(setting, shared)


def _machine(setting: Setting) -> None:
    """The device with its clocks, and the versions that kernels and their choice depend on."""
    details: dict[str, Any] = {**versions(), "python": platform.python_version()}
    if setting.on_gpu:
        device = torch.cuda.get_device_properties(setting.device)
        details |= {
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "multiprocessors": device.multi_processor_count,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "clocks": _clocks(),
        }
    setting.say(Figure("machine", setting.device_name, details=details))


def _clocks() -> str:
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    # Clocks are a note beside the figures: a machine without the program has none.
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
    return answer.stdout.strip()


def _copy(setting: Setting, rates: Rates | None) -> None:
    """Bytes read and written a second by a copy that no cache holds."""
    # 2 GiB in float32, far more than any cache holds.
    elements = 1 << (10 if setting.trial else 29)
    source = torch.randn(elements, device=setting.device)
    target = torch.empty_like(source)
    time = figures.milliseconds(setting, lambda: target.copy_(source))
    expected = None if rates is None else rates.copy / 1e12
    # Four bytes are read and four written; bytes per millisecond over 1e9 are TB/s.
    setting.say(Figure("copy", 8 * elements / time / 1e9, "TB/s", expected))


def _product(setting: Setting, product: Product, rates: Rates | None) -> None:
    """The rates of the four products of one linear layer: forward, and the two gradients.

    The weight gradient three times: in bf16, written in float32, and added in float32.
    """
    x = _random(setting, product.tokens, product.inner)
    weight = _random(setting, product.columns, product.inner)
    d_out = _random(setting, product.tokens, product.columns)
    total = torch.zeros(product.columns, product.inner, device=setting.device)
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: F.linear(x, weight),
        "input gradient": lambda: d_out @ weight,
        "weight gradient, bf16": lambda: d_out.t() @ x,
        "weight gradient, float32 written": lambda: kernels.add_product(
            total, d_out.t(), x, overwrite=True
        ),
        "weight gradient, float32 added": lambda: kernels.add_product(total, d_out.t(), x),
    }
    flops = 2 * product.tokens * product.inner * product.columns
    reached: dict[str, float] = {}
    for name, work in works.items():
        # FLOPs per millisecond over 1e9 are TFLOP/s.
        reached[name] = flops / figures.milliseconds(setting, work) / 1e9
        expected = None if rates is None else rates.products / 1e12
        at_least = None if expected is None else PRODUCTS_AT_LEAST * expected
        # What writing or adding in float32 costs is told by the bf16 product, which comes before.
        if "float32" in name and rates is not None:
            at_least = FLOAT32_AT_LEAST * reached["weight gradient, bf16"]
        figure = Figure(
            f"product {product.name}, {name}", reached[name], "TFLOP/s", expected, at_least
        )
        setting.say(figure)


def _attention(setting: Setting, shape: AttentionShape, backend: str, rates: Rates | None) -> None:
    """Causal attention as the model calls it: views of one qkv tensor [S, B, (N + 2G), D]."""
    parts = (shape.heads, shape.groups, shape.groups)
    joined = _random(setting, shape.sequence, shape.sequences, sum(parts), shape.head_dim)
    joined.requires_grad_()
    q, k, v = (part.permute(1, 2, 0, 3) for part in joined.split(parts, dim=2))
    d_out = _random(setting, shape.sequence, shape.sequences, shape.heads, shape.head_dim)
    d_out = d_out.permute(1, 2, 0, 3)

    def attend() -> Tensor:
        # Asked for only where it is needed, as it may rule out kernels.
        grouped = shape.heads != shape.groups
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.1, enable_gqa=grouped
        )

    with _only(backend):
        out = attend()
        forward = figures.milliseconds(setting, attend)
        backward = figures.milliseconds(
            setting, lambda: torch.autograd.grad(out, joined, d_out, retain_graph=True)
        )
    # Two products of 2 S^2 D FLOPs a head, of which the causal half counts.
    flops = 2 * shape.sequences * shape.heads * shape.sequence**2 * shape.head_dim
    name = f"attention {backend}, {shape.heads}/{shape.groups} heads, S {shape.sequence}"
    setting.say(_node(f"{name}, node", out, backend, rates))
    # Of the default, which is cuDNN's, and of that something is expected.
    expected: dict[str, float | None] = dict.fromkeys(("forward", "backward"))
    if rates is not None and backend != "flash":
        expected["forward"] = rates.attention_forward / 1e12
        expected["backward"] = rates.attention_backward / 1e12
    # Backward computes the scores again, and puts the gradients of q, k and v side by side. It has
    # five products of the size of forward's two, hence the 2.5.
    reached = {"forward": flops / forward / 1e9, "backward": 2.5 * flops / backward / 1e9}
    for direction, rate in reached.items():
        setting.say(Figure(f"{name}, {direction}", rate, "TFLOP/s", expected[direction]))


def _two_calls(setting: Setting, shape: AttentionShape) -> None:
    """Attention of a context rank beside that of the whole sequence, forward and backward.

    The rank holds an early and a late chunk of the sequence and has its share of the pairs of
    queries and keys. Each chunk attends to the keys up to its end (`model/attention.py`).
    """
    heads = (shape.heads, shape.groups, shape.groups)
    q, k, v = (_random(setting, 1, n, shape.sequence, shape.head_dim) for n in heads)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    size = shape.sequence // (2 * CONTEXT_RANKS)
    starts = (size, (2 * CONTEXT_RANKS - 2) * size)  # of the second rank

    def whole() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def in_two_calls() -> Tensor:
        mixed = []
        for start in starts:
            stop = start + size
            mask = causal_lower_right(size, stop)
            keys = k[:, :, :stop]
            values = v[:, :, :stop]
            queries = q[:, :, start:stop]
            mixed.append(
                F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
            )
        return torch.cat(mixed, dim=2)

    def both_ways(attend: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(attend().sum(), inputs)

    of_whole = whole()
    true_rows = torch.cat([of_whole[:, :, start : start + size] for start in starts], dim=2)
    difference = float((in_two_calls() - true_rows).detach().abs().max())
    name = "attention of a context rank in two calls"
    # bf16 has eight bits, and the two take the same keys in blocks of their own.
    setting.say(Figure(f"{name}, largest difference", difference, at_most=0.02))
    # Of a mask that begins at the last key, torch knows FlashAttention's kernel only; one call may
    # take cuDNN's.
    by_default = figures.milliseconds(setting, lambda: both_ways(whole))
    with _only("flash" if setting.on_gpu else "default"):
        whole_time = figures.milliseconds(setting, lambda: both_ways(whole))
    time = figures.milliseconds(setting, lambda: both_ways(in_two_calls))
    share = whole_time / CONTEXT_RANKS / time
    goal = TWO_CALLS_AT_LEAST if setting.on_gpu else None
    details = {
        "milliseconds": time,
        "whole": whole_time,
        "whole by default": by_default,
        "sequence": shape.sequence,
    }
    unit = "of one call's, both by FlashAttention"
    setting.say(Figure(f"{name}, rate", share, unit, 1, at_least=goal, details=details))


def _node(name: str, out: Tensor, backend: str, rates: Rates | None) -> Figure:
    """Which kernel was taken, and how its output lies in memory."""
    node = type(out.grad_fn).__name__
    is_default_of_gpu = backend == "default" and rates is not None
    expected = DEFAULT_NODE if is_default_of_gpu else None
    return Figure(name, node, expected=expected, details={"strides": list(out.stride())})


def _only(backend: str) -> AbstractContextManager[None]:
    """A block in which attention takes one kernel, or torch's own choice."""
    chosen = BACKENDS[backend]
    return nullcontext() if chosen is None else sdpa_kernel(chosen)


def _random(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(*shape, device=setting.device).bfloat16()


if __name__ == "__main__":
    figures.main(measure, __doc__)
