"""Exported folders, opened by stock transformers, compute what the checkpoint computes;
one multiplier left out is seen.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.errors import ConfigError
from megatron_completep.inference.generation import Sampling, generate, load_model
from megatron_completep.interop import export_model as exporting
from megatron_completep.interop.architectures import ARCHITECTURES, blockers, choose_architecture
from megatron_completep.interop.check_export import check_export, load_with_transformers
from megatron_completep.interop.export_model import ExportSettings, export_model, parse_size
from megatron_completep.parallel.context import ParallelContext
from tests.support.configs import GPT2, TIED_GPT2
from tests.support.exports import (
    EXPERTS,
    FACTORS,
    LLAMA,
    QWEN3,
    SHARED_EXPERTS,
    TIED_LLAMA,
    checkpoint,
    export_config,
    save_checkpoint,
)
from tests.support.models import table_for
from tests.support.ranks import WorkerPool, context_on

pytest.importorskip("transformers")

TIED_QWEN3 = {**QWEN3, "tied_embeddings": True}
CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "granite": ("granite", 1.0, LLAMA),
    "granite_tied": ("granite", 0.5, TIED_LLAMA),
    "llama": ("llama", 0.5, LLAMA),
    "llama_tied": ("llama", 1.0, TIED_LLAMA),
    "qwen3": ("qwen3", 1.0, QWEN3),
    "qwen3_tied": ("qwen3", 0.5, TIED_QWEN3),
    "granitemoe": ("granitemoe", 1.0, {**LLAMA, "moe": EXPERTS}),
    "granitemoeshared_tied": (
        "granitemoeshared",
        0.5,
        {"tied_embeddings": True, "moe": SHARED_EXPERTS},
    ),
    "mixtral": ("mixtral", 0.5, {**LLAMA, "head_dim": 12, "moe": EXPERTS}),
    "gpt2": ("gpt2", 0.5, GPT2),
    "gpt2_tied": ("gpt2", 1.0, TIED_GPT2),
    "gpt2_grouped_without_biases": (
        "gpt2",
        1.0,
        {**GPT2, "num_query_groups": 2, "activation": "gelu_tanh", "bias": False},
    ),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory):
    """name of a case -> its run's folder, made once."""
    made: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in made:
            _, alpha, changes = CASES[name]
            made[name] = checkpoint(tmp_path_factory.mktemp(name), alpha, **changes)
        return made[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_exported_model_equal_ours(name: str, run_of, tmp_path: Path) -> None:
    report = export_model(run_of(name), tmp_path / "out", ExportSettings(CASES[name][0]))
    comparison = check_export(run_of(name), tmp_path / "out", report.dtype)
    assert comparison.relative_difference <= 1e-5 < comparison.tolerance
    if name.startswith("granite"):
        assert "residual_multiplier" in report.kept and not report.folded
    else:
        assert set(report.folded) >= {"branch", "query", "embedding"}


@pytest.mark.parametrize("name", ["granite", "llama_tied", "qwen3", "mixtral", "gpt2_tied"])
def test_greedy_generation_of_64_tokens_is_equal(name: str, run_of, tmp_path: Path) -> None:
    export_model(run_of(name), tmp_path / "out", ExportSettings(CASES[name][0]))
    _, ours = load_model(run_of(name), torch.device("cpu"), torch.float32)
    prompt = [5, 17, 80, 3]
    expected = list(generate(ours, prompt, Sampling(temperature=0.0, max_new_tokens=64)))
    theirs = load_with_transformers(tmp_path / "out")
    tokens = torch.tensor([prompt])
    found = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False
    )[0, 4:].tolist()
    assert found == expected
    assert len(set(found)) > 1  # tied models like to repeat themselves


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *(("llama", factor) for factor in ("embedding", "query", "branch", "unembedding")),
        *(("gpt2_tied", factor) for factor in ("embedding", "query", "branch", "final_norm")),
        ("qwen3", "query"),
        ("mixtral", "branch"),
    ],
)
def test_an_export_that_leaves_one_folded_multiplier_out_is_caught(
    name: str, factor: str, run_of, tmp_path: Path, monkeypatch
) -> None:
    right = exporting.fold
    monkeypatch.setattr(
        exporting, "fold", lambda *a: dataclasses.replace(right(*a), **{factor: 1.0})
    )
    report = export_model(run_of(name), tmp_path / "out", ExportSettings(CASES[name][0]))
    assert check_export(run_of(name), tmp_path / "out", report.dtype).relative_difference > 1e-3


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"]
)
def test_an_export_that_leaves_one_kept_multiplier_out_is_caught(
    key: str, run_of, tmp_path: Path
) -> None:
    report = export_model(run_of("granite"), tmp_path / "out")
    assert report.architecture == "granite"  # auto: multipliers are there to be kept
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    assert (
        check_export(run_of("granite"), tmp_path / "out", report.dtype).relative_difference > 1e-3
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_exports_hold_the_rounded_weights(dtype: str, run_of, tmp_path: Path) -> None:
    report = export_model(run_of("llama"), tmp_path / "out", ExportSettings("llama", dtype))
    comparison = check_export(run_of("llama"), tmp_path / "out", dtype)
    assert report.dtype == dtype and comparison.equal and comparison.relative_difference > 1e-5
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    stored = StoredCheckpoint.open(Path(run_of("llama")) / "checkpoints" / "step_00000000")
    assert torch.equal(
        tensors["model.norm.weight"], stored.tensor("final_norm.weight").to(getattr(torch, dtype))
    )


def test_sixteen_bit_experts_are_judged_by_the_median_token(
    run_of, tmp_path: Path, monkeypatch
) -> None:
    """Rounding sends some tokens to other experts; the control is a multiplier left out."""
    export_model(run_of("mixtral"), tmp_path / "out", ExportSettings("mixtral", "bfloat16"))
    comparison = check_export(run_of("mixtral"), tmp_path / "out", "bfloat16")
    assert comparison.equal and comparison.relative_difference > 1e-5
    right = exporting.fold
    monkeypatch.setattr(exporting, "fold", lambda *a: dataclasses.replace(right(*a), query=1.0))
    export_model(run_of("mixtral"), tmp_path / "wrong", ExportSettings("mixtral", "bfloat16"))
    assert not check_export(run_of("mixtral"), tmp_path / "wrong", "bfloat16").equal


def save_in_parallel(rank: int, folder: str, parallel: dict[str, Any]) -> None:
    config = export_config(folder, parallel=parallel, **LLAMA)
    save_checkpoint(config, context_on(rank, config.parallel))


def test_the_layout_that_wrote_a_checkpoint_leaves_no_trace_in_the_export(
    tmp_path: Path, pool: WorkerPool
) -> None:
    pool.run(4, save_in_parallel, str(tmp_path / "four"), {"tensor_parallel_size": 2})
    config = export_config(tmp_path / "one", **LLAMA)
    save_checkpoint(config, ParallelContext.single())
    files = [
        export_model(tmp_path / n, tmp_path / f"{n}_out", ExportSettings("llama")).folder
        for n in ("one", "four")
    ]
    one, four = (Path(folder, "model.safetensors").read_bytes() for folder in files)
    assert one == four


def test_shards_are_bounded_indexed_and_read_with_one_parameter_in_memory(
    run_of, tmp_path: Path, monkeypatch
) -> None:
    alive: list[weakref.ref] = []
    most = 0
    right = StoredCheckpoint.tensor

    def counted(self: StoredCheckpoint, name: str, state: str = "master") -> torch.Tensor:
        nonlocal most
        tensor = right(self, name, state)
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredCheckpoint, "tensor", counted)
    export_model(run_of("llama"), tmp_path / "out", ExportSettings("llama", shard_bytes=20_000))
    # Each parameter is read once.
    assert most == 1 and len(alive) == len(set(load_names(run_of("llama"))))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    for file in files:
        tensors = safetensors.torch.load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        assert sorted(tensors) == sorted(
            name for name, where in index["weight_map"].items() if where == file
        )
    export_model(run_of("llama"), tmp_path / "whole", ExportSettings("llama"))
    whole = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert check_export(run_of("llama"), tmp_path / "out", "float32").equal


