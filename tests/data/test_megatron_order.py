"""Samples and files against Megatron-Core itself
(a test-only dependency) and against golden vectors made with it.
"""

import contextlib
import importlib
import io
import itertools
import logging
import warnings
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.config.schema import DataConfig, SourceConfig
from megatron_completep.data import corpus as corpus_module
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.loader import DocumentEnds, make_batch
from megatron_completep.data.megatron_order import MegatronSource, blend_indices, build_tables
from megatron_completep.data.writer import IndexedWriter, merge
from megatron_completep.errors import DataError
from tests.support.corpora import two_sources, write_documents, write_random

LENGTHS = np.array([5, 3, 9, 4, 7], np.int32)
DOC_1, SAMPLE_1 = [4, 0, 1, 2, 3], [[0, 0], [0, 4], [1, 1], [2, 0], [3, 1], [3, 5], [4, 0]]
GOLDEN = {
    None: (DOC_1, SAMPLE_1, [5, 2, 3, 1, 0, 4]),
    6: (DOC_1, SAMPLE_1, [5, 2, 3, 1, 0, 4]),
    8: (
        [4, 0, 1, 2, 3, 3, 2, 1, 0, 4],
        [
            [0, 0],
            [0, 4],
            [1, 1],
            [2, 0],
            [3, 1],
            [3, 5],
            [4, 0],
            [5, 0],
            [6, 0],
            [6, 4],
            [6, 8],
            [8, 0],
            [8, 4],
            [9, 3],
        ],
        [0, 4, 3, 2, 5, 1, 7, 6, 9, 8, 11, 10, 12],
    ),
    15: (
        [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1],
        [
            *(
                [0, 0],
                [0, 4],
                [0, 8],
                [1, 3],
                [1, 7],
                [2, 2],
                [2, 6],
                [4, 0],
                [4, 4],
                [5, 3],
                [6, 3],
            ),
            *(
                [7, 0],
                [7, 4],
                [9, 0],
                [10, 0],
                [10, 4],
                [11, 3],
                [12, 0],
                [13, 0],
                [13, 4],
                [13, 8],
            ),
        ],
        [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10, 12, 19, 17, 14, 18, 16, 13, 15],
    ),
}


@pytest.mark.parametrize("num_samples", GOLDEN)
def test_tables_equal_the_golden_vectors(num_samples):
    tables = build_tables(LENGTHS, 0, 5, 4, num_samples, 1234)
    assert (
        tuple(tables[name].tolist() for name in ("document_index", "sample_index", "shuffle_index"))
        == GOLDEN[num_samples]
    )


@pytest.mark.parametrize(
    ("weights", "sources", "numbers"),
    [
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1, 2, 0], [0, 0, 0, 1, 2, 1, 1, 3]),
        ([0.3, 0.7], [1, 0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]),
    ],
)
def test_blends_equal_the_golden_vectors(weights, sources, numbers):
    assert [table.tolist() for table in blend_indices(weights, len(sources))] == [sources, numbers]


MODULES = ("blended_megatron_dataset_builder", "gpt_dataset", "indexed_dataset")


@pytest.fixture(scope="session")
def megatron():
    """Megatron-Core's data classes, quiet."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            blended, gpt, indexed = (
                importlib.import_module(f"megatron.core.datasets.{name}") for name in MODULES
            )
        except ImportError as error:
            pytest.skip(f"megatron-core 0.16.1 (test-only) is not installed: {error}")

    class Megatron:
        IndexedDataset, Builder = indexed.IndexedDataset, indexed.IndexedDatasetBuilder
        GPTDataset, GPTDatasetConfig = gpt.GPTDataset, gpt.GPTDatasetConfig
        BlendedBuilder = blended.BlendedMegatronDatasetBuilder

    return Megatron


class Tokenizer:
    """What GPTDatasetConfig needs to know of a tokenizer."""

    eod, pad, vocab_size = -5, -6, 1000
    unique_identifiers: ClassVar[dict[str, str]] = {}


def theirs(megatron, folder, sizes, *, seq_length, seed, **blend):
    """Megatron-Core's datasets for (train, validation, test)."""
    config = megatron.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=None,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blend,
    )
    return megatron.BlendedBuilder(megatron.GPTDataset, sizes, lambda: True, config).build()


def assert_same_samples(ours, their_dataset, samples):
    for index in range(samples):
        sample, expected = ours[index], their_dataset[index]
        assert sample.tokens[:-1].tolist() == expected["tokens"].tolist()
        assert sample.tokens[1:].tolist() == expected["labels"].tolist()


documents = st.lists(st.integers(0, 12), min_size=1, max_size=25).filter(
    lambda lengths: sum(lengths) >= 2
)


