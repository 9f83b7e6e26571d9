"""tools/dataset.py through its main function, and the library behind it."""

import base64
import json
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from megatron_completep.config import save_config
from megatron_completep.data.loader import build_loader
from megatron_completep.data.tokenizer import BytesTokenizer
from megatron_completep.errors import DataError, UserError
from megatron_completep.preprocess import report
from megatron_completep.tools import benchmark_data, dataset, preprocess_data
from tests.support.commands import Ended, Programs
from tests.support.configs import SMALLEST, merged, small_config
from tests.support.corpora import write_documents

TEXTS = [f"Document {i}: " + "äbc " * (i % 9) for i in range(60)]


def write(prefix, texts=TEXTS):
    documents = ([np.frombuffer(text.encode(), np.uint8)] for text in texts)
    write_documents(prefix, documents, tokenizer=dict(BytesTokenizer().identity()))


@pytest.fixture
def run_tool(programs: Programs) -> Callable[..., Ended]:
    """Runs tools/dataset.py, or another tool; errors are the caller's."""

    def run(*words: object, tool: ModuleType = dataset) -> Ended:
        return programs.call(tool.main, *words)

    return run


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "a")
    own = {
        "data": {"train": [{"prefix": str(tmp_path / "a")}], "split": "9,1,0", "prefetch": 0},
        "training": {
            "global_batch_size": 4,
            "train_steps": 6,
            "output_dir": str(tmp_path),
            "validation_samples": 5,
        },
    }
    config = small_config(**merged(SMALLEST, own))
    save_config(config, tmp_path / "run.yaml")
    return config


def test_inspect_counts_and_decodes_with_the_recorded_tokenizer(tmp_path, run_tool):
    write(tmp_path / "a", ["häl", "", "xyz" * 50])
    ended = run_tool("inspect", tmp_path / "a", "--json", "--documents", 9)
    content = json.loads(ended.out)
    assert ended.code == 0
    assert (content["documents"], content["tokens"], content["empty_documents"]) == (3, 154, 1)
    assert (content["longest_document"], content["longest_document_number"]) == (150, 2)
    assert content["shortest_document"] == 0
    assert [document["text"] for document in content["first_documents"]] == ["häl", "", "xyz" * 50]
    ended = run_tool("inspect", tmp_path / "a", "--documents", 1)
    assert "häl" in ended.out and "xyz" not in ended.out


def write_ranks(path):
    """A .tiktoken file of single bytes: ids are bytes."""
    path.write_bytes(
        b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    )


@pytest.fixture
def ranked(tmp_path, run_tool, monkeypatch):
    """A corpus that preprocessing made with a tokenizer of its own, beside it."""
    monkeypatch.setattr(report, "_draw", lambda *_: None)
    write_ranks(tmp_path / "gpt2.tiktoken")
    (tmp_path / "a.txt").write_text("Some text.")
    words = (
        "--input",
        tmp_path / "a.txt",
        "--output-prefix",
        tmp_path / "corpus",
        "--workers",
        1,
        "--tokenizer-type",
        "tiktoken",
    )
    run_tool(*words, "--tokenizer-model", tmp_path / "gpt2.tiktoken", tool=preprocess_data)
    return tmp_path / "corpus_text_document"


def test_inspect_finds_the_tokenizer_where_it_lay_and_says_when_it_is_gone(
    tmp_path, ranked, run_tool, monkeypatch
):
    monkeypatch.chdir("/")
    assert "Some text." in run_tool("inspect", ranked).out
    (tmp_path / "gpt2.tiktoken").rename(tmp_path / "elsewhere.tiktoken")
    out = run_tool("inspect", ranked).out
    assert "Some text." not in out and "name its file with --tokenizer-model" in out
    named = f"gpt2:{tmp_path / 'elsewhere.tiktoken'}"
    # Its type is recorded.
    assert "Some text." in run_tool("inspect", ranked, "--tokenizer-model", named).out
    (tmp_path / "corpus_text_document.json").unlink()
    # Its type shows.
    assert "Some text." in run_tool("inspect", ranked, "--tokenizer-model", named).out
    with pytest.raises(
        DataError, match=r"absent: the named tokenizer's model cannot be read .*\. Give its file\."
    ):
        run_tool("inspect", ranked, "--tokenizer-model", tmp_path / "absent")


