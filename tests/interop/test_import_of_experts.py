"""Training on from imported experts can be balanced, as docs/export.md says."""

import re
from pathlib import Path

from megatron_completep.checkpoint.compare import differences, refused
from megatron_completep.checkpoint.identity import identity_for
from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.interop.import_model import ALLOWED
from tests.support.configs import small_config

PAGE = Path(__file__).resolve().parents[2] / "docs/export.md"


def config_with(data: str, **moe: object) -> Config:
    experts = {"num_experts": 4, "top_k": 2, "gate": "softmax", **moe}
    return small_config(model={"moe": experts}, data={"train": [{"prefix": data}]})


def test_the_balance_of_imported_experts_is_changed_by_the_words_of_the_page() -> None:
    (found,) = re.findall(r"'checkpoint\.allow_changed=\[(.*?)\]'", PAGE.read_text())
    documented = found.split(", ")
    imported = config_with("imported", balance="none")
    balanced = config_with("own", balance="loss", balance_loss=0.01)
    identities = []
    for config, fingerprint in ((imported, {}), (balanced, {"train": "own"})):
        identities.append(identity_for(config, table_of(config), fingerprint, {}))
    changed = differences(*identities)
    assert refused(changed, documented) == []
    # Neither what the import allows is enough, nor what balances alone.
    for words in (ALLOWED, [word for word in documented if word not in ALLOWED]):
        assert refused(changed, words) != []
