"""The table of imports, judged by transformers, and contradictions between tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_completep.config import config_from_mapping, load_config
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.inference.generation import load_model
from megatron_completep.interop.architectures import blockers, export_lines, export_warning
from megatron_completep.interop.check_export import load_with_transformers
from megatron_completep.interop.export_model import export_model
from megatron_completep.interop.hf_config import from_hf
from megatron_completep.interop.import_model import import_model
from megatron_completep.model.rotary import rotary_frequencies
from tests.config.broken_rules import BASE
from tests.interop.import_table import (
    EXPERTS,
    GPT2,
    LINEAR,
    LLAMA3,
    REFUSED,
    RIGHT,
    SHAPE,
    YARN,
    old_style,
)
from tests.support.models import build_model, model_config

transformers = pytest.importorskip("transformers")
LENGTH = 80  # beyond the original lengths of the scalings, where they act


def write_entries(folder: Path, entries: dict[str, Any]) -> None:
    """Write entries over those of config.json; `...` takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    left = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(left))


def make_folder(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """What save_pretrained writes of a random model whose gains and biases are off 1 and 0."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: torch.Tensor = model(tokens)
    return logits


def theirs(folder: Path) -> torch.Tensor:
    model = load_with_transformers(folder)
    return logits_of(lambda tokens: model(tokens).logits)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", RIGHT)
def test_an_import_computes_what_transformers_does_and_goes_back_bit_equal(
    name: str, tmp_path: Path
) -> None:
    family, settings, entries = RIGHT[name]
    original = make_folder(tmp_path / "original", family, settings)
    write_entries(original, entries)
    report = import_model(original, tmp_path / "run")
    ours = logits_of(load_model(report.checkpoint, torch.device("cpu"), torch.float32)[1])
    expected = theirs(original)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()

    exported = export_model(tmp_path / "run", tmp_path / "out")
    assert exported.architecture == report.architecture and not exported.folded
    before = tensors_of(original)
    after = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    assert torch.equal(theirs(tmp_path / "out"), expected)


def test_the_table_has_seventy_one_rows() -> None:
    assert len(RIGHT) + len(REFUSED) == 71


@pytest.fixture(scope="module")
def plain_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """config.json of each family, as it would be imported."""
    contents = {}
    settings_of: dict[str, dict[str, Any]] = {
        "GPT2": {**GPT2, "n_positions": 96},
        "Mistral": {**SHAPE, "sliding_window": None},
        "Mixtral": EXPERTS,
        "GraniteMoe": EXPERTS,
    }
    for family in ("Llama", "Qwen2", "Qwen3", *settings_of):
        settings = settings_of.get(family, SHAPE)
        config = getattr(transformers, f"{family}Config")(**settings)
        contents[family] = json.loads(config.to_json_string())
        from_hf(contents[family], "config.json")  # the control: without the entry it is taken
    return contents


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_true_reason(
    name: str, plain_folders: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, entries, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(plain_folders[family]))
    write_entries(tmp_path, entries)
    with pytest.raises(UserError) as error:
        _, model = from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
        # Rules between settings are those of every configuration.
        config_from_mapping({**BASE, "model": model})
    assert words in str(error.value)


SCALINGS = {
    "none": None,
    "linear": LINEAR,
    "llama3": LLAMA3,
    "llama3 of Llama 3.1": {**LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn of Qwen2.5": {**YARN, "original_max_position_embeddings": 32768},
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, attention factor": {**YARN, "attention_factor": 0.9},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
}


@pytest.mark.parametrize("base", [10000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_are_those_of_transformers(name: str, base: float) -> None:
    scaling = SCALINGS[name]
    shape = {"hidden_size": 512, "num_attention_heads": 4}
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": base}
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=1 << 17, rope_parameters=parameters
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    model = model_config(**shape, rope_base=base, rope_scaling=scaling)
    frequencies, factor = rotary_frequencies(model, torch.device("cpu"))
    # They compute in float32.
    torch.testing.assert_close(frequencies.float(), rotary.inv_freq, rtol=2e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    plain, _ = rotary_frequencies(model_config(**shape, rope_base=base), torch.device("cpu"))
    assert torch.equal(plain, frequencies) == (scaling is None)


def test_positions_of_one_row_are_those_of_every_row() -> None:
    for position in ("rope", "learned"):
        extra = {"rope_scaling": YARN} if position == "rope" else {}
        gpt = build_model(model_config(position=position, seq_length=64, **extra)).eval()
        tokens = torch.randint(9, (2, 9))
        places = torch.arange(20, 29)
        with torch.no_grad():
            by_row = gpt(tokens, positions=places.expand(2, 9))
            assert torch.equal(gpt(tokens, positions=places), by_row)
            assert (position == "rope") == torch.allclose(gpt(tokens), by_row, atol=1e-3)


def spoiled(folder: Path, **tensors: torch.Tensor) -> None:
    whole = tensors_of(folder) | tensors
    safetensors.torch.save_file(whole, folder / "model.safetensors", {"format": "pt"})


def test_a_head_beside_tied_embeddings_must_be_their_equal(tmp_path: Path) -> None:
    original = make_folder(tmp_path / "m", "Llama", {**SHAPE, "tie_word_embeddings": True})
    table = tensors_of(original)["model.embed_tokens.weight"]
    spoiled(original, **{"lm_head.weight": table.clone()})
    import_model(original, tmp_path / "run")
    spoiled(original, **{"lm_head.weight": table + 1})
    with pytest.raises(DataError, match="tie_word_embeddings to false"):
        import_model(original, tmp_path / "other")


def test_nan_in_a_tied_table_and_its_head_is_named_and_not_called_a_difference(
    tmp_path: Path,
) -> None:
    original = make_folder(tmp_path / "m", "Llama", {**SHAPE, "tie_word_embeddings": True})
    name = "model.embed_tokens.weight"
    table = tensors_of(original)[name].clone()
    table[3, 3] = math.nan
    spoiled(original, **{name: table, "lm_head.weight": table.clone()})
    with pytest.raises(DataError, match=r"lm_head\.weight holds nan at \[3, 3\]"):
        import_model(original, tmp_path / "run")


def test_a_tensor_with_nan_is_named_with_its_place_and_nothing_is_left(tmp_path: Path) -> None:
    original = make_folder(tmp_path / "m", "Llama", SHAPE)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors_of(original)[name]
    tensor[3, 5] = math.nan
    spoiled(original, **{name: tensor})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at \[3, 5\]"):
        import_model(original, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_single_file_beside_an_index_must_hold_the_same(tmp_path: Path) -> None:
    original = make_folder(tmp_path / "m", "Llama", SHAPE)
    whole = tensors_of(original)
    name = "model-00001-of-00001.safetensors"
    safetensors.torch.save_file(whole, original / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, name)}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    import_model(original, tmp_path / "run")
    spoiled(original, **{"model.norm.weight": whole["model.norm.weight"] + 1})
    with pytest.raises(DataError, match=r"model\.norm\.weight: .* at \[0\]"):
        import_model(original, tmp_path / "other")


def test_a_missing_entry_has_the_default_of_its_own_architecture() -> None:
    """Llama's 2048 positions are not Qwen2's 32768, nor its groups Mistral's 8."""
    with_experts = ("GraniteMoe", "GraniteMoeShared", "Mixtral")
    for family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Granite", *with_experts):
        shape = {**SHAPE, "num_attention_heads": 32, "hidden_size": 256}
        if family in with_experts:
            shape["num_local_experts"] = 4
        if family == "Mistral":
            shape["sliding_window"] = None
        written = json.loads(getattr(transformers, f"{family}Config")(**shape).to_json_string())
        names = (
            *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
            *("num_experts_per_tok", "shared_intermediate_size"),
        )
        trimmed = {key: value for key, value in written.items() if key not in names}
        expected = getattr(transformers, f"{family}Config").from_dict(trimmed)
        _, model = from_hf(trimmed, "config.json")
        assert model["seq_length"] == expected.max_position_embeddings
        assert model["num_query_groups"] == expected.num_key_value_heads
        head_dim = getattr(expected, "head_dim", None) or 256 // 32
        assert (model["head_dim"], model["norm_eps"]) == (head_dim, expected.rms_norm_eps)
        if family in with_experts:
            assert model["moe"]["top_k"] == expected.num_experts_per_tok
            assert model["moe"]["shared_ffn_hidden_size"] is None


def test_a_plan_says_what_a_model_can_be_exported_as_and_why_not() -> None:
    lines = export_lines(model_config(qkv_bias=True))
    assert lines[0] == "export: as qwen2"
    assert any("not as granite, llama: model.qkv_bias = true" in line for line in lines)
    assert export_warning(model_config(qkv_bias=True)) == []
    assert export_warning(model_config(), "llama") == []
    # A branch that somebody registered has no place in any of them.
    assert blockers("llama", model_config(), ("attention", "mlp")) == []
    (reason,) = blockers("llama", model_config(), ("attention", "mlp", "side"))
    assert "branch side" in reason
    (warning,) = export_warning(model_config(), "gpt2")
    assert warning.startswith("export.architecture = gpt2 cannot express this model\nexport: as ")
    (warning,) = export_warning(model_config(position="alibi"))
    assert "no Hugging Face architecture" in warning and len(warning.splitlines()) == 6


def test_an_import_keeps_the_scaling_in_its_configuration(tmp_path: Path) -> None:
    original = make_folder(tmp_path / "m", "Llama", SHAPE)
    write_entries(original, old_style(LLAMA3, 5e5))
    config = load_config(import_model(original, tmp_path / "run").config)
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.given() == LLAMA3
    with pytest.raises(ConfigError, match=r"model\.rope_scaling"):
        import_model(original, tmp_path / "other", ["model.rope_scaling.factor=4"])
