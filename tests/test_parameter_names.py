"""What a parameter is called stands in the model, and in the tables of foreign architectures;
everybody else asks its spec.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import model_config, model_on_paper

ROOT = Path(__file__).resolve().parents[1]
# Where names belong: the model, our names beside those of others, and examples for the user.
ALLOWED = (
    "megatron_completep/model/",
    "megatron_completep/interop/pieces.py",
    "megatron_completep/interop/reference_names.py",
    "megatron_completep/config/schema.py",
)
# Words that are roles of the table, or plain English, too.
ROLES_AND_WORDS = {
    "embedding",
    "unembedding",
    "final_norm",
    "positions",
    "attention",
    "mlp",
    "layers",
}


def module_words() -> set[str]:
    """The words that parameter names of any model are made of, roles and numbers left out."""
    words: set[str] = set()
    for changes in ({"qk_norm": True}, {"position": "learned", "bias": True, "norm": "layernorm"}):
        model = model_config(**changes)
        for name, _ in model_on_paper(model).named_parameters():
            words |= set(name.split(".")[:-1])
    return {word for word in words if not word.isdigit()} - ROLES_AND_WORDS


def mentions(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a source,
    docstrings left out, that holds a part of a parameter's name.
    """
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    dotted = r"(?:attention|mlp)\.(?:output|up|down)|(?:embedding|positions|norm)\.(?:weight|bias)"
    words = "|".join(sorted(module_words() - {"output", "up", "down"}))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)|{dotted}")
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings and pattern.search(node.value):
            yield node.lineno, node.value


def sources() -> Iterator[tuple[str, str]]:
    for folder in ("megatron_completep", "kernels", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not any(parent.is_symlink() for parent in path.parents) and not name.startswith(
                ALLOWED
            ):
                yield name, path.read_text(encoding="utf-8")


def test_no_name_of_a_parameter_stands_outside_the_model() -> None:
    found = [
        f"{name}:{line}: {text!r}" for name, source in sources() for line, text in mentions(source)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    ['name.endswith("mlp_norm")', 'f"layers.{i}.attention.qkv.weight"', '{"attention.output": 1}'],
)
def test_a_name_is_noticed(code: str) -> None:
    assert list(mentions(f"x = {code}"))
