"""export_hf, import_hf, evaluate_model, generate:
what they print, that they fit together, and their exit codes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_completep.tools import evaluate_model, export_hf, generate, import_hf
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.commands import Programs
from tests.support.corpora import write_texts

Call = Callable[..., tuple[int, str, str]]
TEXTS = [
    "Zwölf Boxkämpfer jagen Viktor quer über den Deich.",
    "the quick brown fox",
    "敏捷的棕色狐狸",
]


@pytest.fixture
def call(programs: Programs) -> Call:
    """(tool, words) -> exit code, stdout, stderr."""

    def run(tool: ModuleType, *words: object) -> tuple[int, str, str]:
        ended = programs.run(tool.main, *words)
        return ended.code, ended.out, ended.err

    return run


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run over bytes with multipliers, and a token file beside it."""
    model = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "vocab_size": 260,
        "seq_length": 48,
    }
    data = {"train": [{"prefix": "none"}], "tokenizer": {"type": "bytes"}}
    run = TinyRun(
        checkpointed_config(
            tmp_path / "run",
            model=model,
            data=data,
            optimizer={"base_lr": 1e-2, "base_init_std": 0.3},
        )
    )
    run.save()
    run.checkpointer.close()
    write_texts(tmp_path / "texts", TEXTS)
    return tmp_path / "run"


def test_a_model_exported_and_imported_again_is_the_same_model(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    pytest.importorskip("transformers")
    code, out, err = call(export_hf, trained, tmp_path / "hf", "--check", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["check"]["equal"]
    assert report["architecture"] == "granite"
    assert report["tokenizer"] == "bytes"
    assert "granite" in err
    code, out, _ = call(
        import_hf, tmp_path / "hf", tmp_path / "again", "training.train_steps=7", "--json"
    )
    imported = json.loads(out)
    assert code == 0
    assert imported["tokenizer"] == "huggingface"
    assert Path(imported["config"]).is_file()
    options = ("--token-file", tmp_path / "texts", "--precision", "float64", "--device", "cpu")
    scores = [
        json.loads(call(evaluate_model, run, *options, "--json")[1])["token_files"]
        for run in (trained, tmp_path / "again")
    ]
    first, second = (score[str(tmp_path / "texts")] for score in scores)
    assert first["bytes"] == second["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert first["bits_per_byte"] == pytest.approx(second["bits_per_byte"], rel=1e-6)
    greedy = (
        "--prompt",
        "the ",
        "--temperature",
        0,
        "--max-new-tokens",
        20,
        "--precision",
        "float64",
    )
    assert call(generate, trained, *greedy)[1] == call(generate, tmp_path / "again", *greedy)[1]


def test_evaluation_prints_bits_per_byte_and_limits_documents(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    code, out, _ = call(evaluate_model, trained, "--token-file", tmp_path / "texts", "--limit", 2)
    assert code == 0 and "bits per byte" in out and "2 documents" in out


def test_a_prompt_ends_at_a_line_feed_and_at_nothing_else(tmp_path: Path) -> None:
    prompts = ["a\u2028b", "form\ffeed", "next\x85line"]
    jsonl = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    jsonl.write_text("\n".join(rows) + "\n", "utf-8")
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts) + "\n", "utf-8")
    assert len(lines.read_text("utf-8").splitlines()) == 6  # what would split them
    for path in (jsonl, lines):
        arguments = argparse.Namespace(prompt=None, prompts=path)
        assert generate.read_prompts(arguments) == prompts
    lines.write_text("")
    assert generate.read_prompts(arguments) == []


def test_prompts_from_files_give_the_same_texts_in_any_batch(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    prompts = ["ab", "a longer prompt", "", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    options = (
        "--json",
        "--max-new-tokens",
        8,
        "--samples",
        2,
        "--top-k",
        40,
        "--precision",
        "float64",
    )
    found = []
    for file, size in (("prompts.txt", 1), ("prompts.jsonl", 3), ("prompts.txt", 8)):
        code, out, _ = call(
            generate, trained, "--prompts", tmp_path / file, "--batch-size", size, *options
        )
        assert code == 0
        found.append(json.loads(out)["results"])
    assert found[0] == found[1] == found[2]
    assert [result["prompt"] for result in found[0]] == prompts
    assert all(len(result["texts"]) == 2 for result in found[0])
    assert found[0][0]["texts"][0] != found[0][0]["texts"][1]  # samples have seeds of their own


def test_the_tools_compute_in_the_runs_own_type_and_say_which(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    code, out, err = call(
        generate, trained, "--prompt", "ab", "--max-new-tokens", 2, "--json", "--device", "cpu"
    )
    assert (code, json.loads(out)["precision"]) == (0, "float32")
    code, out, err = call(
        generate,
        trained,
        "--samples",
        2,
        "--max-new-tokens",
        2,
        "--json",
        "--device",
        "cpu",
        "--precision",
        "bf16",
    )
    assert (code, json.loads(out)["precision"]) == (
        0,
        "bf16",
    )
    assert "in bf16 the texts of a seed depend on --batch-size" in err
    words = ("--token-file", tmp_path / "texts", "--limit", 1, "--json", "--device", "cpu")
    assert json.loads(call(evaluate_model, trained, *words)[1])["precision"] == "float32"


def test_a_prompts_file_with_a_nested_line_names_the_line(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + "[" * 5000 + "]" * 5000 + "\n")
    code, out, err = call(generate, trained, "--prompts", tmp_path / "prompts.jsonl")
    assert (code, out) == (2, "") and "line 2: not usable JSON" in err


def test_mistakes_are_one_message_and_exit_code_2(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    nowhere = tmp_path / "nowhere"
    (tmp_path / "prompts.jsonl").write_text('{"text": "x"}\n')
    for tool, words, message in (
        (export_hf, (nowhere, tmp_path / "out"), "no checkpoint"),
        (export_hf, (trained, tmp_path / "out", "--architecture", "gpt2"), "norm = rmsnorm"),
        (export_hf, (trained, tmp_path / "out", "--max-shard-size", "big"), "size 'big'"),
        (import_hf, (nowhere, tmp_path / "out"), "config.json"),
        (evaluate_model, (nowhere, "--token-file", tmp_path / "texts"), "no checkpoint"),
        (evaluate_model, (trained, "--token-file", nowhere), "nowhere.idx"),
        (evaluate_model, (trained,), "nothing to evaluate"),
        (generate, (trained, "--prompts", nowhere), "cannot be read"),
        (generate, (trained, "--prompts", tmp_path / "prompts.jsonl"), "line 1"),
        (
            generate,
            (trained, "--temperature", -1),
            "--temperature = -1: give a finite number of at least 0",
        ),
    ):
        code, out, err = call(tool, *words)
        assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", [export_hf, import_hf, evaluate_model, generate])
def test_help_shows_an_example(tool: ModuleType, call: Call) -> None:
    code, out, _ = call(tool, "--help")
    name = tool.__name__.rpartition(".")[2]
    assert code == 0 and f"python tools/{name}.py" in out
