"""The update rules by name. The table of a run names the rule that its columns belong to."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_completep.optim.adamw import AdamW
from megatron_completep.optim.muon import Muon
from megatron_completep.optim.rule import Rule

RULES: Mapping[str, type[Rule]] = {"adamw": AdamW, "muon": Muon}
