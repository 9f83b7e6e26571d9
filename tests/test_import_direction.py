"""Imports go one way through the house; the picture is in LEVELS."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_completep"
LEVELS = [
    "kernels errors roles files command_line outputs document launch",
    "config",
    "completep parallel",
    "model data",
    "optim",
    "run",
    "telemetry checkpoint",
    "guards",
    "training",
    # Wings: nothing above imports them.
    "preprocess inference planning",
    "interop instruments",
    "benchmarks reports anywhere",
    "pretrain tools",
    "__main__",
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}
WITHOUT_TORCH = {
    "config",
    "completep",
    "errors",
    "roles",
    "files",
    "command_line",
    "outputs",
    "launch",
}
# Optional or slow to import: these alone may be imported inside a function.
OPTIONAL = {
    *(
        "apex",
        "babel",
        "flash_attn",
        "lm_eval",
        "matplotlib",
        "optuna",
        "pyarrow",
        "ray",
        "rich",
        "sentencepiece",
        "submitit",
        "tensorboard",
        "tiktoken",
    ),
    *("tokenizers", "trackio", "transformers", "triton", "wandb", "zstandard"),
}


def imports_of(source: str, module: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (absolute dotted name, line, whether inside a function)
    for every import in `source`.
    """
    tree = ast.parse(source)
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(module.split(".")[: -node.level] + ([node.module] if node.module else []))
                if node.level
                else node.module or ""
            )
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno, id(node) in inside) for name in names)


def problems_of(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one module,
    given by its dotted name (a package's own file ends in .__init__).
    """
    room = module.split(".")[1]
    found = []
    for name, line, inside in imports_of(source, module):
        top, *rest = name.split(".")
        target = rest[0] if top == PACKAGE and rest else None
        if room == "kernels" and target not in (None, "kernels"):
            found.append(
                f"{module}:{line} kernels import nothing else of the project, found {name}"
            )
        elif target in LEVEL and room in LEVEL and LEVEL[target] > LEVEL[room]:
            found.append(
                f"{module}:{line} {room} (level {LEVEL[room]}) imports {name} (level "
                f"{LEVEL[target]})"
            )
        if top in ("kernels", "tools", "tests"):
            found.append(
                f"{module}:{line} top-level {top} is not a package to import from, found {name}"
            )
        if room in WITHOUT_TORCH and top == "torch":
            found.append(f"{module}:{line} {room} imports torch")
        if inside and top not in OPTIONAL:
            found.append(f"{module}:{line} imports {name} inside a function")
    return found


def modules() -> dict[str, str]:
    """Dotted name -> source of every module of the project;
    kernels and tools under the package's name.
    """
    sources = {}
    for folder, prefix in ((PACKAGE, ""), ("kernels", f"{PACKAGE}."), ("tools", f"{PACKAGE}.")):
        for path in (ROOT / folder).rglob("*.py"):
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def test_imports_go_from_higher_rooms_to_lower_ones():
    assert [
        problem
        for name, source in sorted(modules().items())
        for problem in problems_of(source, name)
    ] == []


def graph_of(sources: dict[str, str], depth: int) -> dict[str, set[str]]:
    """Folder -> the folders that it imports;
    a folder is the first `depth` names of a module, and a file of the top level is one.

    What a package's own file (`__init__`) hands out is an arrow from the package's users to the
    folder inside, not from the package.
    """
    known = set(sources) | {name.removesuffix(".__init__") for name in sources}

    def folder(module: str) -> str:
        names = module.removesuffix(".__init__").split(".")
        is_package = f"{'.'.join(names)}.__init__" in sources
        inside = names if is_package or len(names) == 2 else names[:-1]
        return ".".join(inside[1 : depth + 1])

    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        if depth > 1 and module.endswith(".__init__"):
            continue
        targets = graph.setdefault(folder(module), set())
        for name, _, _ in imports_of(source, module):
            if not name.startswith(f"{PACKAGE}."):
                continue
            target = folder(name if name in known else name.rpartition(".")[0])
            if target and target != folder(module):
                targets.add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs (folder, import of it) from which a way of imports leads back to the folder."""

    def reaches(start: str, end: str) -> bool:
        reached, waiting = set(), [start]
        while waiting:
            folder = waiting.pop()
            if folder == end:
                return True
            waiting += graph.get(folder, set()) - reached
            reached.add(folder)
        return False

    return [
        (folder, target)
        for folder, targets in graph.items()
        for target in sorted(targets)
        if reaches(target, folder)
    ]


def test_no_way_of_imports_leads_back_to_its_room():
    graph = graph_of(modules(), depth=1)
    assert circles(graph) == []
    # The control: one arrow back is a circle, at any distance.
    assert ("optim", "parallel") in circles({**graph, "kernels": {"optim"}})


def test_every_room_has_a_level():
    rooms = {name.split(".")[1] for name in modules()} - {"__init__"}
    assert rooms <= set(LEVEL)


def test_no_way_of_imports_leads_back_to_its_folder_at_any_depth():
    sources = modules()
    assert circles(graph_of(sources, depth=9)) == []
    # The control: a folder inside a room that uses the room's own files, which use it.
    sources[f"{PACKAGE}.optim.rules.__init__"] = ""
    sources[f"{PACKAGE}.optim.rules.muon"] = f"from {PACKAGE}.optim.shards import Shards"
    sources[f"{PACKAGE}.optim.schedule"] = f"from {PACKAGE}.optim.rules import muon"
    found = circles(graph_of(sources, depth=9))
    assert ("optim", "optim.rules") in found and ("optim.rules", "optim") in found


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("model.block", "from megatron_completep.optim import schedule", "model (level 3) imports"),
        (
            "model.block",
            "from megatron_completep import training",
            "imports megatron_completep.training",
        ),
        (
            "model.block",
            "from ..optim import schedule",
            "imports megatron_completep.optim.schedule",
        ),
        (
            "model.__init__",
            "from ..training.loop import train",
            "imports megatron_completep.training.loop",
        ),
        ("kernels.norm", "import megatron_completep.errors", "kernels import nothing else"),
        ("kernels.norm", "from ..errors import UserError", "kernels import nothing else"),
        ("config.load", "import torch.nn as nn", "config imports torch"),
        ("completep", "from torch import Tensor", "completep imports torch"),
        ("optim.schedule", "def f():\n    import json", "imports json inside a function"),
        (
            "optim.schedule",
            "class A:\n    def f(self):\n        from . import groups",
            "inside a function",
        ),
        ("training.loop", "import kernels", "top-level kernels"),
    ],
)
def test_a_wrong_import_is_found(module, source, words):
    (problem,) = problems_of(source, f"{PACKAGE}.{module}")
    assert words in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.loop", "from megatron_completep.optim.schedule import Schedule\nimport torch"),
        ("kernels.norm", "from . import reference\nfrom .reference import norm\nimport torch"),
        ("data.tokenizer", "def f():\n    import tiktoken"),
        ("tools.show_plan", "from megatron_completep.planning import plan"),
    ],
)
def test_a_right_import_is_accepted(module, source):
    assert problems_of(source, f"{PACKAGE}.{module}") == []


def test_a_configuration_is_checked_without_loading_torch():
    modules = ("config", "completep", "errors", "command_line", "outputs")
    imports = "; ".join(f"import megatron_completep.{module}" for module in modules)
    program = f"import sys; {imports}; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"
