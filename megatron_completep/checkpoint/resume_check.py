"""Whether the present run may continue from a checkpoint, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_completep.checkpoint import random_state
from megatron_completep.checkpoint.compare import (
    Difference,
    changed_settings,
    differences,
    refused,
    show,
)
from megatron_completep.checkpoint.data_order import DataOrder, compare_order
from megatron_completep.checkpoint.identity import PRODUCTS, identity_of, refusal
from megatron_completep.checkpoint.manifest import Manifest
from megatron_completep.config.schema import Config
from megatron_completep.data.beginning import trained_beginning
from megatron_completep.errors import CheckpointError
from megatron_completep.run.state import RunState

BEGINNING = "beginning"  # in checkpoint.allow_changed: other beginnings of texts


class ResumeCheck:
    """Compares checkpoints with the present run. Every rank comes to the same result.

    Args:
        config: of the present run.
        identity: of the present run, from `identity.identity_for`.
        states: the names of the states that its update rule keeps, with the masters.
        order: of its training samples; None: not compared.
        report: told of each setting that changes.
        products: the library that computes its matrix products.
    """

    def __init__(
        self,
        config: Config,
        identity: Mapping[str, Any],
        states: Iterable[str],
        data_order: DataOrder | None,
        report: Callable[[str], None],
        products: str = "torch",
    ):
        self._config = config
        self._identity = identity
        self._states = sorted(states)
        self._data_order = data_order
        self._report = report
        self._products = products

    def compare(self, folder: Path, manifest: Manifest) -> None:
        """Report what changes. Raises CheckpointError where the run must not continue.

        folder: of the checkpoint, for the messages.
        """
        # States come first: under another update rule no other difference matters.
        self._compare_states(folder, manifest)
        identity_differences = differences(identity_of(manifest), self._identity)
        allowed = self._config.checkpoint.allow_changed
        if bad := refused(identity_differences, allowed):
            raise CheckpointError(refusal(folder, bad, allowed))
        self._compare_beginnings(folder, manifest)

        # What may change is not refused, but a user who did not mean it must see it.
        settings = changed_settings(manifest.config, self._config)
        settings += [d for d in identity_differences if _is_reported(d)]
        for difference in settings:
            present = show(difference.present)
            stored = show(difference.stored)
            self._report(
                f"resuming with {difference.path} = {present}, the checkpoint has {stored}"
            )
        self._compare_products(manifest)

        # Other data have another order in any case, and were allowed above if we come here.
        unless_allowed = refused(identity_differences, allowed=())
        other_data = any(d.path.startswith(("data.", "fingerprints.")) for d in unless_allowed)
        if self._data_order is not None and not other_data:
            line = compare_order(folder, manifest, self._data_order, allowed)
            if line is not None:
                self._report(line)

    def _compare_beginnings(self, folder: Path, manifest: Manifest) -> None:
        """Refuse data whose documents begin otherwise than those that the weights were trained on.

        Corpora that do not say what their documents begin with pass.
        """
        stored = identity_of(manifest)
        trained_on = _beginning(stored["fingerprints"], stored["data"])
        present = _beginning(self._identity["fingerprints"], self._identity["data"])
        if trained_on is None or present is None or trained_on == present:
            return
        if BEGINNING in self._config.checkpoint.allow_changed:
            return
        raise CheckpointError(
            f"{folder} was trained on texts that begin {_with_or_without(trained_on)} a "
            "beginning-of-text token, the documents of this run begin "
            f"{_with_or_without(present)}. "
            "Preprocess the corpus as its model was trained (--prepend-bos, --no-prepend-bos), "
            f"or, if the change is meant: checkpoint.allow_changed=[{BEGINNING}]."
        )

    def _compare_products(self, manifest: Manifest) -> None:
        """Report products of another library, whose last bits differ.

        A model that was imported has computed nothing.
        """
        # Earlier versions named no library: they had torch's alone.
        stored = manifest.versions.get(PRODUCTS, "torch")
        if manifest.step and stored != self._products:
            self._report(
                f"resuming with matrix products by {self._products}, the checkpoint was written "
                f"with {stored}: results differ in their last bits"
            )

    def _compare_states(self, folder: Path, manifest: Manifest) -> None:
        """Refuse what another update rule wrote: its states mean nothing to the present one."""
        stored_states = sorted(manifest.states)
        if stored_states != self._states:
            raise CheckpointError(
                f"{folder} holds the states {', '.join(stored_states)}, "
                f"but the update rule of this run keeps {', '.join(self._states)}. "
                "Continue with the rule that wrote it; or make a checkpoint of this rule: "
                "tools/checkpoint.py adapt carries means of gradients over, and with --start-anew "
                "the weights alone."
            )


def _is_reported(difference: Difference) -> bool:
    """Whether a difference of identities is reported beside the settings that changed.

    A setting of the table is named as what follows from it. Prefixes of data files differ from
    machine to machine and mean nothing.
    """
    if difference.path.endswith((".prefix", ".beginning")):
        return False
    return difference.path.startswith(("table.", "fingerprints."))


def _beginning(fingerprints: Mapping[str, Any], data: Mapping[str, Any]) -> bool | None:
    """Whether texts begin with a token of their own; None where nothing says so.

    fingerprints, data: of an identity. The corpora decide; a checkpoint without any, such as an
    imported model's, has the setting of its tokenizer.
    """
    ids = trained_beginning(fingerprints)
    if ids is not None:
        return bool(ids)
    chosen: bool | None = (data.get("tokenizer") or {}).get("prepend_bos")
    return chosen


def _with_or_without(has_beginning: bool) -> str:
    return "with" if has_beginning else "without"


def progress_of(manifest: Manifest) -> RunState:
    """How far the run was. Raises CheckpointError when its generator states cannot be read."""
    try:
        random_state.check(manifest.rng)
    # What Python, numpy and torch raise for a state that is none.
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"the manifest of step {manifest.step} holds no state that this version reads: "
            f"{error!r}"
        ) from None
    # They are set only when all tensors are in place; here it is known that they can be.
    return RunState(**manifest.state.model_dump())
