"""Which tokens of a sequence a context rank holds, and attention of their queries."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from megatron_completep import kernels
from megatron_completep.config.derived import PACKED_BACKENDS
from megatron_completep.data.loader import DocumentEnds, make_batch
from megatron_completep.data.samples import Sample
from megatron_completep.kernels.reference import dropout_rows
from megatron_completep.model import flash
from megatron_completep.model.attention import attend_to_prefixes, prefix_mask
from megatron_completep.model.flash import attention_by_part, document_parts
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context_part import ContextPart
from megatron_completep.training.balance import balance_warning, pairs_by_rank
from tests.parallel.packed import lower_right, lower_right_by_document, varlen

CPU = torch.device("cpu")
SCALE = 0.3


def parts(ranks: int) -> list[ContextPart]:
    return [ContextPart(Axis("context", rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_all_ranks_are_the_sequence(ranks: int) -> None:
    length = 16
    x = torch.randn(2, length, 3)
    held = [part.cut(x) for part in parts(ranks)]
    by_rank = torch.cat(held, dim=1).transpose(0, 1)
    for part in parts(ranks) if ranks > 1 else []:
        assert torch.equal(part.in_order(by_rank), x.transpose(0, 1))
        assert torch.equal(part.by_rank(x.transpose(0, 1)), by_rank)
    for part, own in zip(parts(ranks), held, strict=True):
        assert torch.equal(x[:, part.places(length, CPU)], own)
        assert part.whole_length(own.shape[1]) == length


def test_every_rank_has_equally_many_pairs_of_queries_and_keys() -> None:
    length = 64
    pairs = {int((part.places(length, CPU) + 1).sum()) for part in parts(4)}
    assert pairs == {520}
    # Neighbouring tokens would leave the last rank with most of the work.
    contiguous = (torch.arange(length) + 1).view(4, -1).sum(1)
    assert contiguous.tolist() == [136, 392, 648, 904]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tensor_ranks", [1, 2, 3, 4])
def test_dropout_numbers_the_rows_of_any_part(ranks: int, tensor_ranks: int) -> None:
    length = 24 * ranks
    for part in parts(ranks):
        own_places = part.places(length, CPU)
        own_length = part.length(length)
        for first in range(0, own_length, own_length // tensor_ranks):
            rows = part.rows(first, length)
            seed = kernels.dropout_seed(1, 2, 5, length, rows.start, rows.turn, rows.second_start)
            local_length = own_length // tensor_ranks
            expected = own_places[first : first + local_length]
            samples = torch.tensor([5, 6]) * length
            numbers = (expected[:, None] + samples).flatten()
            assert torch.equal(dropout_rows(seed, 2 * local_length), numbers)


def heads(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, 16, 8], k and v [2, 2, 16, 8] in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def whole_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """By one explicit mask over the whole sequence."""
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=SCALE, enable_gqa=True)


def assert_alike(mixed: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Output and gradients of the inputs."""
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(9)).double()
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-14)
    own = torch.autograd.grad((mixed * weight).sum(), inputs, retain_graph=True)
    true = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    for gradient, true_gradient in zip(own, true, strict=True):
        torch.testing.assert_close(gradient, true_gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_calls_a_rank_are_causal_attention(ranks: int) -> None:
    q, k, v = heads(0)
    whole = whole_attention(q, k, v, None)
    for part in parts(ranks):
        places = part.places(16, CPU)
        mixed = attend_to_prefixes(q[:, :, places], k, v, SCALE, "auto", part.chunks(16))
        assert_alike(mixed, whole[:, :, places], (q, k, v))


def test_the_mask_that_kernels_know_begins_at_the_last_key() -> None:
    """What a GPU is handed in place of the mask in memory; `is_causal` would begin at the first."""
    q, k, v = heads(1)
    queries = q[:, :, 8:12]
    keys = k[:, :, :12]
    values = v[:, :, :12]
    attention = F.scaled_dot_product_attention
    known = attention(queries, keys, values, causal_lower_right(4, 12), enable_gqa=True)
    mask = prefix_mask(4, 12, CPU)
    masked = attention(queries, keys, values, mask, enable_gqa=True)
    torch.testing.assert_close(known, masked, rtol=0, atol=1e-14)
    first_key = attention(queries, keys, values, is_causal=True, enable_gqa=True)
    assert (first_key - masked).abs().max() > 0.1


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of what needs a GPU."""
    module = ModuleType("flash_attn")
    monkeypatch.setattr(module, "flash_attn_func", lower_right, raising=False)
    monkeypatch.setattr(module, "flash_attn_varlen_func", lower_right_by_document, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "varlen_attn", varlen)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("ranks", [2, 4])
def test_flash_attention_gets_each_chunk_with_the_keys_before_it(ranks: int) -> None:
    q, k, v = heads(2)
    whole = whole_attention(q, k, v, None)
    for part in parts(ranks):
        places = part.places(16, CPU)
        queries = q[:, :, places]
        mixed = attend_to_prefixes(queries, k, v, SCALE, "flash_attention", part.chunks(16))
        assert_alike(mixed, whole[:, :, places], (q, k, v))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("backend", PACKED_BACKENDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_gets_each_chunk_with_the_keys_of_its_documents(ranks: int, backend: str) -> None:
    q, k, v = heads(2)
    # Ends in the middle of chunks and at their borders, one of a single token.
    lengths = [[3, 5, 1, 7], [8, 8]]
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    documents = torch.stack(rows).int()
    whole = whole_attention(q, k, v, documents)
    for part in parts(ranks):
        places = part.places(16, CPU)
        cut = document_parts(documents, part.chunks(16))
        mixed = attention_by_part(q[:, :, places], k, v, SCALE, backend, cut)
        assert_alike(mixed, whole[:, :, places], (q, k, v))
        # Keys of documents that ended before the chunk are not handed over.
        assert all(len(one.keys) <= 8 or one.row == 0 for one in cut)


def test_the_stand_in_takes_the_arguments_of_torch_s_own() -> None:
    true_parameters = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(varlen).parameters.items():
        assert parameter.kind == true_parameters[name].kind


def test_documents_that_leave_a_rank_with_most_of_the_work_are_warned_of() -> None:
    documents = DocumentEnds(reset=True)
    tokens = np.zeros(33, np.int64)
    whole = Sample(tokens, (), np.array([], np.int64))
    # The last quarter is one document, the rest are single tokens: rank 0 holds the last chunk.
    uneven = Sample(tokens, (), np.arange(1, 25))
    even_batch = make_batch([whole], [0], 32, documents)
    uneven_batch = make_batch([uneven], [0], 32, documents)
    assert balance_warning([even_batch], 2) is None
    assert pairs_by_rank(uneven_batch.positions, 2) == [8 + 36, 16]
    warning = balance_warning([even_batch, uneven_batch], 2)
    assert warning is not None and "one of 2 context ranks 1.47 times" in warning
