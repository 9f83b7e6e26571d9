"""What mkdocs does beside its own work: pages generated from the code, and links that leave the site."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from megatron_completep.config.reference import configuration_reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_completep"
ROOMS = {
    "roles": "What a parameter is.",
    "completep": "The table: which value each role of parameter trains with.",
    "errors": "What a user can cause, and how a program ends.",
    "files": "Files and folders that appear whole or not at all.",
    "command_line": "How every program reads its command line.",
    "outputs": "What a program will write, checked before its work.",
    "document": "Text, tables and pictures as one HTML file or Markdown.",
    "launch": "How the process was started, and that it leaves with its launcher.",
    "config": "The schema, loading, and rules between settings. No torch.",
    "kernels": "Fused operations and their plain twins. Knows nothing of models.",
    "parallel": "Mesh, collectives, parameters and their specs, tensor-parallel layers, the queue of weight gradients.",
    "model": "The decoder.",
    "data": "Token files, tokenizers, the order of samples, the loader.",
    "optim": "Groups by name, the flat layout, shards of the masters, and the rules that update them.",
    "run": "The contract between loop, guards and checkpoint: state, step, hooks, assembly.",
    "telemetry": "What a run tells of itself: metrics, trackers, sizes, time.",
    "checkpoint": "Saving and resuming: committed whole, hashed, read into any layout.",
    "guards": "What a run watches for.",
    "training": "The loop, its hooks, and what is built for it.",
    "preprocess": "Text into token files, and tokenizers from text.",
    "inference": "Text from a model, and how likely it finds texts.",
    "planning": "A run on paper: parameters, memory, traffic, time, kernels.",
    "interop": "Models from and to other libraries.",
    "instruments": "Does the parameterization hold? Checks, sweeps, replayed traces.",
    "benchmarks": "Our programs timed beside what a user would take instead.",
    "reports": "What runs left behind, for people; the quickstart.",
    "pretrain": "The program.",
}


def on_config(config: Any) -> Any:
    """List the API pages in the navigation."""
    (reference,) = (
        part["Reference"] for part in config.nav if isinstance(part, dict) and "Reference" in part
    )
    reference.append({"API": ["api.md", *({room: f"api/{room}.md"} for room in ROOMS)]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Replace and add the generated pages."""
    pages = {"configuration.md": configuration_reference(), "tools.md": tools_page()}
    pages |= {
        "files.md": files_page(),
        "api.md": api_index(),
        **{f"api/{room}.md": api_page(room) for room in ROOMS},
    }
    for path, text in pages.items():
        known = files.get_file_from_path(path)
        if known is not None:
            files.remove(known)
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a file of the repository outside docs/ becomes its path in the text: the site has no place to send it to."""

    def plain(match: re.Match[str]) -> str:
        target = (Path(config.docs_dir) / page.file.src_uri).parent / match[2].split("#")[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {match[2]}, which does not exist.")
        path = target.resolve().relative_to(ROOT)
        words = match[1].strip("`")
        return f"`{path}`" if words in str(path) else f"{match[1]} (`{path}`)"

    return re.sub(
        r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+(?!docs/)[^)]*)\)",
        lambda m: plain(m) if leaves(m[2], page, config) else m[0],
        markdown,
    )


def leaves(link: str, page: Any, config: Any) -> bool:
    docs = Path(config.docs_dir)
    return (
        not (docs / page.file.src_uri)
        .parent.joinpath(link.split("#")[0])
        .resolve()
        .is_relative_to(docs)
    )


def tools_page() -> str:
    """Every tool with the text that its --help begins with."""
    parts = [
        "# Tools",
        "`python tools/NAME.py` in a checkout, `python -m megatron_completep.tools.NAME` where the package is installed. `--help` lists "
        "every option. Words `section.key=value` set a run's configuration and may stand anywhere, before, between and after options. "
        "All mistakes of a command line are said at once, and what will be written is checked before the work: exit code 2. An output "
        "is never an input; corpora, tokenizers, checkpoints and YAML files are replaced only with `--overwrite`, reports and pictures "
        "that the project made are renewed. Ctrl-C ends with one sentence and exit code 130.",
    ]
    for path in sorted((ROOT / "tools").glob("*.py")):
        if path.stem != "__init__":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            parts.append(f"## {path.stem}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def files_page() -> str:
    """Every file of the code with the sentence that its docstring begins with, folder by folder."""
    parts = ["# Files", "Every file of the code, in the words of its own first line."]
    for folder in ("megatron_completep", "kernels", "tools"):
        for path in sorted(
            {file.parent for file in (ROOT / folder).rglob("*.py") if not _is_linked(file)}
        ):
            rows = [
                _file_row(file) for file in sorted(path.glob("*.py")) if file.name != "__init__.py"
            ]
            if rows:
                parts.append(
                    "\n".join(
                        [f"## {path.relative_to(ROOT)}", "", "| file | |", "|---|---|", *rows]
                    )
                )
    return "\n\n".join(parts) + "\n"


def _is_linked(file: Path) -> bool:
    """Whether a file is met a second time, through the package's links to kernels/ and tools/."""
    return any(parent.is_symlink() for parent in file.parents)


def _file_row(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, f"{file} has no docstring"
    first = " ".join(text.split("\n\n")[0].split())
    return f"| `{file.name}` | {first.replace('|', chr(92) + '|')} |"


def api_index() -> str:
    lines = [
        "# API",
        "",
        "From the docstrings, a page a package. Names that begin with an underscore are left out.",
        "",
    ]
    lines += [
        "| | |",
        "|---|---|",
        *(
            f"| [`megatron_completep.{room}`](api/{room}.md) | {text} |"
            for room, text in ROOMS.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def api_page(room: str) -> str:
    """One page with every module of a package."""
    place = PACKAGE / room
    names = [room]
    if place.is_dir():
        paths = sorted(path.relative_to(PACKAGE).with_suffix("") for path in place.rglob("*.py"))
        names = [".".join(path.parts) for path in paths if path.name != "__init__"]
    parts = [f"# megatron_completep.{room}", ROOMS[room]]
    parts += [
        f"## {name} {{ #module-{name.replace('.', '-')} }}\n\n::: megatron_completep.{name}\n"
        for name in names
    ]
    return "\n\n".join(parts) + "\n"
