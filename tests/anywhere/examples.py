"""The examples of docs/anywhere.md, run as they stand."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "anywhere.md"


@cache
def names_of_examples(blocks: int) -> dict[str, Any]:
    """The names that the first code blocks of the page leave behind."""
    sources = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for source in sources[:blocks]:
        exec(source, names)
    return names


def plain_names() -> dict[str, Any]:
    """The imports and the plain transformer."""
    return names_of_examples(2)


def all_names() -> dict[str, Any]:
    """Everything on the page, the Llama too."""
    return names_of_examples(99)
