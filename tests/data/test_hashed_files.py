"""Files that are read back are what was written, or are named;
files that shrink under a reader are named.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.corpus import Corpus, open_corpus, prebuild
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.left_out import LeftOut, read_left_out, write_left_out
from megatron_completep.data.loader import build_loader
from megatron_completep.data.writer import IndexedWriter, merge
from megatron_completep.errors import DataError
from megatron_completep.preprocess import report
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from tests.support.corpora import two_sources, write_random


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda *_: None)


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def bits_of(path: Path, number: int, seed: int = 0) -> list[int]:
    """Some of its bits, the first and the last among them."""
    bits = 8 * path.stat().st_size
    return [0, bits - 1, *random.Random(seed).sample(range(bits), number)]


# The journal of a preprocessing run


def run(folder: Path, name: str, **keywords: Any) -> dict[str, Any]:
    wanted = PreprocessSettings(
        (str(folder / "in"),), str(folder / name), TokenizerChoice("bytes"), append_eod=True
    )
    return preprocess(wanted, log_interval=10**9, block_bytes=200, **keywords)


def output_bytes(folder: Path, name: str) -> list[bytes]:
    return [
        (folder / f"{name}_text_document.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json")
    ]


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A folder with the work of every shard, `out.preprocess`,
    not merged yet, and the output `whole` that it must become.
    """
    (tmp_path / "in").mkdir()
    for name in "ab":
        lines = [
            json.dumps({"text": f"{name} {number} " * (number % 5)}) + "\n" for number in range(20)
        ]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))
    run(tmp_path, "whole")
    run(tmp_path, "out", shard=(0, 1))
    return tmp_path


