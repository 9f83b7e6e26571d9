"""Values of a Hugging Face folder's tensors that contradict the rest of it, or are no numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_completep.errors import DataError
from megatron_completep.interop.tensor_files import TensorFolder

HEAD = "lm_head.weight"


def refuse_non_finite(source: TensorFolder, name: str, tensor: Tensor) -> None:
    """Raise DataError for a tensor with NaN or infinity, naming the first one's place."""
    finite = torch.isfinite(tensor)
    if finite.all():
        return
    place = (~finite).nonzero()[0].tolist()
    wrong = int((~finite).sum())
    raise DataError(
        f"{source.folder}: tensor {name} holds {tensor[tuple(place)].item()} at {place} "
        f"({wrong} of {tensor.numel()} elements are no finite numbers). Download the model again."
    )


def refuse_other_head(source: TensorFolder, table: str) -> None:
    """Raise DataError where the head beside tied embeddings is not the table's equal.

    Some programs store the tied table a second time. table: its name.
    """
    head = source.value(HEAD)
    embedding = source.value(table)
    # A NaN is no equal of itself: it is to be named, not called a difference.
    refuse_non_finite(source, HEAD, head)
    refuse_non_finite(source, table, embedding)
    if head.shape == embedding.shape and torch.equal(head, embedding):
        return
    raise DataError(
        f"{source.folder}: config.json says tie_word_embeddings = true, but {HEAD} is not {table}: "
        f"{_first_difference(head, embedding)}. If the head belongs to the model, set "
        f"tie_word_embeddings to false in config.json; else remove {HEAD} from the folder."
    )


def refuse_other_values(single: TensorFolder, indexed: TensorFolder) -> None:
    """Raise DataError where the single file and the files of an index hold different tensors."""
    missing = sorted(set(single.names) ^ set(indexed.names))
    remedy = "Remove the one that is not the model's"
    title = f"{single.folder}: has both a single file and an index of files, which differ: "
    if missing:
        raise DataError(f"{title}{missing[0]} is in one of them alone. {remedy}.")
    for name in single.names:
        first = single.value(name)
        second = indexed.value(name)
        if first.shape != second.shape or not torch.equal(first, second):
            raise DataError(f"{title}{name}: {_first_difference(first, second)}. {remedy}.")


def _first_difference(first: Tensor, second: Tensor) -> str:
    """Where two tensors differ, and both values there."""
    if first.shape != second.shape:
        return f"shapes {list(first.shape)} and {list(second.shape)}"
    place = (first != second).nonzero()[0].tolist()
    values = f"{first[tuple(place)].item():g} and {second[tuple(place)].item():g}"
    return f"{values} at {place}"
