"""The files are, byte for byte,
those that Megatron-Core's own builder writes for the same texts and tokenizer.
"""

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer

indexed_dataset = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
)

SOURCE = Path(__file__).read_text("utf-8")
TEXTS = [SOURCE[:100], "", SOURCE[100:1500], "é 日本 \r\n\t", SOURCE]


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_token_files_are_those_of_megatrons_builder(
    tmp_path: Path, append_eod: bool, workers: int
) -> None:
    (tmp_path / "source.txt").write_text(SOURCE)
    train_tokenizer(
        TrainingSettings((str(tmp_path / "source.txt"),), 400), str(tmp_path / "t.model")
    )
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    choice = TokenizerChoice("sentencepiece", str(tmp_path / "t.model"))
    settings = PreprocessSettings(
        (str(tmp_path / "in.jsonl"),), str(tmp_path / "ours"), choice, append_eod=append_eod
    )
    preprocess(settings, workers=workers, block_bytes=300, log_interval=10**9)

    # What Megatron's tools/preprocess_data.py does with each document, over its public builder.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    dtype = indexed_dataset.DType.optimal_dtype(processor.vocab_size())
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in TEXTS:
        ids = processor.encode(text)
        if ids and append_eod:
            ids.append(processor.eos_id())
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))

    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours_text_document.{suffix}").read_bytes() == (
            tmp_path / f"theirs.{suffix}"
        ).read_bytes()
    read = indexed_dataset.IndexedDataset(str(tmp_path / "ours_text_document"))
    assert len(read) == len(TEXTS) - 1
    assert processor.decode(read[3].tolist()) == SOURCE
