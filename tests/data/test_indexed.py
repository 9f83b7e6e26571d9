import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.data.indexed import HEADER, IndexedDataset, dtype_for_vocabulary
from megatron_completep.data.writer import IndexedWriter, merge, split
from megatron_completep.errors import DataError
from tests.support.corpora import write_documents

GOLDEN_BIN = "0100020003000400050006000700080009000a00"
GOLDEN_IDX = (
    "4d4d494449445800000100000000000000080400000000000000050000000000000003000000020000000100000004000000"
    "000000000000000006000000000000000a000000000000000c000000000000000000000000000000020000000000000003000000"
    "0000000003000000000000000400000000000000"
)
GOLDEN_DOCUMENTS = [[[1, 2, 3], [4, 5]], [[6]], [], [[7, 8, 9, 10]]]


def flat(documents):
    return [[token for sequence in document for token in sequence] for document in documents]


def read(dataset):
    return [dataset.document(i).tolist() for i in range(len(dataset))]


def test_writer_gives_the_golden_bytes(tmp_path):
    write_documents(tmp_path / "a", GOLDEN_DOCUMENTS)
    assert (tmp_path / "a.bin").read_bytes().hex() == GOLDEN_BIN
    assert (tmp_path / "a.idx").read_bytes().hex() == GOLDEN_IDX


def test_reader_reads_the_golden_bytes_without_a_sidecar(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "a.idx").write_bytes(bytes.fromhex(GOLDEN_IDX))
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.lengths.tolist() == [3, 2, 1, 4]
    assert dataset.pointers.tolist() == [0, 6, 10, 12]
    assert dataset.document_indices.tolist() == [0, 2, 3, 3, 4]
    assert read(dataset) == flat(GOLDEN_DOCUMENTS)
    assert [dataset.sequence(i).tolist() for i in range(4)] == [
        [1, 2, 3],
        [4, 5],
        [6],
        [7, 8, 9, 10],
    ]
    assert [dataset.document_at(t) for t in range(10)] == [0, 0, 0, 0, 0, 1, 3, 3, 3, 3]
    assert dataset.document_starts(0, 10).tolist() == [5, 6]
    assert dataset.problems() == []


def test_many_documents_at_once_equal_one_by_one(tmp_path):
    lengths = [3, 0, 2, 5]
    with IndexedWriter(tmp_path / "a", "int32") as writer:
        writer.add_documents(np.arange(10), lengths)
    tokens = iter(range(10))
    write_documents(tmp_path / "b", [[[next(tokens) for _ in range(n)]] for n in lengths], "int32")
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


documents_strategy = st.lists(
    st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=3), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    documents=documents_strategy,
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "int64"]),
)
def test_what_is_written_is_read_back(tmp_path_factory, documents, dtype):
    documents = [[[t % 128 for t in s] if dtype == "int8" else s for s in d] for d in documents]
    dataset = write_documents(tmp_path_factory.mktemp("round") / "a", documents, dtype)
    assert dataset.dtype == np.dtype(dtype)
    assert read(dataset) == flat(documents)
    assert dataset.num_sequences == sum(map(len, documents))
    owner = [d for d, document in enumerate(flat(documents)) for _ in document]
    assert [dataset.document_at(t) for t in range(dataset.num_tokens)] == owner
    if owner:
        assert dataset.document_starts(0, len(owner)).tolist() == [
            t for t in range(1, len(owner)) if owner[t] != owner[t - 1]
        ]
    assert dataset.problems() == []


@settings(max_examples=30, deadline=None)
@given(corpora=st.lists(documents_strategy, min_size=1, max_size=4))
def test_merge_equals_writing_everything_at_once(tmp_path_factory, corpora):
    folder = tmp_path_factory.mktemp("merge")
    for number, documents in enumerate(corpora):
        write_documents(folder / str(number), documents)
    merge([folder / str(number) for number in range(len(corpora))], folder / "merged")
    write_documents(folder / "whole", [document for documents in corpora for document in documents])
    for suffix in ("bin", "idx", "json"):
        assert (folder / f"merged.{suffix}").read_bytes() == (
            folder / f"whole.{suffix}"
        ).read_bytes()


