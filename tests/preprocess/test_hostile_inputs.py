"""Inputs that are no regular files, JSON without an end of nesting,
names that are not UTF-8, documents without a bound.
"""

import gzip
import io
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_completep.data.files import printable
from megatron_completep.data.indexed import IndexedDataset, read_sidecar
from megatron_completep.data.left_out import read_left_out
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess import report
from megatron_completep.preprocess.quality import Limits
from megatron_completep.preprocess.readers import (
    BadDocument,
    Document,
    describe_place,
    read_documents,
)
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.sources import Source, blocks_of, find_sources, make_units
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer

LATIN_1 = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda *_: None)


def run(
    folder: Path,
    *inputs: Path | str,
    name: str = "out",
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    wanted = PreprocessSettings(
        tuple(map(str, inputs)), str(folder / name), TokenizerChoice("bytes"), **options
    )
    return preprocess(wanted, **{"log_interval": 10**9, **(keywords or {})})


def texts_of(prefix: Path | str) -> list[str]:
    data = IndexedDataset(prefix)
    return [bytes(data.document(i).tolist()).decode() for i in range(len(data))]


def lines_of(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


# What is no regular file


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # its name may have 108 bytes only


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("absent.jsonl")


SPECIAL = {
    "a pipe": (make_pipe, "is a pipe (FIFO), not a regular file"),
    "a socket": (make_socket, "is a socket, not a regular file"),
    "a device": (link_to_device, "is a character device, not a regular file"),
    "a broken link": (link_to_nothing, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("input_format", ["auto", "jsonl"])
@pytest.mark.parametrize("way", ["named", "in a folder", "by a glob"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_by_name_however_it_is_met(
    tmp_path: Path, kind: str, way: str, input_format: str
) -> None:
    make, reason = SPECIAL[kind]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines_of("a"))
    special = tmp_path / "in" / "b.jsonl"
    make(special)
    inputs = {
        "named": [tmp_path / "in" / "a.jsonl", special],
        "in a folder": [tmp_path / "in"],
        "by a glob": [f"{tmp_path}/in/*.jsonl"],
    }
    with pytest.raises(DataError) as refused:
        run(tmp_path, *inputs[way], input_format=input_format)
    assert f"{special}: {reason}" in str(refused.value)
    assert not list(tmp_path.glob("out*"))


def test_a_pipe_of_the_shell_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    """As in `preprocess_data --input a.jsonl <(cat big.jsonl)`:
    the descriptor's name has no ending to guess a format from.
    """
    (tmp_path / "a.jsonl").write_bytes(lines_of("a"))
    reading, writing = os.pipe()
    os.write(writing, lines_of("b", "c"))
    os.close(writing)
    try:
        with pytest.raises(
            DataError,
            match=(
                rf"/dev/fd/{reading}: is a pipe \(FIFO\), not a regular file. Write its "
                r"content to a file"
            ),
        ):
            run(tmp_path, tmp_path / "a.jsonl", f"/dev/fd/{reading}")
        assert os.read(reading, 1000) == lines_of("b", "c")
    finally:
        os.close(reading)


def test_a_regular_file_behind_a_descriptor_is_read(tmp_path: Path) -> None:
    """The control: what counts is what the file is, not where it is named."""
    (tmp_path / "b.jsonl").write_bytes(lines_of("b"))
    with open(tmp_path / "b.jsonl", "rb") as file:
        run(tmp_path, f"/dev/fd/{file.fileno()}", input_format="jsonl")
    assert texts_of(tmp_path / "out_text_document") == ["b"]


def test_all_special_files_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"(?s)a\.txt: is a pipe.*b\.txt: is a pipe"):
        find_sources([tmp_path])


def test_a_pattern_that_matches_a_file_in_several_ways_takes_it_once(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "c.txt").write_text("text")
    assert len(find_sources([tmp_path / "**" / "**" / "*.txt"])) == 1


def test_a_linked_folder_and_one_that_cannot_be_listed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"in/linked: is a link to a folder, which is not followed"):
        find_sources([tmp_path / "in"])
    assert len(find_sources([tmp_path / "in" / "a.txt", tmp_path / "in" / "linked"])) == 2
    (tmp_path / "in" / "linked").unlink()
    (tmp_path / "in" / "closed").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:  # root may list everything, so permissions cannot show it
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        DataError, match=r"in/closed: the folder cannot be listed \(Permission denied\)"
    ):
        find_sources([tmp_path / "in"])


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".json"])
def test_pipes_in_place_of_token_files_are_refused_instead_of_waited_for(
    tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    run(tmp_path, tmp_path / "a.txt")
    path = tmp_path / f"out_text_document{suffix}"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"out_text_document\{suffix}: is a pipe"):
        IndexedDataset(tmp_path / "out_text_document")


