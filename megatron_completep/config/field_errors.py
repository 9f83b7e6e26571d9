"""Turns pydantic's findings into lines of the form `path = value: rule. remedy`."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import Path

_COMPARISONS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def show(value: Any) -> str:
    """A value as a user would write it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return f"{value!r}"
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxdict, shortener.maxlist = 2, 60, 3, 3
    return shortener.repr(value)


def dotted(path: Iterable[str | int]) -> str:
    """A path as users write it: `data.train.0.weight`."""
    return ".".join(str(part) for part in path)


def describe(error: ValidationError, origins: Mapping[Path, str], values: Any = None) -> list[str]:
    """One line for each problem that pydantic found in `values`; `origins` says where a path was written, such as 'line 3'."""
    lines = []
    for finding in error.errors():
        path = tuple(part for part in finding["loc"] if part != "[key]")
        origin = next(
            (
                origins[path[:length]]
                for length in range(len(path), 0, -1)
                if path[:length] in origins
            ),
            "",
        )
        lines.append(
            _describe_one(finding, path, _beside(values, path)) + (f" ({origin})" if origin else "")
        )
    return lines


def _beside(values: Any, path: Path) -> Mapping[str, Any]:
    """The mapping in which the last part of a path stands; empty where there is none."""
    for part in path[:-1]:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return {}
    return values if isinstance(values, Mapping) else {}


def _describe_one(finding: Any, path: Path, beside: Mapping[str, Any]) -> str:
    kind, value, context = finding["type"], finding["input"], finding.get("ctx", {})
    where = f"{dotted(path)} = {show(value)}"
    if kind == "missing":
        return f"{dotted(path)} is missing{_meaning(path)}. Add it."
    if kind == "extra_forbidden" or finding["loc"][-1:] == ("[key]",):
        return f"{dotted(path)}: unknown key. {_suggestion(path, beside)}"
    if kind == "literal_error":
        choices = [show(choice).strip("'") for choice in get_args(_strip(_annotation(path)))]
        return f"{where}: must be {one_of(choices)}."
    if kind in _COMPARISONS:
        name, words = _COMPARISONS[kind]
        return f"{where}: must be {words} {context[name]:g}."
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return f"{where}: must be a whole number." + _whole(path, value)
    if kind in ("float_type", "float_parsing"):
        return f"{where}: must be a number." + (
            " Remove the quotes." if _is_number(value) and _accepted(path, float(value)) else ""
        )
    if kind == "finite_number":
        return f"{where}: must be a finite number."
    if kind in ("bool_type", "bool_parsing"):
        return f"{where}: must be true or false."
    if kind == "string_type":
        return f"{where}: must be text." + (
            " Put it in quotes."
            if _accepted(path, str(value)) and path != ("data", "split")
            else ""
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: must be a section of keys. {_keys(_section(path))}"
    if kind in ("list_type", "tuple_type"):
        return f"{where}: must be a list. Write [a, b] or one `- element` on a line."
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"{where}: must have {'at least' if kind == 'too_short' else 'at most'} {bound} element{'s' if bound != 1 else ''}."
    return f"{where}: {finding['msg'][:1].lower()}{finding['msg'][1:]}."


def one_of(choices: Iterable[Any]) -> str:
    """'1, 2 or 4'."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _whole(path: Path, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f" Write {int(value)}." if _accepted(path, int(value)) else ""
    digits = isinstance(value, str) and value.lstrip("+-").isdigit() and len(value) < 100
    return " Remove the quotes." if digits and _accepted(path, int(value)) else ""


def _accepted(path: Path, value: Any) -> bool:
    """Whether the setting itself takes a value: no remedy is offered that its own bounds refuse."""
    section, element = _section(path[:-1]), path[-1]
    if section is None or str(element) not in section.model_fields:
        return not isinstance(
            value, (dict, list)
        )  # an element of a list, whose bounds are not looked up
    field = section.model_fields[str(element)]
    annotation: Any = (
        Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    )
    try:
        TypeAdapter(
            annotation, config=ConfigDict(strict=True, allow_inf_nan=False)
        ).validate_python(value)
    except ValidationError:
        return False
    return True


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(value, str)


def _suggestion(path: Path, beside: Mapping[str, Any]) -> str:
    key, parent = str(path[-1]), path[:-1]
    section = _section(parent)
    # Where keys are not a section's fields, they are an enumeration's names: completep.factors by role.
    known = (
        list(section.model_fields)
        if section
        else [str(name) for name in get_args(get_args(_annotation(parent))[0])[0]]
    )
    homes = [
        name
        for name in Config.model_fields
        if name != dotted(parent) and key in getattr(_section((name,)), "model_fields", {})
    ]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if meant := close + [f"{home}.{key}" for home in homes]:
        twice = (
            f" {close[0]} is set as well: keep one of the two."
            if close and close[0] in beside and not homes
            else ""
        )
        return f"Did you mean {one_of(meant)}?{twice}"
    return f"Known here: {', '.join(known)}."


def _keys(section: type[BaseModel] | None) -> str:
    return (
        f"Its keys: {', '.join(section.model_fields)}." if section else "Write `key: value` lines."
    )


def _meaning(path: Path) -> str:
    section = _section(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    inner = _section(path)
    text = (field.description if field else None) or (inner.__doc__ if inner else None) or ""
    return f" ({text.strip().splitlines()[0].rstrip('.')})" if text else ""


def _strip(annotation: Any) -> Any:
    """The type below Annotated and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        else:
            return annotation


def _annotation(path: Path) -> Any:
    """The declared type at a path of the configuration; object where the path leaves the schema."""
    annotation: Any = Config
    for part in path:
        annotation = _strip(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else object
        elif get_origin(annotation) in (list, tuple) and get_args(annotation):
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif get_origin(annotation) is not Literal:
            annotation = object
    return annotation


def _section(path: Path) -> type[BaseModel] | None:
    annotation = _strip(_annotation(path))
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )
