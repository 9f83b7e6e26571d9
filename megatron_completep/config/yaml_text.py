"""YAML as configurations need it: plain values only, `1e-3` is a number, a key stands once; every error has file, line and remedy."""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_completep.errors import ConfigError

Path = tuple[str | int, ...]

# Depth to which line numbers are kept: section, key, list index, key.
LINE_DEPTH = 5
MAX_BYTES = 16 << 20
# Of a document whose aliases are written out. Aliases of aliases multiply: ten lines can stand for 10^10 values.
MAX_VALUES = 100_000


class _Resolver(yaml.resolver.BaseResolver):
    """Which plain words are numbers, booleans or null; YAML 1.1's dates, octal and base-60 numbers stay text."""


_TAG = "tag:yaml.org,2002:"
_BOOLEAN = re.compile(
    r"^(?:true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"
)
_INTEGER = re.compile(r"^[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_Resolver.add_implicit_resolver(_TAG + "bool", _BOOLEAN, list("tTfFyYnNoO"))
_Resolver.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
_Resolver.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Resolver.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "found a key that is not a word", key.start_mark
                )
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                problem = f"key {key.value} stands twice, first in line {first[key.tag, key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.tag, key.value] = line
        return super().construct_mapping(node, deep)


class _Block(dict[str, Any]):
    """A mapping to be written with a key a line."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Block,
    lambda dumper, block: dumper.represent_mapping(_TAG + "map", block.items(), flow_style=False),
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    if len(digits) > 100:
        raise yaml.constructor.ConstructorError(
            None, None, f"found a number of {len(digits)} digits", node.start_mark
        )
    return int(digits, 16 if "x" in digits else 10)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _float)

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
        "Write the values out in place of aliases (words that start with *); no configuration has so many.",
    ),
)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Read one YAML document of plain values.

    Args:
        text: the document.
        name: what to call it in messages, such as the file's path.

    Returns:
        The value (None when the document is empty) and the line of every key and list element down to `LINE_DEPTH`.

    Raises:
        ConfigError: not YAML, or more than plain values; names line and remedy.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        if (problem := _size_problem(node)) is not None:
            raise _syntax_error(name, node.start_mark.line + 1, problem)
        return loader.construct_document(node), _lines(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _syntax_error(
            name,
            mark.line + 1 if mark else 1,
            ", ".join(filter(None, (error.context, error.problem))),
        ) from None
    except yaml.reader.ReaderError as error:
        raise _syntax_error(
            name, text.count("\n", 0, error.position) + 1, f"{error.reason}: {error.character!r}"
        ) from None
    except RecursionError:
        raise _syntax_error(name, 1, "brackets are nested too deeply") from None


def dump_yaml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of plain values as YAML that `parse_yaml` reads back equal: a setting a line, in the order given."""
    blocks = _Block({name: _Block(section) for name, section in sections.items()})
    return yaml.dump(blocks, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=120)


def dump_value(value: Any) -> str:
    """One plain value as it stands in a YAML file, on one line."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=float("inf")).strip()[
        1:-1
    ]


def _syntax_error(name: str, line: int, problem: str) -> ConfigError:
    remedy = next(
        (remedy for words, remedy in _REMEDIES if words in problem),
        "Check the indentation, the brackets and the quotes around here.",
    )
    return ConfigError(f"{name}, line {line}: {problem}. {remedy}")


def _size_problem(root: yaml.Node) -> str | None:
    """Why a document is larger than it looks, if it is: each node is visited once, however many aliases stand for it."""
    sizes: dict[
        int, int
    ] = {}  # values that a node stands for, itself included; 0 while its children are counted

    def size_of(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 0
        total = 1
        for child in children:
            size = size_of(child)
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
    lines: dict[Path, int] = {}
    if len(path) >= LINE_DEPTH:
        return lines
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value) for index, value in enumerate(node.value)]
    for key, where, value in children:
        lines[*path, key] = where.start_mark.line + 1
        lines |= _lines(value, (*path, key))
    return lines
