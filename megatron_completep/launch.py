"""How this process was started: what its launcher told it, and that it leaves with its launcher.

The only reader of RANK, WORLD_SIZE and whatever else launchers set. Imports nothing slow: it comes before the imports that take seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker

from megatron_completep.errors import ConfigError

PR_SET_PDEATHSIG = 1
MAX_DIGITS = 18  # of a number in the environment; Python refuses to read some thousands
INTERRUPTED = "interrupted before the first step: nothing was trained, nothing is lost"


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, Slurm, a person) told this process; the defaults are those of a process without one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this node
    restart_count: int = 0  # how often torchrun has started this job anew
    launched: bool = False  # under a launcher, even with one process
    by_torchrun: bool = False  # which ends its workers itself, by any signal that it gets
    store_host: str = ""  # where the ranks meet: MASTER_ADDR and MASTER_PORT
    store_port: int = 0
    launcher_holds_store: bool = False  # otherwise rank 0 does

    @classmethod
    def from_environment(cls) -> Launch:
        """Of this process. Raises ConfigError as `read_launch` does."""
        return read_launch(os.environ)

    @property
    def store_holder(self) -> str:
        """Who answers at the address where the ranks meet, in words."""
        return "the launcher" if self.launcher_holds_store else "rank 0"


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher, or a person in its place, made this process one of several."""
    return any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_by_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What the variables of a launcher say. Raises ConfigError with all that is wrong with them, and the rank that they name."""
    if not is_launched(environment):
        return Launch()
    problems: list[str] = []

    def text_of(name: str, meaning: str, needed: bool) -> str | None:
        text = environment.get(name)
        if text is None and needed:
            problems.append(f"{name} is not set. It is {meaning}.")
        elif text is not None and not text.strip():
            problems.append(f"{name} is empty. It is {meaning}.")
        return text if text and text.strip() else None

    def number_of(name: str, meaning: str, least: int, default: int | None = None) -> int | None:
        text = text_of(name, meaning, needed=default is None)
        if text is None:
            return None if name in environment else default
        if not (
            text.isascii()
            and text.strip().isdigit()
            and len(text) <= MAX_DIGITS
            and int(text) >= least
        ):
            problems.append(
                f"{name} = {text[:40]!r} is not a whole number of at least {least}. It is {meaning}."
            )
            return None
        return int(text)

    rank = number_of("RANK", "this process's number among all, from 0", 0)
    world = number_of("WORLD_SIZE", "the number of processes", 1)
    several = world is not None and world > 1
    local = number_of(
        "LOCAL_RANK",
        "this process's number on its node, from 0, and chooses its GPU",
        0,
        None if several else 0,
    )
    local_world = number_of("LOCAL_WORLD_SIZE", "the number of processes on this node", 1, 1)
    restarts = number_of(
        "TORCHELASTIC_RESTART_COUNT", "how often torchrun has started the job anew", 0, 0
    )
    host = text_of("MASTER_ADDR", "the host of rank 0, where the ranks meet", needed=several)
    port = number_of(
        "MASTER_PORT", "a free port of that host, the same for all ranks", 1, None if several else 0
    )

    if rank is not None and world is not None and rank >= world:
        problems.append(
            f"RANK = {rank} is not below WORLD_SIZE = {world}: {world} processes are numbered 0 to {world - 1}. "
            f"Set WORLD_SIZE to the number of processes that you start."
        )
    if (
        local is not None
        and local_world is not None
        and "LOCAL_WORLD_SIZE" in environment
        and local >= local_world
    ):
        problems.append(
            f"LOCAL_RANK = {local} is not below LOCAL_WORLD_SIZE = {local_world}, the number of processes on this node."
        )
    if world is not None and local_world is not None and local_world > world:
        problems.append(
            f"LOCAL_WORLD_SIZE = {local_world} is more than WORLD_SIZE = {world}, the processes on all nodes."
        )
    if port is not None and port > 65535:
        problems.append(f"MASTER_PORT = {port} is no port. Ports go up to 65535.")
    if problems:
        who = (
            f"rank {environment['RANK'].strip()}"
            if environment.get("RANK", "").strip()
            else "a process without RANK"
        )
        advice = "torchrun and the templates in configs/launch set them all; unset RANK, WORLD_SIZE and LOCAL_RANK to train in one process."
        raise ConfigError(
            "\n  ".join([f"{who}: the launcher's variables cannot be used", *problems, advice])
        )
    assert (
        rank is not None
        and world is not None
        and local is not None
        and local_world is not None
        and restarts is not None
    )
    return Launch(
        rank=rank,
        world_size=world,
        local_rank=local,
        local_world_size=local_world,
        restart_count=restarts,
        launched=True,
        by_torchrun=is_by_torchrun(environment),
        store_host=host or "",
        store_port=port or 0,
        launcher_holds_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


# --- the process and its launcher -----------------------------------------------------------------------------------------------


def begin_program() -> None:
    """The first call of a program, before the imports that take seconds: it leaves with its launcher, and at Ctrl-C with a sentence."""
    leave_with_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_interrupted)


def _leave_interrupted(*_: object) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one sentence a node
        with suppress(OSError):
            os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(128 + signal.SIGINT)


def leave_with_launcher() -> None:
    """Under a launcher: leave when it dies, however it dies. An orphan would train on, and hold the output folder's lock.

    A process in a terminal, or under nohup, that torchrun did not start is one that somebody started from a shell. The end of that shell
    is a hang-up to it, and no more: training saves before it leaves, and nohup lets it go on.
    """
    if not is_launched(os.environ):
        return
    of_a_shell = not is_by_torchrun(os.environ) and (
        _has_terminal() or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    )
    leave_with_parent(os.getppid(), signal.SIGHUP if of_a_shell else signal.SIGKILL)


def leave_with_parent(
    parent: int, number: int = signal.SIGKILL, interval_seconds: float = 0.5
) -> None:
    """Get the signal `number` when process `parent` dies, or has died.

    The kernel is asked for it; a thread looks as well: the parent may have died before, or the kernel may be another.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    threading.Thread(
        target=_watch, args=(parent, number, interval_seconds), name="parent", daemon=True
    ).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of this block, and longer in the processes that are started in it: until they call `work_for`.

    While a worker imports what it needs, Ctrl-C would be a traceback of each.
    """
    resource_tracker.ensure_running()  # which is started with the first worker otherwise, and lifts the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def work_for(parent: int) -> None:
    """The first call of a worker of process `parent`: it leaves with that process, and at Ctrl-C without a word."""
    leave_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _watch(parent: int, number: int, interval_seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(interval_seconds)
    os.kill(os.getpid(), number)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
