"""A thread that notices when a run hangs, names the rank that is to blame, and ends the process.

In a hang, all ranks wait for one of them. Each watchdog writes its rank's position to the process
group's store. From all positions they name the rank that is not inside a collective, or that does
not answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch._C import _distributed_c10d
from torch._C._distributed_c10d import Store

from megatron_completep.launch import Launch
from megatron_completep.run.state import ExitCode

# Files whose functions wait for other ranks.
PATHS_THAT_WAIT_FOR_PEERS = (
    "/torch/distributed/",
    "/parallel/collectives.py",
    "/parallel/rendezvous.py",
)
ANSWER_SECONDS = 3.0  # limit for one call to the store or one file write
# Store key, set by the first rank that times out; the others then publish their positions.
ASKED = "watchdog/asked"

Answer = dict[str, Any] | None  # what `Watchdog._answer` returns on a rank; None: no answer in time
T = TypeVar("T")


class Watchdog:
    """Ends the process when no sign of life comes for longer than the time-out.

    Signs of life are a new phase of the start (`enter_phase`), a finished step (`step_done`), and
    `progress` or `heartbeat` within either. When none comes in time, the watchdog writes the stacks
    of all threads to the run's folder, reports which rank holds the others up, and ends the process
    with exit code HUNG.

    Args:
        folder: the run's folder, for the dump files.
        timeout_seconds: None disables the watchdog. A phase may ask for more.
        store: the store of the process group; None for a single process.
        report: prints a line for the user; called from the watchdog's threads.
        leave: ends the process with an exit code. A process that hangs in a collective can be ended
            by `os._exit` only.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        timeout_seconds: float | None,
        store: Store | None,
        report: Callable[[str], None],
        leave: Callable[[int], Any] = os._exit,
    ):
        self.launch = launch
        self.folder = folder
        self.timeout = timeout_seconds or float("inf")
        self._report = report
        self._leave = leave
        self._store = store
        self._main = threading.get_ident()

        # Where the run is. The training thread writes these, the watchdog's threads read them.
        self._step = 0
        self._phase = 0
        self._in_training = False
        self._activity = ""
        self._last_sign_of_life = time.monotonic()
        self._allowed_seconds = self.timeout

        self._stopped = threading.Event()
        self._leaving = threading.Event()
        # Whichever of the two threads comes first dumps the flight recorder, and holds the lock
        # until it is written.
        self._flight_recorder = threading.Lock()
        self._flight_recorder_dumped = False
        self._threads: list[threading.Thread] = []
        if timeout_seconds is not None:
            self._start_threads()

    def _start_threads(self) -> None:
        watch = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._threads.append(watch)
        if self._store is not None:
            # A separate connection: the training thread may hang in a call on the first one.
            connection = own_connection(self._store)
            answers = threading.Thread(
                target=self._answer_peers, args=(connection,), name="watchdog answers", daemon=True
            )
            self._threads.append(answers)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching.

        If the watchdog is already ending the process, wait for it: the exception that passes
        through here may be the time-out of the same collective, and the watchdog's verdict and exit
        code must come first.
        """
        self.stop()
        if self._leaving.is_set():
            for thread in self._threads:
                thread.join()

    def enter_phase(self, doing: str, at_least_seconds: float = 0.0) -> None:
        """Begin a start-up phase. All ranks go through the same phases.

        The phase may last max(time-out, at_least_seconds).
        """
        self._phase += 1
        self._allowed_seconds = max(self.timeout, at_least_seconds)
        self.progress(doing)

    def step_done(self, step: int) -> None:
        """Record that step `step` is done.

        Also called once before the first step of this start, with the number of the step before it.
        """
        self._step = step
        self._in_training = True
        self._allowed_seconds = self.timeout
        self.progress("")

    def progress(self, doing: str) -> None:
        """Report that a long activity (a save, a validation) goes on, and what it is.

        Any thread may call it. doing: named in the report of a hang if no other sign of life
        follows.
        """
        self._activity = doing
        self._last_sign_of_life = time.monotonic()

    def heartbeat(self) -> None:
        """A sign of life from a save or load that training is waiting for."""
        self._last_sign_of_life = time.monotonic()

    def stop(self) -> None:
        """Watch no longer; returns at once."""
        self._stopped.set()

    def _poll_seconds(self) -> float:
        """Polling interval of the watchdog's threads."""
        return min(1.0, self.timeout / 10)

    def _patience(self) -> float:
        """Seconds within which the watchdogs of other ranks must answer."""
        return ANSWER_SECONDS + self.timeout / 5

    def _watch(self) -> None:
        """Thread that ends the process when this rank has timed out."""
        while not self._stopped.wait(self._poll_seconds()):
            if time.monotonic() - self._last_sign_of_life > self._allowed_seconds:
                self._leaving.set()
                # Limit the time of the report: writing to a blocked terminal may hang too, and the
                # process must end.
                call_with_timeout(self._expire, 2 * ANSWER_SECONDS + 2 * self._patience())
                self._leave(int(ExitCode.HUNG))
                return

    def _expire(self) -> None:
        """Report all that can be found out."""
        rank = self.launch.rank
        answer = self._answer()
        self._dump_stacks(rank)
        how = "waiting for other ranks" if answer["waiting"] else "not waiting for another rank"
        self._report(
            f"rank {rank} made no progress for {self._allowed_seconds:g} s {answer['progress']}, "
            f"in {answer['place']}, {how}. Stacks: {self._stack_file(rank)}"
        )
        if self._store is not None:
            self._dump_flight_recorder(rank)
            self._report(self._verdict(self._store, answer))

    def _progress_text(self) -> str:
        """How far this rank is, in words."""
        text = f"at step {self._step + 1}" if self._in_training else "before the first step"
        return f"{text} ({self._activity})" if self._activity else text

    def _answer(self) -> dict[str, Any]:
        """The position of this rank, as it is published to the other ranks."""
        place, waiting = where(sys._current_frames().get(self._main))
        return {
            "step": self._step + 1,
            "phase": self._phase,
            "progress": self._progress_text(),
            "place": place,
            "waiting": waiting,
        }

    def _verdict(self, store: Store, answer: dict[str, Any]) -> str:
        """Who is to blame, from what all ranks answer."""

        def ask_all() -> dict[int, Answer]:
            return self._ask_all(own_connection(store), answer)

        # A call to the store may never return if the process that hosts the store is stopped.
        answers = call_with_timeout(ask_all, self._patience() + ANSWER_SECONDS)
        if answers is None or answers[self.launch.rank] is None:
            return (
                f"hung: {self.launch.store_holder}, which hosts the store, does not answer "
                "(stopped, or its host is down)"
            )
        return verdict(answers)

    def _ask_all(self, store: Store, answer: dict[str, Any]) -> dict[int, Answer]:
        """Rank -> its answer, for all ranks including this one."""
        publish(store, self.launch.rank, answer)
        store.set(ASKED, str(self.launch.rank))
        # All ranks answer at the same time, so they share one time limit.
        deadline = time.monotonic() + self._patience()
        answers = {}
        for peer in range(self.launch.world_size):
            answers[peer] = ask(store, peer, max(0.05, deadline - time.monotonic()))
        return answers

    def _answer_peers(self, store: Store) -> None:
        """Thread that publishes this rank's position once another rank has timed out.

        It then ends this process too, even if this rank has not timed out itself.
        """
        rank = self.launch.rank
        with suppress(RuntimeError):  # the store is gone
            while not self._stopped.wait(self._poll_seconds()):
                if store.check([ASKED]):
                    self._leaving.set()
                    publish(store, rank, self._answer())
                    self._dump_stacks(rank)
                    self._dump_flight_recorder(rank)
                    # This process may host the store, which the asking rank still needs.
                    time.sleep(self._patience() + ANSWER_SECONDS)
                    self._leave(int(ExitCode.HUNG))
                    return

    def _dump_flight_recorder(self, rank: int) -> None:
        """Write torch's record of this rank's newest collectives to the run's folder, once.

        Both threads may call this at the same moment, if this rank and another one time out
        together. The second one waits: it may be the one that ends the process.
        """
        if not self._flight_recorder.acquire(timeout=ANSWER_SECONDS):
            return
        try:
            if self._flight_recorder_dumped:
                return
            self._flight_recorder_dumped = True
            path = self._flight_recorder_file(rank)
            report = call_with_timeout(lambda: dump_flight_recorder(path), ANSWER_SECONDS)
            self._report(f"rank {rank}: {report or 'the flight recorder does not answer'}")
        finally:
            self._flight_recorder.release()

    def _flight_recorder_file(self, rank: int) -> Path:
        return self.folder / f"hang_rank_{rank:05d}.collectives.json"

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"hang_rank_{rank:05d}.txt"

    def _dump_stacks(self, rank: int) -> None:
        """Write the stacks of all threads to the run's folder and to stderr."""
        # The disk may be the cause of the hang.
        with suppress(OSError), open(self._stack_file(rank), "w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        with suppress(OSError, ValueError, AttributeError):  # a terminal that is gone, or none
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def own_connection(store: Any) -> Store:
    """A second connection to the same store; the first may be in a call that never returns."""
    # torch's stubs lack `clone`, hence the annotations.
    connection: Store = store.clone()
    return connection


def call_with_timeout(call: Callable[[], T], seconds: float) -> T | None:
    """What `call` returns, or None if it raises or does not return within `seconds`.

    The call runs in a separate thread, which is abandoned after that time.
    """
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, name="call with time-out", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def dump_flight_recorder(path: Path) -> str:
    """Write the flight recorder (the newest collectives) of this process as JSON.

    Returns a clause for the user: the last collective and where the file is, or why there is none.
    """
    # Torch builds without NCCL have only the second function; old versions have neither.
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None) or getattr(
        _distributed_c10d, "_dump_fr_trace_json", None
    )
    try:
        dumped = dump() if dump is not None else b"{}"
        entries = json.loads(dumped).get("entries", [])
        path.write_bytes(dumped if isinstance(dumped, bytes) else dumped.encode())
    except (OSError, ValueError, RuntimeError) as error:
        return f"the newest collectives cannot be written to {path}: {error}"
    if not entries:
        return "no collectives are recorded (see parallel.flight_recorder_entries)"

    newest = entries[-1]
    # Which of the two fields an entry has depends on the backend.
    finished = newest.get("retired") or newest.get("state") == "completed"
    state = "finished" if finished else str(newest.get("state"))
    group = newest.get("process_group", ["?"])[0]
    name = newest.get("profiling_name", "?")
    return (
        f"the last collective is {name} of {newest.get('input_sizes')} in group {group}, {state}; "
        f"the {len(entries)} newest are in {path}"
    )


