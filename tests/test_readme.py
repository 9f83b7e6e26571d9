"""The README is short, and its tree names every folder of the package;
the list of files is made from their docstrings.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def folders_named(readme: str) -> set[str]:
    """Folders of the package that the tree names, each before its description, two a line."""
    return set(re.findall(r"(?:^  |  )  (\w+)/ ", readme, re.MULTILINE))


def folders() -> set[str]:
    found = (
        path
        for path in (ROOT / "megatron_completep").iterdir()
        if path.is_dir() and not path.is_symlink()
    )
    return {path.name for path in found if (path / "__init__.py").exists()}


def test_the_readme_is_short_and_names_every_folder_of_the_package() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert folders_named(text) == folders()


def test_a_folder_that_is_not_named_is_noticed() -> None:
    text = (ROOT / "README.md").read_text().replace("  optim/ ", "  optimizers/ ")
    assert folders_named(text) ^ folders() == {"optim", "optimizers"}


def test_the_page_of_files_has_each_file_once_in_its_own_words() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.files_page()
    assert page.count("| `linear.py` | Linear layers whose weight is split over tensor ranks.") == 1
    rows = re.findall(r"^\| `\w+\.py` \|", page, re.MULTILINE)
    code = {
        path
        for folder in ("kernels", "tools", "megatron_completep")
        for path in (ROOT / folder).rglob("*.py")
    }
    own = {path.resolve() for path in code if path.name != "__init__.py"}
    assert len(rows) == len(own)
