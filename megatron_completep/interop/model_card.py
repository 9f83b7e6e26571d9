"""README.md of an exported folder: its multipliers, its tokenizer, and how it was trained."""

from __future__ import annotations

from typing import Any

from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.config import Config
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.planning.plan import describe

_MEANING = {
    "embedding": "token (and position) embeddings",
    "query": "the q projection, or the gain of the norm on queries",
    "branch": "the output projections of attention, MLP and experts, with their biases",
    "final_norm": "the final norm",
    "unembedding": "the unembedding (`lm_head`)",
}


def model_card(config: Config, manifest: Manifest, report: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    `report` is an export's report as JSON (`ExportReport.to_json`).
    """
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        *_introduction(manifest, report),
        *_tokenizer_notes(report),
        "## The parameterization",
        "",
        _parameterization(config, manifest.table, report),
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
        f"Versions: {versions}.",
        "",
    ]
    return "\n".join(lines)


def _introduction(manifest: Manifest, report: dict[str, Any]) -> list[str]:
    """Front matter, title, origin, and how the folder is loaded."""
    origin = (
        f"Exported by megatron-completep from step {manifest.step} "
        f"({manifest.state.tokens:,} tokens) of a run, in {report['dtype']}. "
        "Stock transformers and vLLM load it; no remote code is needed."
    )
    # The hub reads front matter only where a file begins with it.
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megatron-completep, completep]",
        "---",
        f"# {report['architecture']} model of {report['parameters']:,} parameters",
        "",
        origin,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
        "",
    ]


def _parameterization(config: Config, table: dict[str, Any], report: dict[str, Any]) -> str:
    """The multipliers of width and depth, and what became of the forward multipliers."""
    # A manifest without an entry stands for a multiplier of 1.
    width_multiplier = table.get("width_multiplier", 1)
    depth_multiplier = table.get("depth_multiplier", 1)
    alpha = table.get("alpha", 1)
    return (
        f"`{config.completep.parameterization}`: width multiplier m_N = {width_multiplier:g}, "
        f"depth multiplier m_L = {depth_multiplier:g}, alpha = {alpha:g}. {_multipliers(report)}"
    )


def _multipliers(report: dict[str, Any]) -> str:
    """Where the forward multipliers are: in config.json, folded into tensors, or nowhere."""
    # An architecture has either all four multipliers in its configuration or none of them.
    kept_multipliers = report["kept"]
    if kept_multipliers:
        listed = ", ".join(f"`{name}` = {factor:.9g}" for name, factor in kept_multipliers.items())
        return (
            f"The forward multipliers are in config.json ({listed}); "
            "the tensors are those that were trained."
        )
    folded_factors = report["folded"]
    if folded_factors:
        listed = "; ".join(
            f"{_MEANING[name]} times {factor:.9g}" for name, factor in folded_factors.items()
        )
        return (
            "This architecture has no forward multipliers, so they are folded into the tensors: "
            f"{listed}. "
            "The function is the same; training that goes on from here, outside of "
            "megatron-completep, follows another parameterization."
        )
    return "All forward multipliers are 1; the tensors are those that were trained."


def _tokenizer_notes(report: dict[str, Any]) -> list[str]:
    """A paragraph on the tokenizer."""
    if report["tokenizer"] is None:
        return ["The folder holds no tokenizer.", ""]
    # A text that begins otherwise than in training gets other probabilities.
    ids = report["beginning"]
    begun = "no token is added in front"
    if ids:
        begun = f"texts begin with the token {', '.join(map(str, ids))}"
    note = (
        f"The tokenizer ({report['tokenizer']} in training) encodes as it did in training: "
        f"{begun}, and text that spells a special token stays text, unless a Hugging Face "
        "tokenizer's own configuration says otherwise."
    )
    return [note, ""]