def load_names(run: str) -> list[str]:
    return list(
        StoredCheckpoint.open(Path(run) / "checkpoints" / "step_00000000").manifest.parameters
    )


def test_a_model_that_no_architecture_expresses_is_refused_with_every_reason(
    tmp_path: Path,
) -> None:
    model = export_config(
        tmp_path,
        norm="layernorm",
        activation="squared_relu",
        position="alibi",
        bias=True,
        qk_norm=True,
    ).model
    with pytest.raises(ConfigError) as error:
        choose_architecture(model, table_for(model, export_config(tmp_path).completep))
    lines = str(error.value).splitlines()[1:]
    assert [line.strip().split(":")[0] for line in lines] == [*ARCHITECTURES]
    llama = next(line for line in lines if line.strip().startswith("llama:"))
    assert all(
        word in llama
        for word in (
            "norm = layernorm",
            "activation = squared_relu",
            "position = alibi",
            "qk_norm = true",
        )
    )
    # GPT-2 has layernorm: only what is in the way is named
    assert "norm" not in lines[-1].split("gpt2:")[1].split(";")[0]
    for name in ("granite", "llama", "qwen3", "gpt2"):
        assert blockers(name, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (LLAMA, "granite"),
        ({**LLAMA, "plain": True}, "llama"),
        (QWEN3, "qwen3"),
        ({"moe": EXPERTS}, "granitemoe"),
        ({"moe": SHARED_EXPERTS}, "granitemoeshared"),
        ({"moe": EXPERTS, "plain": True}, "mixtral"),
        (GPT2, "gpt2"),
    ],
)
def test_auto_keeps_multipliers_where_it_can_and_is_plain_where_there_are_none(
    changes: dict, expected: str, tmp_path: Path
) -> None:
    plain = changes.get("plain", False)
    config = export_config(
        tmp_path, factors=not plain, **{k: v for k, v in changes.items() if k != "plain"}
    )
    completep = (
        config.completep.model_copy(update={"parameterization": "sp"})
        if plain
        else config.completep
    )
    assert choose_architecture(config.model, table_for(config.model, completep)) == expected