@pytest.mark.parametrize("suffix", ["journal", "units"])
def test_a_flipped_bit_in_a_journal_is_said_and_its_work_is_done_again(
    unfinished: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    (journal,) = (unfinished / "out.preprocess").glob(f"*.{suffix}")
    kept = {path: path.read_bytes() for path in journal.parent.iterdir()}
    said = 0
    for bit in bits_of(journal, 25):
        journal.parent.mkdir(exist_ok=True)
        for path in journal.parent.iterdir():
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
        flip(journal, bit)
        for path in unfinished.glob("out_*"):
            path.unlink()
        capsys.readouterr()
        assert run(unfinished, "out")["status"] == "complete"
        assert output_bytes(unfinished, "out") == output_bytes(unfinished, "whole")
        said += f"that work is done again: {journal}, line " in capsys.readouterr().err
    assert said >= 26  # all but a newline at the very end, which leaves a torn line


def test_a_line_of_an_earlier_version_has_no_hash_and_is_done_again(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (journal,) = (unfinished / "out.preprocess").glob("*.journal")
    bare = [line.rpartition(b" ")[0] + b"\n" for line in journal.read_bytes().splitlines()]
    journal.write_bytes(b"".join(bare))
    run(unfinished, "out")
    assert output_bytes(unfinished, "out") == output_bytes(unfinished, "whole")
    assert (
        f"{len(bare)} records of finished work are not what was written" in capsys.readouterr().err
    )


def test_an_untouched_journal_says_nothing(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control."""
    run(unfinished, "out")
    assert "done again" not in capsys.readouterr().err


def test_a_finished_output_that_was_damaged_is_not_taken_for_complete(unfinished: Path) -> None:
    index = unfinished / "whole_text_document.idx"
    flip(index, 8 * 40)
    with pytest.raises(
        DataError, match=r"(?s)whole_text_document\.idx: .*give --overwrite to write it again"
    ):
        run(unfinished, "whole")
    assert run(unfinished, "whole", overwrite=True)["status"] == "complete"
    assert not IndexedDataset(unfinished / "whole_text_document").problems()


# Prebuilt tables


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    write_random(tmp_path / "a", [9] * 30)
    write_random(tmp_path / "b", [7] * 20)
    return two_sources(tmp_path, order="megatron")


def corpus_of(data: DataConfig) -> Corpus:
    return open_corpus(data, seq_length=5, total_samples=40, vocab_size=1000)


def samples_of(data: DataConfig) -> list[list[int]]:
    corpus = corpus_of(data)
    return [corpus[i].tokens.tolist() for i in range(40)]


FILES = (
    "document_index.npy",
    "sample_index.npy",
    "shuffle_index.npy",
    "dataset_index.npy",
    "dataset_sample_index.npy",
    "description.json",
)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_prebuilt_order_is_refused_by_name_and_prebuilding_mends_it(
    data: DataConfig, name: str
) -> None:
    expected = samples_of(data)
    folders = [path for path, _ in prebuild(data, seq_length=5, total_samples=40)]
    path = next(folder / name for folder in folders if (folder / name).exists())
    content, refused = path.read_bytes(), 0
    for bit in bits_of(path, 20):
        flip(path, bit)
        try:
            found = samples_of(data)
        except DataError as error:
            refused += 1
            assert str(path.parent) in str(error) and "prebuild it again" in str(error)
        else:
            # A space that became another one.
            assert name == "description.json" and found == expected
        path.write_bytes(content)
    assert refused == 22 or (name == "description.json" and refused > 10)
    flip(path, 8 * (len(content) - 3))
    assert [built for _, built in prebuild(data, seq_length=5, total_samples=40)].count(True) == 1
    assert samples_of(data) == expected


def test_tables_of_an_earlier_version_are_refused_and_prebuilt_again(data: DataConfig) -> None:
    (folder, _), *_ = prebuild(data, seq_length=5, total_samples=40)
    content = json.loads((folder / "description.json").read_text())
    del content["hashes"]
    (folder / "description.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="of an earlier version, which kept no hashes"):
        samples_of(data)
    prebuild(data, seq_length=5, total_samples=40)
    samples_of(data)


# What a run left out


def test_a_flipped_bit_in_the_list_of_rollbacks_is_refused(tmp_path: Path) -> None:
    entries = [LeftOut(12, 96, 112, 14), LeftOut(20, 200, 232, 24)]
    write_left_out(tmp_path, entries)
    path, refused = tmp_path / "rollbacks.json", 0
    content = path.read_bytes()
    bits = bits_of(path, 200)
    for bit in bits:
        flip(path, bit)
        try:
            assert read_left_out(tmp_path) == entries, bit  # a space that became another one
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
        path.write_bytes(content)
    assert refused > 0.8 * len(bits)
    # Of an earlier version.
    path.write_text(
        json.dumps([{"after_step": 12, "first_sample": 96, "next_sample": 112, "spike_step": 14}])
    )
    assert read_left_out(tmp_path) == entries[:1]


# Shortened under a reader


USES: dict[str, Callable[[IndexedDataset, Path], Any]] = {
    "a sample": lambda dataset, folder: (dataset.read(0, 5), dataset.document_starts(0, 5)),
    "a document": lambda dataset, folder: dataset.document(1),
    "a sequence": lambda dataset, folder: dataset.sequence(1),
    "all of it": lambda dataset, folder: dataset.problems(),
    "a copy": lambda dataset, folder: IndexedWriter(folder / "copy", "uint16").append(dataset),
}


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("use", USES)
def test_token_files_that_are_shortened_while_open_are_an_error_and_not_a_killed_process(
    tmp_path: Path, use: str, suffix: str
) -> None:
    write_random(tmp_path / "a", [3000] * 8)
    dataset = IndexedDataset(tmp_path / "a")
    USES[use](dataset, tmp_path)  # the control: whole, it is read
    os.truncate(tmp_path / f"a{suffix}", 0)
    if (use, suffix) == ("all of it", ".bin"):
        assert any("a.bin: content" in problem for problem in dataset.problems())
        return
    with pytest.raises(DataError, match=rf"a\{suffix}: .*was shortened"):
        USES[use](dataset, tmp_path)


@pytest.mark.parametrize("order", ["permutation", "megatron"])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_the_training_loop_hears_that_a_token_file_was_shortened(
    data: DataConfig, order: str, prefetch: int, suffix: str
) -> None:
    changed = DataConfig.model_validate({**data.model_dump(), "order": order, "prefetch": prefetch})
    sizes = {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_steps": 10,
        "vocab_size": 1000,
        "data_rank": 0,
        "data_size": 1,
    }
    with build_loader(changed, seq_length=5, **sizes) as loader:
        loader.next_step()
        os.truncate(f"{data.train[0].prefix}{suffix}", 10)
        with pytest.raises(DataError, match=rf"a\{suffix}: .*was shortened"):
            for _ in range(9):
                loader.next_step()


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_prebuilt_table_that_is_shortened_under_a_run_is_named(
    data: DataConfig, name: str
) -> None:
    folders = [path for path, _ in prebuild(data, seq_length=5, total_samples=40)]
    corpus = corpus_of(data)
    corpus[0]
    os.truncate(next(folder / name for folder in folders if (folder / name).exists()), 100)
    with pytest.raises(DataError, match=rf"{name}: was shortened"):
        [corpus[i] for i in range(40)]


def test_a_file_that_is_replaced_by_another_one_is_no_matter(tmp_path: Path) -> None:
    """As a new build does: the open reader keeps the file that it opened."""
    write_random(tmp_path / "a", [30] * 8)
    dataset = IndexedDataset(tmp_path / "a")
    expected = dataset.document(3).tolist()
    write_random(tmp_path / "b", [5])
    for suffix in ("idx", "bin"):
        os.replace(tmp_path / f"b.{suffix}", tmp_path / f"a.{suffix}")
    assert dataset.document(3).tolist() == expected


def test_merging_a_source_that_shrinks_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random(tmp_path / "a", [3000] * 8)
    monkeypatch.setattr(
        IndexedWriter, "_write_tokens", lambda self, tokens: os.truncate(tmp_path / "a.idx", 0)
    )
    with pytest.raises(DataError, match=r"a\.idx: was shortened"):
        merge([tmp_path / "a"], tmp_path / "b")
    assert not list(tmp_path.glob("b*"))
