"""apex and flash-attn: used where they are installed,
refused clearly where they are asked for and missing.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch

from megatron_completep.errors import ConfigError
from megatron_completep.model import flash
from megatron_completep.model.attention import AttentionInputs, attend
from megatron_completep.model.flash import prepare_backend
from megatron_completep.parallel.onednn import Processor
from megatron_completep.parallel.products import ApexProducts, Products, choose_products

GPU = torch.device("cuda", 0)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, **functions) -> None:
    module = ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda wanted: object() if wanted == name else None
    )


def test_apex_asked_for_and_missing_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"training.weight_gradient = apex.*not installed"):
        choose_products("apex", "auto", GPU, torch.bfloat16, Processor())
    with pytest.raises(ConfigError, match="float32 on cpu"):
        choose_products("apex", "auto", torch.device("cpu"), torch.float32, Processor())


def test_apex_is_used_where_it_is_installed_unless_told_otherwise(monkeypatch):
    def accumulate(x, d_out, main_grad):
        main_grad.add_(d_out.float().t() @ x.float())

    pretend_installed(
        monkeypatch, "fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=accumulate
    )
    assert type(choose_products("auto", "auto", GPU, torch.bfloat16, Processor())) is ApexProducts
    assert type(choose_products("apex", "auto", GPU, torch.bfloat16, Processor())) is ApexProducts
    assert type(choose_products("torch", "auto", GPU, torch.bfloat16, Processor())) is Products
    assert (
        type(choose_products("auto", "auto", torch.device("cpu"), torch.bfloat16, Processor()))
        is Products
    )


def test_a_library_of_products_that_was_asked_for_is_refused_where_apex_would_replace_it(
    monkeypatch,
):
    pretend_installed(
        monkeypatch, "fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=lambda *tensors: None
    )
    with pytest.raises(ConfigError, match="matrix_products = onednn serves float32 on a CPU"):
        choose_products("auto", "onednn", GPU, torch.bfloat16, Processor())
    chosen = choose_products("auto", "torch", GPU, torch.bfloat16, Processor())
    assert type(chosen) is ApexProducts  # the control: torch's own products, fused by apex


def test_the_fused_accumulation_adds_to_what_is_there_and_overwrites_what_is_stale(monkeypatch):
    def accumulate(x, d_out, main_grad):
        main_grad.add_(d_out.t() @ x)

    pretend_installed(
        monkeypatch, "fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=accumulate
    )
    generator = torch.Generator().manual_seed(0)
    d_out, x = torch.randn(7, 3, generator=generator), torch.randn(7, 5, generator=generator)
    for first in (True, False):
        plain, fused = torch.full((3, 5), 2.0), torch.full((3, 5), 2.0)
        Products().add_weight_gradient(plain, d_out, x, first)
        ApexProducts().add_weight_gradient(fused, d_out, x, first)
        torch.testing.assert_close(fused, plain)
        torch.testing.assert_close(fused, d_out.t() @ x + (0.0 if first else 2.0))


def test_flash_attention_asked_for_and_missing_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        prepare_backend("flash_attention", GPU)


def test_flash_attention_3_takes_the_place_of_torch_s_own_where_it_is_installed(monkeypatch):
    with pytest.raises(ConfigError, match="flash-attn-3 is not installed"):
        prepare_backend("flash_attention_3", GPU)
    pretend_installed(monkeypatch, "flash_attn_interface")
    activated = []
    monkeypatch.setattr(flash, "activate_flash_attention_impl", activated.append)
    prepare_backend("flash", GPU)
    assert activated == []
    prepare_backend("flash_attention_3", GPU)
    assert activated == ["FA3"]
    for backend in ("flash_attention_3", "varlen"):
        with pytest.raises(ConfigError, match="runs on GPUs only, but this run is on cpu"):
            prepare_backend(backend, torch.device("cpu"))
    prepare_backend("varlen", GPU)
    monkeypatch.setattr(flash, "varlen_attn", lambda query, key, value: None)
    with pytest.raises(ConfigError, match=r"varlen needs torch 2.12 or later, and this is 2"):
        prepare_backend("varlen", GPU)


@pytest.mark.parametrize("documents", [False, True])
def test_flash_attention_gets_its_own_layout_the_scale_and_the_document_boundaries(
    monkeypatch, documents
):
    """A stand-in with flash-attn's interface, made of SDPA:
    the shapes and the scale that reach it are the right ones.
    """
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def plain(q, k, v, softmax_scale, causal):
        assert causal
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def by_document(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        bounds = cu_seqlens_q.tolist()
        parts = [
            plain(*(x[None, a:b] for x in (q, k, v)), softmax_scale, causal)[0]
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts)

    pretend_installed(
        monkeypatch, "flash_attn", flash_attn_func=plain, flash_attn_varlen_func=by_document
    )
    prepare_backend("flash_attention", GPU)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 4, 6, 8, generator=generator),
        *torch.randn(2, 2, 2, 6, 8, generator=generator),
    )
    starts = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32) if documents else None
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    if documents:
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    expected = sdpa(q, k, v, attn_mask=allowed.expand(2, 1, 6, 6), scale=0.3, enable_gqa=True)
    inputs = AttentionInputs(document_starts=starts)
    torch.testing.assert_close(attend(q, k, v, inputs, 0.3, "flash_attention"), expected)
    # torch's own gets the same.
    if documents:
        monkeypatch.setattr(
            flash,
            "varlen_attn",
            lambda *arguments, scale, window_size, enable_gqa: by_document(*arguments, scale, True),
        )
        torch.testing.assert_close(attend(q, k, v, inputs, 0.3, "varlen"), expected)
