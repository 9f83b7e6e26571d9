"""Turns pydantic's findings into lines of the form `path = value: rule. remedy`."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import Path

# pydantic's name of the finding: the name of the bound in its context, the words of the message.
_COMPARISONS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_INTEGER_TEXT = re.compile("[+-]?[0-9]{1,99}")
_YAML_WORDS = {None: "null", True: "true", False: "false"}


def show(value: Any) -> str:
    """A value as a user would write it, shortened."""
    if value is None or isinstance(value, bool):
        return _YAML_WORDS[value]
    if isinstance(value, (int, float)):
        return f"{value!r}"
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    shortener.maxstring = 60
    shortener.maxdict = 3
    shortener.maxlist = 3
    return shortener.repr(value)


def dotted(path: Iterable[str | int]) -> str:
    """A path as users write it: `data.train.0.weight`."""
    return ".".join(str(key) for key in path)


def describe(error: ValidationError, origins: Mapping[Path, str], values: Any = None) -> list[str]:
    """One line for each problem that pydantic found in `values`.

    origins: where a path was written, such as 'line 3'.
    """
    lines = []
    for finding in error.errors():
        # pydantic appends "[key]" to the path of a mapping's key that is refused itself.
        path = tuple(key for key in finding["loc"] if key != "[key]")
        line = _describe_one(finding, path, _beside(values, path))
        origin = _origin_of(path, origins)
        lines.append(f"{line} ({origin})" if origin else line)
    return lines


def _origin_of(path: Path, origins: Mapping[Path, str]) -> str:
    """Where the path, or else what it stands in, was written; empty where that is not known."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return ""


def _beside(values: Any, path: Path) -> Mapping[str, Any]:
    """The mapping in which the last key of a path stands; empty where there is none."""
    container = values
    for key in path[:-1]:
        try:
            container = container[key]
        except (KeyError, IndexError, TypeError):
            return {}
    return container if isinstance(container, Mapping) else {}


def _describe_one(finding: Any, path: Path, beside: Mapping[str, Any]) -> str:
    """The problem in words; beside: the mapping in which the path's last key stands."""
    kind = finding["type"]
    value_found = finding["input"]
    context = finding.get("ctx", {})
    where = f"{dotted(path)} = {show(value_found)}"

    # Problems of the key.
    if kind == "missing":
        return f"{dotted(path)} is missing{_meaning(path)}. Add it."
    if kind == "string_type" and finding["loc"][-1:] == ("[key]",):
        return f"{dotted(path)}: a key must be text. Put it in quotes."
    if kind == "extra_forbidden" or finding["loc"][-1:] == ("[key]",):
        return f"{dotted(path)}: unknown key. {_suggestion(path, beside)}"

    # Problems of the value, within its type.
    if kind == "literal_error":
        choices = get_args(_strip(_annotation(path)))
        words = one_of(show(choice).strip("'") for choice in choices)
        return f"{where}: must be {words}."
    if kind in _COMPARISONS:
        bound_name, comparison = _COMPARISONS[kind]
        return f"{where}: must be {comparison} {context[bound_name]:g}."
    if kind == "finite_number":
        return f"{where}: must be a finite number."
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        comparison = "at least" if kind == "too_short" else "at most"
        return f"{where}: must have {comparison} {bound} element{'s' if bound != 1 else ''}."

    problem = _wrong_type(kind, where, path, value_found)
    if problem is not None:
        return problem
    message = finding["msg"]
    return f"{where}: {message[:1].lower()}{message[1:]}."


def _wrong_type(kind: str, where: str, path: Path, value_found: Any) -> str | None:
    """The problem of a value of another type, in words; None: the kind is no such problem."""
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return f"{where}: must be a whole number.{_integer_remedy(path, value_found)}"
    if kind in ("float_type", "float_parsing"):
        is_quoted = _is_number_text(value_found) and _accepted(path, float(value_found))
        return f"{where}: must be a number.{' Remove the quotes.' if is_quoted else ''}"
    if kind in ("bool_type", "bool_parsing"):
        return f"{where}: must be true or false."
    if kind == "string_type":
        # Quotes make no split of a number: '969' has one part.
        helps = _accepted(path, str(value_found)) and path != ("data", "split")
        return f"{where}: must be text.{' Put it in quotes.' if helps else ''}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: must be a section of keys. {_keys(_section(path))}"
    if kind in ("list_type", "tuple_type"):
        return f"{where}: must be a list. Write [a, b] or one `- element` on a line."
    return None


