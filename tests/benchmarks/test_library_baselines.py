"""The benchmark's adapters to other libraries, through stand-ins with the libraries' signatures:
the same function, or a clear report.
"""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from megatron_completep.benchmarks import library_baselines
from megatron_completep.benchmarks.kernel_benchmark import SMOKE, run

HIDDEN = 24


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place, "its backward would write over the gradient that all implementations share"
    return F.rms_norm(X, (X.shape[-1],), W, eps)


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, (X.shape[-1],), W, B, eps)


def liger_cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None, return_z_loss=False,
):  # fmt: skip
    return F.cross_entropy(input.float(), target, reduction=reduction)


def liger_swiglu(a, b):
    return F.silu(a) * b


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """q, k [B, heads, S, D]; cos, sin [1, S, D]."""
    assert cos.shape == (1, q.shape[2], q.shape[3])
    return rotate(q, cos.unsqueeze(1), sin.unsqueeze(1)), rotate(
        k, cos.unsqueeze(1), sin.unsqueeze(1)
    )


def quack_rmsnorm(
    x,
    weight=None,
    bias=None,
    residual=None,
    out_dtype=None,
    residual_dtype=None,
    eps=1e-6,
    prenorm=False,
):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def quack_cross_entropy(
    x,
    target,
    lse_partial=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    inplace_backward=False,
):
    return F.cross_entropy(x.float(), target, reduction=reduction)


def parallel_cross_entropy(
    inp,
    target,
    label_smoothing=0.0,
    reduce_loss=False,
    dist_process_group=None,
    ignore_idx=-100,
    is_cg_capturable=False,
    *,
    _input=None,
):
    assert inp.dim() == 3 and target.shape == inp.shape[:2]
    return F.cross_entropy(
        inp.float().flatten(0, 1), target.flatten(), reduction="mean" if reduce_loss else "none"
    ).view(target.shape)


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    assert fused
    assert tensor_format == "sbhd"
    assert freqs.shape == (t.shape[0], 1, 1, t.shape[3])
    assert freqs.dtype == torch.float32
    return rotate(t, freqs.cos(), freqs.sin())


def te_swiglu(input, quantizer):
    gate, up = input.chunk(2, dim=-1)
    return F.silu(gate) * up


def te_dswiglu(grad, fwd_input, quantizer):
    with torch.enable_grad():
        leaf = fwd_input.detach().requires_grad_()
        return torch.autograd.grad(te_swiglu(leaf, None), leaf, grad)[0]


class SoftmaxCrossEntropyLoss:
    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        return F.cross_entropy(logits.float(), labels, ignore_index=padding_idx, reduction="none")


def fused_apply_rotary_pos_emb_cached(t, cos_, sin_, transpose_output_memory=False):
    assert cos_.shape == (t.shape[0], 1, 1, t.shape[3])
    return rotate(t, cos_, sin_)


class FusedAdam(torch.optim.AdamW):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
    ):
        assert adam_w_mode and bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class Norm(torch.nn.RMSNorm):
    def __init__(self, hidden, eps):
        super().__init__(hidden, eps=eps)


LIBRARIES = {  # every module that the adapters import
    "liger_kernel.transformers.functional": [
        liger_rms_norm,
        liger_layer_norm,
        liger_cross_entropy,
        liger_swiglu,
        liger_rope,
    ],
    "quack.rmsnorm": {"rmsnorm": quack_rmsnorm},
    "quack.cross_entropy": {"cross_entropy": quack_cross_entropy},
    "transformer_engine.pytorch": {"RMSNorm": Norm, "LayerNorm": torch.nn.LayerNorm},
    "transformer_engine.pytorch.cross_entropy": [parallel_cross_entropy],
    "transformer_engine.pytorch.attention.rope": [apply_rotary_pos_emb],
    "transformer_engine.pytorch.optimizers": [FusedAdam],
    "transformer_engine_torch": {"swiglu": te_swiglu, "dswiglu": te_dswiglu},
    "apex.normalization": {"FusedRMSNorm": Norm, "FusedLayerNorm": torch.nn.LayerNorm},
    "apex.contrib.xentropy": [SoftmaxCrossEntropyLoss],
    "apex.transformer.functional": [fused_apply_rotary_pos_emb_cached],
    "apex.optimizers": [FusedAdam],
}


@pytest.fixture
def libraries(monkeypatch):
    """All of them "installed"; returns {module: its stand-in}."""
    modules = {}
    for name, members in LIBRARIES.items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            path = ".".join(parts[:k])
            modules.setdefault(path, types.ModuleType(path))
        given = (
            members
            if isinstance(members, dict)
            else {member.__name__: member for member in members}
        )
        vars(modules[name]).update(given)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def silent(line):
    raise AssertionError(line)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_library_is_needed():
    assert library_baselines.norms(torch.nn.Parameter(torch.ones(HIDDEN)), None, silent) == {}
    assert library_baselines.cross_entropies(silent) == {}
    assert library_baselines.swiglus(silent) == {}


