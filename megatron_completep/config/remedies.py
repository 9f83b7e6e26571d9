"""Problems between settings, and the search for values of a setting that mend one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completep.config.field_errors import one_of
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError

VALUES = "<values>"  # in a problem's text: stands for the values that fit
TRIED = 64  # values of a setting that are tried as remedies, at most
SHOWN = 8  # values that a message shows, at most


@dataclass(frozen=True)
class Choice:
    """A problem that another value of one setting mends.

    Only values that no other rule refuses are offered. around: offer only the nearest value that
    fits on either side.
    """

    text: str  # with VALUES in their place
    path: str
    values: Iterable[int]
    near: int
    around: bool = False


Problem = str | Choice


def raise_problems(config: Config, problems_of: Callable[[Config], list[Problem]]) -> None:
    """Raise ConfigError with all problems of a configuration, one a line; return if it has none.

    problems_of: also asked about changed configurations, to see which remedies are any good.
    """
    problems = problems_of(config)
    if not problems:
        return

    def fits(path: str, candidate: int) -> bool:
        changed = _with(config, path.split("."), candidate)
        return len(problems_of(changed)) < len(problems)

    count = "1 setting does" if len(problems) == 1 else f"{len(problems)} settings do"
    lines = [f"{count} not fit the others"]
    for problem in problems:
        lines.append(problem if isinstance(problem, str) else _with_values(problem, fits))
    raise ConfigError("\n  ".join(lines))


def _with(section: Any, path: Sequence[str], setting: int) -> Any:
    """A section with one setting replaced; nothing is validated."""
    name, *inner_path = path
    if inner_path:
        replacement = _with(getattr(section, name), inner_path, setting)
    else:
        replacement = setting
    return section.model_copy(update={name: replacement})


def _with_values(problem: Choice, fits: Callable[[str, int], bool]) -> str:
    """The text of a problem, with the values closest by ratio of those that fit."""
    nearest = sorted(problem.values, key=lambda candidate: _ratio(candidate, problem.near))
    fitting = [candidate for candidate in nearest[:TRIED] if fits(problem.path, candidate)]
    if problem.around:
        below = [candidate for candidate in fitting if candidate < problem.near]
        above = [candidate for candidate in fitting if candidate >= problem.near]
        fitting = below[:1] + above[:1]
    offered = "another value together with the settings that it must fit"
    if fitting:
        offered = one_of(sorted(fitting[:SHOWN]))
    return problem.text.replace(VALUES, offered)


def _ratio(a: float, b: float) -> float:
    """The ratio of two positive numbers, at least 1."""
    return max(a / b, b / a)


def multiples(step: int, near: int) -> list[int]:
    """The positive multiples of `step` around a number.

    There are as many as are tried on either side, fewer below where 0 is close.
    """
    middle = max(1, near // step)
    factors = range(max(1, middle - TRIED), middle + TRIED + 1)
    return [step * factor for factor in factors]


def all_divisors(number: int) -> list[int]:
    """The divisors of a positive number, in order."""
    # The bound keeps a mistyped number of thirty digits from costing more than a message.
    largest = min(math.isqrt(number), 100_000)
    small = [n for n in range(1, largest + 1) if number % n == 0]
    large = [number // n for n in small]
    return sorted({*small, *large})


def closest(candidates: Iterable[int], near: int) -> str:
    """The candidates closest to `near` by ratio, in order, as '1, 2 or 4'."""
    nearest = sorted(candidates, key=lambda candidate: _ratio(candidate, near))
    return one_of(sorted(nearest[:SHOWN]))