@settings(max_examples=40, deadline=None)
@given(
    lengths=documents,
    seq_length=st.integers(2, 9),
    seed=st.integers(0, 2**32 - 1),
    num_samples=st.integers(1, 60),
)
def test_one_source_gives_exactly_the_samples_of_gpt_dataset(
    megatron, tmp_path_factory, lengths, seq_length, seed, num_samples
):
    folder = tmp_path_factory.mktemp("gpt")
    dataset = write_random(folder / "a", lengths)
    prefix = str(folder / "a")
    expected = theirs(
        megatron,
        folder,
        [num_samples, 0, 0],
        seq_length=seq_length,
        seed=seed,
        blend_per_split=[([prefix], None), None, None],
    )[0]
    source = MegatronSource(dataset, seq_length, seed, num_samples).open()
    assert len(source) == len(expected)
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert source.tables[name].tolist() == getattr(expected, name).tolist(), name
        assert source.tables[name].dtype == getattr(expected, name).dtype
    assert_same_samples(source, expected, len(source))


@pytest.mark.parametrize("reset", [False, True])
def test_the_loss_is_masked_where_megatron_masks_it_for_eod_mask_loss(megatron, tmp_path, reset):
    """Documents end with Megatron's end token, which occurs nowhere else.

    Only positions and attention differ under a reset, not what counts.
    """
    random = np.random.default_rng(0)
    ended = [[*random.integers(0, 900, length), 999] for length in (7, 1, 12, 0, 30, 4)]
    dataset = write_documents(tmp_path / "a", ([document] for document in ended))

    class WithEnd(Tokenizer):
        eod = 999

    their_config = {"random_seed": 3, "sequence_length": 5, "tokenizer": WithEnd()}
    switches = {"reset_position_ids": reset, "reset_attention_mask": reset, "eod_mask_loss": True}
    blend = {"blend_per_split": [([str(tmp_path / "a")], None), None, None]}
    config = megatron.GPTDatasetConfig(
        **their_config, **switches, **blend, path_to_cache=None, create_attention_mask=False
    )
    expected = megatron.BlendedBuilder(
        megatron.GPTDataset, [20, 0, 0], lambda: True, config
    ).build()[0]

    source = MegatronSource(dataset, 5, 3, 20).open()
    masked = make_batch([source[i] for i in range(20)], range(20), 5, DocumentEnds(reset, True))
    assert masked.loss_mask.tolist() == [expected[i]["loss_mask"].tolist() for i in range(20)]
    assert masked.positions.tolist() == [expected[i]["position_ids"].tolist() for i in range(20)]
    plain = make_batch([source[i] for i in range(20)], range(20), 5, DocumentEnds(reset))
    assert plain.loss_mask.all() and 0 < masked.loss_mask.mean() < 1


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    num_samples=st.integers(4, 60),
    weighted=st.booleans(),
    data=st.data(),
)
def test_blends_and_splits_give_exactly_the_samples_of_blended_dataset(
    megatron, tmp_path_factory, sizes, seed, num_samples, weighted, data
):
    folder = tmp_path_factory.mktemp("blend")
    weighted = weighted or len(sizes) > 1
    weights = (
        [data.draw(st.floats(0.05, 10).map(lambda w: round(w, 3))) for _ in sizes]
        if weighted
        else None
    )
    prefixes = []
    for number, documents in enumerate(sizes):
        random = np.random.default_rng([seed, number])
        write_random(folder / str(number), random.integers(3, 30, size=documents), seed=number)
        prefixes.append(str(folder / str(number)))
    train, validation, _ = theirs(
        megatron,
        folder,
        [num_samples, 6, 0],
        seq_length=5,
        seed=seed,
        blend=(prefixes, weights),
        split="60,40",
    )
    sources = [
        SourceConfig(prefix=p, weight=w) for p, w in zip(prefixes, weights or [None], strict=True)
    ]
    config = DataConfig(train=sources, split="60,40", seed=seed, order="megatron")
    for split, expected, samples in (("train", train, num_samples), ("validation", validation, 6)):
        ours = corpus_module.open_corpus(
            config, seq_length=5, total_samples=samples, vocab_size=1000, split=split
        )
        assert_same_samples(ours, expected, samples)


