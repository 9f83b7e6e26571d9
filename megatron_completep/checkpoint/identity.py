"""What a checkpoint says of the run that wrote it, for the comparison with the run that resumes."""

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

SHOWN = 40  # differences in a message
PRODUCTS = "products"  # the entry of a manifest's versions with the library of matrix products


def identity_for(
    config: Config,
    table: Table,
    fingerprints: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The identity of the present run, which is compared at resume.

    Args:
        fingerprints: of data and tokenizer.
        parameters: name -> what `shard.describe` says of it.
    """
    described = {}
    for name, parameter in parameters.items():
        described[name] = [parameter["role"], parameter["width_ratio"], parameter["shape"]]
    identity = {
        "model": config.model.model_dump(mode="json"),
        "table": describe_table(table),
        "data": config.data.model_dump(mode="json"),
        "fingerprints": dict(fingerprints),
        "parameters": described,
    }
    # As JSON would bring it back, or a tuple would differ from the list that was stored.
    readable: dict[str, Any] = jsonable(identity)
    return readable


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """The identity of the run that wrote a checkpoint."""
    described = {}
    for name, parameter in manifest.parameters.items():
        described[name] = [parameter.role, parameter.width_ratio, parameter.shape]
    return {
        "model": manifest.config.get("model", {}),
        "table": manifest.table,
        "data": manifest.config.get("data", {}),
        "fingerprints": manifest.fingerprints,
        "parameters": described,
    }


def describe_table(table: Table) -> dict[str, Any]:
    """The parameterization as plain values.

    Both what was configured, and what follows from it for the forward pass.
    """
    role_factors = {}
    for role, factors in table.own_factors.items():
        role_factors[str(role)] = factors.model_dump()
    described = {
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
        "own_factors": role_factors,
    }
    if table.base_expert_ffn_hidden_size:
        described["experts"] = table.experts._asdict()
        described["base_expert_ffn_hidden_size"] = table.base_expert_ffn_hidden_size
    # Earlier versions did not know it: where it is batch_exponent, it is not a difference.
    if not table.batch.has_one_exponent:
        described["duration_exponent"] = table.batch.duration_exponent
    return described


def describe_layout(config: Config, context: ParallelContext) -> dict[str, int]:
    """Ranks along each axis, for people; nothing that reads a checkpoint needs them."""
    described = (context.tensor, context.pipeline, context.data, context.context)
    axes = {axis.name: axis.size for axis in described}
    if context.expert_size > 1:
        axes["expert"] = context.expert_size
    return {**axes, "world": context.world_size, "virtual": config.parallel.virtual_pipeline_size}


def versions(products: str | None = None) -> dict[str, str]:
    """The versions of what writes the checkpoint.

    products: the library that computed the run's matrix products; None: nothing was computed.
    """
    found = {
        "megatron_completep": megatron_completep.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return found if products is None else {**found, PRODUCTS: products}


def refusal(folder: Path, bad: list[Difference], allowed: Sequence[str]) -> str:
    """The message for a run whose settings are not the checkpoint's: what differs, and remedies.

    None of the remedies is refused in its turn.

    allowed: what checkpoint.allow_changed has already.
    """
    # A model of another width differs in every parameter.
    shown = bad[:SHOWN]
    more = f"\n  ... and {len(bad) - len(shown)} more" if len(bad) > len(shown) else ""
    remedies = ["Continue with the checkpoint's settings, or start in another training.output_dir."]
    # What cannot be allowed at all must not be offered.
    if any(difference.of_other_tensors for difference in bad):
        remedies.append(
            "The tensors are not this model's, so checkpoint.allow_changed does not help."
        )
    else:
        # With what is allowed already, as the new setting replaces the old one.
        patterns = ", ".join([*allowed, *_patterns(bad)])
        override = shlex.quote(f"checkpoint.allow_changed=[{patterns}]")
        remedies.append(f"If the change is meant: {override}.")
    if _can_adapt(bad):
        remedies.append("To keep the function under the new settings: tools/checkpoint.py adapt.")
    title = f"{folder} was trained with other settings:"
    return "\n".join([title, f"{side_by_side(shown)}{more}", *remedies])


def _can_adapt(bad: Sequence[Difference]) -> bool:
    """Whether tools/checkpoint.py adapt can make a checkpoint of the present model."""
    of_model = [difference for difference in bad if difference.path.startswith("model.")]
    # A change of the base shape shows in the table alone.
    of_table = any(difference.path.startswith("table.") for difference in bad)
    if not of_model and not of_table:
        return False
    for difference in of_model:
        if not matches(difference.path, ADAPTABLE):
            return False
        # Layers can be added, but not taken away.
        if difference.path == "model.num_layers":
            old = difference.stored
            new = difference.present
            if not (isinstance(old, int) and isinstance(new, int) and old <= new):
                return False
    return True


def _patterns(bad: Sequence[Difference]) -> list[str]:
    """What allows these differences: their paths, or one pattern for a section with many."""
    by_section: dict[str, list[str]] = {}
    for difference in bad:
        section = difference.path.partition(".")[0]
        by_section.setdefault(section, []).append(difference.path)
    patterns = []
    for section, paths in by_section.items():
        patterns += paths if len(paths) <= 4 else [f"{section}.*"]
    return patterns
