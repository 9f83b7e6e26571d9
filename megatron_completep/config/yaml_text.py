"""YAML as configurations need it: plain values only, `1e-3` is a number, a key stands once.

Every error has file, line and remedy.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import yaml

from megatron_completep.errors import ConfigError

Path = tuple[str | int, ...]

# Depth to which line numbers are kept: section, key, list index, key.
LINE_DEPTH = 5
MAX_BYTES = 16 << 20
# Of a document whose aliases are written out. Aliases of aliases multiply: ten lines can stand for
# 10^10 values.
MAX_VALUES = 100_000


class _Resolver(yaml.resolver.BaseResolver):
    """Knows which plain words are numbers, booleans or null.

    YAML 1.1's dates, octal and base-60 numbers stay text.
    """


_TAG = "tag:yaml.org,2002:"
_BOOLEAN = re.compile(
    r"^(?:true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"
)
_INTEGER = re.compile(r"^[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
# The last argument: the characters that such a word can begin with.
_Resolver.add_implicit_resolver(_TAG + "bool", _BOOLEAN, list("tTfFyYnNoO"))
_Resolver.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
_Resolver.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Resolver.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}  # where each key stood first
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise _constructor_error("found a key that is not a word", mark)
            # Tag and text together: 1 and "1" are two keys.
            name = (key.tag, key.value)
            if name in lines:
                problem = f"key {key.value} stands twice, first in line {lines[name]}"
                raise _constructor_error(problem, mark)
            lines[name] = mark.line + 1
        return super().construct_mapping(node, deep)


def _constructor_error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Block(dict[str, Any]):
    """A mapping that is written with one key a line."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_block(dumper: _Dumper, block: _Block) -> yaml.MappingNode:
    return dumper.represent_mapping(_TAG + "map", block.items(), flow_style=False)


_Dumper.add_representer(_Block, _represent_block)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    # Python refuses to convert thousands of digits, with an error that names no line.
    if len(digits) > 100:
        raise _constructor_error(f"found a number of {len(digits)} digits", node.start_mark)
    return int(digits, 16 if "x" in digits else 10)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    digits = node.value.lower().replace("_", "")
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _float)

# Words of a problem, and what to do about it. The first that occur in the message count.
_REMEDIES = (
    ("'\\t'", "YAML does not take tabs: indent with spaces."),
    ("stands twice", "Keep one of the two."),
    (
        "constructor for the tag",
        "Only plain values are read: remove the tag (the word that starts with !).",
    ),
    (
        "undefined alias",
        "Write the value out, or put it in quotes when it is meant to start with *.",
    ),
    ("single document", "One file is one configuration: remove what follows the line ---."),
    ("digits", "No setting needs such a number."),
    (
        "mapping values are not allowed",
        "Put one `key: value` on a line, and quotes around a text that holds a colon.",
    ),
    ("could not find expected ':'", "Write `key: value`, with a space after the colon."),
    ("special characters", "Save the file as plain UTF-8 text."),
    ("not a word", "Keys are plain words, such as hidden_size."),
    ("refers to itself", "Write the value out in place of the alias."),
    (
        "values",
        "Write the values out in place of aliases (words that start with *); "
        "no configuration has so many.",
    ),
)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Read one YAML document of plain values.

    Args:
        text: the document.
        name: what to call it in messages, such as the file's path.

    Returns:
        The value (None when the document is empty), and the line of every key and list element down
        to `LINE_DEPTH`.

    Raises:
        ConfigError: not YAML, or more than plain values; names line and remedy.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        # Counted before values are made: a document of many aliases would fill the memory.
        problem = _size_problem(node)
        if problem is not None:
            raise _syntax_error(name, node.start_mark.line + 1, problem)
        return loader.construct_document(node), _lines(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise _syntax_error(name, line, problem) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"{error.reason}: {error.character!r}"
        raise _syntax_error(name, line, problem) from None
    except RecursionError:
        raise _syntax_error(name, 1, "brackets are nested too deeply") from None


def dump_yaml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of plain values as YAML that `parse_yaml` reads back equal.

    A setting stands on one line, in the order given.
    """
    blocks = _Block({name: _Block(section) for name, section in sections.items()})
    return yaml.dump(blocks, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=120)


def dump_value(value: Any) -> str:
    """One plain value as it stands in a YAML file, on one line."""
    # A list around the value keeps YAML from ending it with "...".
    line = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=float("inf"))
    return line.strip().removeprefix("[").removesuffix("]")


def _syntax_error(name: str, line: int, problem: str) -> ConfigError:
    return ConfigError(f"{name}, line {line}: {problem}. {_remedy(problem)}")


def _remedy(problem: str) -> str:
    for words, remedy in _REMEDIES:
        if words in problem:
            return remedy
    return "Check the indentation, the brackets and the quotes around here."


def _size_problem(root: yaml.Node) -> str | None:
    """Why a document is larger than it looks, if it is.

    Each node is visited once, however many aliases stand for it.
    """
    # Values that a node stands for, itself included; 0 while its children are counted.
    sizes: dict[int, int] = {}

    def size_of(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = list(itertools.chain.from_iterable(node.value))
        elif isinstance(node, yaml.SequenceNode):
            children = node.value

        sizes[id(node)] = 0
        total = 1
        for child in children:
            size = size_of(child)
            # A child that is still being counted is an alias of a node around it.
            if size == 0:
                raise _Endless
            total += size
        sizes[id(node)] = total
        return total

    try:
        size = size_of(root)
    except _Endless:
        return "a value refers to itself"
    return f"it stands for {size:,} values" if size > MAX_VALUES else None


class _Endless(Exception):
    """A value that contains itself."""


def _lines(node: yaml.Node, path: Path) -> dict[Path, int]:
    """The line, from 1, of every key and list element below a node, down to `LINE_DEPTH`."""
    lines: dict[Path, int] = {}
    if len(path) >= LINE_DEPTH:
        return lines
    # (key, the node whose line counts, the node of the value)
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, child) for key, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, child, child) for index, child in enumerate(node.value)]
    for key, line_node, child in children:
        lines[*path, key] = line_node.start_mark.line + 1
        lines |= _lines(child, (*path, key))
    return lines