def test_another_seed_gives_other_samples(megatron, tmp_path):
    """Negative control of the comparison."""
    dataset = write_random(tmp_path / "a", [30] * 20)
    blend = [([str(tmp_path / "a")], None), None, None]
    expected = theirs(megatron, tmp_path, [20, 0, 0], seq_length=5, seed=1, blend_per_split=blend)[
        0
    ]
    with pytest.raises(AssertionError):
        assert_same_samples(MegatronSource(dataset, 5, 2, 20).open(), expected, 20)


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 999), max_size=6), max_size=3), max_size=8),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_files_are_byte_identical_with_megatron_both_ways(
    megatron, tmp_path_factory, documents, dtype
):
    folder = tmp_path_factory.mktemp("files")
    writer = IndexedWriter(folder / "ours", dtype)
    builder = megatron.Builder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        writer.add_document(document)
        if document:
            builder.add_document(
                [token for sequence in document for token in sequence],
                [len(sequence) for sequence in document],
            )
        else:
            builder.end_document()
    writer.close()
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (
            folder / f"theirs.{suffix}"
        ).read_bytes()
    tokens = [[token for sequence in document for token in sequence] for document in documents]
    dataset = IndexedDataset(folder / "theirs")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == tokens
    if any(tokens):  # Megatron cannot map an empty .bin
        read = megatron.IndexedDataset(str(folder / "ours"))
        assert [read[i].tolist() for i in range(len(read))] == [
            sequence for document in documents for sequence in document
        ]
        assert read.document_indices.tolist() == dataset.document_indices.tolist()


def test_merging_gives_the_bytes_that_megatron_merges_to(megatron, tmp_path):
    for name, lengths in (("a", [3, 0, 5]), ("b", [2, 2]), ("c", [7])):
        write_random(tmp_path / name, lengths, seed=len(lengths))
    merge([tmp_path / name for name in "abc"], tmp_path / "ours")
    builder = megatron.Builder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in "abc":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (
            tmp_path / f"theirs.{suffix}"
        ).read_bytes()


def config_of(folder, **changes):
    return two_sources(folder, **{"order": "megatron", **changes})


def open_corpus(config, **changes):
    return corpus_module.open_corpus(
        config, **({"seq_length": 5, "total_samples": 40, "vocab_size": 1000} | changes)
    )


def test_prebuilt_tables_are_used_and_change_nothing(tmp_path, monkeypatch):
    write_random(tmp_path / "a", [9] * 30)
    write_random(tmp_path / "b", [7] * 20)
    config = config_of(tmp_path)
    built = [open_corpus(config)[i].tokens.tolist() for i in range(40)]
    folders = corpus_module.prebuild(config, seq_length=5, total_samples=40)
    assert [new for _, new in folders] == [True] * 3
    assert [new for _, new in corpus_module.prebuild(config, seq_length=5, total_samples=40)] == [
        False
    ] * 3
    # Building again would fail.
    monkeypatch.setattr("megatron_completep.data.megatron_order.build_tables", None)
    assert [open_corpus(config)[i].tokens.tolist() for i in range(40)] == built
    with pytest.raises(TypeError):
        open_corpus(config, total_samples=41)  # another run has other tables

    np.save(folders[0][0] / "shuffle_index.npy", np.arange(3))
    with pytest.raises(
        DataError, match=r"shuffle_index\.npy: content: .* Remove the folder, or prebuild it again"
    ):
        open_corpus(config)
    (folders[0][0] / "description.json").write_bytes(
        (folders[1][0] / "description.json").read_bytes()
    )
    with pytest.raises(DataError, match="is not the one its name stands for"):
        open_corpus(config)
    (folders[0][0] / "description.json").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"the prebuilt index cannot be read .* Remove the folder"):
        open_corpus(config)


def test_sources_in_epochs_and_too_small_ones_are_refused(tmp_path):
    write_random(tmp_path / "a", [1])
    write_random(tmp_path / "b", [7] * 20)
    with pytest.raises(DataError, match="a source is given in epochs"):
        open_corpus(
            config_of(tmp_path, train=[SourceConfig(prefix=str(tmp_path / "b"), epochs=1.0)])
        )
    with pytest.raises(DataError, match=r"a\.bin: sequences 0 to 0 hold 1 tokens, too few"):
        open_corpus(config_of(tmp_path))
    with pytest.raises(DataError, match="sample 999 was asked for"):
        open_corpus(config_of(tmp_path, train=[SourceConfig(prefix=str(tmp_path / "b"))]))[999]


def test_documents_of_a_sample_are_marked_where_their_tokens_meet(tmp_path):
    dataset = write_random(tmp_path / "a", [3, 0, 4, 2, 6])
    source = MegatronSource(dataset, 5, 3, 8).open()
    for index in range(8):
        sample = source[index]
        joined = [dataset.tokens[span.begin : span.end].tolist() for span in sample.spans]
        assert list(itertools.chain(*joined)) == sample.tokens.tolist() and len(sample.tokens) == 6
        assert sample.starts.tolist() == np.cumsum([len(part) for part in joined[:-1]]).tolist()
