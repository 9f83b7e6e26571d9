"""FlashAttention's packages, and torch's attention of documents one after the other."""

from __future__ import annotations

import importlib.util
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from megatron_completep.errors import ConfigError

# Setting of model.attention_backend -> (the package, the module that it brings).
PACKAGES = {
    "flash_attention": ("flash-attn", "flash_attn"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface"),
}

ON_GPUS = ("flash_attention_3", "varlen")  # found out here, where the device is known


def prepare_backend(backend: str, device: torch.device) -> None:
    """Make ready what a setting of model.attention_backend needs, before the model is built.

    FlashAttention 3 takes the place of torch's own FlashAttention in this process.

    Raises ConfigError where the package is missing, torch is too old, or no GPU is there.
    """
    if backend == "varlen" and "enable_gqa" not in signature(varlen_attn).parameters:
        raise ConfigError(
            f"model.attention_backend = varlen needs torch 2.12 or later, and this is "
            f"{torch.__version__}. Use auto."
        )
    if backend in PACKAGES:
        _check_package(backend)
    if backend in ON_GPUS and device.type != "cuda":
        raise ConfigError(
            f"model.attention_backend = {backend} runs on GPUs only, but this run is on "
            f"{device.type}. Use auto."
        )
    if backend == "flash_attention_3":
        activate_flash_attention_impl("FA3")


def _check_package(backend: str) -> None:
    """Raise ConfigError where the package of a backend is missing."""
    package, module = PACKAGES[backend]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"model.attention_backend = {backend}, but the package {package} is not "
            "installed. Install it, or use auto."
        )


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by flash-attn: q [B, N, S, D], k and v [B, G, S_keys, D] -> [B, N, S, D].

    The last query sees every key, where there are more keys than queries.
    """
    from flash_attn import flash_attn_func

    # flash-attn has the sequence before the heads.
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    mixed: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    return mixed.transpose(1, 2)


class Bounds(NamedTuple):
    """Where documents begin among tokens that lie one after the other."""

    starts: Tensor  # int32 [documents + 1], from 0 to the number of tokens
    longest: int  # no document has more tokens


def bounds_of(starts: Sequence[int], device: torch.device) -> Bounds:
    """The bounds of documents from 0 to the number of tokens."""
    longest = max(stop - start for start, stop in pairwise(starts))
    return Bounds(torch.tensor(starts, dtype=torch.int32, device=device), longest)


def attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, document_starts: Tensor
) -> Tensor:
    """Causal attention inside documents: q [B, N, S, D], k and v [B, G, S, D] -> [B, N, S, D].

    document_starts [documents + 1] int32, over the B * S tokens: each document is a sequence of its
    own.
    """
    q = q.transpose(1, 2)
    bounds = Bounds(document_starts, q.shape[1])
    keys = k.transpose(1, 2).flatten(0, 1)
    values = v.transpose(1, 2).flatten(0, 1)
    mixed = _packed(q.flatten(0, 1), keys, values, bounds, bounds, scale, backend)
    return mixed.view(q.shape).transpose(1, 2)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Bounds,
    keys: Bounds,
    scale: float,
    backend: str,
) -> Tensor:
    """Causal attention of documents one after the other: q [T, N, D], k and v [T_keys, G, D].

    The last query of a document sees every key of it. backend: one of `PACKED_BACKENDS`.
    """
    if backend == "varlen":
        # The window says causal: any key before, none behind.
        packed = varlen_attn(
            q,
            k,
            v,
            queries.starts,
            keys.starts,
            queries.longest,
            keys.longest,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(packed, Tensor)  # alone, as nothing beside it was asked for
        return packed
    from flash_attn import flash_attn_varlen_func

    mixed: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=queries.starts,
        cu_seqlens_k=keys.starts,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=True,
    )
    return mixed


class DocumentPart(NamedTuple):
    """The documents that one chunk of one row belongs to, of a sequence that context ranks share.

    Attention from the chunk's queries begins at the first key of the first of these documents, and
    ends at the chunk's own end.
    """

    row: int
    queries: range  # the numbers of the chunk's tokens among the rank's own
    keys: range  # places in the whole sequence
    query_bounds: Bounds  # within `queries`
    key_bounds: Bounds  # within `keys`


def document_parts(document_ids: Tensor, chunks: Sequence[range]) -> list[DocumentPart]:
    """The documents of a rank's chunks, row by row. Waits for the device once.

    document_ids: [B, W], of the whole sequence.
    """
    parts = []
    for row, ids in enumerate(document_ids.tolist()):
        starts = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1]]
        first_query = 0
        for chunk in chunks:
            # Documents that begin before the chunk's end and do not end before it begins.
            first_document = bisect_right(starts, chunk.start) - 1
            own_starts = starts[first_document : bisect_left(starts, chunk.stop)]
            first_key = own_starts[0]
            key_starts = [start - first_key for start in own_starts]
            query_starts = [max(start - chunk.start, 0) for start in own_starts]
            keys = range(first_key, chunk.stop)
            queries = range(first_query, first_query + len(chunk))
            query_bounds = bounds_of([*query_starts, len(chunk)], document_ids.device)
            key_bounds = bounds_of([*key_starts, len(keys)], document_ids.device)
            parts.append(DocumentPart(row, queries, keys, query_bounds, key_bounds))
            first_query += len(chunk)
    return parts


def attention_by_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, documents: Sequence[DocumentPart]
) -> Tensor:
    """Causal attention of a rank's part of a sequence: q [B, N, S, D] -> [B, N, S, D].

    A call a chunk and row. k, v: [B, G, W, D], in the order of the sequence.
    """
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    mixed = []
    for part in documents:
        queries = q[part.row, part.queries.start : part.queries.stop]
        keys = k[part.row, part.keys.start : part.keys.stop]
        values = v[part.row, part.keys.start : part.keys.stop]
        bounds = (part.query_bounds, part.key_bounds)
        mixed.append(_packed(queries, keys, values, *bounds, scale, backend))
    # The parts lie row by row.
    return torch.cat(mixed).view(q.shape).transpose(1, 2)
