"""The configuration reference, generated from the schema: docs/configuration.md is this text."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_completep.config.field_errors import one_of
from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import dump_value

_HEAD = """\
# Configuration

A run is one YAML file; this page lists every setting. It is generated from \
`megatron_completep/config/schema.py` by
`python tools/config_reference.py --write`.

- Any setting can be overridden on the command line: `section.key=value`, the value in YAML; \
elements of lists go by number,
  as in `data.train.0.weight=2`.
- Unknown keys, duplicate keys and values of another type are refused; every problem is reported \
at once, and nothing starts.
- `1e-3` is a number. `null` means what the setting's text says.
- The resolved configuration, defaults included, is saved with the run as `config.yaml`.
"""

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_PLURALS = {"section (below)": "sections (below)", "text": "texts"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def configuration_reference() -> str:
    """The reference as Markdown.

    It has a table for each section, and one for each kind of list element or mapping value in it.
    """
    pages = [_HEAD]
    for name, field in Config.model_fields.items():
        pages += _section(f"## {name}", _sections_in(field.annotation)[0])
    return "\n".join(pages)


def _section(title: str, section: type[BaseModel]) -> Iterator[str]:
    """The lines of a section's table, and of the tables of the sections inside it."""
    yield f"{title}\n\n{_first_paragraph(section)}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        field_type = _type(field.annotation, field.metadata)
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{name}` | {field_type} | {_default(field)} | {meaning} |"
    yield ""

    # Sections inside this one, such as data.train.0, follow its table.
    path = title.removeprefix("## ")
    for name, field in section.model_fields.items():
        inner_title = f"### {path}.{name}{_suffix(field.annotation)}"
        for inner in _sections_in(field.annotation):
            yield from _section(inner_title, inner)


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().split("\n\n")[0].split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    # Shown as a file writes it: YAML has no tuples.
    if isinstance(default, tuple):
        default = list(default)
    return f"`{dump_value(default)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type in words. metadata: pydantic's bounds, which a field keeps apart from its type."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        inner, *infos = arguments
        # A `Field` inside Annotated holds several bounds; a bound may also stand there by itself.
        bounds: list[Any] = []
        for info in infos:
            bounds += getattr(info, "metadata", [info])
        return _type(inner, bounds)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return " or ".join(_type(kind, metadata) for kind in kinds) + ", or null"
    if origin is Literal:
        return one_of(f"`{choice}`" for choice in arguments)

    # Containers: the type of their elements says the rest.
    if origin is list:
        return f"list of {_plural(_type(arguments[0], []))}"
    if origin is tuple:
        return f"list of {len(arguments)} {_plural(_type(arguments[0], []))}"
    if origin is dict and arguments[1] is Any:
        is_listed = get_origin(arguments[0]) is Literal
        return f"mapping of {_type(arguments[0], [])}" if is_listed else "mapping"
    if origin is dict:
        return f"mapping: role to {_type(arguments[1], [])}"
    if issubclass(annotation, BaseModel):
        return "section (below)"
    return _WORDS[annotation] + _bounds(metadata)


def _plural(words: str) -> str:
    if words in _PLURALS:
        return _PLURALS[words]
    return words.replace("number", "numbers")


def _bounds(metadata: list[Any]) -> str:
    bounds = []
    for item in metadata:
        for name, sign in _SIGNS.items():
            bound = getattr(item, name, None)
            if bound is not None:
                bounds.append(f"{sign} {bound:g}")
    return f" {' and '.join(bounds)}" if bounds else ""


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type consists of: itself, or those of its elements or alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    sections = []
    for argument in get_args(annotation):
        sections += _sections_in(argument)
    return sections


def _suffix(annotation: Any) -> str:
    """How the path of an element ends, where the type or an alternative of it is a container."""
    origins = {get_origin(argument) for argument in get_args(annotation)}
    origins.add(get_origin(annotation))
    if list in origins:
        return ".0, .1, ..."
    return ".ROLE" if dict in origins else ""
