import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.samples import PermutedSource
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.errors import DataError


def corpus_of(folder, lengths):
    with IndexedWriter(folder / "a", "int32") as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
    return IndexedDataset(folder / "a")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    seq_length=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_holds_every_sample_once_with_its_document_ends(
    tmp_path_factory, lengths, seq_length, seed
):
    dataset = corpus_of(tmp_path_factory.mktemp("samples"), lengths)
    total = sum(lengths)
    if (total - 1) // seq_length < 1:
        with pytest.raises(DataError, match="one sample takes"):
            PermutedSource(dataset, seq_length, seed)
        return
    source = PermutedSource(dataset, seq_length, seed)
    n = source.samples_per_epoch
    assert n == (total - 1) // seq_length
    boundaries = set(np.cumsum(lengths).tolist())
    for epoch in (0, 1, 5):
        seen = []
        for index in range(epoch * n, (epoch + 1) * n):
            sample = source[index]
            assert source.locate(index)[0] == epoch
            begin = int(sample.tokens[0])  # tokens are their own positions
            assert sample.tokens.tolist() == list(range(begin, begin + seq_length + 1))
            assert sample.starts.tolist() == [
                p for p in range(1, seq_length + 1) if begin + p in boundaries
            ]
            seen.append(begin // seq_length)
        assert sorted(seen) == list(range(n))


def test_every_epoch_seed_and_stream_has_its_own_order(tmp_path):
    dataset = corpus_of(tmp_path, [1000])
    source = PermutedSource(dataset, 10, 1)
    n = source.samples_per_epoch

    def order(source, epoch):
        return [source.locate(epoch * n + i)[1] for i in range(n)]

    orders = [
        order(source, 0),
        order(source, 1),
        order(PermutedSource(dataset, 10, 2), 0),
        order(PermutedSource(dataset, 10, 1, stream=1), 0),
    ]
    assert len({tuple(o) for o in orders}) == 4
    assert order(PermutedSource(dataset, 10, 1), 1) == orders[1]


def test_a_range_of_documents_keeps_to_its_tokens(tmp_path):
    dataset = corpus_of(tmp_path, [7, 5, 6, 9])
    source = PermutedSource(dataset, 3, 0, documents=(1, 3))
    tokens: list[int] = []
    for number in range(source.samples_per_epoch):
        tokens += source[number].tokens[:-1].tolist()
    assert sorted(tokens) == list(range(7, 16))


def test_too_small_a_corpus_names_file_tokens_and_remedy(tmp_path):
    with pytest.raises(
        DataError,
        match=r"a\.bin: documents 0 to 0 hold 10 tokens, one sample takes seq_length \+ 1 = 11",
    ):
        PermutedSource(corpus_of(tmp_path, [10]), 10, 0)
