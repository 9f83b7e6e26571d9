"""Tokens to the ranks of their experts, and back. No token is dropped.

T tokens of this rank, k experts each, so that it has T k slots; R rows, the slots of all ranks
whose expert is held here. Ranks along the axis hold equal, consecutive runs of the experts.

Every sum runs over the k slots of a token in their order and nothing is added atomically, so that a
step is deterministic to the bit. What a rank does around a collective never depends on its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import read_on_host, start_all_to_all
from megatron_completep.parallel.expert_load import ExpertLoad, naming_load


class Dispatch:
    """Where the slots of one micro-batch and layer go.

    Made, it has sent the counts; `to_experts` waits for them, so that the caller can compute
    something between. The host reads the counts once.

    Attributes:
        counts: int64 [E], slots of this rank by expert, on the device.
        load: of the experts of this rank, for messages.
    """

    def __init__(self, experts: Tensor, num_experts: int, axis: Axis, layer: int):
        """experts: int64 [T, k], of each token. layer: for messages."""
        self._axis = axis
        self._local_experts = num_experts // axis.size
        self._top_k = experts.shape[1]
        flat = experts.flatten()
        # Stable, so that the rows of an expert lie in the order of the tokens.
        self._order = flat.argsort(stable=True)
        self.load = ExpertLoad(layer, mean=len(flat))
        self._place = _inverse(self._order)
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))
        equal = [self._local_experts] * axis.size
        # What arrives: rows by source and local expert.
        self._counting = start_all_to_all(self.counts, axis, equal, equal)
        self._sizes: list[int] = []

    @property
    def sizes(self) -> list[int]:
        """Rows of each local expert, once they have arrived."""
        return self._sizes

    def to_experts(self, tokens: Tensor) -> Tensor:
        """tokens [T, H] -> [R, H], sorted by local expert, then by source and token.

        Communicates over the axis, in backward too.
        """
        received_counts = self._counting.wait().view(self._axis.size, -1)
        sent_counts = self.counts.view(self._axis.size, -1)
        # The only values of a layer that the host waits for.
        sent, received = read_on_host(torch.stack([sent_counts, received_counts]))
        self._sizes = [sum(column) for column in zip(*received, strict=True)]
        self.load.rows = sum(self._sizes)
        rows: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            tokens, self._order, self._place, self._top_k, self.load
        )
        if self._axis.size == 1:
            return rows
        self._sent = [sum(counts) for counts in sent]
        self._received = [sum(counts) for counts in received]
        self._arrival_order = _by_expert(received_counts, sum(self._received))
        self._arrival_place = _inverse(self._arrival_order)
        arrived = _exchange(rows, self._axis, self._sent, self._received, self.load)
        return _reorder(arrived, self._arrival_order, self._arrival_place, self.load)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows [R, H] of the experts, weights [T, k] -> [T, H]: the weighted sum over the slots.

        Communicates over the axis, in backward too.
        """
        if self._axis.size > 1:
            rows = _reorder(rows, self._arrival_place, self._arrival_order, self.load)
            rows = _exchange(rows, self._axis, self._received, self._sent, self.load)
        out: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
            rows, weights, self._order, self._place, self.load
        )
        return out


class _Spread(torch.autograd.Function):
    """tokens [T, H] -> one row a slot, sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, top_k: int, load: ExpertLoad
    ) -> Tensor:
        ctx.load = load
        ctx.place = place
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    @naming_load
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None, None]:
        by_slot = d_rows.index_select(0, ctx.place)
        by_token = by_slot.view(-1, ctx.top_k, d_rows.shape[1])
        # Summed in a wide type, as a product over all of k would be.
        sum_dtype = torch.promote_types(d_rows.dtype, torch.float32)
        return by_token.sum(1, dtype=sum_dtype).to(d_rows.dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    """rows of the slots, sorted by expert, and weights [T, k] -> weighted sums [T, H]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor, load: ExpertLoad
    ) -> Tensor:
        ctx.load = load
        ctx.save_for_backward(rows, weights, order, place)
        by_token = rows.index_select(0, place).view(*weights.shape, rows.shape[1])
        # In the weights' type, at least float32.
        return (by_token * weights[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    @naming_load
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weights, order, place = ctx.saved_tensors
        by_token = rows.index_select(0, place).view(*weights.shape, rows.shape[1])
        d_weights = (by_token * d_out[:, None].to(weights.dtype)).sum(-1)
        d_by_token = d_out[:, None] * weights[..., None]
        d_rows = d_by_token.view(rows.shape).to(rows.dtype).index_select(0, order)
        return d_rows, d_weights, None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; `place` is the inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, load: ExpertLoad) -> Tensor:
        ctx.load = load
        ctx.place = place
        return rows.index_select(0, order)

    @staticmethod
    @naming_load
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        return d_rows.index_select(0, ctx.place), None, None, None


class _Exchange(torch.autograd.Function):
    """Runs of rows to the ranks of an axis; the gradients go the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        axis: Axis,
        sent: list[int],
        received: list[int],
        load: ExpertLoad,
    ) -> Tensor:
        ctx.load = load
        ctx.axis = axis
        ctx.sent = sent
        ctx.received = received
        return _all_to_all(rows, axis, sent, received)

    @staticmethod
    @naming_load
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None, None]:
        d_sent = _all_to_all(d_rows, ctx.axis, ctx.received, ctx.sent)
        return d_sent, None, None, None, None


def _all_to_all(rows: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    width = rows.shape[1]
    sent_elements = [width * count for count in sent]
    received_elements = [width * count for count in received]
    flat = rows.contiguous().view(-1)
    return start_all_to_all(flat, axis, sent_elements, received_elements).wait().view(-1, width)


def _exchange(
    rows: Tensor, axis: Axis, sent: list[int], received: list[int], load: ExpertLoad
) -> Tensor:
    out: Tensor = _Exchange.apply(rows, axis, sent, received, load)  # type: ignore[no-untyped-call]
    return out


def _reorder(rows: Tensor, order: Tensor, place: Tensor, load: ExpertLoad) -> Tensor:
    out: Tensor = _Reorder.apply(rows, order, place, load)  # type: ignore[no-untyped-call]
    return out


def _by_expert(counts: Tensor, rows: int) -> Tensor:
    """int64 [rows]: arrived rows, which lie by source and then expert, in the order of experts.

    counts: int64 [source, local expert].
    """
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return experts.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place
