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

A run is one YAML file; this page lists every setting. It is generated from `megatron_completep/config/schema.py` by
`python tools/config_reference.py --write`.

- Any setting can be overridden on the command line: `section.key=value`, the value in YAML; elements of lists go by number,
  as in `data.train.0.weight=2`.
- Unknown keys, duplicate keys and values of another type are refused; every problem is reported at once, and nothing starts.
- `1e-3` is a number. `null` means what the setting's text says.
- The resolved configuration, defaults included, is saved with the run as `config.yaml`.
"""


def configuration_reference() -> str:
    """The reference as Markdown: a table for each section, and one for each kind of list element or mapping value in it."""
    pages = [_HEAD]
    for name, field in Config.model_fields.items():
        pages += _section(f"## {name}", _sections_in(field.annotation)[0])
    return "\n".join(pages)


def _section(title: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"{title}\n\n{_first_paragraph(section)}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {meaning} |"
    yield ""
    for name, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            yield from _section(
                f"### {title.removeprefix('## ')}.{name}{_suffix(field.annotation)}", inner
            )


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().split("\n\n")[0].split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{dump_value(list(value) if isinstance(value, tuple) else value)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _type(inner, [item for info in more for item in getattr(info, "metadata", [info])])
    if origin in (Union, types.UnionType):
        return (
            " or ".join(
                _type(argument, metadata) for argument in arguments if argument is not type(None)
            )
            + ", or null"
        )
    if origin is Literal:
        return one_of(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {_plural(_type(arguments[0], []))}"
    if origin is tuple:
        return f"list of {len(arguments)} {_plural(_type(arguments[0], []))}"
    if origin is dict:
        return f"mapping: role to {_type(arguments[1], [])}"
    if issubclass(annotation, BaseModel):
        return "section (below)"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[
        annotation
    ] + _bounds(metadata)


def _plural(words: str) -> str:
    return {"section (below)": "sections (below)", "text": "texts"}.get(
        words, words.replace("number", "numbers")
    )


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {value:g}"
        for item in metadata
        for name, sign in signs.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _suffix(annotation: Any) -> str:
    origins = {get_origin(annotation), *(get_origin(argument) for argument in get_args(annotation))}
    return ".0, .1, ..." if list in origins else ".ROLE" if dict in origins else ""
