"""The README's tree names every file of the project's code, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "kernels/*", "tools", *(f"megatron_completep{rest}" for rest in ("", "/*", "/*/*")))
LINKS = ("megatron_completep/kernels", "megatron_completep/tools")  # the same files under the package's name


def named(readme: str) -> dict[str, str]:
    """Path -> phrase of every file in the tree."""
    found, folder = {}, ""
    for line in re.search(r"<details>.*?```\n(.*?)```", readme, re.DOTALL)[1].splitlines():
        if not line.startswith(" "):
            folder = line
        else:
            name, _, phrase = line.strip().partition(" ")
            found[folder + name] = phrase.strip()
    return found


def files() -> set[str]:
    paths = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")}
    return {path for path in paths if not path.startswith(LINKS) and not path.endswith("__init__.py")}


def test_the_readme_names_every_file_with_a_phrase():
    tree = named((ROOT / "README.md").read_text())
    assert set(tree) == files()
    assert all(tree.values())


def test_a_file_that_is_not_named_is_noticed():
    tree = named((ROOT / "README.md").read_text().replace("    layout.py ", "    lay_out.py "))
    assert set(tree) ^ files() == {"megatron_completep/optim/layout.py", "megatron_completep/optim/lay_out.py"}
