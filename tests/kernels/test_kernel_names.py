"""A profile shows a kernel's name and nothing else:
every launched kernel has its own, and it says whose it is.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

from megatron_completep import kernels
from megatron_completep.kernels.library import LAUNCHERS

OPS = Path(str(kernels.__file__)).parent / "ops"
OPERATORS = {name.rstrip("_") for name in LAUNCHERS}


def launched_kernels(source: str) -> list[str]:
    """The functions under `triton.jit` that the same file launches,
    `kernel[grid](...)`; the others are inlined.
    """
    tree = ast.parse(source)
    compiled = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    }
    calls = [
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    return sorted(compiled & {call.id for call in calls if isinstance(call, ast.Name)})


def problems(sources: dict[str, str]) -> list[str]:
    """`sources`: file name without ending -> text."""
    lines = []
    counts: Counter[str] = Counter()
    for file, source in sources.items():
        for name in launched_kernels(source):
            counts[name] += 1
            if not name.endswith("_kernel"):
                lines.append(f"{file}: {name} does not end in _kernel")
            if not name.startswith((file, *OPERATORS)):
                lines.append(f"{file}: {name} names neither the file nor one of its operators")
    return lines + [
        f"{name} stands in {count} files" for name, count in counts.items() if count > 1
    ]


def sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in OPS.glob("*.py")}


def test_a_profile_tells_every_kernel_apart():
    assert problems(sources()) == []
    assert sum(len(launched_kernels(source)) for source in sources().values()) >= 15, (
        "the search finds no kernels any more"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("swiglu_forward_kernel", "forward_kernel", "names neither the file"),
        ("swiglu_forward_kernel", "swiglu_forward", "does not end in _kernel"),
        ("swiglu_forward_kernel", "squared_relu_forward_kernel", "stands in 2 files"),
    ],
)
def test_a_kernel_with_another_name_is_noticed(old, new, message):
    changed = sources()
    changed["swiglu"] = changed["swiglu"].replace(old, new)
    assert any(message in line for line in problems(changed))
