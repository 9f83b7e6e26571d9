"""The heads' cases of the kernel benchmark: rotation, QK-norm with it, gradients joined."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.benchmarks import library_baselines
from megatron_completep.benchmarks.kernel_cases import (
    EPS,
    Case,
    Program,
    Setting,
    all_of,
    backward_alone,
    forward_of,
)


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain rotation; at least float32, for torch multiplies in its operands' precision."""
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos = cos.unsqueeze(2)
    sin = sin.unsqueeze(2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def random_angle(rows: int, head_dim: int, setting: Setting) -> Tensor:
    """[rows, 1, head_dim / 2], between 0 and about 2 pi."""
    return torch.rand(rows, 1, head_dim // 2, device=setting.device) * 6.3


def head_cases(
    rows: int, queries: int, keys: int, head_dim: int, setting: Setting
) -> Iterator[Case]:
    """Between the QKV projection and attention: heads [rows, 1, queries + 2 keys, head_dim]."""
    yield _rotary_case(rows, queries, head_dim, setting)
    yield from _normed_heads_cases(rows, queries, keys, head_dim, setting)
    yield _joined_heads_case(rows, queries, keys, head_dim, setting)


def _rotary_case(rows: int, heads: int, head_dim: int, setting: Setting) -> Case:
    """The rotation of [rows, 1, heads, head_dim]; its backward is the same kernel."""
    x = setting.random(rows, 1, heads, head_dim)
    angle = random_angle(rows, head_dim, setting)
    cos = angle.cos()
    sin = angle.sin()

    def ours(x: Tensor) -> Tensor:
        return kernels.rotary(x, cos, sin)

    def plain(x: Tensor) -> Tensor:
        return rotation(x, cos, sin)

    programs: dict[str, Program] = setting.with_compiled({"ours": ours, "eager": plain}, plain)
    implementations = all_of(forward_of, programs, x)
    for name, program in library_baselines.rotaries(x, angle, setting.say).items():
        implementations[name] = forward_of(program)  # x is bound already, in the library's layout
    floor = 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()
    answer = functools.partial(plain, x.double())
    return Case("rotary", rows, heads * head_dim, floor, implementations, answer)


def _normed_heads_cases(
    rows: int, queries: int, keys: int, head_dim: int, setting: Setting
) -> Iterator[Case]:
    heads = setting.random(rows, 1, queries + 2 * keys, head_dim).requires_grad_()
    q_gain = setting.vector(head_dim)
    k_gain = setting.vector(head_dim)
    angle = random_angle(rows, head_dim, setting)
    cos = angle.cos()
    sin = angle.sin()
    norm = kernels.Norm("rmsnorm", EPS)

    def ours(heads: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.normed_heads(heads, q_gain, k_gain, cos, sin, queries, norm)

    def plain(heads: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads.split((queries, keys, keys), dim=2)
        q = F.rms_norm(q, (head_dim,), q_gain, EPS)
        k = F.rms_norm(k, (head_dim,), k_gain, EPS)
        return rotation(q, cos, sin), rotation(k, cos, sin), v

    programs: dict[str, Program] = setting.with_compiled({"ours": ours, "eager": plain}, plain)
    gains = (q_gain, k_gain)
    head_bytes = rows * head_dim * heads.element_size()
    angle_bytes = 2 * cos.numel() * cos.element_size()
    columns = (queries + keys) * head_dim
    # Values are a view of the projection: only queries and keys are read and written.
    floor = 2 * (queries + keys) * head_bytes + angle_bytes
    forward = all_of(forward_of, programs, heads, *gains)
    yield Case("normed heads forward", rows, columns, floor, forward)

    gradients = (
        setting.random(rows, 1, queries, head_dim),
        setting.random(rows, 1, keys, head_dim),
        setting.random(rows, 1, keys, head_dim),
    )
    inputs = (heads, *gains)
    backward = all_of(backward_alone, programs, inputs, list(inputs), gradients)
    # Reads the heads and both gradients, writes one; the gradient of the values is copied.
    floor = (3 * (queries + keys) + 2 * keys) * head_bytes + angle_bytes
    yield Case("normed heads backward", rows, columns, floor, backward)


def _joined_heads_case(rows: int, queries: int, keys: int, head_dim: int, setting: Setting) -> Case:
    """One gradient of the projection from three: two rotated back, all side by side."""
    d_q = setting.random(rows, 1, queries, head_dim)
    d_k = setting.random(rows, 1, keys, head_dim)
    d_v = setting.random(rows, 1, keys, head_dim)
    angle = random_angle(rows, head_dim, setting)
    cos = angle.cos()
    sin = angle.sin()

    def ours(d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Tensor:
        return kernels.join_heads(d_q, d_k, d_v, cos, sin)

    def plain(d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Tensor:
        return torch.cat((rotation(d_q, cos, -sin), rotation(d_k, cos, -sin), d_v), dim=2)

    programs: dict[str, Program] = setting.with_compiled({"ours": ours, "eager": plain}, plain)
    gradients = (d_q, d_k, d_v)
    answer = functools.partial(plain, *(gradient.double() for gradient in gradients))
    width = (queries + 2 * keys) * head_dim
    floor = 2 * rows * width * d_q.element_size() + 2 * cos.numel() * cos.element_size()
    implementations = all_of(forward_of, programs, *gradients)
    return Case("joined heads", rows, width, floor, implementations, answer)
