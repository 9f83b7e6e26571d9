"""Programs of the project, run in this process as their command lines would run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from megatron_completep.errors import exit_on_user_error

Main = Callable[[Sequence[str]], int | None]


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it printed."""

    code: int
    out: str
    err: str


class Programs:
    """Runs programs and reads what they print; the fixture `programs` hands one to a test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def run(self, main: Main, *words: object) -> Ended:
        """Run the `main` of a program to its end, as its command line would."""

        def code_of(arguments: Sequence[str]) -> int:
            with pytest.raises(SystemExit) as ended:
                exit_on_user_error(lambda: main(arguments))
            return int(ended.value.code or 0)

        return self.call(code_of, *words)

    def output(self, main: Main, *words: object) -> str:
        """What a program prints that is to end with exit code 0."""
        ended = self.run(main, *words)
        assert ended.code == 0, ended.err
        return ended.out

    def call(self, main: Main, *words: object) -> Ended:
        """Call the `main` of a program; the errors that it raises are the caller's."""
        self._capsys.readouterr()  # what was printed before is not the program's
        threads = torch.get_num_threads()  # programs set it
        try:
            code = main([str(word) for word in words])
        finally:
            torch.set_num_threads(threads)
        captured = self._capsys.readouterr()
        return Ended(int(code or 0), captured.out, captured.err)
