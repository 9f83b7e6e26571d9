"""The rules by which a call of attention on a GPU takes a kernel, as a function of its shapes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

from megatron_completep.model import attention
from megatron_completep.model.attention import AttentionInputs, attend
from megatron_completep.model.attention_kernels import (
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    NAMED,
    AttentionCall,
    KernelChoice,
    choose_kernels,
)

BACKENDS = ("auto", *NAMED)


def call(**changes: Any) -> AttentionCall:
    """A training call on a GPU without mask, of 2048 tokens."""
    plain = AttentionCall("cuda", 2048, 2048, masked=False, grouped=False, trains=True)
    return plain._replace(**changes)


def every_call() -> list[AttentionCall]:
    """Every kind of call; lengths on either side of what breaks cuDNN's backward."""
    flags = (False, True)
    calls = []
    for queries, keys, masked, grouped, trains, cached in product(
        (2048, 2112), (2048, 2112), flags, flags, flags, flags
    ):
        calls.append(AttentionCall("cuda", queries, keys, masked, grouped, trains, cached))
    return calls


def may_take(choice: KernelChoice, kernel: object) -> bool:
    return not choice.kernels or kernel in choice.kernels


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_call_takes_a_kernel_that_fails_it(backend: str) -> None:
    for one in every_call():
        choice = choose_kernels(backend, one)
        breaks_cudnn = one.masked and (one.queries % 128 == 64 or one.keys % 128 == 64)
        if breaks_cudnn or one.cached:
            assert not may_take(choice, CUDNN), one
        if one.masked:
            assert FLASH not in choice.kernels, one
        # What may end at the memory-efficient kernel or nowhere has expanded keys and values.
        fits_alone = one.grouped and not choice.expand
        if fits_alone and choice.kernels:
            assert choice.kernels[0] is not EFFICIENT, one


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("auto", {}, KernelChoice()),
        ("auto", {"grouped": True}, KernelChoice()),
        ("auto", {"masked": True}, KernelChoice()),
        ("auto", {"masked": True, "grouped": True}, KernelChoice((), expand=True)),
        ("auto", {"masked": True, "queries": 64}, KernelChoice((EFFICIENT, MATH))),
        ("auto", {"queries": 64}, KernelChoice()),
        ("auto", {"trains": False}, KernelChoice((FLASH, EFFICIENT, MATH))),
        ("cudnn", {"grouped": True}, KernelChoice((CUDNN,))),
        ("cudnn", {"trains": False}, KernelChoice((CUDNN, FLASH, EFFICIENT, MATH))),
        ("cudnn", {"trains": False, "cached": True}, KernelChoice((FLASH, EFFICIENT, MATH))),
        ("cudnn", {"masked": True}, KernelChoice((CUDNN,))),
        ("flash", {"grouped": True}, KernelChoice((FLASH,))),
        ("flash_attention_3", {}, KernelChoice((FLASH,))),
        ("efficient", {"grouped": True}, KernelChoice((EFFICIENT,), expand=True)),
        (
            "flash_attention",
            {"cached": True, "trains": False},
            (KernelChoice((FLASH, EFFICIENT, MATH))),
        ),
        ("sdpa", {"masked": True, "queries": 64}, KernelChoice()),
    ],
    ids=str,
)
def test_what_a_setting_takes(
    backend: str, changes: dict[str, Any], expected: KernelChoice
) -> None:
    assert choose_kernels(backend, call(**changes)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_cpu_every_setting_is_torch_s_own_choice(backend: str) -> None:
    for one in every_call():
        assert choose_kernels(backend, one._replace(device_type="cpu")) == KernelChoice()


def test_a_choice_reaches_torch_and_ends_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of a GPU on CPU tensors: which kernels are allowed while SDPA runs."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 6, 8, generator=generator, dtype=torch.float64)
    expected = attend(q, k, v, AttentionInputs(), 0.3, "auto")
    plain: Any = torch.nn.functional.scaled_dot_product_attention
    seen: list[Any] = []

    def look(*heads: Tensor, **options: Any) -> Tensor:
        seen.append((_cur_sdpa_kernel_backends(), [tensor.shape[1] for tensor in heads]))
        return plain(*heads, **options)

    before = _cur_sdpa_kernel_backends()
    chosen = KernelChoice((EFFICIENT, MATH), expand=True)
    monkeypatch.setattr(attention, "choose_kernels", lambda backend, one: chosen)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    mixed = attend(q, k, v, AttentionInputs(), 0.3, "auto")
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    ((allowed, heads),) = seen
    assert set(allowed) == {EFFICIENT, MATH} and heads == [4, 4, 4]
    assert set(_cur_sdpa_kernel_backends()) == set(before) != {EFFICIENT, MATH}
