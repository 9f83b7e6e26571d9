"""FlashAttention's packages as attention backends: used where installed and asked for."""

from __future__ import annotations

import importlib.util
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from megatron_completep.errors import ConfigError

# Setting of model.attention_backend -> (the package, the module that it brings).
PACKAGES = {
    "flash_attention": ("flash-attn", "flash_attn"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface"),
}


def prepare_backend(backend: str, device: torch.device) -> None:
    """Make ready what a setting of model.attention_backend needs, before the model is built.

    FlashAttention 3 takes the place of torch's own FlashAttention in this process.

    Raises ConfigError where the package is missing, or no GPU is there for FlashAttention 3.
    """
    if backend not in PACKAGES:
        return
    package, module = PACKAGES[backend]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"model.attention_backend = {backend}, but the package {package} is not "
            "installed. Install it, or use auto."
        )
    if backend == "flash_attention_3":
        if device.type != "cuda":
            raise ConfigError(
                f"model.attention_backend = {backend} runs on GPUs only, but this run is on "
                f"{device.type}. Use auto."
            )
        activate_flash_attention_impl("FA3")


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None
) -> Tensor:
    """Causal attention: q [B, N, S, D], k and v [B, G, S, D] -> [B, N, S, D].

    document_starts [documents + 1] int32, over the B * S tokens: each document is a sequence of its
    own.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # flash-attn has the sequence before the heads.
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if document_starts is None:
        mixed: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        return mixed.transpose(1, 2)

    batch, length = q.shape[:2]
    mixed = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=document_starts,
        cu_seqlens_k=document_starts,
        max_seqlen_q=length,
        max_seqlen_k=length,
        softmax_scale=scale,
        causal=True,
    )
    return mixed.view(batch, length, *mixed.shape[1:]).transpose(1, 2)


class DocumentPart(NamedTuple):
    """The documents that one chunk of one row belongs to, of a sequence that context ranks share.

    Attention from the chunk's queries begins at the first key of the first of these documents, and
    ends at the chunk's own end.
    """

    row: int
    queries: range  # the numbers of the chunk's tokens among the rank's own
    keys: range  # places in the whole sequence
    query_starts: Tensor  # int32 [documents + 1], within `queries`
    key_starts: Tensor  # int32 [documents + 1], within `keys`
    longest: tuple[int, int]  # most queries and most keys of one of these documents


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
            bounds = [[*query_starts, len(chunk)], [*key_starts, len(keys)]]
            starts_of = torch.tensor(bounds, dtype=torch.int32, device=document_ids.device)
            longest = longest_run(bounds[0]), longest_run(bounds[1])
            queries = range(first_query, first_query + len(chunk))
            parts.append(DocumentPart(row, queries, keys, starts_of[0], starts_of[1], longest))
            first_query += len(chunk)
    return parts


def longest_run(bounds: Sequence[int]) -> int:
    """The largest difference between neighbouring bounds."""
    return max(stop - start for start, stop in pairwise(bounds))


def flash_attention_by_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    chunks: Sequence[range],
    documents: Sequence[DocumentPart] | None,
) -> Tensor:
    """Causal attention of some chunks of a sequence: q [B, N, S, D] -> [B, N, S, D].

    A call a chunk; with documents a call a chunk and row. flash-attn puts the last query beside the
    last key where it is given more keys than queries.

    k, v: [B, G, W, D], in the order of the sequence. chunks: places in it of the S queries.
    documents: of `document_parts`; None: each row is one document.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # flash-attn has the sequence before the heads.
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    mixed: list[Tensor] = []
    if documents is None:
        for chunk, queries in zip(chunks, q.split([len(c) for c in chunks], dim=1), strict=True):
            keys = k[:, : chunk.stop]
            values = v[:, : chunk.stop]
            mixed.append(flash_attn_func(queries, keys, values, softmax_scale=scale, causal=True))
        return torch.cat(mixed, dim=1).transpose(1, 2)
    for part in documents:
        mixed.append(
            flash_attn_varlen_func(
                q[part.row, part.queries.start : part.queries.stop],
                k[part.row, part.keys.start : part.keys.stop],
                v[part.row, part.keys.start : part.keys.stop],
                cu_seqlens_q=part.query_starts,
                cu_seqlens_k=part.key_starts,
                max_seqlen_q=part.longest[0],
                max_seqlen_k=part.longest[1],
                softmax_scale=scale,
                causal=True,
            )
        )
    # The parts lie row by row.
    return torch.cat(mixed).view(q.shape).transpose(1, 2)
