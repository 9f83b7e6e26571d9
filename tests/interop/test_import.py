"""Imported folders compute what transformers computes,
train on at any layout, and their export is the original, bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_completep.checkpoint import Checkpointer, StoredCheckpoint
from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.interop import import_model as importing
from megatron_completep.interop.check_export import check_export
from megatron_completep.interop.export_model import ExportSettings, export_model
from megatron_completep.interop.hf_config import from_hf
from megatron_completep.interop.import_model import import_model
from megatron_completep.parallel.parameter import spec_of
from megatron_completep.pretrain import pretrain
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.telemetry.metrics import read_metrics
from tests.support.corpora import write_random
from tests.support.ranks import WorkerPool, context_on

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 93,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
LLAMA = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "qwen2": ("Qwen2", {**LLAMA, "bos_token_id": None, "eos_token_id": None}),
    "granite": (
        "Granite",
        {
            **LLAMA,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 8.0,
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 93, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
}


def make_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """What save_pretrained writes of a random model whose gains and biases are off 1 and 0."""
    family, settings = FOLDERS[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=dtype))
    model.save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "factor",
    ["input_multiplier", "residual_multiplier", "attention_multiplier", "logit_multiplier"],
)
def test_an_import_that_forgets_one_of_granites_multipliers_is_caught(
    factor: str, tmp_path: Path, monkeypatch
) -> None:
    original = make_folder(tmp_path, "granite")

    def forgetful(*arguments: Any) -> tuple[str, dict[str, Any]]:
        architecture, model = from_hf(*arguments)
        return architecture, {name: value for name, value in model.items() if name != factor}

    monkeypatch.setattr(importing, "from_hf", forgetful)
    report = import_model(original, tmp_path / "run")
    assert check_export(report.checkpoint, original, "float32").relative_difference > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_tensors_come_back_bit_equal(dtype: str, tmp_path: Path) -> None:
    original = make_folder(tmp_path, "llama", getattr(torch, dtype))
    report = import_model(original, tmp_path / "run")
    assert report.dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    export_model(tmp_path / "run", tmp_path / "out", ExportSettings("llama", dtype))
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (original, tmp_path / "out")
    )
    assert all(
        torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before
    )


def test_sharded_folders_and_the_base_models_own_names_are_read(tmp_path: Path) -> None:
    original = make_folder(tmp_path, "gpt2")
    whole = safetensors.torch.load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    tensors = {name.removeprefix("transformer."): value for name, value in whole.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that older versions saved
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map = {}
    for number, half in enumerate(halves):
        safetensors.torch.save_file(half, original / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{number}.safetensors")
    (original / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    import_model(original, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", ExportSettings("gpt2"))
    after = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert whole.keys() == after.keys()
    assert all(torch.equal(whole[key], after[key]) for key in whole)
    weight_map["wte.weight"] = "../elsewhere.safetensors"
    (original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match="not in this folder"):
        import_model(original, tmp_path / "other")


def reference_loss(original: Path, tokens: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(original)).eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def loaded(rank: int, path: str, parallel: list[str]) -> Assembly:
    """The imported model as a layout loads it."""
    config = load_config(path, parallel)
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context)
    optimizer, table = assembly.optimizer, assembly.table
    Checkpointer(config, context, optimizer, table, report=lambda text: None).load_latest()
    optimizer.wait_for_parameters()
    return assembly


def loss_at_layout(rank: int, path: str, parallel: list[str], tokens: torch.Tensor) -> float:
    """The loss of the imported model in a layout without pipeline stages."""
    (chunk,) = loaded(rank, path, parallel).chunks
    with torch.no_grad():
        return chunk(tokens[:, :-1], labels=tokens[:, 1:]).item() / tokens[:, 1:].numel()


def parameters_at_layout(rank: int, path: str, parallel: list[str]) -> list[str]:
    """Names of this stage's parameters;
    each is compared with what the checkpoint stores under its name.
    """
    optimizer = loaded(rank, path, parallel).optimizer
    stored = StoredCheckpoint.open(Path(path).parent / "checkpoints" / "step_00000000")
    for name, parameter in optimizer.shards.parameters.items():
        whole = stored.tensor(spec_of(parameter).stored_name(name))
        assert torch.equal(parameter.detach()[: whole.shape[0]], whole), name
    return list(optimizer.shards.parameters)


def test_pipeline_stages_load_an_import_tied_embeddings_included(
    tmp_path: Path, pool: WorkerPool
) -> None:
    report = import_model(
        make_folder(tmp_path, "gpt2"),
        tmp_path / "run",
        ["training.global_batch_size=4", "training.device=cpu", "training.precision=float32"],
    )
    first, last = pool.run(
        2, parameters_at_layout, report.config, ["parallel.pipeline_parallel_size=2"]
    )
    assert "embedding.weight" in first
    assert "unembedding.weight" in last
    assert "layers.1.mlp.down.bias" in last


@pytest.mark.parametrize("name", ["granite", "qwen2"])
def test_training_goes_on_from_an_import(name: str, tmp_path: Path, pool: WorkerPool) -> None:
    """One process trains; two tensor ranks start from the same loss,
    which is that of transformers.
    """
    original = make_folder(tmp_path, name)
    words = [
        "training.precision=float32",
        "training.device=cpu",
        "training.train_steps=6",
        "training.global_batch_size=4",
    ]
    words += [
        "optimizer.base_lr=3e-3",
        "optimizer.warmup_fraction=0",
        "logging.tensorboard=false",
        "checkpoint.async_save=false",
    ]
    write_random(tmp_path / "tokens", [40] * 30, vocabulary=93)
    words += [f"data.train=[{{prefix: {tmp_path / 'tokens'}}}]", "model.vocab_multiple=8"]
    report = import_model(original, tmp_path / "run", words)
    tokens = torch.randint(93, (2, 33), generator=torch.Generator().manual_seed(3))
    expected = reference_loss(original, tokens)
    layout = ["parallel.tensor_parallel_size=2"]
    losses = pool.run(2, loss_at_layout, report.config, layout, tokens)
    assert losses == pytest.approx([expected] * 2, rel=1e-5)
    pretrain(load_config(report.config))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 6 and rows[-1]["loss"] < rows[0]["loss"]


def test_a_model_that_is_not_expressible_is_refused_with_every_reason(tmp_path: Path) -> None:
    values = {
        **LLAMA,
        "model_type": "llama",
        "hidden_act": "gelu",
        "attention_bias": True,
        "quantization_config": {"bits": 4},
    }
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 8.0}
    values["num_hidden_layers"] = "two"
    with pytest.raises(ConfigError) as error:
        from_hf(values, "config.json")
    text = str(error.value)
    assert len(text.splitlines()) == 6
    assert all(
        word in text
        for word in (
            "hidden_act",
            "attention_bias",
            "quantization_config",
            "dynamic",
            "num_hidden_layers",
        )
    )
    with pytest.raises(ConfigError, match="mamba"):
        from_hf({"model_type": "mamba"}, "config.json")
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 9,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
    }
    assert from_hf(gpt2, "config.json")[1]["activation"] == "gelu_tanh"
    with pytest.raises(ConfigError, match="16 learned positions"):
        from_hf(gpt2, "config.json", seq_length=8)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    original = make_folder(tmp_path, "llama")
    (original / "model.safetensors").rename(original / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickle"):
        import_model(original, tmp_path / "run")
    (original / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        import_model(original, tmp_path / "run")
    (original / "model.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(DataError, match="not a safetensors file"):
        import_model(original, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_that_do_not_fit_the_configuration_are_all_named(tmp_path: Path) -> None:
    original = make_folder(tmp_path, "llama")
    tensors = safetensors.torch.load_file(original / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.float64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    safetensors.torch.save_file(tensors, original / "model.safetensors")
    with pytest.raises(DataError) as error:
        import_model(original, tmp_path / "run")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4
    text = "\n".join(lines)
    assert all(
        word in text
        for word in (
            "norm.weight: missing",
            "[3, 32]",
            "F64",
            "q_proj.bias: our model has no such tensor",
        )
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.rope_base=5", "model.rope_base"),
        (
            "completep={parameterization: completep, base_hidden_size: 8, base_num_layers: 1}",
            "another residual_multiplier",
        ),
        ("model.hidden_sizes=5", "hidden_sizes"),
    ],
)
def test_overrides_that_would_change_the_function_are_refused(
    word: str, message: str, tmp_path: Path
) -> None:
    original = make_folder(tmp_path, "llama")
    with pytest.raises(ConfigError, match=message):
        import_model(original, tmp_path / "run", [word])


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    original = make_folder(tmp_path, "llama")
    import_model(original, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        import_model(original, tmp_path / "run")


def test_what_a_killed_import_left_goes_with_the_next(tmp_path: Path) -> None:
    """It is not taken for a run that is there already;
    what a run is, a link to a checkpoint included, still is.
    """
    original = make_folder(tmp_path, "llama")
    left = tmp_path / "run" / "checkpoints" / ".step_00000000.deadbeef"
    left.mkdir(parents=True)
    (left / "part_00000.safetensors").write_bytes(b"half")
    report = import_model(original, tmp_path / "run")
    assert not left.exists() and StoredCheckpoint.open(report.checkpoint).manifest.step == 0
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "step_00000005").symlink_to(report.checkpoint)
    with pytest.raises(ConfigError, match="holds a run already"):
        import_model(original, tmp_path / "other")


def test_the_folder_kernels_of_a_checkout_answers_transformers_probe_with_nothing() -> None:
    """transformers imports a package of this name where it finds one,
    and would take an error for its own.
    """
    program = (
        "import kernels, sys; print(hasattr(kernels, '__version__'), "
        "any(name.startswith('kernels.') for name in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["False", "False"]
