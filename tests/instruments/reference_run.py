"""Record a trace as the authors' code would, without any code of the project:
the plain twin and torch.optim.AdamW.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_completep.config.schema import CompletePConfig, ModelConfig
from tests.support.configs import GPT2
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}

# What every trace of this file has in common.
FIXED: dict[str, Any] = {
    "num_heads": 2,
    "base_num_layers": 1,
    "base_hidden_size": 8,
    "batch_size": 4,
    "position": "learned",
    "norm": "LayerNorm eps 1e-5",
    "activation": "GELU (erf)",
    "attention_scale": "1/head_dim",
    "init_std": 0.1,
    "lr": 1e-2,
    "betas": [0.9, 0.95],
    "eps": 1e-12,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "lr_schedule": "constant",
}


def shapes(
    layers: int, hidden: int, vocab: int, length: int, bias: bool, tied: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> (GPT-2's name, shape)."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "embedding.weight": ("transformer.wte.weight", (vocab, hidden)),
        "positions.weight": ("transformer.wpe.weight", (length, hidden)),
    }
    sizes = {
        "attention_norm": (hidden,),
        "attention.qkv": (3 * hidden, hidden),
        "attention.output": (hidden, hidden),
        "mlp_norm": (hidden,),
        "mlp.up": (4 * hidden, hidden),
        "mlp.down": (hidden, 4 * hidden),
    }
    for layer in range(layers):
        for name, gpt2_name in BLOCK_NAMES.items():
            own = f"layers.{layer}.{name}"
            reference = f"transformer.h.{layer}.{gpt2_name}"
            tensors[f"{own}.weight"] = (f"{reference}.weight", sizes[name])
            if bias:
                tensors[f"{own}.bias"] = (f"{reference}.bias", sizes[name][:1])
    tensors["final_norm.weight"] = ("transformer.ln_f.weight", (hidden,))
    if bias:
        tensors["final_norm.bias"] = ("transformer.ln_f.bias", (hidden,))
    if not tied:
        tensors["unembedding.weight"] = ("lm_head.weight", (vocab, hidden))
    return tensors


def record(
    stem: Path, alpha: float | None, bias: bool = True, tied: bool = True, steps: int = 6
) -> None:
    """Write stem.json and stem.npz of a run; alpha None: plain muP.

    3 layers (the base has 1), 16 wide (8), 2 heads.
    """
    layers, hidden, vocab, length = 3, 16, 29, 10
    m_N, m_L = 2.0, 3.0
    generator = torch.Generator().manual_seed(5)
    names = shapes(layers, hidden, vocab, length, bias, tied)
    model = ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=2,
        ffn_hidden_size=4 * hidden,
        vocab_size=vocab,
        seq_length=length,
        attention_scale="1/head_dim",
        **{**GPT2, "bias": bias, "tied_embeddings": tied},
    )
    completep = CompletePConfig(
        parameterization="mup" if alpha is None else "completep",
        alpha=1.0 if alpha is None else alpha,
        base_hidden_size=8,
        base_num_layers=1,
    )
    weights: dict[str, torch.nn.Parameter] = {}
    groups: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    depth = 1.0 if alpha is None else m_L ** (alpha - 1)
    # One epsilon for all tensors, as in the reference.
    eps = 1e-12 / m_N * (1.0 if alpha is None else m_L**-alpha)
    decay = 0.1 if alpha is None else 0.1 * m_N  # the reference's plain muP does not scale it
    for name, (gpt2_name, shape) in names.items():
        is_matrix = len(shape) == 2
        in_block = name.startswith("layers.")
        if is_matrix:
            start = torch.randn(shape, generator=generator) * 0.1
        else:
            start = torch.full(shape, float(name.endswith("weight")))
        weights[name] = torch.nn.Parameter(start.double())
        arrays[f"init/{gpt2_name}"] = start.numpy()
        lr = 1e-2 * (depth if in_block else 1.0) / (m_N if in_block and is_matrix else 1.0)
        weight_decay = (decay if in_block else 0.1) if is_matrix else 0.0
        groups.append(
            {"params": [weights[name]], "lr": lr, "weight_decay": weight_decay, "eps": eps}
        )
    tokens = torch.randint(vocab, (steps, 4, length + 1), generator=generator)
    losses, norms = train(PlainTwin(dict(weights), model, completep), groups, tokens)
    weight_norms = {}
    for name, (gpt2_name, _) in names.items():
        arrays[f"final/{gpt2_name}"] = weights[name].detach().float().numpy()
        weight_norms[gpt2_name] = weights[name].norm().item()
    settings = {
        **FIXED,
        "name": stem.name,
        "num_layers": layers,
        "hidden_size": hidden,
        "alpha": alpha,
        "bias": bias,
        "seq_length": length,
        "steps": steps,
        "vocab_size": vocab,
        "tied_embeddings": tied,
        "loss": losses,
        "grad_norm": norms,
        "param_norm_final": weight_norms,
        "groups": [{"eps": eps}],
    }
    stem.with_suffix(".json").write_text(json.dumps(settings))
    np.savez(
        stem.with_suffix(".npz"),
        inputs=tokens[:, :, :-1].numpy(),
        targets=tokens[:, :, 1:].numpy(),
        **arrays,
    )


def train(
    twin: PlainTwin, groups: list[dict[str, Any]], tokens: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a step for each of tokens [steps, B, S + 1]."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses: list[float] = []
    norms: list[float] = []
    for batch in tokens:
        inputs, labels = batch[:, :-1], batch[:, 1:]
        optimizer.zero_grad()
        loss = cross_entropy_sum(twin.logits(inputs), labels) / labels.numel()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.weights.values(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
