"""Preprocessing: what it reads, in which order, what it drops,
and that nothing but inputs and settings decides the bytes.
"""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.errors import DataError
from megatron_completep.preprocess import encode, report, work
from megatron_completep.preprocess.progress import Display
from megatron_completep.preprocess.quality import Limits, first_occurrences
from megatron_completep.preprocess.readers import Document, describe_place, read_documents
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.sources import blocks_of, find_sources, make_units

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda raw: lzma.compress(raw, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing is most of a small run's time; the tests marked so draw."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(report, "_draw", lambda *_: None)


def run(
    folder: Path,
    *inputs: Path | str,
    name: str = "out",
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Preprocess with the bytes tokenizer into folder/name."""
    wanted = PreprocessSettings(
        tuple(map(str, inputs)), str(folder / name), TokenizerChoice("bytes"), **options
    )
    return preprocess(wanted, **{"log_interval": 10**9, **(keywords or {})})


def texts_of(prefix: Path | str) -> list[str]:
    data = IndexedDataset(prefix)
    assert not data.problems()
    documents = (data.document(i) for i in range(len(data)))
    return [document[document < 256].astype(np.uint8).tobytes().decode() for document in documents]


def lines_of(texts: list[str], key: str = "text") -> bytes:
    return b"".join(
        json.dumps({"id": number, key: text}).encode() + b"\n" for number, text in enumerate(texts)
    )


TEXTS = ["first", "", "zwei\r\nZeilen", "三", "last \u2581"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines_of(TEXTS)))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](b"one\nfile"))
    (tmp_path / f"c.dat{ending}").write_bytes(COMPRESS[ending](b"line 1\r\n\nline 2"))
    run(tmp_path, tmp_path / f"a.jsonl{ending}", tmp_path / f"b.txt{ending}")
    assert texts_of(tmp_path / "out_text_document") == [*TEXTS, "one\nfile"]
    run(tmp_path, tmp_path / f"c.dat{ending}", name="lines", input_format="lines")
    assert texts_of(tmp_path / "lines_text_document") == ["line 1", "line 2"]


def test_parquet_columns_give_one_output_each(tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS, "title": [text.upper() for text in TEXTS], "n": range(5)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    summary = run(tmp_path, tmp_path / "a.parquet", json_keys=("title", "text"))
    assert texts_of(tmp_path / "out_text_document") == TEXTS
    assert texts_of(tmp_path / "out_title_document") == [text.upper() for text in TEXTS]
    assert [output["key"] for output in summary["outputs"]] == ["title", "text"]


def test_the_order_is_that_of_the_inputs_and_sorted_within_folders_and_globs(
    tmp_path: Path,
) -> None:
    for name in ("z/b.txt", "z/a/x.md", "z/ignored.pyc", "z/.hidden.txt", "y/2.py", "y/deep/1.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    run(tmp_path, tmp_path / "z", f"{tmp_path}/y/**/*.py", tmp_path / "z/ignored.pyc")
    assert texts_of(tmp_path / "out_text_document") == [
        "z/a/x.md",
        "z/b.txt",
        "y/2.py",
        "y/deep/1.py",
        "z/ignored.pyc",
    ]


def test_the_end_of_document_token_follows_every_document_that_has_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["ab", "", "c"]))
    run(tmp_path, tmp_path / "a.jsonl", append_eod=True)
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data.document(i).tolist() for i in range(3)] == [[97, 98, 256], [], [99, 256]]
    assert (data.num_sequences, data.dtype.name) == (2, "uint16")


def test_tokenizer_and_counts_are_recorded_beside_the_output(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    summary = run(tmp_path, tmp_path / "a.jsonl", append_eod=True)
    sidecar = json.loads((tmp_path / "out_text_document.json").read_text())
    assert sidecar["tokenizer"]["type"] == "bytes"
    assert len(sidecar["tokenizer"]["hash"]) == 16
    assert (sidecar["documents"], sidecar["append_eod"]) == (5, True)
    size = sum(len(text.encode()) for text in TEXTS)
    assert sidecar["tokens"] == size + 4
    lengths = {
        name: value
        for name, value in summary["text_bytes_a_document"].items()
        if not name.startswith("p")
    }
    assert lengths == {"total": size, "mean": size / 5, "min": 0, "max": 12}
    assert summary["text_bytes_a_document"]["p50"] == 5
    assert json.loads((tmp_path / "out_report.json").read_text())["bytes_a_token"] == size / (
        size + 4
    )
    assert not (tmp_path / "out.preprocess").exists()


def test_the_report_draws_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    run(tmp_path, tmp_path / "a.jsonl")
    assert (tmp_path / "out_report.png").read_bytes().startswith(b"\x89PNG")


def test_percentiles_are_within_their_bin() -> None:
    values = np.random.RandomState(3).lognormal(6, 2, 20_000).astype(np.int64)
    histogram = report.Histogram.empty()
    for part in np.array_split(values, 7):
        histogram.add(part)
    for q in (0.1, 0.5, 0.9, 0.99):
        assert histogram.percentile(q) == pytest.approx(np.quantile(values, q), rel=0.022, abs=1)
    assert histogram.summary()["mean"] == values.mean()


# Which bytes: independent of workers, of how work is cut, of shards


def corpus(folder: Path, documents: int = 60) -> list[Path]:
    """Files of every kind with texts of very different lengths, some of them repeated."""
    generator = random.Random(5)
    texts = [
        "é" * generator.choice([0, 1, 3, 40, 700]) + str(number % 23) for number in range(documents)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_bytes(lines_of(texts))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(texts[::-1])))
    for number in range(5):
        (folder / f"c{number}.txt").write_text(texts[number] * 3)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), folder / "d.parquet", row_group_size=7
    )
    return sorted(folder.iterdir())


def output_bytes(folder: Path, name: str) -> list[bytes]:
    return [
        (folder / f"{name}_text_document.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json")
    ]


def test_workers_and_blocks_do_not_change_a_byte(tmp_path: Path) -> None:
    files = corpus(tmp_path / "in")
    for number, (workers, block_bytes) in enumerate([(1, None), (1, 50), (2, 500), (3, 2000)]):
        options = {"append_eod": True, "deduplicate": True, "limits": Limits(min_characters=2)}
        run(
            tmp_path,
            *files,
            name=str(number),
            keywords={"workers": workers, "block_bytes": block_bytes},
            **options,
        )
        assert output_bytes(tmp_path, str(number)) == output_bytes(tmp_path, "0")
    run(tmp_path, *files, name="other", append_eod=True)
    assert output_bytes(tmp_path, "other") != output_bytes(tmp_path, "0")


def test_shards_of_a_job_array_give_the_same_bytes(tmp_path: Path) -> None:
    files = corpus(tmp_path / "in")
    run(tmp_path, *files, name="whole")
    for index in (2, 0):  # the third shard never ran
        summary = run(
            tmp_path, *files, name="parts", keywords={"shard": (index, 3), "block_bytes": 500}
        )
        assert summary["status"] == f"shard {index}/3 complete"
        assert not (tmp_path / "parts_text_document.idx").exists()
    run(tmp_path, *files, name="parts", keywords={"block_bytes": 500})
    assert output_bytes(tmp_path, "parts") == output_bytes(tmp_path, "whole")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    files = corpus(tmp_path / "in")
    run(tmp_path, *files, name="local")
    run(tmp_path, *files, name="ray", keywords={"engine": "ray", "workers": 2, "block_bytes": 500})
    assert output_bytes(tmp_path, "ray") == output_bytes(tmp_path, "local")


def test_ray_is_asked_for_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match="needs the package ray"):
        run(tmp_path, *corpus(tmp_path / "in"), keywords={"engine": "ray"})


LINE = st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b" "))


@settings(max_examples=300)
@given(st.lists(LINE, max_size=12), st.booleans(), st.integers(1, 40), st.sampled_from(["", ".gz"]))
def test_cut_anywhere_every_line_is_read_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    final_newline: bool,
    block_bytes: int,
    ending: str,
) -> None:
    raw = b"\n".join(lines) + (b"\n" if final_newline and lines else b"")
    path = tmp_path_factory.getbasetemp() / f"cut.txt{ending}"
    path.write_bytes(COMPRESS[ending](raw))
    (unit,) = make_units(find_sources([path], "lines"), block_bytes)
    found = []
    for block in blocks_of(unit, block_bytes):
        for document in read_documents(block, ["text"], "repair"):
            assert isinstance(document, Document)
            found.append((describe_place(block, document.place), document.texts[0]))
    expected = [
        (f"{path}, line {number}", line.removesuffix(b"\r").decode("utf-8", "replace"))
        for number, line in enumerate(raw.split(b"\n"), 1)
        if line.strip()
    ]
    assert found == expected


def test_compressed_lines_are_cut_into_blocks(tmp_path: Path) -> None:
    raw = b"".join(b"%d %s\n" % (number, b"x" * 1000) for number in range(5000))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    (unit,) = make_units(find_sources([tmp_path / "a.txt.zst"], "lines"), 1 << 20)
    blocks = list(blocks_of(unit, 1 << 20))
    assert 3 <= len(blocks) <= 5  # a block ends with the chunk of about 1 MB that fills it
    assert max(len(block.payload or b"") for block in blocks) < 3 << 20
    assert b"".join(block.payload or b"" for block in blocks) == raw
    assert [block.first_line for block in blocks] == [
        1 + sum((b.payload or b"").count(b"\n") for b in blocks[:i]) for i in range(len(blocks))
    ]
    assert sum(block.disk_bytes for block in blocks) == (tmp_path / "a.txt.zst").stat().st_size


# Quality


def test_duplicates_leave_only_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a", "b", "a", "ab", "b"]))
    (tmp_path / "b.jsonl").write_bytes(lines_of(["ab", "c", "a"]))
    summary = run(
        tmp_path,
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        deduplicate=True,
        keywords={"block_bytes": 10},
    )
    assert texts_of(tmp_path / "out_text_document") == ["a", "b", "ab", "c"]
    assert (summary["duplicates"], summary["documents"]) == (4, 4)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60), st.integers(1, 20))
def test_first_occurrences_are_found_in_any_number_of_passes(
    rows: list[tuple[int, int]], documents_a_pass: int
) -> None:
    hashes = np.array(rows, np.uint64).reshape(-1, 2)
    assert first_occurrences(hashes, documents_a_pass).tolist() == [
        row not in rows[:number] for number, row in enumerate(rows)
    ]


def test_length_limits_drop_and_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", "é", "éé", "ééé", "abcd", "abcde"]))
    summary = run(
        tmp_path,
        tmp_path / "a.jsonl",
        limits=Limits(min_characters=1, max_characters=4, min_tokens=3, max_tokens=5),
    )
    assert texts_of(tmp_path / "out_text_document") == ["éé", "abcd"]
    assert summary["dropped"] == {"characters": 2, "tokens": 2}


BAD_LINES = {
    "invalid UTF-8": b'{"text": "a\xff"}',
    "lone surrogate": b'{"text": "a\\ud800"}',
    "invalid JSON": b'{"text": "a}',
    "key text is missing; the keys are words": b'{"words": "a"}',
    "holds a number, expected a string": b'{"text": 1}',
    "expected a JSON object, found an array": b'["text"]',
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_bad_document_stops_the_run_with_file_line_and_reason(
    tmp_path: Path, reason: str, ending: str
) -> None:
    raw = lines_of(["good"] * 5) + b"\n" + BAD_LINES[reason] + b"\n" + lines_of(["good"])
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](raw))
    with pytest.raises(DataError, match="1 documents are bad") as caught:
        run(tmp_path, path, keywords={"block_bytes": 20})
    assert f"{path}, line 7: " in str(caught.value)
    assert reason in str(caught.value)
    assert not (tmp_path / "out_text_document.idx").exists()
    summary = run(tmp_path, path, keywords={"block_bytes": 20, "max_bad_documents": 1})
    assert (summary["bad_documents"], summary["documents"]) == (1, 6)
    assert reason in summary["bad_examples"][0]


def test_unicode_is_repaired_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a\xffb"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"\xe9t\xe9")
    summary = run(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt", unicode="repair")
    assert texts_of(tmp_path / "out_text_document") == [
        "a\ufffdb",
        "a\ufffdb",
        "😀",
        "\ufffdt\ufffd",
    ]
    assert summary["bad_documents"] == 0


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_truncated_archive_counts_as_bad_and_its_beginning_is_kept(
    tmp_path: Path, ending: str
) -> None:
    texts = [random.Random(number).randbytes(5000).hex() for number in range(500)]
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending](lines_of(texts))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated") as caught:
        run(tmp_path, path)
    assert str(path) in str(caught.value)
    run(tmp_path, path, keywords={"max_bad_documents": 1})
    kept = texts_of(tmp_path / "out_text_document")
    assert 50 < len(kept) < 400
    assert kept == texts[: len(kept)]


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_corrupted_archive_names_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(b"this is no archive at all")
    with pytest.raises(DataError, match="bad") as caught:
        run(tmp_path, path)
    assert f"{path}: cannot be read as {ending[1:]}" in str(caught.value)


def test_damaged_or_wrong_parquet_names_the_file(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column text; the columns are words\."):
        run(tmp_path, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row group 0, row 1: key words holds null"):
        run(tmp_path, tmp_path / "a.parquet", name="words", json_keys=("words",))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b.parquet: cannot be read as parquet"):
        run(tmp_path, tmp_path / "b.parquet", name="cut")


def test_a_link_beside_its_file_is_read_once_and_a_file_given_twice_is_refused(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "b.txt").write_text("b\n")
    (folder / "a.txt").symlink_to("b.txt")
    for whole in (folder, f"{folder}/*.txt"):
        assert len(find_sources([whole], "lines")) == 1
        with pytest.raises(DataError, match="named twice"):
            find_sources([whole, folder / "b.txt"], "lines")
    with pytest.raises(DataError, match="named twice"):
        find_sources([folder / "b.txt", folder / "b.txt"], "lines")


def test_all_unusable_inputs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(DataError) as caught:
        run(
            tmp_path,
            tmp_path / "absent.txt",
            tmp_path / "a.txt",
            tmp_path,
            f"{tmp_path}/*.csv",
            tmp_path / "empty folder",
        )
    for part in (
        "absent.txt: no such file",
        "a.txt: named twice",
        "*.csv: no such file",
        "empty folder: the folder has no file",
    ):
        assert part in str(caught.value)


def test_empty_inputs_leave_nothing_that_looks_valid(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="no document is left of 1 input files"):
        run(tmp_path, tmp_path / "a.jsonl")
    assert not list(tmp_path.glob("out_*"))


def test_plain_text_has_no_keys_and_a_tokenizer_may_have_no_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="plain text has no keys"):
        run(tmp_path, tmp_path / "a.txt", json_keys=("a", "b"))
    with pytest.raises(DataError, match="give each key once"):
        run(tmp_path, tmp_path / "a.txt", json_keys=("a", "a"))


# Started again


def test_the_same_run_again_does_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    run(tmp_path, tmp_path / "a.txt")
    before = (tmp_path / "out_text_document.idx").stat().st_mtime_ns
    assert run(tmp_path, tmp_path / "a.txt")["status"] == "already complete"
    assert (tmp_path / "out_text_document.idx").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, tmp_path / "a.txt", append_eod=True)
    assert (
        run(tmp_path, tmp_path / "a.txt", append_eod=True, keywords={"overwrite": True})["status"]
        == "complete"
    )
    assert IndexedDataset(tmp_path / "out_text_document").num_tokens == 2


def test_unfinished_work_of_another_run_is_refused(tmp_path: Path) -> None:
    files = corpus(tmp_path / "in")
    run(tmp_path, *files, keywords={"shard": (0, 2)})
    with pytest.raises(DataError, match="unfinished work of a run with other inputs"):
        run(tmp_path, *files, append_eod=True)
    files[0].write_bytes(files[0].read_bytes() + b"\n")
    with pytest.raises(DataError, match="unfinished work of a run with other inputs"):
        run(tmp_path, *files)


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    files = corpus(tmp_path / "in")
    wanted = PreprocessSettings(
        tuple(map(str, files)), str(tmp_path / "out"), TokenizerChoice("bytes")
    )
    held = work.WorkFolder(wanted, "fingerprint", exclusive=False)
    with pytest.raises(DataError, match="another process is at work"):
        run(tmp_path, *files)
    held.close()


def test_a_changed_shard_is_detected(tmp_path: Path) -> None:
    files = corpus(tmp_path / "in")
    for index in (0, 1):
        run(tmp_path, *files, keywords={"shard": (index, 2)})
    shard = max((tmp_path / "out.preprocess").glob("*.0.bin"), key=lambda name: name.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="are not what was written"):
        run(tmp_path, *files)
    assert not (tmp_path / "out_text_document.idx").exists()


def test_stopped_anywhere_in_the_merge_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = corpus(tmp_path / "in", 6)
    run(tmp_path, *files, name="whole")
    calls = limit = 0

    def step(self: Any, tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "step", step)
    while not (tmp_path / "stopped_report.json").exists():
        with suppress(KeyboardInterrupt):
            run(tmp_path, *files, name="stopped", keywords={"block_bytes": 500})
        assert (
            not list(tmp_path.glob("stopped_text_document.*"))
            or (tmp_path / "stopped_report.json").exists()
        )
        calls, limit = 0, limit + 1
    assert limit > 4
    assert output_bytes(tmp_path, "stopped") == output_bytes(tmp_path, "whole")


def test_stopped_after_any_block_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round one more block is finished;
    of the next one the tokens are written, but its journal line is torn.
    """
    files = corpus(tmp_path / "in", 12)
    run(tmp_path, *files, name="whole", deduplicate=True)
    original = encode.Encoder._finish
    rounds = calls = 0

    class Stopped(Exception):
        pass

    def finish(self: encode.Encoder, block: Any, result: Any) -> encode.Record:
        nonlocal calls
        calls += 1
        record = original(self, block, result)
        if calls == 2:
            self._journal.truncate(self._journal.tell() - rounds % 50 - 1)
            raise Stopped
        return record

    monkeypatch.setattr(encode.Encoder, "_finish", finish)
    while True:
        calls = 0
        try:
            run(tmp_path, *files, name="stopped", deduplicate=True, keywords={"block_bytes": 300})
            break
        except Stopped:
            rounds += 1
            assert not (tmp_path / "stopped_text_document.idx").exists()
    assert rounds > 10
    assert output_bytes(tmp_path, "stopped") == output_bytes(tmp_path, "whole")