def test_heads_that_stock_configurations_refuse_are_refused_here(tmp_path: Path) -> None:
    model = export_config(tmp_path, num_attention_heads=3, num_query_groups=3, head_dim=8).model
    assert "does not divide" in blockers("llama", model)[0] and not blockers("granite", model)
    wide = export_config(tmp_path, **{**GPT2, "head_dim": 16}).model
    assert "model.hidden_size = 32" in blockers("gpt2", wide)[0]


def test_experts_that_an_architecture_lacks_are_refused_by_setting(tmp_path: Path) -> None:
    def reasons(name: str, moe: dict[str, Any] | None, **changes: Any) -> str:
        return "; ".join(blockers(name, export_config(tmp_path, moe=moe, **changes).model))

    sigmoid = {"num_experts": 4, "top_k": 2}
    assert "gate = sigmoid" in reasons("granitemoe", sigmoid)
    assert "balance = bias" in reasons("granitemoe", sigmoid)
    assert "gate = sigmoid" in reasons("mixtral", {**sigmoid, "balance": "none"})
    for name in ("granitemoe", "mixtral"):
        assert "shared_ffn_hidden_size = 16" in reasons(name, SHARED_EXPERTS)
        assert "model.moe is null" in reasons(name, None)
        assert not reasons(name, EXPERTS)
    first_dense = reasons("granitemoeshared", {**SHARED_EXPERTS, "first_dense_layers": 1})
    assert "first_dense_layers = 1 and every = 1 leave 1 of 3 layers" in first_dense
    assert "every = 2 leave 1 of 3" in reasons("mixtral", {**EXPERTS, "every": 2})
    assert "model.hidden_size = 32" in reasons("granitemoe", EXPERTS, head_dim=12)
    assert "qkv_bias = true" in reasons("granitemoe", EXPERTS, qkv_bias=True)
    assert "qkv_bias = true" in reasons("mixtral", EXPERTS, qkv_bias=True)
    for name in ("granite", "llama", "qwen3", "qwen2", "mistral", "gpt2"):
        assert "it has no experts" in reasons(name, EXPERTS)


def test_an_existing_folder_is_left_alone_and_a_failed_export_leaves_nothing(
    run_of, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_model(run_of("llama"), tmp_path / "out")
    monkeypatch.setattr(exporting, "model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(run_of("llama"), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_card_holds_configuration_table_and_multipliers(run_of, tmp_path: Path) -> None:
    export_model(run_of("llama"), tmp_path / "out", ExportSettings("llama"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_num_layers: 1" in card
    assert "hidden_weight: layers.0-2" in card
    assert "m_N = 4" in card
    assert f"embeddings times {FACTORS['input_multiplier']:g}" in card


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("77", 77)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "0", "5 apples"])
def test_words_that_are_no_size_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_a_parameter_that_no_tensor_takes_is_refused_by_name(
    run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model with a third branch, which would be exported without it."""
    all_pieces = exporting.pieces

    def without_one(*arguments: Any) -> list[Any]:
        pieces = all_pieces(*arguments)
        return [piece for piece in pieces if piece.source != "layers.2.mlp.down.weight"]

    monkeypatch.setattr(exporting, "pieces", without_one)
    with pytest.raises(ConfigError, match=r"has no tensor for layers\.2\.mlp\.down\.weight\."):
        export_model(run_of("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
