"""What documents begin with is compared wherever corpora, tokenizer and checkpoint meet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_completep.checkpoint.resume_check import ResumeCheck
from megatron_completep.config.schema import DataConfig, TokenizerConfig
from megatron_completep.data.beginning import beginning_lines, check_beginnings
from megatron_completep.data.corpus import open_corpus
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.run_tokenizer import copy_in, keep_tokenizer
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.data.writer import merge, split
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.inference import generation
from tests.interop.test_beginnings import BEGIN, END, write_tokenizer_files
from tests.support.checkpoints import checkpointed_config
from tests.support.corpora import write_documents


def corpus(folder: Path, name: str, front: list[int] | None, **closing: Any) -> str:
    """Documents that begin with `front`; None: nothing is recorded."""
    documents = [[[*(front or []), 20 + number, 30, END]] for number in range(40)]
    if front is not None:
        closing["beginning"] = front
    write_documents(folder / name, documents, **closing)
    return str(folder / name)


def data_of(train: list[str], validation: list[str] | None = None, **more: Any) -> DataConfig:
    listed = None if validation is None else [{"prefix": prefix} for prefix in validation]
    return DataConfig.model_validate(
        {"train": [{"prefix": prefix} for prefix in train], "validation": listed, **more}
    )


def opened(data: DataConfig) -> None:
    open_corpus(data, seq_length=8, total_samples=4, vocab_size=300)


def test_sources_of_a_blend_and_of_validation_must_begin_alike(tmp_path: Path) -> None:
    begun = corpus(tmp_path, "begun", [BEGIN])
    plain = corpus(tmp_path, "plain", [])
    silent = corpus(tmp_path, "silent", None)
    for train, validation in (([begun, plain], None), ([begun], [plain]), ([plain], [begun])):
        with pytest.raises(DataError, match="without a beginning-of-text token"):
            opened(data_of(train, validation))
    # The controls: those that agree, and those that say nothing.
    opened(data_of([begun, silent], [begun]))
    opened(data_of([plain], [silent]))
    assert beginning_lines(data_of([plain, silent])) == []
    (line,) = beginning_lines(data_of([begun, silent]))
    assert line.startswith(f"{silent}: not recorded") and f"token {BEGIN}" in line


def test_corpora_of_one_run_must_have_one_tokenizer(tmp_path: Path) -> None:
    own = {"type": "huggingface", "vocab_size": 270, "eod_id": 5, "hash": "a"}
    others = {
        "type": {**own, "type": "bytes"},
        "vocab_size": {**own, "vocab_size": 257},
        "eod_id": {**own, "eod_id": 4},
    }
    first = corpus(tmp_path, "first", [], tokenizer=own, append_eod=True)
    for field, tokenizer in others.items():
        other = corpus(tmp_path, f"other_{field}", [], tokenizer=tokenizer, append_eod=True)
        with pytest.raises(DataError, match=f"tokenizer: {field} = "):
            opened(data_of([first, other]))
    # The controls: the same one, and one that says nothing.
    opened(data_of([first, corpus(tmp_path, "same", [], tokenizer=own, append_eod=True)]))
    opened(data_of([first, corpus(tmp_path, "silent", None)]))


def test_the_end_token_may_be_named_in_the_map_of_special_tokens_alone(tmp_path: Path) -> None:
    write_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    settings = TokenizerConfig(type="huggingface", model=str(tmp_path))
    assert build_tokenizer(settings).eod_id == END  # the control: a name that is known
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<pad>"}')
    assert build_tokenizer(settings).eod_id == 4


def test_the_tokenizer_must_begin_texts_as_the_corpora_do(tmp_path: Path) -> None:
    write_tokenizer_files(tmp_path / "t")
    settings = {"type": "huggingface", "model": str(tmp_path / "t")}
    own = build_tokenizer(TokenizerConfig.model_validate(settings))
    recorded = {"tokenizer": own.identity(), "append_eod": True}
    begun = corpus(tmp_path, "begun", [BEGIN], **recorded)
    plain = corpus(tmp_path, "plain", [], **recorded)
    opened(data_of([begun], tokenizer=settings))
    opened(data_of([plain], tokenizer={**settings, "prepend_bos": False}))
    with pytest.raises(DataError, match=r"Set data\.tokenizer\.prepend_bos to false"):
        opened(data_of([plain], tokenizer=settings))
    with pytest.raises(DataError, match=r"Set data\.tokenizer\.prepend_bos to true"):
        opened(data_of([begun], tokenizer={**settings, "prepend_bos": False}))
    with pytest.raises(DataError, match=r"data\.tokenizer\.eod_token"):
        opened(data_of([begun], tokenizer={**settings, "eod_token": "<pad>"}))
    silent = corpus(tmp_path, "silent", None)
    (line,) = beginning_lines(data_of([silent], tokenizer=settings))
    assert "data.tokenizer.prepend_bos to false" in line
    for model in ("bytes", None):
        wrong = {"type": "bytes", "prepend_bos": True} if model else settings
        if model:
            with pytest.raises(DataError, match="no beginning-of-text token"):
                build_tokenizer(TokenizerConfig.model_validate(wrong))
    with pytest.raises(DataError, match="has no such token"):
        build_tokenizer(TokenizerConfig.model_validate({**settings, "eod_token": "<none>"}))
    # Every text that holds the letter would seem to end at it.
    with pytest.raises(DataError, match="to texts that hold 'a' as well"):
        build_tokenizer(TokenizerConfig.model_validate({**settings, "eod_token": "a"}))


def test_merged_and_split_files_keep_what_documents_begin_with(tmp_path: Path) -> None:
    begun = corpus(tmp_path, "begun", [BEGIN])
    plain = corpus(tmp_path, "plain", [])
    assert merge([begun, begun], tmp_path / "both")["beginning"] == [BEGIN]
    (half, _) = split(begun, [1, 1], [tmp_path / "a", tmp_path / "b"])
    assert half["beginning"] == [BEGIN]
    with pytest.raises(DataError, match="--no-prepend-bos"):
        merge([begun, plain], tmp_path / "mixed")
    for name, digest in (("begun", "0123"), ("plain", "4567")):
        recorded = json.loads((tmp_path / f"{name}.json").read_text())
        recorded["tokenizer"] = {"type": "bytes", "model": None, "hash": digest}
        (tmp_path / f"{name}.json").write_text(json.dumps(recorded))
    with pytest.raises(DataError, match=r"bytes \(hash 0123\), but .*plain was made with bytes"):
        merge([plain, begun], tmp_path / "mixed")
    silent = corpus(tmp_path, "silent", None)
    assert "beginning" not in merge([begun, silent], tmp_path / "unknown")
    assert IndexedDataset(str(tmp_path / "unknown")).num_documents == 80


def test_a_runs_copy_of_its_tokenizer_keeps_the_choice(tmp_path: Path) -> None:
    write_tokenizer_files(tmp_path / "t", template=None)
    settings = TokenizerConfig(
        type="huggingface", model=str(tmp_path / "t"), prepend_bos=True, eod_token="<pad>"
    )
    assert keep_tokenizer(settings, tmp_path) is None
    copy = copy_in(tmp_path / "tokenizer")
    assert copy is not None
    tokenizer = build_tokenizer(copy)
    assert (tokenizer.beginning, tokenizer.eod_id) == ((BEGIN,), 4)


def test_a_resume_on_texts_that_begin_otherwise_is_refused(tmp_path: Path) -> None:
    def identity(ids: list[int] | None, **tokenizer: Any) -> dict[str, Any]:
        sources = [] if ids is None else [{"beginning": ids}]
        return {"fingerprints": {"data": sources}, "data": {"tokenizer": tokenizer or None}}

    def compare(stored: dict[str, Any], present: dict[str, Any], *allowed: str) -> None:
        config = checkpointed_config(tmp_path, checkpoint={"allow_changed": list(allowed)})
        check = ResumeCheck(config, present, (), None, print)
        manifest: Any = SimpleNamespace(
            fingerprints=stored["fingerprints"],
            config={"data": stored["data"]},
            parameters={},
            table={},
        )
        check._compare_beginnings(tmp_path, manifest)

    begun, plain, silent = identity([BEGIN]), identity([]), identity(None)
    imported = identity(None, prepend_bos=True)  # no corpus yet
    for stored, present in ((begun, plain), (plain, begun), (imported, plain)):
        with pytest.raises(CheckpointError, match=r"allow_changed=\[beginning\]"):
            compare(stored, present)
        compare(stored, present, "beginning")
    for stored, present in ((begun, begun), (imported, begun), (silent, begun), (begun, silent)):
        compare(stored, present)


def test_a_checkpoint_of_before_beginnings_were_known_generates_as_before() -> None:
    def prepended(sources: list[dict[str, Any]]) -> bool | None:
        manifest: Any = SimpleNamespace(fingerprints={"data": sources} if sources else {})
        return generation._prepended(manifest)

    assert prepended([{"prefix": "old"}]) is False
    assert prepended([{"prefix": "new", "beginning": [BEGIN]}]) is True
    assert prepended([{"prefix": "new", "beginning": []}]) is False
    assert prepended([{"prefix": "silent", "beginning": None}]) is None
    assert prepended([]) is None  # an import


def test_a_prefix_that_is_not_there_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    check_beginnings(data_of([str(tmp_path / "absent")]), None)