def test_merged_and_split_files_know_where_the_tokenizer_lies(tmp_path, ranked, run_tool):
    run_tool("merge", "--input", ranked, "--output-prefix", tmp_path / "merged")
    run_tool("split", tmp_path / "merged", "--shares", "1", "--output-prefix", tmp_path / "part")
    assert "Some text." in run_tool("inspect", tmp_path / "part").out


def test_another_tokenizer_than_the_recorded_one_is_refused_by_inspect(tmp_path, ranked, run_tool):
    ranks = (tmp_path / "gpt2.tiktoken").read_bytes()
    (tmp_path / "gpt2.tiktoken").write_bytes(ranks + base64.b64encode(b"So") + b" 256\n")
    with pytest.raises(
        DataError,
        match=r"the files were written with tiktoken gpt2 \(hash .*Use the tokenizer of the corpus",
    ):
        run_tool("inspect", ranked, "--tokenizer-model", tmp_path / "gpt2.tiktoken")
    assert "Some text." not in run_tool("inspect", ranked).out  # by itself it is not used


def test_a_prefix_without_its_key_is_met_with_the_one_that_was_meant(tmp_path, ranked, run_tool):
    with pytest.raises(
        DataError,
        match=r"corpus\.idx: No such file or directory\. Did you mean .*/corpus_text_document\?",
    ):
        run_tool("inspect", tmp_path / "corpus")
    for suffix in (".idx", ".bin"):
        with pytest.raises(DataError, match=r"Did you mean .*/corpus_text_document\?"):
            run_tool("inspect", f"{ranked}{suffix}")
    with pytest.raises(DataError, match="give PREFIX without the suffix"):
        run_tool("inspect", tmp_path / "nothing")


def test_a_split_without_validation_prebuilds_training_alone(tmp_path, config, run_tool):
    words = (
        "prebuild",
        tmp_path / "run.yaml",
        "data.order=megatron",
        "data.split='100,0,0'",
        "--json",
    )
    assert len(json.loads(run_tool(*words).out)["folders"]) == 1
    with pytest.raises(DataError, match=r"data\.split = '100,0,0' leaves nothing to validate on"):
        run_tool("sample", tmp_path / "run.yaml", "--validation", "data.split='100,0,0'")


def test_a_prefix_that_is_not_utf_8_is_inspected_and_verified(tmp_path, run_tool):
    prefix = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9")
    write(prefix)
    for words in (("inspect", prefix), ("inspect", prefix, "--json"), ("verify", prefix)):
        ended = run_tool(*words)
        assert ended.code == 0 and "caf\\xe9" in (ended.out + ended.err).replace("\\\\", "\\")


def test_verify_passes_good_files_and_names_every_fault(tmp_path, run_tool):
    write(tmp_path / "a")
    write(tmp_path / "b")
    ended = run_tool("verify", tmp_path / "a", tmp_path / "b", "--json", "--vocab-size", 256)
    assert ended.code == 0 and json.loads(ended.out)["pass"] is True
    with open(tmp_path / "b.bin", "r+b") as file:
        file.seek(2 * (len(TEXTS[0].encode()) + 3))
        file.write(b"\xff\xff")
    ended = run_tool("verify", tmp_path / "a", tmp_path / "b", "--json", "--vocab-size", 256)
    problems = json.loads(ended.out)["problems"]
    assert ended.code == 1 and problems[str(tmp_path / "a")] == []
    content, document, *_ = problems[str(tmp_path / "b")]
    assert "b.bin: content" in content
    assert document.split(": ", 1)[1].split(",")[0] == "document 1"


def test_merge_and_split_write_what_they_say(tmp_path, run_tool):
    write(tmp_path / "a")
    write(tmp_path / "b", TEXTS[:10])
    ended = run_tool(
        "merge", "--input", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "ab"
    )
    assert ended.code == 0 and "70 documents" in ended.out
    ended = run_tool(
        "split",
        tmp_path / "ab",
        "--shares",
        "6,1",
        "--output-prefix",
        tmp_path / "c",
        tmp_path / "d",
        "--json",
    )
    assert ended.code == 0
    assert [content["documents"] for content in json.loads(ended.out).values()] == [
        60,
        10,
    ]
    for left, right in (("a", "c"), ("b", "d")):
        for suffix in ("bin", "idx", "json"):
            assert (tmp_path / f"{left}.{suffix}").read_bytes() == (
                tmp_path / f"{right}.{suffix}"
            ).read_bytes()
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (["--shares", "6,1"], ["--shares", "1,1", "--overwrite"]):
        with pytest.raises(
            DataError if "--overwrite" in words else UserError,
            match=r"exists|1 outputs for the shares 1, 1\. Give",
        ):
            run_tool("split", tmp_path / "ab", *words, "--output-prefix", tmp_path / "c")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents
    ended = run_tool(
        "split",
        tmp_path / "ab",
        "--shares",
        "1,0",
        "--overwrite",
        "--output-prefix",
        tmp_path / "c",
        tmp_path / "d",
    )
    assert ended.code == 0 and "70 documents" in ended.out


