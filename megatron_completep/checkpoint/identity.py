"""What a checkpoint says of the run that wrote it, and whether the present run may go on from there."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_completep
from megatron_completep.checkpoint.compare import ADAPTABLE, Difference, matches, side_by_side
from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.checkpoint.save import jsonable
from megatron_completep.completep import Table
from megatron_completep.config.schema import Config
from megatron_completep.parallel.context import ParallelContext


def identity_for(
    config: Config, table: Table, fingerprints: Mapping[str, Any], parameters: Mapping[str, Mapping]
) -> dict[str, Any]:
    """What is compared at resume, of the present run."""
    value = {
        "model": config.model.model_dump(mode="json"),
        "table": describe_table(table),
        "data": config.data.model_dump(mode="json"),
        "fingerprints": dict(fingerprints),
        "parameters": {
            name: [p["role"], p["width_ratio"], p["shape"]] for name, p in parameters.items()
        },
    }
    return jsonable(value)


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """The same, as a checkpoint holds it."""
    return {
        "model": manifest.config.get("model", {}),
        "table": manifest.table,
        "data": manifest.config.get("data", {}),
        "fingerprints": manifest.fingerprints,
        "parameters": {
            name: [p.role, p.width_ratio, p.shape] for name, p in manifest.parameters.items()
        },
    }


def describe_table(table: Table) -> dict[str, Any]:
    """The parameterization as plain values: what was configured, and what follows from it for the forward pass."""
    return {
        "width_multiplier": table.width_multiplier,
        "depth_multiplier": table.depth_multiplier,
        "alpha": table.alpha,
        "attention_scale": table.attention_scale,
        "base_residual_multiplier": table.base_residual_multiplier,
        "base_logit_multiplier": table.base_logit_multiplier,
        "base_hidden_size": table.base_hidden_size,
        "base_ffn_hidden_size": table.base_ffn_hidden_size,
        "scale_width": table.scale_width,
        "batch_ratio": table.batch.batch_ratio,
        "duration_ratio": table.batch.duration_ratio,
        "batch_exponent": table.batch.exponent,
        "residual_multiplier": table.residual_multiplier,
        "logit_multiplier": table.logit_multiplier,
        "own_factors": {str(role): own.model_dump() for role, own in table.own_factors.items()},
    }


def describe_layout(config: Config, context: ParallelContext) -> dict[str, int]:
    """Ranks along each axis, for whoever looks at the checkpoint; nothing that reads it needs them."""
    axes = {axis.name: axis.size for axis in (context.tensor, context.pipeline, context.data)}
    return {**axes, "world": context.world_size, "virtual": config.parallel.virtual_pipeline_size}


def versions() -> dict[str, str]:
    """Of what wrote the checkpoint."""
    return {
        "megatron_completep": megatron_completep.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def refusal(folder: Path, found: list[Difference], allowed: Sequence[str]) -> str:
    """The message for a run whose settings are not the checkpoint's: what differs, and only remedies that are not refused next.

    allowed: what checkpoint.allow_changed has already.
    """
    shown = found[:40]
    more = f"\n  ... and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    remedies = ["Continue with the checkpoint's settings, or start in another training.output_dir."]
    if any(d.of_other_tensors for d in found):
        remedies.append(
            "The tensors are not this model's, so checkpoint.allow_changed does not help."
        )
    else:
        words = ", ".join([*allowed, *_patterns(found)])
        remedies.append(
            f"If the change is meant: {shlex.quote(f'checkpoint.allow_changed=[{words}]')}."
        )
    of_model = [d for d in found if d.path.startswith("model.")]
    reshaped = of_model or any(d.path.startswith("table.") for d in found)
    layers = [(d.stored, d.present) for d in of_model if d.path == "model.num_layers"]
    not_fewer = all(
        isinstance(old, int) and isinstance(new, int) and old <= new for old, new in layers
    )
    if reshaped and not_fewer and all(matches(d.path, ADAPTABLE) for d in of_model):
        remedies.append("To keep the function under the new settings: tools/checkpoint.py adapt.")
    return "\n".join(
        [f"{folder} was trained with other settings:", f"{side_by_side(shown)}{more}", *remedies]
    )


def _patterns(found: Sequence[Difference]) -> list[str]:
    """What allows these differences: their paths, or one pattern for a section with many."""
    by_section: dict[str, list[str]] = {}
    for difference in found:
        by_section.setdefault(difference.path.partition(".")[0], []).append(difference.path)
    return [
        word
        for name, paths in by_section.items()
        for word in (paths if len(paths) <= 4 else [f"{name}.*"])
    ]
