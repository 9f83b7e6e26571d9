"""README.md of an exported folder: what it is, how the multipliers are kept, and how it was trained."""

from __future__ import annotations

from typing import Any

from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.config import Config
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.planning.plan import describe

_MEANING = {
    "embedding": "token (and position) embeddings",
    "query": "the q projection, or the gain of the norm on queries",
    "branch": "the output projections of attention and MLP, with their biases",
    "final_norm": "the final norm",
    "unembedding": "the unembedding (`lm_head`)",
}


def model_card(config: Config, manifest: Manifest, report: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    tokens = manifest.state.tokens
    table = manifest.table
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [megatron-completep, completep]",
            "---",
            f"# {report['architecture']} model of {report['parameters']:,} parameters",
            "",
            f"Exported by megatron-completep from step {manifest.step} ({tokens:,} tokens) of a run, in {report['dtype']}. "
            "Stock transformers and vLLM load it; no remote code is needed.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
            "```",
            "",
            *_tokenizer_notes(report),
            "## The parameterization",
            "",
            f"`{config.completep.parameterization}`: width multiplier m_N = {table.get('width_multiplier', 1):g}, depth multiplier "
            f"m_L = {table.get('depth_multiplier', 1):g}, alpha = {table.get('alpha', 1):g}. {_multipliers(report)}",
            "",
            "```text",
            describe(config),
            "```",
            "",
            "## Training configuration",
            "",
            "```yaml",
            dump_yaml(config.model_dump(mode="json")).rstrip(),
            "```",
            "",
            f"Versions: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}.",
            "",
        ]
    )


def _multipliers(report: dict[str, Any]) -> str:
    if report["kept"]:
        values = ", ".join(f"`{name}` = {value:.9g}" for name, value in report["kept"].items())
        return f"The forward multipliers are in config.json ({values}); the tensors are those that were trained."
    if report["folded"]:
        values = "; ".join(
            f"{_MEANING[name]} times {value:.9g}" for name, value in report["folded"].items()
        )
        return (
            "This architecture has no forward multipliers, so they are folded into the tensors: "
            + values
            + ". "
            "The function is the same; training that goes on from here, outside of megatron-completep, follows another parameterization."
        )
    return "All forward multipliers are 1; the tensors are those that were trained."


def _tokenizer_notes(report: dict[str, Any]) -> list[str]:
    if report["tokenizer"] is None:
        return ["The folder holds no tokenizer.", ""]
    return [
        f"The tokenizer ({report['tokenizer']} in training) encodes as it did in training: no token is added in front, and text that "
        "spells a special token stays text, unless a Hugging Face tokenizer's own configuration says otherwise.",
        "",
    ]
