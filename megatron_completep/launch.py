"""How this process was started: what its launcher told it, and that it ends with its launcher.

This is the only reader of RANK, WORLD_SIZE and whatever else launchers set, and the only place that
sets variables for libraries. It imports nothing slow, because it comes before the imports that take
seconds.
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

PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>
MAX_DIGITS = 18  # of a number in the environment; Python refuses to read thousands of digits
MAX_PORT = 65535
INTERRUPTED = "interrupted before the first step: nothing was trained, nothing is lost"


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, Slurm, a person) told this process.

    The defaults are those of a process without a launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this node
    restart_count: int = 0  # how often torchrun has restarted this job
    launched: bool = False  # under a launcher, even with one process
    by_torchrun: bool = False  # torchrun ends its workers itself at any signal that it gets
    store_host: str = ""  # where the ranks meet: MASTER_ADDR and MASTER_PORT
    store_port: int = 0
    launcher_holds_store: bool = False  # otherwise rank 0 does

    @classmethod
    def from_environment(cls) -> Launch:
        """The launch of this process. Raises ConfigError as `read_launch` does."""
        return read_launch(os.environ)

    @property
    def store_holder(self) -> str:
        """The process that hosts the store at the address where the ranks meet, in words."""
        return "the launcher" if self.launcher_holds_store else "rank 0"


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher, or a person in its place, started this process as one of several."""
    return any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