@pytest.mark.parametrize("order", ["permutation", "megatron"])
def test_sample_shows_exactly_what_the_step_trains_on(tmp_path, config, run_tool, order):
    ended = run_tool("sample", tmp_path / "run.yaml", "--step", 3, "--json", f"data.order={order}")
    samples = json.loads(ended.out)["samples"]
    loader = build_loader(
        config.data.model_copy(update={"order": order}),
        seq_length=16,
        micro_batch_size=2,
        global_batch_size=4,
        train_steps=6,
        vocab_size=512,
        data_rank=0,
        data_size=1,
        consumed_samples=8,
    )
    rows = [
        row
        for batch in loader.next_step()
        for row in zip(batch.sample_ids.tolist(), batch.tokens.tolist(), strict=True)
    ]
    assert ended.code == 0
    found = [
        (s["sample"], [token for d in s["documents"] for token in d["tokens"]][:-1])
        for s in samples
    ]
    assert found == rows
    for document in (document for sample in samples for document in sample["documents"]):
        encoded = TEXTS[document["document"]].encode()
        assert (
            bytes(document["tokens"])
            == encoded[document["position"] : document["position"] + len(document["tokens"])]
        )
        assert document["text"] == bytes(document["tokens"]).decode(errors="replace")


def test_sample_prints_validation_and_refuses_a_step_outside_the_run(tmp_path, config, run_tool):
    ended = run_tool("sample", tmp_path / "run.yaml", "--validation")
    assert ended.code == 0 and ended.out.count("sample ") == 5 and "Document 5" in ended.out
    with pytest.raises(DataError, match="step 7 is outside this run, which has the steps 1 to 6"):
        run_tool("sample", tmp_path / "run.yaml", "--step", 7)


def test_prebuild_builds_once_and_says_when_there_is_nothing_to_do(tmp_path, config, run_tool):
    words = ("prebuild", tmp_path / "run.yaml", "data.order=megatron", "--json")
    first, second = (json.loads(run_tool(*words).out)["folders"] for _ in range(2))
    assert [folder["built"] for folder in first] == [True, True]
    assert [folder["built"] for folder in second] == [False, False]
    assert "nothing to prebuild" in run_tool("prebuild", tmp_path / "run.yaml").out


def test_a_run_with_another_tokenizer_than_the_corpus_is_refused(tmp_path, config, run_tool):
    sidecar = json.loads((tmp_path / "a.json").read_text())
    sidecar["tokenizer"] |= {"hash": "0123", "type": "tiktoken", "model": "gpt2"}
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    with pytest.raises(
        DataError, match=r"written with tiktoken gpt2 .*hash 0123.*, not with bytes"
    ):
        run_tool("sample", tmp_path / "run.yaml", "--step", 1, "data.tokenizer={type: bytes}")
    with pytest.raises(DataError, match="written with tiktoken gpt2"):
        run_tool("inspect", tmp_path / "a", "--tokenizer-type", "bytes")
    ended = run_tool("inspect", tmp_path / "a")  # its own tokenizer is not at hand: ids only
    assert ended.code == 0 and "Document" not in ended.out


def test_the_reading_benchmark_gives_every_figure(tmp_path, run_tool):
    ended = run_tool(
        "reading",
        "--documents",
        2000,
        "--seeks",
        20,
        "--folder",
        tmp_path,
        "--json",
        tool=benchmark_data,
    )
    figures = json.loads(ended.out)
    assert ended.code == 0
    assert figures["documents"] == 2000
    assert figures["index_bytes"] == 34 + 20 * 2000 + 8
    assert all(
        figures[name] > 0
        for name in (
            "open_seconds",
            "seek_us_median",
            "blend_arbitrary_first_jump_ms",
            "loader_tokens_per_second",
        )
    )
    assert list(tmp_path.iterdir()) == []