@pytest.mark.parametrize("family", ["sentencepiece", "huggingface"])
def test_a_tokenizer_from_a_pipe_is_refused(tmp_path: Path, family: str) -> None:
    os.mkfifo(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="tokenizer: is a pipe"):
        build_tokenizer(TokenizerChoice(family, str(tmp_path / "tokenizer")))


def test_training_a_tokenizer_refuses_pipes_and_reads_standard_input(tmp_path: Path) -> None:
    text = "".join(f"def function_{i}(a, b):\n    return a + {i} * b\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    os.mkfifo(tmp_path / "b.txt")
    output = str(tmp_path / "t.model")
    with pytest.raises(DataError, match=r"b\.txt: is a pipe"):
        train_tokenizer(TrainingSettings((str(tmp_path),), 300), output)
    train_tokenizer(TrainingSettings((str(tmp_path / "a.txt"),), 300), output)
    expected = Path(output).read_bytes()
    lines = io.BytesIO(lines_of(text))
    report = train_tokenizer(
        TrainingSettings(("-",), 300, input_format="jsonl"), output, standard_input=lines
    )
    assert Path(output).read_bytes() == expected
    assert report["settings"]["inputs"] == ["-"]
    with pytest.raises(DataError, match="standard input has no name that shows its format"):
        train_tokenizer(TrainingSettings(("-",), 300), output, standard_input=io.BytesIO())


def test_preprocessing_says_why_it_does_not_read_standard_input(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"-: standard input is not read here: .* again after an interruption"
    ):
        run(tmp_path, "-")


def test_inputs_without_a_document_are_said_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of("a"))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "hollow.jsonl.gz").write_bytes(gzip.compress(b"\n\n"))
    summary = run(
        tmp_path, *(tmp_path / name for name in ("a.jsonl", "empty.jsonl", "hollow.jsonl.gz"))
    )
    assert "2 input files hold no document: " in capsys.readouterr().err
    assert [Path(name).name for name in summary["inputs"]["empty_files"]] == [
        "empty.jsonl",
        "hollow.jsonl.gz",
    ]
    (tmp_path / "text.txt").write_text("some words to learn from. " * 200)
    said: list[str] = []
    inputs = (str(tmp_path / "empty.jsonl"), str(tmp_path / "text.txt"))
    train_tokenizer(TrainingSettings(inputs, 280), str(tmp_path / "t.model"), said.append)
    assert any("1 input files are empty" in line and "empty.jsonl" in line for line in said)


def test_a_run_that_leaves_no_document_writes_nothing_and_a_corrected_one_goes_through(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of("a"))
    for limits in (Limits(min_tokens=9), Limits(max_characters=0)):
        with pytest.raises(
            DataError, match=r"no document is left of 1 input files .* Nothing was written"
        ):
            run(tmp_path, tmp_path / "a.jsonl", limits=limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    assert run(tmp_path, tmp_path / "a.jsonl")["documents"] == 1


def test_an_input_that_shrinks_while_it_is_read_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(*"abcdef"))
    monkeypatch.setattr(
        "megatron_completep.preprocess.run.make_units",
        after(lambda: path.write_bytes(lines_of("a")), make_units),
    )
    with pytest.raises(
        DataError, match=r"a\.jsonl: has 14 bytes, at the start of this run it had 84"
    ):
        run(tmp_path, path)
    assert not (tmp_path / "out_text_document.idx").exists()