def test_norms_compute_what_torch_computes(libraries):
    x, weight, bias = (
        torch.randn(5, HIDDEN),
        *(torch.nn.Parameter(torch.randn(HIDDEN)) for _ in range(2)),
    )
    found = library_baselines.norms(weight, None, silent)
    assert set(found) == {"liger", "quack", "transformer engine", "apex"}
    for norm in found.values():
        close(norm(x), F.rms_norm(x, (HIDDEN,), weight, library_baselines.EPS))
        assert torch.autograd.grad(norm(x).sum(), weight)[0].shape == (HIDDEN,), (
            "it differentiates a weight of its own"
        )
    found = library_baselines.norms(weight, bias, silent)
    assert set(found) == {"liger", "transformer engine", "apex"}
    for norm in found.values():
        close(norm(x), F.layer_norm(x, (HIDDEN,), weight, bias, library_baselines.EPS))


def test_losses_activations_and_rotations_compute_what_torch_computes(libraries):
    logits, labels = torch.randn(6, 40), torch.randint(40, (6,))
    losses = library_baselines.cross_entropies(silent)
    assert set(losses) == {"liger", "quack", "transformer engine", "apex"}
    for loss in losses.values():
        close(loss(logits, labels).sum(), F.cross_entropy(logits, labels, reduction="sum"))
    gate_up = torch.randn(6, 2 * HIDDEN, requires_grad=True)
    expected = te_swiglu(gate_up, None)
    swiglus = library_baselines.swiglus(silent)
    assert set(swiglus) == {"liger", "transformer engine"}
    for swiglu in swiglus.values():
        close(swiglu(gate_up), expected)
        close(
            *(
                torch.autograd.grad(out.sum(), gate_up, retain_graph=True)[0]
                for out in (swiglu(gate_up), expected)
            )
        )
    x, angle = torch.randn(7, 1, 4, 8), torch.rand(7, 1, 4)
    whole = torch.cat((angle, angle), -1).unsqueeze(1)
    expected = rotate(x, whole.cos(), whole.sin())
    rotaries = library_baselines.rotaries(x, angle, silent)
    assert set(rotaries) == {"liger", "transformer engine", "apex"}
    q, k = rotaries.pop("liger")()
    close(torch.cat((q, k), dim=1).permute(2, 0, 1, 3), expected)
    for rotary in rotaries.values():
        close(rotary(), expected)


def test_optimizers_take_the_step_that_torch_takes(libraries):
    start, grad = torch.randn(9), torch.randn(9)

    def stepped(make):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = grad
        make(parameter)()
        return parameter.detach()

    expected = stepped(
        lambda p: torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2).step
    )
    for name in ("transformer engine", "apex"):
        close(
            stepped(lambda p, name=name: library_baselines.adamws(p, 0.1, 0.2, silent)[name]),
            expected,
        )


def test_the_benchmark_measures_every_library_where_it_has_something(libraries):
    lines: list[str] = []
    found, left_out = run(
        dataclasses.replace(SMOKE, dtype=torch.float32), torch.device("cpu"), lines.append
    )
    assert not left_out and not [line for line in lines if "Error" in line or "cannot" in line]
    measured = {(m.kernel, m.implementation) for m in found}
    everybody = {"liger", "transformer engine", "apex"}
    for kernel, expected in {
        "residual rmsnorm backward": {f"add + {name}" for name in (*everybody, "quack")},
        "layernorm forward": everybody,
        "rmsnorm backward": {*everybody, "quack"},
        "swiglu backward": {"liger", "transformer engine"},
        "rotary": everybody,
        "cross-entropy forward": {"quack", "apex"},
        "cross-entropy backward": {"quack", "apex"},
        "cross-entropy forward + backward": {*everybody, "quack"},
        "adamw": {"torch fused + copy", "transformer engine + copy", "apex + copy"},
    }.items():
        assert {(kernel, name) for name in expected} <= measured, kernel


def test_a_broken_library_is_reported_and_stops_nothing(libraries, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("built for another architecture")

    # Fails when called.
    monkeypatch.setattr(libraries["liger_kernel.transformers.functional"], "liger_rms_norm", broken)
    # Another version.
    monkeypatch.delattr(
        libraries["apex.transformer.functional"], "fused_apply_rotary_pos_emb_cached"
    )
    monkeypatch.setattr(libraries["transformer_engine.pytorch.optimizers"], "FusedAdam", broken)
    # Another signature.
    monkeypatch.setattr(libraries["quack.cross_entropy"], "cross_entropy", lambda logits: logits)
    lines: list[str] = []
    found, _ = run(
        dataclasses.replace(SMOKE, dtype=torch.float32), torch.device("cpu"), lines.append
    )
    assert len({m.kernel for m in found if m.implementation == "ours"}) == 26
    said = "\n".join(lines)
    assert (
        "residual rmsnorm forward, add + liger: RuntimeError: built for another architecture"
        in said
    )
    assert (
        said.count("apex is installed, but its rotary embedding cannot be prepared: AttributeError")
        == 1
    )
    assert (
        said.count(
            "transformer engine is installed, but its AdamW cannot be prepared: RuntimeError"
        )
        == 1
    )
    assert "cross-entropy backward, quack: TypeError" in said
