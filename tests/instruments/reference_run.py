"""Record a trace as the authors' code would, without any code of the project: the plain twin and
torch.optim.AdamW.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_completep.config.schema import CompletePConfig, ModelConfig
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def shapes(
    layers: int, hidden: int, vocab: int, length: int, bias: bool, tied: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> (GPT-2's name, shape)."""
    found = {
        "embedding.weight": ("transformer.wte.weight", (vocab, hidden)),
        "positions.weight": ("transformer.wpe.weight", (length, hidden)),
    }
    sizes = {
        "attention_norm": (hidden,), "attention.qkv": (3 * hidden, hidden), "attention.output": (hidden, hidden),
        "mlp_norm": (hidden,), "mlp.up": (4 * hidden, hidden), "mlp.down": (hidden, 4 * hidden),
    }  # fmt: skip
    for layer in range(layers):
        for ours, theirs in BLOCK_NAMES.items():
            found[f"layers.{layer}.{ours}.weight"] = (
                f"transformer.h.{layer}.{theirs}.weight",
                sizes[ours],
            )
            if bias:
                found[f"layers.{layer}.{ours}.bias"] = (
                    f"transformer.h.{layer}.{theirs}.bias",
                    sizes[ours][:1],
                )
    found["final_norm.weight"] = ("transformer.ln_f.weight", (hidden,))
    if bias:
        found["final_norm.bias"] = ("transformer.ln_f.bias", (hidden,))
    if not tied:
        found["unembedding.weight"] = ("lm_head.weight", (vocab, hidden))
    return found


def record(
    stem: Path, alpha: float | None, bias: bool = True, tied: bool = True, steps: int = 6
) -> None:
    """Write stem.json and stem.npz: 3 layers (base 1), 16 wide (base 8), 2 heads."""
    layers, hidden, vocab, length, m_N, m_L = 3, 16, 29, 10, 2.0, 3.0
    generator = torch.Generator().manual_seed(5)
    names = shapes(layers, hidden, vocab, length, bias, tied)
    model = ModelConfig(
        hidden_size=hidden, num_layers=layers, num_attention_heads=2, ffn_hidden_size=4 * hidden, vocab_size=vocab, seq_length=length,
        norm="layernorm", activation="gelu", position="learned", bias=bias, tied_embeddings=tied, attention_scale="1/head_dim",
    )  # fmt: skip
    completep = CompletePConfig(
        parameterization="mup" if alpha is None else "completep",
        alpha=1.0 if alpha is None else alpha,
        base_hidden_size=8,
        base_num_layers=1,
    )
    weights, groups, arrays = {}, [], {}
    depth = 1.0 if alpha is None else m_L ** (alpha - 1)
    # one for all tensors, as in the reference
    eps = 1e-12 / m_N * (1.0 if alpha is None else m_L**-alpha)
    decay = 0.1 if alpha is None else 0.1 * m_N  # the reference's plain muP does not scale it
    for name, (theirs, shape) in names.items():
        matrix, inside = len(shape) == 2, name.startswith("layers.")
        start = (
            torch.randn(shape, generator=generator) * 0.1
            if matrix
            else torch.full(shape, float(name.endswith("weight")))
        )
        weights[name] = torch.nn.Parameter(start.double())
        arrays[f"init/{theirs}"] = start.numpy()
        lr = 1e-2 * (depth if inside else 1.0) / (m_N if inside and matrix else 1.0)
        wd = (decay if inside else 0.1) if matrix else 0.0
        groups.append({"params": [weights[name]], "lr": lr, "weight_decay": wd, "eps": eps})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    tokens = torch.randint(vocab, (steps, 4, length + 1), generator=generator)
    twin, losses, norms = PlainTwin(dict(weights), model, completep), [], []
    for batch in tokens:
        optimizer.zero_grad()
        loss = cross_entropy_sum(twin.logits(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    for name, (theirs, _) in names.items():
        arrays[f"final/{theirs}"] = weights[name].detach().float().numpy()
    settings: dict[str, Any] = {
        "name": stem.name, "num_layers": layers, "hidden_size": hidden, "num_heads": 2, "base_num_layers": 1, "base_hidden_size": 8,
        "alpha": alpha, "bias": bias, "seq_length": length, "batch_size": 4, "steps": steps, "vocab_size": vocab, "tied_embeddings": tied,
        "position": "learned", "norm": "LayerNorm eps 1e-5", "activation": "GELU (erf)", "attention_scale": "1/head_dim", "init_std": 0.1,
        "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-12, "weight_decay": 0.1, "grad_clip": 1.0, "lr_schedule": "constant",
        "loss": losses, "grad_norm": norms, "param_norm_final": {t: weights[n].norm().item() for n, (t, _) in names.items()},
        "groups": [{"eps": eps}],
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(settings))
    np.savez(
        stem.with_suffix(".npz"),
        inputs=tokens[:, :, :-1].numpy(),
        targets=tokens[:, :, 1:].numpy(),
        **arrays,
    )
