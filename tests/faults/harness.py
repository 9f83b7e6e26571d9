"""Runs of a tiny model that something happens to.

A rank is a process forked from a server that has imported everything, so that a run of two costs a
second; it executes the real `pretrain`. What is to happen is told as a `Fault`, which only this
file knows how to cause.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import pty
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.manifest import committed_steps
from megatron_completep.config import load_config
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.errors import exit_on_user_error

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torch.distributed", "megatron_completep.pretrain", "megatron_completep.data.writer"]
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PR_SET_CHILD_SUBREAPER = 36
PEER_SECONDS = 30.0
COUNTS = {"injections": 0, "hung": 0}  # of the test that runs; conftest.py reads them for the table


def count_injection() -> None:
    """One more fault was caused."""
    COUNTS["injections"] += 1


CONFIG = """
model:
  {hidden_size: 32, num_layers: 2, num_attention_heads: 4, ffn_hidden_size: 64,
   vocab_size: 64, vocab_multiple: 16, seq_length: 16}
completep: {base_hidden_size: 16, base_num_layers: 1}
optimizer: {base_lr: 1.0e-2, warmup_steps: 2}
data: {train: [{prefix: PREFIX}]}
training:
  {micro_batch_size: 2, global_batch_size: 4, train_steps: 12, precision: float32,
   device: cpu, cpu_threads: 1, output_dir: OUTPUT}
checkpoint: {interval: 3, async_save: false, keep: 2, timeout_minutes: 4}
parallel: {timeout_minutes: 4}
guards: {lock_wait_seconds: 20, hang_timeout_minutes: 4}
logging: {interval: 1, tensorboard: false}
"""


@dataclass(frozen=True)
class Fault:
    """`kind` happens on `rank` (-1: on all),
    at the fail point `point` (the `nth` time it is passed) or at the steps `steps`.
    """

    kind: str = "none"
    rank: int = 0
    point: str = ""
    nth: int = 1
    steps: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one run ended."""

    exit_codes: list[int]
    output: str  # of all ranks
    seconds: float
    timed_out: bool


@dataclass
class Ranks:
    """A run under way."""

    processes: list[Any]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 240.0) -> Outcome:
        """Wait for all; whoever is left then is killed and the outcome says so.

        A peer of a dead rank gets 30 s, as from a launcher.
        """
        deadline = self.started + seconds
        while any(p.is_alive() for p in self.processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in self.processes):
                deadline = min(deadline, time.monotonic() + PEER_SECONDS)
            time.sleep(0.02)
        timed_out = time.monotonic() >= self.started + seconds
        took = time.monotonic() - self.started
        for process in self.processes:
            process.kill()
            process.join()
        COUNTS["hung"] += timed_out
        output = "".join(log.read_text(errors="replace") for log in self.logs)
        return Outcome([p.exitcode for p in self.processes], output, took, timed_out)


def write_corpus(folder: Path) -> Path:
    """Token files of 40 documents, and the configuration that reads them."""
    generator = np.random.default_rng(7)
    writer = IndexedWriter(folder / "corpus", np.uint16)
    for _ in range(40):
        writer.add_document([generator.integers(0, 60, int(generator.integers(20, 60)))])
    writer.close()
    path = folder / "run.yaml"
    path.write_text(
        CONFIG.replace("PREFIX", str(folder / "corpus")).replace("OUTPUT", str(folder / "run"))
    )
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    config: Path,
    fault: Fault | None = None,
    world: int = 2,
    overrides: Sequence[str] = (),
    restart_count: int = 0,
    environments: Sequence[dict[str, str]] | None = None,
) -> Ranks:
    """Start the ranks of a run; `restart_count` as torchrun tells it.

    RANK in an override becomes the rank's number: two nodes.

    environments: of each process, in place of what torchrun would set for `world` of them.
    """
    if fault is not None:
        count_injection()
    port = free_port()
    told = environments or [
        environment_of(rank, world, port, restart_count) for rank in range(world)
    ]
    logs = [
        config.parent / f"{config.stem}.{time.monotonic_ns()}.rank_{rank}.log"
        for rank in range(len(told))
    ]
    for log in logs:
        log.touch()  # a rank may be killed before it opens its own
    processes = []
    for rank, environment in enumerate(told):
        arguments = (
            rank,
            environment,
            str(logs[rank]),
            str(config),
            tuple(overrides),
            fault or Fault(),
            list(sys.path),
        )
        process = SERVER.Process(target=_rank, args=arguments)
        process.start()
        processes.append(process)
    return Ranks(processes, logs)