def publish(store: Any, rank: int, answer: dict[str, Any]) -> None:
    """Publish this rank's position to the watchdogs of other ranks."""
    # The host of the store may be gone: DistNetworkError or, in other versions, RuntimeError.
    with suppress(Exception):
        store.set(f"watchdog/{rank}", json.dumps(answer))


def ask(store: Any, peer: int, seconds: float) -> Answer:
    """What the watchdog of rank `peer` has published, or None after `seconds` without it."""
    try:
        store.wait([f"watchdog/{peer}"], timedelta(seconds=seconds))
        answer: dict[str, Any] = json.loads(store.get(f"watchdog/{peer}"))
    except Exception:  # dist.DistStoreError and, in other versions, RuntimeError
        return None
    return answer


def verdict(answers: dict[int, Answer]) -> str:
    """Who is to blame, in words, from the answers by rank.

    Blamed are the ranks without an answer; else the ranks furthest behind; if all are equally far,
    those that do not wait for others.
    """
    silent = []
    answered: dict[int, dict[str, Any]] = {}
    for rank, answer in answers.items():
        if answer is None:
            silent.append(rank)
        else:
            answered[rank] = answer
    if silent:
        if len(silent) == 1:
            return (
                f"hung: rank {silent[0]} does not answer (stopped, or its host is down); "
                "the others wait for it"
            )
        return (
            f"hung: ranks {_list(silent)} do not answer (stopped, or their hosts are down); "
            "the others wait for them"
        )

    position = {rank: (answer["step"], answer["phase"]) for rank, answer in answered.items()}
    furthest_behind = min(position.values())
    culprits = [rank for rank in answered if position[rank] == furthest_behind]
    # If all ranks are equally far, blame those that do not wait for others.
    if len(culprits) == len(answered):
        culprits = [rank for rank in answered if not answered[rank]["waiting"]] or culprits
    places = "; ".join(f"rank {rank} in {answered[rank]['place']}" for rank in culprits[:4])
    progress = answered[culprits[0]]["progress"]
    if len(culprits) == 1:
        return f"hung {progress}: rank {culprits[0]} holds the others up: {places}"
    return f"hung {progress}: ranks {_list(culprits)} hold the others up: {places}"


def where(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, and whether it waits for other ranks.

    The position is file, line and function of the innermost frame outside of torch.
    """
    waiting = False
    place = None
    while frame is not None:
        code = frame.f_code
        if any(path in code.co_filename for path in PATHS_THAT_WAIT_FOR_PEERS):
            waiting = True
        if place is None and "/torch/" not in code.co_filename:
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return place or "torch", waiting


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