def test_split_parts_merge_back_into_the_whole(tmp_path):
    documents = [[[i] * (i % 7)] for i in range(50)]
    write_documents(tmp_path / "whole", documents)
    split(tmp_path / "whole", [6, 3, 1], [tmp_path / name for name in "abc"])
    assert [len(IndexedDataset(tmp_path / name)) for name in "abc"] == [30, 15, 5]
    merge([tmp_path / name for name in "abc"], tmp_path / "again")
    assert (tmp_path / "again.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_merge_refuses_mixed_types_tokenizers_and_its_own_output(tmp_path):
    write_documents(tmp_path / "a", GOLDEN_DOCUMENTS, tokenizer={"type": "bytes"})
    write_documents(tmp_path / "b", GOLDEN_DOCUMENTS, "int32", tokenizer={"type": "bytes"})
    write_documents(tmp_path / "c", GOLDEN_DOCUMENTS, tokenizer={"type": "tiktoken"})
    with pytest.raises(DataError, match=r"b\.idx: dtype code"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(DataError, match=r"c\.json: tokenizer"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(DataError, match="an input as well as an output"):
        merge([tmp_path / "a"], tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []
    assert read(IndexedDataset(tmp_path / "a")) == flat(GOLDEN_DOCUMENTS)


def test_nothing_valid_exists_before_close_and_abort_leaves_nothing(tmp_path):
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([[1, 2, 3]])
    assert not (tmp_path / "a.idx").exists() and not (tmp_path / "a.bin").exists()
    writer._idx.flush()
    # A partial index is no index even under its final name.
    (tmp_path / "a.idx.partial").rename(tmp_path / "b.idx")
    (tmp_path / "b.bin").write_bytes(b"\1\0\2\0\3\0")
    with pytest.raises(DataError, match=r"b\.idx: magic"):
        IndexedDataset(tmp_path / "b")
    writer.abort()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.bin", "b.idx"]
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "c", "uint16") as writer:
        raise RuntimeError
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_crash_while_renaming_never_shows_a_mixed_pair(tmp_path, monkeypatch, fails_at):
    """An older corpus of the same size lies under the same prefix:
    the worst case, since sizes would agree.
    """
    write_documents(tmp_path / "a", [[[1, 2, 3], [4]], [[5]]])
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([[9], [8, 7, 6, 5]])
    calls = iter(range(3))
    replace = Path.replace

    def crashing(self, target):
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", crashing)
        writer.close()
    with pytest.raises(DataError, match=r"a\.idx: No such file"):
        IndexedDataset(tmp_path / "a")
    # Writing again mends it.
    assert read(write_documents(tmp_path / "a", [[[9], [8, 7]]])) == [[9, 8, 7]]


def test_writer_refuses_tokens_that_do_not_fit(tmp_path):
    writer = IndexedWriter(tmp_path / "a", "uint16")
    for wrong in (65536, -1):
        with pytest.raises(DataError, match=f"document 0: token id {wrong} does not fit uint16"):
            writer.add_document([[1, wrong]])
    with pytest.raises(DataError, match="lengths sum to 3"):
        writer.add_documents([1, 2], [1, 2])
    writer.abort()
    with pytest.raises(DataError, match="float32 cannot be stored"):
        IndexedWriter(tmp_path / "a", "float32")


def test_dtype_follows_the_vocabulary_as_in_megatron():
    assert dtype_for_vocabulary(65499) == np.uint16
    assert dtype_for_vocabulary(65500) == np.int32


def patch(path: Path, offset: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(new)] = new
    path.write_bytes(raw)


POINTERS, INDICES = HEADER.size + 16, HEADER.size + 48


@pytest.mark.parametrize(
    ("offset", "new", "field"),
    [
        (0, b"X", "magic"),
        (9, b"\2", "version"),
        (17, b"\7", "dtype code"),
        (17, b"\x63", "dtype code"),
        (17, b"\4", "size"),
        (18, b"\5", "size"),
        (26, b"\4", "size"),
        (26, bytes(8), "document_indices"),
        (HEADER.size, b"\4", "pointers"),
        (HEADER.size + 3, b"\xff", "lengths"),
        (POINTERS, b"\2", "pointers"),
        (POINTERS + 8, b"\4", "pointers"),
        (INDICES, b"\1", "document_indices"),
        (INDICES + 8, b"\4", "document_indices"),
        (INDICES + 32, b"\3", "document_indices"),
    ],
)
def test_a_corrupted_index_names_file_and_field(tmp_path, offset, new, field):
    (tmp_path / "a.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "a.idx").write_bytes(bytes.fromhex(GOLDEN_IDX))
    patch(tmp_path / "a.idx", offset, new)
    with pytest.raises(DataError, match=rf"a\.(idx|bin): {field}"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("suffix", "size"), [("idx", 0), ("idx", 20), ("idx", 80), ("bin", 0), ("bin", 19), ("bin", 18)]
)
def test_a_truncated_file_is_refused(tmp_path, suffix, size):
    write_documents(tmp_path / "a", GOLDEN_DOCUMENTS)
    os.truncate(tmp_path / f"a.{suffix}", size)
    with pytest.raises(DataError, match=rf"a\.{suffix}: (header|size)"):
        IndexedDataset(tmp_path / "a")


def test_a_file_that_shrinks_while_in_use_is_an_error_not_a_crash(tmp_path):
    dataset = write_documents(tmp_path / "a", [[list(range(10_000))]])
    assert dataset.read(9_000, 9_003).tolist() == [9_000, 9_001, 9_002]
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(
        DataError,
        match=r"a\.bin: tokens 9000 to 9002 cannot be read: the file was shortened while in use",
    ):
        dataset.read(9_000, 9_003)


def test_a_missing_file_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere\.idx: No such file or directory.*without the suffix"
    ):
        IndexedDataset(tmp_path / "nowhere")


def test_the_sidecar_finds_a_changed_token_and_a_sidecar_of_other_files(tmp_path):
    dataset = write_documents(tmp_path / "a", GOLDEN_DOCUMENTS)
    assert dataset.problems() == []
    patch(tmp_path / "a.bin", 0, b"\2")
    assert [problem.split(": ")[1] for problem in IndexedDataset(tmp_path / "a").problems()] == [
        "content"
    ]
    sidecar = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(sidecar | {"tokens": 11}))
    with pytest.raises(DataError, match=r"a\.json: tokens: 11, but the token files have 10"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: cannot be read as JSON"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.json").write_text('{"something": "else"}')
    assert IndexedDataset(tmp_path / "a").sidecar is None


def test_a_multimodal_index_opens_and_is_not_merged(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "a.idx").write_bytes(bytes.fromhex(GOLDEN_IDX) + bytes([0, 1, 0, 1]))
    modes = IndexedDataset(tmp_path / "a").modes
    assert modes is not None and modes.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="modes"):
        merge([tmp_path / "a"], tmp_path / "b")


def test_a_fault_inside_a_huge_index_is_found_by_the_full_check(tmp_path, monkeypatch):
    write_documents(tmp_path / "a", [[[1, 2]] for _ in range(100_000)])
    patch(tmp_path / "a.idx", HEADER.size + 4 * 100_000 + 8 * 78_500, b"\1")
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match="pointers: sequence 78499"):
        IndexedDataset(tmp_path / "a")
    monkeypatch.setattr("megatron_completep.data.indexed.FULL_CHECK_BYTES", 1000)
    assert "pointers: sequence 78499" in IndexedDataset(tmp_path / "a").problems()[0]


