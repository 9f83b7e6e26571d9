"""Hooks of mkdocs: pages that are generated from the code, and links that leave the site."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn
from unittest import mock

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from megatron_completep.command_line import PROGRAM, Parser, command_name
from megatron_completep.config.reference import configuration_reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_completep"
# The modules of the package with a page in the API reference, and what each is about.
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
    "parallel": "Mesh, collectives, parameters and their specs, tensor-parallel layers, "
    "the queue of weight gradients.",
    "model": "The decoder.",
    "data": "Token files, tokenizers, the order of samples, the loader.",
    "optim": "Groups by name, the flat layout, shards of the masters, "
    "and the rules that update them.",
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
    "anywhere": "The table for models of other trainers, under torch optimizers.",
    "reports": "What runs left behind, for people; the quickstart.",
    "pretrain": "The trainer.",
    "__main__": "The installed program, which runs the others.",
}

TOOLS_INTRODUCTION = (
    "`megatron-completep COMMAND` where the package is installed, `python tools/NAME.py` in a "
    "checkout; `megatron-completep --help` lists the commands. Words `section.key=value` set a "
    "run's configuration and may stand anywhere, before, between and after options. All mistakes "
    "of a command line are said at once, and what will be written is checked before the work: exit "
    "code 2. An output is never an input; corpora, tokenizers, checkpoints and YAML files are "
    "replaced only with `--overwrite`, reports and pictures that the project made are renewed. "
    "Ctrl-C ends with one sentence and exit code 130."
)
# A Markdown link, but no picture, whose address climbs a folder and does not enter docs/ again.
LINK_UPWARDS = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+(?!docs/)[^)]*)\)")


def on_config(config: Any) -> Any:
    """List the API pages in the navigation."""
    api_pages: list[Any] = ["api.md"]
    for room in ROOMS:
        api_pages.append({room: f"api/{room}.md"})
    sections = [entry for entry in config.nav if isinstance(entry, dict) and "Reference" in entry]
    (section,) = sections  # mkdocs.yml has one of this name
    section["Reference"].append({"API": api_pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Replace and add the generated pages."""
    pages = {
        "configuration.md": configuration_reference(),
        "tools.md": tools_page(),
        "files.md": files_page(),
        "api.md": api_index(),
    }
    for room in ROOMS:
        pages[f"api/{room}.md"] = api_page(room)

    for path, content in pages.items():
        # docs/configuration.md is committed for readers of the repository; the site takes the
        # generated one, which is never older than the code.
        committed = files.get_file_from_path(path)
        if committed is not None:
            files.remove(committed)
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files of the repository outside docs/ by the files' paths.

    The site has no page for them. Raises PluginError for a link to a file that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        words, link = match.groups()
        if not leaves(link, page, config):
            return match[0]
        target = _target(link, page, config)
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {link}, which does not exist.")
        path = target.resolve().relative_to(ROOT)
        # A link whose words are the name of the file needs no second mention of it.
        if words.strip("`") in str(path):
            return f"`{path}`"
        return f"{words} (`{path}`)"

    return LINK_UPWARDS.sub(replace, markdown)


def _target(link: str, page: Any, config: Any) -> Path:
    """The file that a page links to, without the anchor."""
    source: str = page.file.src_uri
    folder = Path(config.docs_dir, source).parent
    return folder / link.split("#")[0]


def leaves(link: str, page: Any, config: Any) -> bool:
    """Whether a page's link points out of docs/."""
    target = _target(link, page, config).resolve()
    return not target.is_relative_to(Path(config.docs_dir))


def tools_page() -> str:
    """Every tool with the text that its --help begins with, and every option."""
    sections = ["# Tools", TOOLS_INTRODUCTION]
    for path in sorted((ROOT / "tools").glob("*.py")):
        if path.stem != "__init__":
            sections.append(f"## {path.stem}")
            sections.append(f"`{PROGRAM} {command_name(path.stem)}`")
            sections += as_paragraphs(_docstring(path) or "")
            sections += option_tables(parser_of(path.stem), path.stem)
    return "\n\n".join(sections) + "\n"


def as_paragraphs(docstring: str) -> list[str]:
    """A docstring as Markdown: what is indented is a block of commands, the rest is text."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith("    "):
            paragraphs.append(f"```bash\n{dedent(paragraph)}\n```")
        else:
            escaped = paragraph.replace("<", "&lt;").replace("*", "\\*")
            paragraphs.append(escaped)
    return paragraphs


class _ParserFound(Exception):
    """Carries a tool's parser out of the tool, which would go on to its work."""