def one_of(choices: Iterable[Any]) -> str:
    """'1, 2 or 4'."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _integer_remedy(path: Path, value_found: Any) -> str:
    """How the value found can be made the whole number that it means; empty where it means none."""
    # 2.0 or 1e6 in a file; beyond 1e15 a float's digits need not be those that were written.
    if isinstance(value_found, float) and value_found.is_integer() and abs(value_found) < 1e15:
        whole_number = int(value_found)
        return f" Write {whole_number}." if _accepted(path, whole_number) else ""
    is_quoted = isinstance(value_found, str) and _INTEGER_TEXT.fullmatch(value_found)
    return " Remove the quotes." if is_quoted and _accepted(path, int(value_found)) else ""


def _accepted(path: Path, value: Any) -> bool:
    """Whether the setting itself takes a value: no remedy is offered that its own bounds refuse."""
    section = _section(path[:-1])
    name = str(path[-1])
    # The bounds of a list's elements are not looked up: any plain value may do.
    if section is None or name not in section.model_fields:
        return not isinstance(value, (dict, list))
    field = section.model_fields[name]
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    rules = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        TypeAdapter(annotation, config=rules).validate_python(value)
    except ValidationError:
        return False
    return True


def _is_number_text(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(value, str)


def _suggestion(path: Path, beside: Mapping[str, Any]) -> str:
    """What an unknown key may mean: a key of the same section, or the same key of another one."""
    key = str(path[-1])
    parent = path[:-1]
    section = _section(parent)
    if section is not None:
        known_keys = list(section.model_fields)
    else:
        # A mapping whose keys are listed, or are an enumeration (completep.factors, by role).
        key_type = get_args(_strip(_annotation(parent)))[0]
        is_listed = get_origin(key_type) is Literal
        names = get_args(key_type) if is_listed else get_args(key_type)[0]
        known_keys = [str(name) for name in names]
    homes = []
    for name in Config.model_fields:
        fields = getattr(_section((name,)), "model_fields", {})
        if name != dotted(parent) and key in fields:
            homes.append(name)

    close = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.5)
    meant = close + [f"{home}.{key}" for home in homes]
    if not meant:
        return f"Known here: {', '.join(known_keys)}."
    # To correct the spelling would then make a duplicate key.
    is_set = bool(close) and close[0] in beside and not homes
    remedy = f" {close[0]} is set as well: keep one of the two." if is_set else ""
    return f"Did you mean {one_of(meant)}?{remedy}"


def _keys(section: type[BaseModel] | None) -> str:
    if section is None:
        return "Write `key: value` lines."
    return f"Its keys: {', '.join(section.model_fields)}."


def _meaning(path: Path) -> str:
    """What a setting or section is for, in parentheses; empty where the schema does not say it."""
    parent = _section(path[:-1])
    field = parent.model_fields.get(str(path[-1])) if parent else None
    section = _section(path)
    explanation = field.description if field else None
    if not explanation and section is not None:
        explanation = section.__doc__
    if not explanation:
        return ""
    first_line = explanation.strip().splitlines()[0]
    return f" ({first_line.rstrip('.')})"


def _strip(annotation: Any) -> Any:
    """The type below Annotated and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            alternatives = get_args(annotation)
            annotation = next(kind for kind in alternatives if kind is not type(None))
        else:
            return annotation


def _annotation(path: Path) -> Any:
    """The declared type at a path of the configuration; object where the path leaves the schema."""
    annotation: Any = Config
    for key in path:
        annotation = _strip(annotation)
        arguments = get_args(annotation)
        if _is_section(annotation):
            field = annotation.model_fields.get(str(key))
            annotation = field.annotation if field else object
        elif get_origin(annotation) in (list, tuple) and arguments:
            annotation = arguments[0]
        elif get_origin(annotation) is dict:
            annotation = arguments[1]
        # pydantic may append the choice to the path of a literal: it has no type of its own.
        elif get_origin(annotation) is not Literal:
            annotation = object
    return annotation


def _section(path: Path) -> type[BaseModel] | None:
    """The section at a path of the configuration, if it is one."""
    annotation = _strip(_annotation(path))
    return annotation if _is_section(annotation) else None


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