def environment_of(rank: int, world: int, port: int, restart_count: int = 0) -> dict[str, str]:
    """What torchrun sets."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
    }


def run(
    config: Path,
    fault: Fault | None = None,
    world: int = 2,
    overrides: Sequence[str] = (),
    seconds: float = 240.0,
    restart_count: int = 0,
) -> Outcome:
    """A run from its start to its end."""
    return start(config, fault, world, overrides, restart_count).wait(seconds)


def start_under_launcher(
    config: Path, world: int = 2, overrides: Sequence[str] = (), of_them: int | None = None
) -> tuple[Any, Path]:
    """A launcher that forks the ranks itself, `of_them` if not all,
    and the file in which it writes their process ids.
    """
    pids = config.parent / "pids"
    launcher = SERVER.Process(
        target=_launcher,
        args=(world, of_them or world, str(config), tuple(overrides), str(pids), list(sys.path)),
    )
    launcher.start()
    return launcher, pids


def _launcher(
    world: int, of_them: int, config: str, overrides: tuple[str, ...], pids: str, path: list[str]
) -> None:
    os.setsid()  # away from the terminal of whoever runs the tests
    # And from their nohup: ranks would inherit it and, as they should, train on without a launcher.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    port = free_port()
    children = []
    for rank in range(of_them):
        child = os.fork()
        if child == 0:
            _rank(
                rank,
                environment_of(rank, world, port),
                f"{config}.rank_{rank}.log",
                config,
                overrides,
                Fault(),
                path,
            )
            os._exit(0)
        children.append(child)
    Path(f"{pids}.tmp").write_text(json.dumps(children))
    os.rename(f"{pids}.tmp", pids)
    time.sleep(3600)


def run_in_terminal(
    config: Path,
    fault: Fault,
    steps: int,
    world: int = 2,
    nohup: bool = False,
    seconds: float = 240.0,
) -> list[int]:
    """Exit codes of ranks that a shell started in a terminal,
    which is closed when `steps` are done. world 1: without a launcher.
    """
    count_injection()
    codes = config.parent / "codes"
    process = SERVER.Process(
        target=_terminal, args=(str(config), fault, steps, world, nohup, str(codes), list(sys.path))
    )
    process.start()
    process.join(seconds)
    COUNTS["hung"] += process.is_alive()
    process.kill()
    return list(json.loads(codes.read_text())) if codes.exists() else []


def _terminal(
    config: str, fault: Fault, steps: int, world: int, nohup: bool, codes: str, path: list[str]
) -> None:
    """Holds the other end of the terminal, and adopts what the shell leaves behind."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pids = Path(f"{codes}.pids")
    shell, terminal = pty.fork()
    if shell == 0:
        _shell(config, fault, world, nohup, pids, path)
    os.set_blocking(terminal, False)
    metrics = Path(config).parent / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        with suppress(BlockingIOError):
            os.read(terminal, 65536)
        time.sleep(0.01)
    os.close(terminal)
    Path(fault.point).touch() if fault.kind == "wait" else None
    os.waitpid(shell, 0)
    found = [
        os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in json.loads(pids.read_text())
    ]
    Path(f"{codes}.tmp").write_text(json.dumps(found))
    os.rename(f"{codes}.tmp", codes)


def _shell(config: str, fault: Fault, world: int, nohup: bool, pids: Path, path: list[str]) -> None:
    """The head of a session: the kernel tells it when its terminal is closed, of which it dies."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    port, children = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            environment = environment_of(rank, world, port) if world > 1 else {}
            code = 1
            try:
                _rank(rank, environment, None, config, (), fault, path)
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                os._exit(code)
        children.append(child)
    pids.write_text(json.dumps(children))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    time.sleep(3600)


def _rank(
    rank: int,
    environment: dict[str, str],
    log: str | None,
    config: str,
    overrides: tuple[str, ...],
    fault: Fault,
    path: list[str],
) -> None:
    """A rank whose output goes to a file, or stays in the terminal."""
    sys.path[:] = path
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    from megatron_completep.pretrain import pretrain
    from tests.faults.injections import (
        inject,  # after the environment is set, in the forked process only
    )

    def main() -> int:
        own = [override.replace("RANK", str(rank)) for override in overrides]
        return int(
            pretrain(
                load_config(config, own),
                inject(fault) if fault.rank in (rank, -1) else no_fail_point,
            )
        )

    exit_on_user_error(main)


def no_fail_point(name: str) -> None:
    pass


def wait_for_step(config: Path, step: int, seconds: float = 240.0) -> None:
    """Wait until a run has written the row of a step."""
    metrics = config.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


# The oracle.


def losses(config: Path) -> dict[int, float]:
    """Loss by step, as metrics.jsonl has it at full precision."""
    rows = [
        json.loads(line)
        for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return {row["step"]: row["loss"] for row in rows}


def final_state(config: Path) -> tuple[int, dict[str, bytes]]:
    """Step of the newest checkpoint, and the bytes of every tensor in it."""
    folders = committed_steps(config.parent / "run" / "checkpoints")
    stored = StoredCheckpoint.open(folders[max(folders)])
    values = {
        f"{state}/{name}": stored.tensor(name, state).numpy().tobytes()
        for name in stored.manifest.parameters
        for state in ("master", "exp_avg", "exp_avg_sq")
    }
    return max(folders), values


def steps_on_disk(config: Path) -> list[str]:
    """Names in checkpoints/."""
    return sorted(os.listdir(config.parent / "run" / "checkpoints"))


def at_point(fault: Fault, action: Callable[[], None]) -> Callable[[str], None]:
    """A fail point that acts the nth time its name is passed."""
    passed = 0

    def fail_point(name: str) -> None:
        nonlocal passed
        if name == fault.point:
            passed += 1
            if passed == fault.nth:
                action()

    return fail_point


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