def after(do: Callable[[], object], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        result = call(*arguments)
        do()
        return result

    return both


def test_a_file_that_vanishes_is_a_bad_document_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ending in ("txt", "jsonl", "jsonl.gz", "parquet"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(lines_of("a"))
        monkeypatch.setattr(
            "megatron_completep.preprocess.run.make_units", after(path.unlink, make_units)
        )
        with pytest.raises(
            DataError, match=rf"1 documents are bad.*\n.*a\.{ending}: cannot be read"
        ):
            run(tmp_path, path, name=ending)


# Nested JSON


@pytest.mark.parametrize("depth", [1024, 100_000])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("spoilt", ["", "\\ud800"], ids=["", "surrogate"])
def test_a_document_nested_too_deeply_is_bad_and_the_others_are_read(
    tmp_path: Path, depth: int, closed: bool, spoilt: str
) -> None:
    nested = "[" * depth + ("]" * depth if closed else "")
    line = (
        f'{{"text": "x{spoilt}", "more": {nested}}}\n'.encode()
        if closed
        else nested.encode() + b"\n"
    )
    (tmp_path / "a.jsonl").write_bytes(lines_of("a") + line + lines_of("b"))
    options: dict[str, Any] = {"unicode": "repair", "keywords": {"max_bad_documents": 1}}
    summary = run(tmp_path, tmp_path / "a.jsonl", **options)
    assert texts_of(tmp_path / "out_text_document") == ["a", "b"]
    assert summary["bad_documents"] == 1
    assert "a.jsonl, line 2: invalid JSON" in summary["bad_examples"][0]


def test_a_document_nested_moderately_is_good(tmp_path: Path) -> None:
    """The control of the bound."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "more": ' + b"[" * 900 + b"]" * 900 + b"}\n")
    run(tmp_path, tmp_path / "a.jsonl")
    assert texts_of(tmp_path / "out_text_document") == ["x"]


def test_nested_side_files_are_refused_by_name(tmp_path: Path) -> None:
    nested = "[" * 100_000
    (tmp_path / "a.json").write_text(nested)
    with pytest.raises(DataError, match=r"a\.json: cannot be read as JSON \(nested too deeply\)"):
        read_sidecar(str(tmp_path / "a"))
    (tmp_path / "rollbacks.json").write_text(nested)
    with pytest.raises(
        DataError, match=r"rollbacks\.json: not a list of rollbacks \(nested too deeply\)"
    ):
        read_left_out(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(nested)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a Hugging Face tokenizer\.json"):
        build_tokenizer(TokenizerChoice("huggingface", str(tmp_path / "hf")))
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "hf" / "tokenizer.json")
    )
    (tmp_path / "hf" / "tokenizer_config.json").write_text(nested)
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json: not a JSON object \(nested too deeply\)"
    ):
        build_tokenizer(TokenizerChoice("huggingface", str(tmp_path / "hf")))


def test_a_damaged_report_or_plan_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    run(tmp_path, tmp_path / "a.txt")
    (tmp_path / "out_report.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, tmp_path / "a.txt")
    run(tmp_path, tmp_path / "a.txt", name="other", keywords={"shard": (0, 1)})
    (tmp_path / "other.preprocess" / "plan.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"plan\.json: is not what was written"):
        run(tmp_path, tmp_path / "a.txt", name="other")


# Names that are not UTF-8


@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_are_not_utf_8_work_in_files_reports_and_messages(
    tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / LATIN_1
    folder.mkdir()
    (folder / f"{LATIN_1}.jsonl").write_bytes(lines_of("a") + b"{}\n")
    (folder / f"{LATIN_1}.txt.gz").write_bytes(gzip.compress(b"text"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(folder / f"{LATIN_1}.parquet")
    (folder / f"{LATIN_1}.empty.jsonl").write_bytes(b"")
    output = f"out{LATIN_1}"
    with pytest.raises(DataError) as refused:
        run(tmp_path, folder, name=output, keywords={"workers": workers})
    assert "caf\\xe9.jsonl, line 2: key text is missing" in str(refused.value)
    summary = run(
        tmp_path, folder, name=output, keywords={"workers": workers, "max_bad_documents": 1}
    )
    assert texts_of(tmp_path / f"{output}_text_document") == ["a", "row", "text"]
    assert summary["outputs"][0]["prefix"] == f"{tmp_path}/outcaf\\xe9_text_document"
    assert [Path(name).name for name in summary["inputs"]["empty_files"]] == [
        "caf\\xe9.empty.jsonl"
    ]
    for text in (json.dumps(summary), (tmp_path / f"{output}_report.json").read_text()):
        assert "\\ud" not in text  # a lone surrogate, which other readers of JSON refuse
    assert run(tmp_path, folder, name=output)["status"] == "already complete"


def test_training_a_tokenizer_works_with_such_names(tmp_path: Path) -> None:
    (tmp_path / f"{LATIN_1}.txt").write_text("some words to learn from. " * 200)
    model = tmp_path / f"{LATIN_1}.model"
    summary = train_tokenizer(
        TrainingSettings((str(tmp_path / f"{LATIN_1}.txt"),), 280), str(model)
    )
    assert summary["tokenizer"]["model"] == "caf\\xe9.model"
    assert [Path(name).name for name in summary["settings"]["inputs"]] == ["caf\\xe9.txt"]
    (tmp_path / "a.txt").write_text("words")
    wanted = PreprocessSettings(
        (str(tmp_path / "a.txt"),),
        str(tmp_path / "out"),
        TokenizerChoice("sentencepiece", str(model)),
    )
    assert preprocess(wanted, log_interval=10**9)["tokenizer"]["model"] == "caf\\xe9.model"


def test_what_can_be_printed_is_left_as_it_is() -> None:
    assert [printable(name) for name in ("a b", "é", LATIN_1)] == ["a b", "é", "caf\\xe9"]


# Documents without a bound


def documents_of(
    path: Path, input_format: str, limit: int, block_bytes: int
) -> list[tuple[str, str]]:
    """(place, text, or a bad document's reason) of a file."""
    (unit,) = make_units(find_sources([path], input_format), block_bytes)
    found = []
    for block in blocks_of(unit, block_bytes, limit):
        for document in read_documents(block, ["text"], "refuse", limit):
            assert isinstance(document, Document | BadDocument)
            text = document.texts[0] if isinstance(document, Document) else document.reason
            found.append((describe_place(block, document.place).removeprefix(f"{path}, "), text))
    return found


@pytest.mark.parametrize("block_bytes", [10, 300, 1 << 20])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("length", [100, 101, 5000])
@pytest.mark.parametrize("last", [False, True])
def test_a_line_above_the_bound_is_bad_and_its_neighbours_are_read(
    tmp_path: Path, ending: str, block_bytes: int, length: int, last: bool
) -> None:
    lines = ["first", "x" * length] + ([] if last else ["after", "y" * length, "end"])
    raw = "\n".join(lines).encode()
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(
        {"": lambda r: r, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[
            ending
        ](raw)
    )
    reason = (
        "the line is longer than 9.536743164e-05 MB, the largest document "
        "(--max-document-megabytes)"
    )
    expected = [
        (f"line {number}", line if len(line) <= 100 else reason)
        for number, line in enumerate(lines, 1)
    ]
    assert documents_of(path, "lines", 100, block_bytes) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_file_and_a_row_above_the_bound_are_bad(tmp_path: Path, name: str) -> None:
    pack = {"txt": lambda r: r, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[
        name.rpartition(".")[2]
    ]
    for size in (100, 101):
        (tmp_path / name).write_bytes(pack(b"x" * size))
        found = documents_of(tmp_path / name, "text", 100, 1 << 20)
        assert found[0][1].startswith("x" * 100 if size == 100 else "the text is longer than")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x" * 100, "x" * 101]}), tmp_path / "a.parquet"
    )
    assert [
        text[:15] for _, text in documents_of(tmp_path / "a.parquet", "parquet", 100, 1 << 20)
    ] == ["x" * 15, "the row is long"]


@pytest.mark.parametrize("ending", ["zst", "gz"])
@pytest.mark.parametrize("input_format", ["jsonl", "text"])
def test_an_archive_that_unpacks_to_one_huge_line_needs_little_memory(
    tmp_path: Path, ending: str, input_format: str
) -> None:
    size = 300 << 20
    path = tmp_path / f"a.{'jsonl' if input_format == 'jsonl' else 'txt'}.{ending}"
    with open(path, "wb") as file:
        packer: Any = (
            zstandard.ZstdCompressor().stream_writer(file, closefd=False)
            if ending == "zst"
            else gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1)
        )
        with packer as packed:
            packed.write(b'{"text": "')
            for _ in range(size >> 20):
                packed.write(b"x" * (1 << 20))
            packed.write(b'"}\n{"text": "good"}\n')
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    found = documents_of(path, input_format, 1 << 20, 1 << 22)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert "longer than 1 MB" in found[0][1]
    assert [text for _, text in found[1:]] == (["good"] if input_format == "jsonl" else [])


def test_the_bound_decides_the_output(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of("a", "b" * 500))
    run(tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="made from other inputs, tokenizer or settings"):
        run(tmp_path, tmp_path / "a.jsonl", largest_document=400)
    keywords = {"max_bad_documents": 1, "overwrite": True}
    assert (
        run(tmp_path, tmp_path / "a.jsonl", largest_document=400, keywords=keywords)[
            "bad_documents"
        ]
        == 1
    )
    assert texts_of(tmp_path / "out_text_document") == ["a"]


def test_work_of_before_the_bound_is_recognized() -> None:
    """A value that the version before it gave."""
    wanted = PreprocessSettings(("a",), "o", TokenizerChoice("bytes"), limits=Limits(1, 2))
    source = Source("a/é.jsonl", "jsonl", "", 3, 4)
    assert wanted.fingerprint([source], {"type": "bytes", "model": None}, 100) == "180ff032d8d061bb"