def parser_of(tool: str) -> Parser:
    """The parser with which a tool reads its command line, with every option added."""

    def leave(parser: Parser, *_: Any) -> NoReturn:
        raise _ParserFound(parser)

    module = importlib.import_module(f"megatron_completep.tools.{tool}")
    with mock.patch.object(Parser, "parse_args", leave):
        try:
            module.main([])
        except _ParserFound as found:
            parser: Parser = found.args[0]
            return parser
    raise PluginError(f"tools/{tool}.py reads its command line without a Parser.")


def option_tables(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """The table of a parser's arguments, and a heading and a table for each of its commands."""
    rows = []
    commands: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = dict(action.choices)
        elif not isinstance(action, argparse._HelpAction):
            rows.append(f"| {_argument(action)} | {_meaning(action)} |")
    sections = []
    if rows:
        sections.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    for command, command_parser in commands.items():
        sections.append(f"### {name} {command}")
        if command_parser.description:
            sections.append(_cell(command_parser.description))
        sections += option_tables(command_parser, f"{name} {command}")
    return sections


def _argument(action: argparse.Action) -> str:
    """How an argument is written, with its value."""
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return f"`{value or action.dest}`"
    written = ", ".join(action.option_strings)
    # Choices are listed beside their meaning.
    words = "" if action.nargs == 0 else f" {value}"
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"`{written}{words}{more}`" + (" (required)" if action.required else "")


def _meaning(action: argparse.Action) -> str:
    """What an argument says, which values it takes, and its default unless its help names it."""
    phrases = [_cell(action.help or "")]
    if action.choices is not None:
        phrases.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    is_setting = action.option_strings and action.nargs != 0 and not action.required
    if is_setting and action.default not in (None, []) and "default" not in (action.help or ""):
        default = action.default
        if isinstance(default, list | tuple):
            default = ",".join(str(entry) for entry in default)
        phrases.append(f"default: `{default}`")
    return "; ".join(filter(None, phrases))


def _cell(text: str) -> str:
    """A text as one line of a table, in which a bar would begin another column."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def files_page() -> str:
    """Every file of the code with the sentence that its docstring begins with, by folder."""
    sections = ["# Files", "Every file of the code, in the words of its own first line."]
    for name in ("megatron_completep", "kernels", "tools"):
        files = [file for file in (ROOT / name).rglob("*.py") if not _is_linked(file)]
        for folder in sorted({file.parent for file in files}):
            rows = [_file_row(file) for file in sorted(folder.glob("*.py")) if not _is_init(file)]
            if rows:
                lines = [f"## {folder.relative_to(ROOT)}", "", "| file | |", "|---|---|", *rows]
                sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _is_init(file: Path) -> bool:
    return file.name == "__init__.py"


def _is_linked(file: Path) -> bool:
    """Whether a file is met a second time, through the package's links to kernels/ and tools/."""
    return any(parent.is_symlink() for parent in file.parents)


def _docstring(file: Path) -> str | None:
    """A module's docstring. It is parsed, not imported: some modules need a GPU's libraries."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def _file_row(file: Path) -> str:
    docstring = _docstring(file)
    assert docstring, f"{file} has no docstring"
    first_paragraph = docstring.split("\n\n")[0]
    sentence = " ".join(first_paragraph.split())
    cell = sentence.replace("|", "\\|")  # a bar would begin another column
    return f"| `{file.name}` | {cell} |"


def api_index() -> str:
    """The list of the API pages."""
    lines = [
        "# API",
        "",
        "From the docstrings, a page a package. Names that begin with an underscore are left out.",
        "",
        "| | |",
        "|---|---|",
    ]
    for room, purpose in ROOMS.items():
        lines.append(f"| [`megatron_completep.{room}`](api/{room}.md) | {purpose} |")
    return "\n".join(lines) + "\n"


def api_page(room: str) -> str:
    """One page with every module of a package."""
    modules = [room]
    folder = PACKAGE / room
    if folder.is_dir():
        files = [file for file in folder.rglob("*.py") if not _is_init(file)]
        paths = [file.relative_to(PACKAGE).with_suffix("") for file in files]
        modules = [".".join(path.parts) for path in sorted(paths)]

    sections = [f"# megatron_completep.{room}", ROOMS[room]]
    for module in modules:
        # The anchor is given, because mkdocs would make one of the heading without its dots.
        anchor = f"module-{module.replace('.', '-')}"
        heading = f"## {module} {{ #{anchor} }}"
        sections.append(f"{heading}\n\n::: megatron_completep.{module}\n")
    return "\n\n".join(sections) + "\n"
