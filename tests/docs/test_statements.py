"""What the documentation says of the code is there: messages, settings, files, fields."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_completep.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GAP = "\0"


def texts_of_the_code() -> list[str]:
    """Every string of the package, with GAP where a value is put in."""
    found = []
    for path in sorted((ROOT / "megatron_completep").rglob("*.py")) + sorted(
        (ROOT / "tools").glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else GAP
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str, texts: list[str]) -> bool:
    """Whether one text of the code holds the message's parts in order; … stands for anything."""
    parts = [part.strip() for part in message.split("…") if part.strip(" .")]
    pattern = re.compile(
        ".*?".join(re.escape(part).replace(r"\ ", f"[ {GAP}]+") for part in parts), re.DOTALL
    )
    return any(pattern.search(text) for text in texts)


def quoted_messages() -> list[str]:
    """The first column of the tables headed `message` in the troubleshooting page."""
    found, inside = [], False
    for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        inside = line.startswith("| message |") or (inside and line.startswith("|"))
        if inside and line.startswith("| `"):
            found.append(line.split("`")[1])
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program() -> None:
    texts, messages = texts_of_the_code(), quoted_messages()
    assert len(messages) > 15
    assert [message for message in messages if not is_said(message, texts)] == []


@pytest.mark.parametrize(
    "message",
    [
        "does not divide the number of the day",
        "is in use by … nobody at all",
        "unknown key of an unknown lock",
    ],
)
def test_a_message_that_nothing_says_would_be_found(message: str) -> None:
    assert not is_said(message, texts_of_the_code())
    assert is_said("has no GPU, this node shows …", texts_of_the_code())


def settings() -> set[str]:
    """All settings of first and second level, such as model.num_layers, and section names."""
    found = set(Config.model_fields)
    for name, field in Config.model_fields.items():
        found |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    return found


SETTING = re.compile(rf"`((?:{'|'.join(Config.model_fields)})\.[a-z_]+)(?=[`.: =\[])")


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")) + ["../README.md"])
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    named = set(SETTING.findall((DOCS / page).read_text(encoding="utf-8")))
    assert {
        name
        for name in named - settings()
        if not name.endswith(("_", ".md", ".py", ".safetensors"))
    } == set()


def test_the_table_for_megatron_names_a_setting_or_says_why_not() -> None:
    rows = [
        line.split("|")[1:4]
        for line in (DOCS / "megatron.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `--")
    ]
    assert len(rows) > 60
    for flags, ours, remark in rows:
        named = re.findall(r"`([^`]+)`", ours)
        assert named or remark.strip(), flags
        assert set(named) <= settings(), flags
    flags = re.findall(r"--[a-z0-9-]+", "".join(row[0] for row in rows))
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    "page",
    sorted(
        str(path.relative_to(ROOT))
        for path in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    ),
)
def test_every_file_of_the_repository_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:tools|tests|megatron_completep|kernels|configs|docs)/[\w/.-]+\.(?:py|md|yaml|sbatch|png|json|css))",
            text,
        )
    )
    made = {"configs/tuned.yaml", "configs/tuned_proxy.yaml"}  # by a command of the page
    assert {
        name for name in named - made if "NAME" not in name and not (ROOT / name).exists()
    } == set()
