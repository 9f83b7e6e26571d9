"""Entries of an untrusted config.json, read with all problems collected."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

# Upper bounds. A larger number is a mistake, which must not cost memory or overflow.
MOST = 2**31 - 1  # of a size
MOST_FACTOR = 1e30  # of a number that is not whole


class Reader:
    """Reads the entries of a config.json, and notes what is missing or cannot be expressed.

    defaults: what the architecture takes for an entry that is missing. After a problem it returns a
    stand-in, so that one reading collects all problems.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        problems: list[str],
        defaults: Mapping[str, Any] | None = None,
    ):
        self.entries = entries
        self.problems = problems
        self.defaults = defaults or {}

    def entry(self, name: str) -> Any:
        """An entry as it stands there, or the architecture's default where it is missing."""
        return self.entries.get(name, self.defaults.get(name))

    def number(
        self, name: str, default: Any = None, kind: type = int, largest: float | None = None
    ) -> Any:
        """A number above 0 and up to `largest`; a whole one where `kind` is int.

        default: what null stands for, and a missing entry without a default of the architecture.
        """
        largest = largest or (MOST if kind is int else MOST_FACTOR)
        entry = self.entry(name)
        if entry is None:
            entry = self.defaults.get(name) if default is None else default
        is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        if is_number and 0 < entry <= largest and (kind is not int or entry == int(entry)):
            return kind(entry)

        expected = f"a whole number from 1 to {largest}" if kind is int else "a number above 0"
        problem = f"{name} is missing" if entry is None else f"{name} = {shown(entry)}"
        self.problems.append(f"{problem}: expected {expected}")
        return kind(1)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null stands for the default."""
        entry = self.entries.get(name)
        if entry is not None and not isinstance(entry, bool):
            self.problems.append(f"{name} = {shown(entry)}: expected true or false")
        return default if entry is None else bool(entry)

    def require(self, name: str, default: Any, fits: Callable[[Any], bool], reason: str) -> Any:
        """An entry of which our model expresses some values only; `reason` says why."""
        entry = self.entries.get(name, default)
        if not fits(entry):
            self.problems.append(f"{name} = {shown(entry)}: {reason}")
        return entry


def shown(entry: Any) -> str:
    """An entry of an untrusted JSON file in a message: as JSON writes it, shortened."""
    if entry is None or isinstance(entry, bool):
        return {None: "null", True: "true", False: "false"}[entry]
    return reprlib.repr(entry)
