"""Docstrings for the fields of classes in the API pages: what the code says of each elsewhere.

A field of a configuration section has its description, one of a dataclass and a member of an enum
the comment behind it or above it.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives attributes of classes that have no docstring of their own one."""

    def on_attribute_instance(
        self, *, node: Any, attr: griffe.Attribute, agent: Any, **_: Any
    ) -> None:
        """Called for each attribute, when its code has been read."""
        is_field = attr.parent is not None and attr.parent.is_class
        if not is_field or attr.docstring is not None or not isinstance(node, ast.stmt):
            return
        text = description_of(node) or comment_of(node, agent.code.splitlines())
        if text:
            # An enum's or dataclass's comment begins small, as the words behind a line do.
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:], parent=attr)


def description_of(node: ast.stmt) -> str | None:
    """The description of a pydantic field; None: it is none."""
    call = getattr(node, "value", None)
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "Field":
        return None
    for keyword in call.keywords:
        if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return None


def comment_of(node: ast.stmt, lines: list[str]) -> str | None:
    """The comment behind a statement, or the one in the lines just above it; None: neither."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    if behind.strip().startswith("#"):
        return behind.strip().lstrip("# ")
    within = lines[node.lineno - 1 : node.end_lineno]
    comments = [line.partition("#")[2].strip() for line in within if "#" in line]
    if comments:
        return " ".join(comments)
    above = []
    number = node.lineno - 2
    while number >= 0 and lines[number].strip().startswith("#"):
        above.insert(0, lines[number].strip().lstrip("# "))
        number -= 1
    return " ".join(above) or None
