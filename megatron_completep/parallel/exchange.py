"""Small JSON values between ranks, over a process group of its own.

JSON and not pickle, so that what a rank receives is data and never code.
"""

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
    """Exchanges values between all ranks; unless it says otherwise, a method is collective.

    It has a gloo group of its own, so that a thread may use it while training communicates.
    """

    def __init__(self, context: ParallelContext, timeout_minutes: float):
        self.rank = context.rank
        self.size = context.world_size
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        if self._group is None:
            return [value]
        data = _encode(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        # Tensors are sent without their sizes, so the lengths go first.
        dist.all_gather(lengths, torch.tensor([data.numel()]), group=self._group)
        sizes = [int(length) for length in lengths]
        # A gather needs equal lengths: values are padded to the longest.
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [_decode(padded[:size]) for padded, size in zip(gathered, sizes, strict=True)]

    def broadcast(self, value: Any = None) -> Any:
        """The value of rank 0, on every rank."""
        if self._group is None:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        # The others need to know how much memory to receive into.
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
        """Run `action` on every rank.

        Where it fails on one, all ranks raise the same CheckpointError, which names the ranks.
        """
        result: T | None = None
        problem: str | None = None
        try:
            result = action()
        # Any other exception is a defect of the program, and ends the rank with a traceback.
        except (CheckpointError, OSError, MemoryError) as error:
            problem = describe(error)
        # Every rank comes here, failed or not: the others would wait for one that raised.
        problem_of_ranks = self.all_gather(problem)
        problems = {rank: text for rank, text in enumerate(problem_of_ranks) if text is not None}
        if problems:
            raise CheckpointError(join_problems(problems, self.size))
        return result  # type: ignore[return-value]

    def on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and return its result on every rank.

        Where it fails, all ranks raise: a CheckpointError as it is; of another error of the user's
        the other ranks raise the text with its exit code. So no rank continues alone, only to be
        surprised later by the end of rank 0.
        """
        value: Any = None
        problem: str | None = None
        user_error: UserError | None = None
        if self.rank == 0:
            try:
                value = action()
            except (CheckpointError, OSError) as error:
                problem = describe(error)
            except UserError as error:
                user_error = error
        # An exception is no JSON; its text and its exit code are.
        text_and_code = user_error and (str(user_error), user_error.exit_code)
        value, problem, text_and_code = self.broadcast((value, problem, text_and_code))
        if problem is not None:
            raise CheckpointError(problem)
        if text_and_code is not None:
            # Rank 0 raises the error that it caught, which still has its own class.
            raise user_error or _of_first_rank(*text_and_code)
        return value


class LongWork:
    """A part of a job that takes some ranks longer than others.

    Every so many seconds all ranks learn that it still goes on somewhere. Each exchange is a round
    of all ranks: a rank that works joins it between two pieces of its work, and a rank that is done
    waits in it. So no slow rank is taken for a dead one, and no rank waits in one exchange for
    longer than a piece of work takes.
    """

    def __init__(self, exchange: Exchange, every_seconds: float, progress: Callable[[], None]):
        """progress: called whenever this rank learns that the job makes progress."""
        self._exchange = exchange
        self._every = every_seconds
        self._progress = progress
        self._next_round = time.monotonic() + every_seconds

    def goes_on(self) -> None:
        """Called when a piece of this rank's work is done and others follow."""
        self._progress()
        if time.monotonic() >= self._next_round:
            self._exchange.all_gather(None)
            # Counted from the end of the round, which may have waited for a slower rank.
            self._next_round = time.monotonic() + self._every

    def gather_results(self, result: Any) -> list[Any]:
        """Called when this rank's work is done; returns the results of all ranks, by rank.

        Waits until all ranks are done. result: never None.
        """
        results = self._exchange.all_gather(result)
        # None comes from a rank that is between two pieces of its work.
        while any(result_of_rank is None for result_of_rank in results):
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
    error = UserError(text)
    error.exit_code = exit_code
    return error


def join_problems(problems: dict[int, str], size: int) -> str:
    """The problems as lines, each text once, with the ranks that it comes from."""
    if size == 1:
        # A single process has no use for rank numbers.
        return next(iter(problems.values()))
    ranks: dict[str, list[str]] = {}
    for rank, text in problems.items():
        ranks.setdefault(text, []).append(str(rank))
    return "\n".join(f"rank {', '.join(numbers)}: {text}" for text, numbers in ranks.items())


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
