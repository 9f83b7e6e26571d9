"""docs/configuration.md says what the schema says."""

from pathlib import Path

from megatron_completep.config import Config
from megatron_completep.config.reference import configuration_reference

COMMITTED = Path(__file__).resolve().parents[2] / "docs/configuration.md"


def test_the_committed_reference_is_current():
    assert COMMITTED.read_text(encoding="utf-8") == configuration_reference(), (
        "run: python tools/config_reference.py --write"
    )


def test_every_setting_is_documented():
    text = configuration_reference()
    for name, field in Config.model_fields.items():
        page = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key, setting in field.annotation.model_fields.items():
            assert setting.description, f"{name}.{key} has no description"
            assert f"| `{key}` |" in page and setting.description.replace("|", "\\|") in page


def test_types_bounds_and_defaults_are_shown():
    text = configuration_reference()
    assert "| `hidden_size` | whole number > 0 | required |" in text
    assert "| `dropout` | number >= 0 and < 1 | `0.0` |" in text
    assert "| `base_eps` | number > 0 | `1.0e-12` |" in text
    assert "| `betas` | list of 2 numbers >= 0 and <= 1 | `[0.9, 0.95]` |" in text
    assert "| `position` | `rope`, `learned` or `alibi` | `rope` |" in text
    assert "| `train` | list of sections (below) | required |" in text
    assert "| `tokenizer` | section (below), or null | `null` |" in text
    assert "### completep.factors.ROLE" in text
    assert "### data.train.0, .1, ..." in text
    assert "### data.tokenizer\n" in text