class _Variables:
    """Reads the variables of a launcher and collects what is wrong with them in `problems`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: list[str] = []

    def text(self, name: str, meaning: str, needed: bool) -> str | None:
        """A variable that is set and not blank, else None; `needed`: its absence is a problem."""
        setting = self.environment.get(name)
        is_blank = setting is not None and not setting.strip()
        if setting is None and needed:
            self.problems.append(f"{name} is not set. It is {meaning}.")
        elif is_blank:
            self.problems.append(f"{name} is empty. It is {meaning}.")
        return None if is_blank else setting

    def number(self, name: str, meaning: str, least: int, default: int | None = None) -> int | None:
        """A whole number of at least `least`, or `default` where the variable is not set.

        None where it cannot be used. Without a default the variable is needed.
        """
        digits = self.text(name, meaning, needed=default is None)
        if digits is None:
            return None if name in self.environment else default
        # int() would also read "1_0" and the digits of other scripts.
        is_number = digits.isascii() and digits.strip().isdigit() and len(digits) <= MAX_DIGITS
        if not is_number or int(digits) < least:
            self.problems.append(
                f"{name} = {digits[:40]!r} is not a whole number of at least {least}. "
                f"It is {meaning}."
            )
            return None
        return int(digits)

    def refuse_contradictions(
        self, rank: int | None, world: int | None, local_rank: int | None, local_world: int | None
    ) -> None:
        """Note where numbers do not fit each other; None: a number that could not be read."""
        if rank is not None and world is not None and rank >= world:
            self.problems.append(
                f"RANK = {rank} is not below WORLD_SIZE = {world}: {world} processes are numbered "
                f"0 to {world - 1}. Set WORLD_SIZE to the number of processes that you start."
            )
        # A default of LOCAL_WORLD_SIZE says nothing about the node's processes.
        is_set = "LOCAL_WORLD_SIZE" in self.environment
        if local_world is None or not is_set:
            return
        if local_rank is not None and local_rank >= local_world:
            self.problems.append(
                f"LOCAL_RANK = {local_rank} is not below LOCAL_WORLD_SIZE = {local_world}, "
                "the number of processes on this node."
            )
        if world is not None and local_world > world:
            self.problems.append(
                f"LOCAL_WORLD_SIZE = {local_world} is more than WORLD_SIZE = {world}, "
                "the processes on all nodes."
            )

    def raise_problems(self) -> None:
        """Raise ConfigError with all that was noted, if anything, and the rank of the process."""
        if not self.problems:
            return
        rank = self.environment.get("RANK", "").strip()
        process = f"rank {rank}" if rank else "a process without RANK"
        headline = f"{process}: the launcher's variables cannot be used"
        advice = (
            "torchrun and the templates in configs/launch set them all; "
            "unset RANK, WORLD_SIZE and LOCAL_RANK to train in one process."
        )
        raise ConfigError("\n  ".join([headline, *self.problems, advice]))


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What the variables of a launcher say.

    Raises ConfigError with everything that is wrong with them, and the rank that they name.
    """
    if not is_launched(environment):
        return Launch()
    variables = _Variables(environment)
    number = variables.number
    rank = number("RANK", "this process's number among all, from 0", 0)
    world = number("WORLD_SIZE", "the number of processes", 1)

    # One process alone chooses the first GPU and meets nobody, so it needs neither of these.
    several = world is not None and world > 1
    needed_or_0 = None if several else 0
    local_meaning = "this process's number on its node, from 0, and chooses its GPU"
    local_rank = number("LOCAL_RANK", local_meaning, 0, needed_or_0)
    local_world = number("LOCAL_WORLD_SIZE", "the number of processes on this node", 1, 1)
    restart_meaning = "how often torchrun has started the job anew"
    restarts = number("TORCHELASTIC_RESTART_COUNT", restart_meaning, 0, 0)
    host_meaning = "the host of rank 0, where the ranks meet"
    host = variables.text("MASTER_ADDR", host_meaning, needed=several)
    port_meaning = "a free port of that host, the same for all ranks"
    port = number("MASTER_PORT", port_meaning, 1, needed_or_0)

    variables.refuse_contradictions(rank, world, local_rank, local_world)
    if port is not None and port > MAX_PORT:
        variables.problems.append(f"MASTER_PORT = {port} is no port. Ports go up to 65535.")
    variables.raise_problems()

    # A number that could not be read is a problem, so none is missing here.
    assert rank is not None and world is not None
    assert local_rank is not None and local_world is not None and restarts is not None
    return Launch(
        rank=rank,
        world_size=world,
        local_rank=local_rank,
        local_world_size=local_world,
        restart_count=restarts,
        launched=True,
        by_torchrun=is_by_torchrun(environment),
        store_host=host or "",
        store_port=port or 0,
        launcher_holds_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set variables that libraries read later; one that the user has set keeps its value."""
    for name, setting in variables.items():
        os.environ.setdefault(name, setting)


def begin_program() -> None:
    """The first call of a program, before the imports that take seconds.

    From here on the process ends with its launcher, and Ctrl-C prints a sentence, not a traceback.
    """
    exit_when_launcher_dies()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_interrupted)


def _leave_interrupted(*_: object) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one sentence a node
        with suppress(OSError):
            os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(128 + signal.SIGINT)


def exit_when_launcher_dies() -> None:
    """Under a launcher, end this process when the launcher dies, however it dies.

    An orphan would train on, and hold the output folder's lock. A process in a terminal, or under
    nohup, that torchrun did not start is one that a person started from a shell. The end of that
    shell sends it SIGHUP only: training saves before it leaves, and nohup lets it go on.
    """
    if not is_launched(os.environ):
        return
    from_shell = False
    if not is_by_torchrun(os.environ):
        from_shell = _has_terminal() or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    exit_when_parent_dies(os.getppid(), signal.SIGHUP if from_shell else signal.SIGKILL)


def exit_when_parent_dies(
    parent: int, number: int = signal.SIGKILL, interval_seconds: float = 0.5
) -> None:
    """Have the signal `number` sent to this process when process `parent` dies, or has died.

    Linux is asked for the signal. A thread looks every `interval_seconds` as well: the parent may
    have died before the kernel was asked, and other systems have no such call.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    arguments = (parent, number, interval_seconds)
    threading.Thread(target=_watch, args=arguments, name="parent", daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Block Ctrl-C until the end of this block.

    Processes that are started inside inherit the block until they call `work_for`: while a worker
    imports what it needs, Ctrl-C would print a traceback of each.
    """
    # It would otherwise start with the first worker, and unblock the signal again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def work_for(parent: int) -> None:
    """The first call of a worker of process `parent`.

    The worker ends with that process, and at Ctrl-C without a message.
    """
    exit_when_parent_dies(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _watch(parent: int, number: int, interval_seconds: float) -> None:
    # The parent of an orphan is another process: init, or the nearest subreaper.
    while os.getppid() == parent:
        time.sleep(interval_seconds)
    os.kill(os.getpid(), number)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, even where its output goes elsewhere."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
