"""What the user sees on stderr during a run: a bar on a terminal, elsewhere lines."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_completep.preprocess.journal import Record


class Display:
    """Progress of one run.

    total_bytes: size of the inputs on disk. log_interval: documents between lines where stderr is
    no terminal.
    """

    def __init__(self, total_bytes: int, log_interval: int):
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._total_bytes = max(total_bytes, 1)  # is divided by
        self._task = self._bar.add_task("tokenize", total=self._total_bytes, rates="")
        self._interval = log_interval
        self._start_time = time.monotonic()
        # Of the inputs on disk: done by earlier runs, and done so far.
        self._resumed_bytes = 0
        self._disk_bytes = 0
        # Done by this run.
        self._documents = 0
        self._text_bytes = 0
        self._tokens = 0
        self._next_line = 0  # number of documents at which a line is printed

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
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def resumed(self, disk_bytes: int) -> None:
        """Note bytes that an earlier run has done: they are part of the bar, not of the rates."""
        self._resumed_bytes = disk_bytes
        self._disk_bytes = disk_bytes
        self._bar.update(self._task, completed=disk_bytes)

    def add(self, record: Record) -> None:
        """Count a finished block."""
        self._disk_bytes += record["disk_bytes"]
        self._documents += record["documents"]
        self._text_bytes += record["text_bytes"]
        self._tokens += record["tokens"]
        self._bar.update(self._task, completed=self._disk_bytes, rates=self._rates())
        if self._console.is_terminal or self._documents < self._next_line:
            return
        self._next_line = self._documents + self._interval
        done_bytes = self._disk_bytes - self._resumed_bytes
        bytes_to_do = self._total_bytes - self._disk_bytes
        # The rest is assumed to go on at the rate so far.
        remaining = self._seconds() * bytes_to_do / done_bytes if done_bytes else 0.0
        percentage = 100 * self._disk_bytes / self._total_bytes
        self.say(f"{percentage:5.1f} %  {self._rates()}  {_duration(remaining)} left")

    def stage(self, description: str, total: int) -> None:
        """Begin a new bar, of `total` tokens to copy."""
        self._bar.reset(self._task, total=max(total, 1), description=description, rates="")
        self._bar.refresh()

    def step(self, tokens: int) -> None:
        """Count copied tokens."""
        self._bar.advance(self._task, tokens)

    def _seconds(self) -> float:
        """Seconds since the run began; above 0."""
        return max(time.monotonic() - self._start_time, 1e-9)

    def _rates(self) -> str:
        seconds = self._seconds()
        documents = self._documents / seconds
        megabytes = self._text_bytes / seconds / 1e6
        tokens = self._tokens / seconds
        return f"{documents:,.0f} documents/s  {megabytes:,.1f} MB/s  {tokens:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    """1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
