"""Small JSON values between ranks, on a process group of its own. JSON and not pickle: what a rank receives is data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_completep.errors import CheckpointError, UserError
from megatron_completep.parallel.context import ParallelContext

T = TypeVar("T")


class Exchange:
    """Collective over all ranks. Its gloo group is its own, so that a thread may use it while training communicates."""

    def __init__(self, context: ParallelContext, timeout_minutes: float):
        self.rank, self.size = context.rank, context.world_size
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        data = _encode(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([data.numel()]), group=self._group)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [_decode(part[:size]) for part, size in zip(gathered, sizes, strict=True)]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value."""
        if self._group is None:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        dist.broadcast(length, 0, group=self._group)
        if self.rank:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return _decode(data)

    def send(self, data: torch.Tensor, to: int, tag: int) -> dist.Work:
        """Start sending a tensor of the host to one rank, which receives it under the same tag."""
        work = dist.isend(data, to, group=self._group, tag=tag)
        assert work is not None
        return work

    def receive(self, into: torch.Tensor, sender: int, tag: int) -> dist.Work:
        """Start receiving what `sender` sends under this tag."""
        work = dist.irecv(into, sender, group=self._group, tag=tag)
        assert work is not None
        return work

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where it fails on one, raise the same CheckpointError, naming the ranks, on all of them."""
        result: T | None = None
        problem: str | None = None
        try:
            result = action()
        except (CheckpointError, OSError, MemoryError) as error:
            problem = describe(error)
        problems = {
            rank: text for rank, text in enumerate(self.all_gather(problem)) if text is not None
        }
        if problems:
            raise CheckpointError(join_problems(problems, self.size))
        return result  # type: ignore[return-value]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and give its result to every rank, or its CheckpointError, or another mistake of the user's.

        Of another mistake the other ranks raise the text with its exit code: no rank goes on alone, to meet the end of rank 0 later.
        """
        value: Any = None
        problem: str | None = None
        mistake: UserError | None = None
        if self.rank == 0:
            try:
                value = action()
            except (CheckpointError, OSError) as error:
                problem = describe(error)
            except UserError as error:
                mistake = error
        value, problem, told = self.broadcast(
            (value, problem, mistake and (str(mistake), mistake.exit_code))
        )
        if problem is not None:
            raise CheckpointError(problem)
        if told is not None:
            raise mistake or _of_first_rank(*told)
        return value


class LongWork:
    """A part of a job that takes ranks unequally long. All of them hear, every so many seconds, that it still goes on somewhere.

    Each exchange is a round of all ranks: one that works joins it between two pieces of its work, one that is done waits in it.
    So nobody takes a slow rank for a dead one, and nobody waits in one exchange for longer than a piece of work takes.
    """

    def __init__(self, exchange: Exchange, every_seconds: float, progress: Callable[[], None]):
        self._exchange, self._every, self._progress = exchange, every_seconds, progress
        self._next_round = time.monotonic() + every_seconds

    def goes_on(self) -> None:
        """A piece of this rank's work is done, and others follow."""
        self._progress()
        if time.monotonic() >= self._next_round:
            self._exchange.all_gather(None)
            self._next_round = time.monotonic() + self._every

    def done(self, result: Any) -> list[Any]:
        """This rank's work is done. Returns every rank's result (never null), by rank, once all are done."""
        results = self._exchange.all_gather(result)
        while any(other is None for other in results):
            self._progress()
            results = self._exchange.all_gather(result)
        self._progress()
        return results


def describe(error: BaseException) -> str:
    """What went wrong, with the file where the operating system names one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _of_first_rank(text: str, exit_code: int) -> UserError:
    mistake = UserError(text)
    mistake.exit_code = exit_code
    return mistake


def join_problems(problems: dict[int, str], size: int) -> str:
    """One problem as it is; equal ones once, with their ranks."""
    if size == 1:
        return next(iter(problems.values()))
    ranks: dict[str, list[str]] = {}
    for rank, text in problems.items():
        ranks.setdefault(text, []).append(str(rank))
    return "\n".join(f"rank {', '.join(who)}: {text}" for text, who in ranks.items())


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
