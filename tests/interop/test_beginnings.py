"""A model whose tokenizer begins texts with a token of its own, through import, training files,
scoring and export; lm-eval's back end `hf` on the original and on the export is the judge.
"""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megatron_completep.config import load_config
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.inference.generation import (
    Sampling,
    encode_prompt,
    generate_texts,
    load_model,
    tokenizer_of_run,
)
from megatron_completep.inference.lm_eval_tasks import native_model
from megatron_completep.inference.scoring import Scorer, score_token_file
from megatron_completep.interop.check_export import check_tokenizer
from megatron_completep.interop.export_model import ExportSettings, export_model
from megatron_completep.interop.hf_tokenizer import write_tokenizer
from megatron_completep.interop.import_model import import_model
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice

transformers = pytest.importorskip("transformers")

TEXTS = ["the quick brown fox jumps over the lazy dog", "x", "a tail  \n", "Zwölf Boxkämpfer " * 4]
BEGIN, END = 3, 5  # ids that no default would guess


def write_tokenizer_files(folder: Path, template: str | None = "<s> $A") -> None:
    """A byte-level tokenizer of 270 ids with `<s>` and `</s>` in its midst."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet[:BEGIN], "<s>", "<pad>", "</s>", *alphabet[BEGIN:]]
    vocabulary = {name: index for index, name in enumerate(names)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<s>", "<pad>", "</s>"])
    if template is not None:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))


GENERATION = {
    "bos_token_id": BEGIN,
    "eos_token_id": [END, 7],
    "pad_token_id": 4,
    "temperature": 0.6,
    "do_sample": True,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with two end tokens, a pad token and settings of generation."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=270,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=48,
        bos_token_id=BEGIN,
        eos_token_id=[END, 7],
        pad_token_id=4,
        initializer_range=0.3,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer_files(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    words = ["training.precision=float32", "training.device=cpu"]
    report = import_model(original, run, words, seq_length=40)
    assert any(f"texts begin with the token {BEGIN}" in note for note in report.notes)
    return run


@pytest.fixture(scope="module")
def exported(imported: Path) -> Path:
    folder = imported.parent / "exported"
    export_model(imported, folder, ExportSettings(dtype="float32"))
    return folder


def native_scorer(run: Path) -> Scorer:
    config, model = load_model(run, torch.device("cpu"), torch.float32)
    tokenizer = build_tokenizer(tokenizer_of_run(run, config))
    return Scorer(model, tokenizer, max_length=48, end_tokens=config.export.end_tokens())


def requests_of(pairs: list[tuple[str, ...]]) -> list[Any]:
    return [types.SimpleNamespace(args=pair) for pair in pairs]


CHOICES = [
    (context, choice) for context in ("", "the quick ", "x") for choice in ("brown", " fox", "é")
]


def likelihoods(model: Any) -> list[float]:
    """Rolling log-likelihoods of texts, then those of choices, by an lm-eval model."""
    rolling = model.loglikelihood_rolling(requests_of([(text,) for text in TEXTS]), True)
    chosen = model.loglikelihood(requests_of(CHOICES), True)
    return [*rolling, *(likelihood for likelihood, _ in chosen)]


def test_lm_evals_own_back_end_scores_the_original_and_the_export_as_the_native_one(
    original: Path, imported: Path, exported: Path
) -> None:
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.model import TemplateLM

    options = {"dtype": "float32", "device": "cpu", "batch_size": 3}
    ours = likelihoods(native_model(native_scorer(imported), TemplateLM))
    for folder in (original, exported):
        theirs = likelihoods(huggingface.HFLM(pretrained=str(folder), **options))
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-5), folder
    # The control: without the beginning every figure is another one.
    without = huggingface.HFLM(pretrained=str(original), add_bos_token=False, **options)
    plain = likelihoods(without)
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain[: len(TEXTS)], ours, strict=False))

    # A token file's score takes the beginning for context alone, as lm-eval does without it.
    files = token_files(original, imported.parent / "scored")
    score = score_token_file(native_scorer(imported), IndexedDataset(files))
    assert -score.nats == pytest.approx(sum(plain[: len(TEXTS)]), rel=1e-6)
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)


def token_files(tokenizer: Path, prefix: Path, **choice: Any) -> str:
    """The token files of the texts, each document with its end."""
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    chosen = TokenizerChoice("huggingface", str(tokenizer), **choice)
    settings = PreprocessSettings((str(source),), str(prefix), chosen, append_eod=True)
    preprocess(settings)
    return settings.output_prefixes()[0]


def test_documents_begin_as_the_library_begins_them_unless_the_user_says_otherwise(
    original: Path, tmp_path: Path
) -> None:
    library = tokenizers.Tokenizer.from_file(str(original / "tokenizer.json"))
    for choice, front in (({}, [BEGIN]), ({"prepend_bos": False}, [])):
        prefix = token_files(original, tmp_path / f"corpus{len(choice)}", **choice)
        dataset = IndexedDataset(prefix)
        for number, text in enumerate(TEXTS):
            ids = library.encode(text, add_special_tokens=False).ids
            assert dataset.document(number).tolist() == [*front, *ids, END]
        assert dataset.sidecar is not None and dataset.sidecar["beginning"] == front
    other = token_files(original, tmp_path / "ended", eod_token="<pad>")
    assert IndexedDataset(other).document(0)[-1] == 4
    chosen = TokenizerChoice("huggingface", str(original), eod_token="<pad>")
    unended = PreprocessSettings((str(tmp_path / "ended.jsonl"),), str(tmp_path / "not"), chosen)
    with pytest.raises(DataError, match="<pad> names the token that --append-eod writes"):
        preprocess(unended)


def test_what_an_import_cannot_give_back_by_itself_is_told(
    original: Path, imported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    model.config.eos_token_id = 270
    model.half().save_pretrained(folder)
    write_tokenizer_files(folder, template="<s> $A </s>")
    report = import_model(folder, tmp_path / "run", ["training.device=cpu"])
    assert report.dtype == "F16"
    told = " ".join(report.notes)
    assert "its tensors are F16" in told
    assert f"its template also ends texts, with {END}" in told
    assert "its eos_token_id is 270, and its vocabulary ends at 269" in told
    export_model(tmp_path / "run", tmp_path / "out", ExportSettings(dtype="float16"))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode("x").ids == [BEGIN, *library.encode("x", add_special_tokens=False).ids]
    # The type of the original, asked for, gives its tensors back.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # The control: of an original in float32 whose template ends nothing, nothing of it is told.
    untold = import_model(original, tmp_path / "control", ["training.device=cpu"])
    assert not any("its te" in note for note in untold.notes)


def test_unfinished_preprocessing_of_before_is_finished_as_it_was_begun(
    original: Path, tmp_path: Path
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(name: str, prepend_bos: bool | None) -> Any:
        chosen = TokenizerChoice("huggingface", str(original), prepend_bos)
        return PreprocessSettings((str(source),), str(tmp_path / name), chosen)

    # A version of before put no token in front: its work has the fingerprint of a run without.
    preprocess(run("old", False), shard=(0, 1))
    assert (tmp_path / "old.preprocess").is_dir()
    preprocess(run("old", None))
    assert IndexedDataset(str(tmp_path / "old_text_document")).document(0)[0] != BEGIN
    # The controls: one that begins now, and one that is asked for.
    preprocess(run("new", None))
    assert IndexedDataset(str(tmp_path / "new_text_document")).document(0)[0] == BEGIN
    preprocess(run("asked", False), shard=(0, 1))
    with pytest.raises(DataError, match="other inputs"):
        preprocess(run("asked", True))
    # Finished output of before is another corpus by now, and is not replaced unasked.
    with pytest.raises(DataError, match="--overwrite"):
        preprocess(run("new", False))


def test_end_tokens_pad_generation_and_longest_sequence_survive_import_and_export(
    original: Path, imported: Path, exported: Path
) -> None:
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (original, exported)
    )
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    assert json.loads((exported / "generation_config.json").read_text()) == GENERATION
    config = load_config(imported / "config.yaml")
    assert config.model.seq_length == 40 and config.export.end_tokens() == [END, 7]
    assert config.data.tokenizer is not None and config.data.tokenizer.prepend_bos
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert json.loads((original / name).read_text()) == json.loads(
            (exported / name).read_text()
        )


def test_an_id_of_minus_one_is_no_token_and_longer_runs_are_exported_as_long(
    original: Path, tmp_path: Path
) -> None:
    """Llama 1 wrote pad_token_id -1 for none."""
    folder = tmp_path / "m"
    shutil.copytree(original, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "pad_token_id": -1}))
    import_model(folder, tmp_path / "run", ["training.device=cpu"], seq_length=64)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.export.token_ids == {"bos_token_id": BEGIN, "eos_token_id": [END, 7]}
    assert content["max_position_embeddings"] == 48
    export_model(tmp_path / "run", tmp_path / "out", ExportSettings(dtype="float32"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 64


def test_a_pad_token_stays_where_no_end_is_named_and_is_the_end_where_there_is_none(
    tmp_path: Path,
) -> None:
    for pad, expected in (("<pad>", "<pad>"), (None, "</s>")):
        folder = tmp_path / str(pad)
        write_tokenizer_files(folder, template=None)
        names = {} if pad is None else {"pad_token": pad}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        settings = TokenizerConfig(type="huggingface", model=str(folder))
        out = folder / "out"
        out.mkdir()
        write_tokenizer(build_tokenizer(settings), out, 48, settings)
        written = json.loads((out / "tokenizer_config.json").read_text())
        assert (written["eos_token"], written["pad_token"]) == ("</s>", expected)


def test_the_check_of_an_export_reads_its_tokenizer_in_transformers(
    imported: Path, exported: Path, tmp_path: Path
) -> None:
    assert check_tokenizer(imported, exported) > 500
    # The control: a folder whose tokenizer puts nothing in front.
    write_tokenizer_files(tmp_path, template=None)
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(ConfigError, match="in training it was"):
        check_tokenizer(imported, tmp_path)


def test_prompts_begin_as_documents_and_texts_end_at_each_end_token(imported: Path) -> None:
    scorer = native_scorer(imported)
    tokenizer = scorer.tokenizer
    assert encode_prompt(tokenizer, "") == [BEGIN]
    assert encode_prompt(tokenizer, "ab")[0] == BEGIN and len(encode_prompt(tokenizer, "ab")) == 3
    greedy = Sampling(0.0, 1.0, 12)
    whole = next(text for _, text in generate_texts(scorer.model, tokenizer, ["the"], greedy))
    stops = tokenizer.encode(whole)
    cut = dict(
        generate_texts(scorer.model, tokenizer, ["the"], greedy, end_tokens=stops)  # at once
    )
    assert cut.get(0, "") == ""


def test_the_exported_tokenizer_begins_texts_as_training_did(
    original: Path, tmp_path: Path
) -> None:
    """Without a beginning in training the template goes, and with one that the file lacks it
    comes.
    """
    plain = tmp_path / "plain"
    write_tokenizer_files(plain, template=None)
    ended = tmp_path / "ended"
    write_tokenizer_files(ended, template="<s> $A </s>")
    cases = [(original, False, []), (plain, True, [BEGIN]), (ended, None, [BEGIN])]
    for number, (folder, prepend, front) in enumerate(cases):
        settings = TokenizerConfig(type="huggingface", model=str(folder), prepend_bos=prepend)
        ours = build_tokenizer(settings)
        out = tmp_path / f"out{number}"
        out.mkdir()
        write_tokenizer(ours, out, 64, settings)
        (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
        theirs = transformers.AutoTokenizer.from_pretrained(str(out))
        assert theirs("ab")["input_ids"] == [*front, *ours.encode("ab")], number