FUZZED = [[[1, 2, 3], [4, 5]], [[6]], [], [[7, 8, 9, 10]], [[11] * 20], [[], [12, 13]]]


def mutated(original, random):
    """The bytes of an index with random bits, bytes or fields changed, cut off or added."""
    raw = bytearray(original)
    match random.integers(5):
        case 0:
            del raw[random.integers(len(raw)) :]
        case 1:
            raw += random.bytes(int(random.integers(1, 40)))
        case 2:
            at = int(random.integers(len(raw)))
            raw[at] ^= 1 << int(random.integers(8))
        case 3:  # a whole field
            at = int(random.integers(len(raw) - 8))
            raw[at : at + 8] = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1][
                random.integers(6)
            ].to_bytes(8, "little")
        case 4:
            for at in random.integers(len(raw), size=3):
                raw[at] = int(random.integers(256))
    return raw


def fuzz(folder, mutations, unchanged):
    """Open that many mutated indices: DataError naming the file,
    or data for which `unchanged` holds. Returns how many opened.
    """
    random = np.random.default_rng(7)
    original = (folder / "a.idx").read_bytes()
    opened = 0
    for _ in range(mutations):
        raw = mutated(original, random)
        with open(
            folder / "a.idx", "r+b"
        ) as file:  # in place: ext4 flushes a file that was emptied and written again
            file.write(raw)
            file.truncate()
        try:
            dataset = IndexedDataset(folder / "a")
        except DataError as error:
            assert str(folder / "a.") in str(error)
        else:
            assert unchanged(dataset)
            opened += 1
    return opened


def test_ten_thousand_mutated_indices_give_an_error_or_the_same_data(tmp_path):
    expected = read(write_documents(tmp_path / "a", FUZZED))
    opened = fuzz(tmp_path, 10_000, lambda dataset: read(dataset) == expected)
    assert 0 < opened < 1000


def test_mutated_indices_without_a_sidecar_never_change_tokens_or_sequences(tmp_path):
    """The format has nothing to compare the grouping of sequences into documents with:
    it may differ, but stays a valid one.
    """
    write_documents(tmp_path / "a", FUZZED)
    (tmp_path / "a.json").unlink()
    original = IndexedDataset(tmp_path / "a")
    lengths, tokens = original.lengths.tolist(), original.tokens.tolist()

    def unchanged(dataset):
        documents = [token for document in read(dataset) for token in document]
        return dataset.lengths.tolist() == lengths and documents == tokens

    assert 0 < fuzz(tmp_path, 3000, unchanged) < 600
