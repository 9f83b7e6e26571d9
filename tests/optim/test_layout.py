"""The flat layout: every element owned exactly once,
aligned, whatever the sizes, the ranks and the buckets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_completep.optim.layout import (
    ALIGNMENT,
    Entry,
    Layout,
    Segment,
    elements_of_bucket,
    lay_out,
)
from tests.support.models import model_config, model_on_paper, small_setup

sizes = st.lists(st.integers(1, 700), min_size=1, max_size=12).map(
    lambda numbers: [Entry(f"p{i}", n) for i, n in enumerate(numbers)]
)
shard_counts = st.integers(1, 6)
bucket_sizes = st.integers(1, 3000)


def laid_out(parameters: list[Entry], shards: int, bucket_elements: int) -> Layout:
    return lay_out(parameters, {"gradient": shards}, bucket_elements)


def shard_count(layout: Layout) -> int:
    return layout.buckets[0].shards


def owners(layout: Layout) -> dict[str, Counter[int]]:
    """How often each element of each parameter is in some shard."""
    counts: dict[str, Counter[int]] = {}
    for shard in range(shard_count(layout)):
        for segment in layout.segments({"gradient": shard}):
            elements = range(segment.parameter_start, segment.parameter_start + segment.size)
            counts.setdefault(segment.name, Counter()).update(elements)
    return counts


@given(sizes, shard_counts, bucket_sizes)
def test_every_element_is_owned_exactly_once(
    parameters: list[Entry], shards: int, bucket: int
) -> None:
    counts = owners(laid_out(parameters, shards, bucket))
    assert counts == {entry.name: Counter(range(entry.size)) for entry in parameters}


@given(sizes, shard_counts, bucket_sizes)
def test_pieces_are_aligned_in_order_and_apart(
    parameters: list[Entry], shards: int, bucket: int
) -> None:
    layout = laid_out(parameters, shards, bucket)
    assert [Entry(piece.name, piece.size) for piece in layout.pieces] == parameters
    end = 0
    for piece in layout.pieces:
        assert piece.start % ALIGNMENT == 0 and piece.start >= end
        end = piece.start + piece.size
        bucket_of_piece = layout.buckets[piece.bucket]
        assert bucket_of_piece.start <= piece.start and end <= bucket_of_piece.stop
    assert layout.size >= end


@given(sizes, shard_counts, bucket_sizes)
def test_buckets_follow_each_other_and_split_evenly_and_aligned(
    parameters: list[Entry], shards: int, bucket: int
) -> None:
    layout = laid_out(parameters, shards, bucket)
    position = 0
    for place in layout.buckets:
        assert place.start == position and place.size % (ALIGNMENT * shards) == 0
        slices = [place.slice_of(shard) for shard in range(shards)]
        assert [a for a, _ in slices] == [place.start, *(b for _, b in slices[:-1])]
        assert slices[-1][1] == place.stop
        assert len({b - a for a, b in slices}) == 1
        position = place.stop
    assert layout.size == position and layout.shard_size * shards == layout.size


@given(sizes, shard_counts, bucket_sizes)
def test_a_shard_cut_from_the_flat_buffer_holds_the_elements_its_segments_name(
    parameters: list[Entry], shards: int, bucket: int
) -> None:
    layout = laid_out(parameters, shards, bucket)
    number = {entry.name: index for index, entry in enumerate(parameters)}
    flat = torch.full((layout.size,), -1, dtype=torch.int64)
    for piece in layout.pieces:
        flat[piece.start : piece.start + piece.size] = number[piece.name] * 1000 + torch.arange(
            piece.size
        )
    for shard in range(shards):
        own = torch.cat([flat[start:stop] for start, stop in layout.slices({"gradient": shard})])
        found = torch.full_like(own, -1)
        for s in layout.segments({"gradient": shard}):
            found[s.shard_start : s.shard_start + s.size] = (
                number[s.name] * 1000 + s.parameter_start + torch.arange(s.size)
            )
        assert torch.equal(own, found)


@given(sizes, shard_counts, bucket_sizes, st.data())
def test_parameters_asked_to_be_alone_have_a_bucket_of_their_own(
    parameters: list[Entry], shards: int, bucket: int, data: st.DataObject
) -> None:
    alone = frozenset(data.draw(st.sets(st.sampled_from([entry.name for entry in parameters]))))
    layout = laid_out(
        [entry._replace(alone=entry.name in alone) for entry in parameters], shards, bucket
    )
    tenants = Counter(piece.bucket for piece in layout.pieces)
    assert all(tenants[piece.bucket] == 1 for piece in layout.pieces if piece.name in alone)
    assert owners(layout) == {entry.name: Counter(range(entry.size)) for entry in parameters}


@given(sizes, shard_counts, bucket_sizes)
def test_a_bucket_is_closed_once_it_is_full(
    parameters: list[Entry], shards: int, bucket: int
) -> None:
    layout = laid_out(parameters, shards, bucket)
    for number, place in enumerate(layout.buckets):
        last = [piece for piece in layout.pieces if piece.bucket == number][-1]
        assert last.start - place.start < bucket  # before its last piece it had room
    assert all(place.size >= bucket for place in layout.buckets[:-1])


@given(sizes, st.data())
def test_parameters_of_two_axes_share_no_bucket_and_each_is_cut_over_its_own_ranks(
    parameters: list[Entry], data: st.DataObject
) -> None:
    """As with experts that a part of the data ranks holds:
    their state is divided over fewer ranks.
    """
    shards = {"gradient": 6, "few": 2}
    axes = data.draw(
        st.lists(st.sampled_from(list(shards)), min_size=len(parameters), max_size=len(parameters))
    )
    mixed = [entry._replace(axis=axis) for entry, axis in zip(parameters, axes, strict=True)]
    layout = lay_out(mixed, shards, 1000)
    axis_of = {entry.name: entry.axis for entry in mixed}
    assert len(layout.pieces) == len(mixed)
    for piece in layout.pieces:
        assert layout.buckets[piece.bucket].axis == axis_of[piece.name]
    counts: dict[str, Counter[int]] = {}
    for rank in range(6):
        ranks = {"gradient": rank, "few": rank % 2}
        segments = layout.segments(ranks)
        assert all(
            s.shard_start >= 0 and s.shard_start + s.size <= layout.shard_size for s in segments
        )
        assert sum(stop - start for start, stop in layout.slices(ranks)) == layout.shard_size
        for segment in segments:
            counts.setdefault(segment.name, Counter()).update(
                range(segment.parameter_start, segment.parameter_start + segment.size)
            )
    for entry in mixed:
        assert counts[entry.name] == dict.fromkeys(range(entry.size), 6 // shards[entry.axis])


def test_a_bucket_behind_one_of_another_axis_divides_by_its_own_shards() -> None:
    entries = [Entry("a", 1, "few"), Entry("b", 253, "gradient")]
    layout = lay_out(entries, {"gradient": 6, "few": 2}, 1000)
    assert all(bucket.size % bucket.shards == 0 for bucket in layout.buckets)


def test_shard_boundaries_cut_parameters_of_different_groups() -> None:
    """What the segment table is for: here shard 0 ends inside b and shard 1 begins there."""
    layout = laid_out(
        [Entry("a", 100), Entry("b", 300), Entry("c", 20)], shards=2, bucket_elements=10_000
    )
    first, second = (layout.segments({"gradient": shard}) for shard in range(2))
    assert first == (Segment("a", 0, 0, 100), Segment("b", 128, 0, 128))
    assert second == (Segment("b", 0, 128, 172), Segment("c", 192, 0, 20))


def test_a_shard_that_owns_only_padding_has_no_segments() -> None:
    layout = laid_out([Entry("a", 3)], shards=4, bucket_elements=1)
    assert [len(layout.segments({"gradient": shard})) for shard in range(4)] == [1, 0, 0, 0]


def test_the_check_of_ownership_finds_a_lost_element() -> None:
    class Careless(Layout):
        def segments(self, ranks: Mapping[str, int]) -> tuple[Segment, ...]:
            return tuple(
                Segment(s.name, s.shard_start, s.parameter_start, max(1, s.size - 1))
                for s in super().segments(ranks)
            )

    layout = laid_out([Entry("a", 100), Entry("b", 300)], 2, 10_000)
    assert owners(Careless(layout.pieces, layout.buckets)) != {
        "a": Counter(range(100)),
        "b": Counter(range(300)),
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_the_model_s_parameters_lie_in_backward_order(shards: int) -> None:
    model = model_config(num_layers=3, bias=True, norm="layernorm")
    gpt = model_on_paper(model)
    named = [Entry(name, p.numel()) for name, p in reversed(list(gpt.named_parameters()))]
    layout = laid_out(named, shards, 1 << 12)
    names = [piece.name for piece in layout.pieces]
    assert names[0] == "unembedding.weight" and names[-1] == "embedding.weight"
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert layers == sorted(layers, reverse=True)


def test_parameters_are_views_of_one_buffer_at_their_pieces() -> None:
    gpt, optimizer, _ = small_setup(dtype=torch.bfloat16)
    for piece in optimizer.shards.layout.pieces:
        parameter = dict(gpt.named_parameters())[piece.name]
        assert parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32
        assert parameter.data_ptr() == optimizer.shards.flat.data_ptr() + 2 * piece.start
        assert parameter.main_grad.data_ptr() == optimizer.shards.grad.data_ptr() + 4 * piece.start
        own = optimizer.shards.master[piece.start : piece.start + piece.size]
        assert torch.equal(own.to(torch.bfloat16), parameter.flatten())


def test_a_bucket_grows_with_the_ranks_that_sum_it_and_is_never_smaller_than_configured() -> None:
    configured = elements_of_bucket(40.0, 1)
    assert configured == 40 * 2**20 // 4
    assert elements_of_bucket(40.0, 40) == configured
    for ranks in (80, 1024, 4096):
        part = elements_of_bucket(40.0, ranks) / ranks
        assert part == configured / 40  # 1 MB of float32, however many ranks there are
