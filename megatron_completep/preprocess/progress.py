"""What the user sees meanwhile: a bar on a terminal, a line every so many documents elsewhere. Always on stderr."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_completep.preprocess.encode import Record


class Display:
    """Progress of one run. total_bytes: size of the inputs on disk; log_interval: documents between lines where stderr is no terminal."""

    def __init__(self, total_bytes: int, log_interval: int):
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("tokenize", total=max(total_bytes, 1), rates="")
        self._total, self._interval = max(total_bytes, 1), log_interval
        self._start = time.monotonic()
        self._at_start = self._disk = self._documents = self._text = self._tokens = (
            self._next_line
        ) = 0

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def resumed(self, disk_bytes: int) -> None:
        """Bytes that an earlier run has done: part of the bar, not of the rates."""
        self._at_start = self._disk = disk_bytes
        self._bar.update(self._task, completed=disk_bytes)

    def add(self, record: Record) -> None:
        self._disk += record["disk_bytes"]
        self._documents += record["documents"]
        self._text += record["text_bytes"]
        self._tokens += record["tokens"]
        self._bar.update(self._task, completed=self._disk, rates=self._rates())
        if not self._console.is_terminal and self._documents >= self._next_line:
            self._next_line = self._documents + self._interval
            done = self._disk - self._at_start
            left = self._seconds() * (self._total - self._disk) / done if done else 0.0
            self.say(
                f"{100 * self._disk / self._total:5.1f} %  {self._rates()}  {_duration(left)} left"
            )

    def stage(self, description: str, total: int) -> None:
        """A new bar, of `total` tokens to copy."""
        self._bar.reset(self._task, total=max(total, 1), description=description, rates="")
        self._bar.refresh()

    def step(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _rates(self) -> str:
        seconds = self._seconds()
        return f"{self._documents / seconds:,.0f} documents/s  {self._text / seconds / 1e6:,.1f} MB/s  {self._tokens / seconds:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
