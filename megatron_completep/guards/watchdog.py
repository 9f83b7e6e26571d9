"""A thread that notices when a run hangs, names the rank that is to blame, and ends the process.

In a hang every rank waits for one. The watchdogs of all ranks tell each other where they are,
through the store of the process group. The rank that does not wait inside a collective, or does not
answer at all, is named.
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
WAITING = ("/torch/distributed/", "/parallel/collectives.py", "/parallel/rendezvous.py")
ANSWER_SECONDS = 3.0  # that a call to the store, or writing a file, may take
# Key in the store, set by the first rank whose time is up: all others then publish where they are.
ASKED = "watchdog/asked"

Answer = dict[str, Any] | None  # what `Watchdog._answer` returns on a rank; None: no answer in time
T = TypeVar("T")


class Watchdog:
    """Ends the process when no sign of life comes for longer than the time-out.

    Signs of life are a new phase of the start (`enter`), a finished step (`beat`), and `progress`
    or `stay` within either. When none comes in time, the watchdog writes the stacks of all threads
    to the run's folder, reports which rank holds the others up, and leaves with exit code HUNG.

    Args:
        folder: the run's, for the files.
        timeout_seconds: None: never. A phase may ask for longer.
        store: the store of the process group; None: this process is alone.
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
        self._stepping = False
        self._doing = ""
        self._beat_at = time.monotonic()
        self._bound = self.timeout

        self._stopped = threading.Event()
        self._leaving = threading.Event()
        # Acquired once and never released, by the thread that writes the collectives.
        self._collectives_written = threading.Lock()
        self._threads: list[threading.Thread] = []
        if timeout_seconds is not None:
            self._start_threads()

    def _start_threads(self) -> None:
        watch = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._threads.append(watch)
        if self._store is not None:
            # A connection of its own, as the training thread may hang in a call on the other.
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
        """Stop watching, unless the watchdog is about to end the process.

        Then its verdict and its exit code come first: the error that is under way here may be the
        time-out of the same collective.
        """
        self.stop()
        if self._leaving.is_set():
            for thread in self._threads:
                thread.join()

    def enter(self, doing: str, at_least_seconds: float = 0.0) -> None:
        """Begin a phase of the start. All ranks go through the same phases.

        The phase may take the time-out, or `at_least_seconds` where that is longer.
        """
        self._phase += 1
        self._bound = max(self.timeout, at_least_seconds)
        self.progress(doing)

    def beat(self, step: int) -> None:
        """A step is done, or the first one begins; `step` is the last one that is done."""
        self._step = step
        self._stepping = True
        self._bound = self.timeout
        self.progress("")

    def progress(self, doing: str) -> None:
        """A sign of life from something long; any thread may call it.

        doing: what is reported where no other sign of life follows.
        """
        self._doing = doing
        self._beat_at = time.monotonic()

    def stay(self) -> None:
        """A sign of life from what training waits for: a save, or a load."""
        self._beat_at = time.monotonic()

    def stop(self) -> None:
        """Watch no longer; returns at once."""
        self._stopped.set()

    def _look_seconds(self) -> float:
        """How often the threads look."""
        return min(1.0, self.timeout / 10)

    def _patience(self) -> float:
        """Seconds that the watchdogs of other ranks have for their answers."""
        return ANSWER_SECONDS + self.timeout / 5

    def _watch(self) -> None:
        """The thread that leaves when this rank's time is up."""
        while not self._stopped.wait(self._look_seconds()):
            if time.monotonic() - self._beat_at > self._bound:
                self._leaving.set()
                # The process ends in any case: even a terminal that takes no text may hang.
                in_time(self._expire, 2 * ANSWER_SECONDS + 2 * self._patience())
                self._leave(int(ExitCode.HUNG))
                return

    def _expire(self) -> bool:
        """Report all that can be found out."""
        rank = self.launch.rank
        answer = self._answer()
        self._dump_stacks(rank)
        how = "waiting for other ranks" if answer["waiting"] else "not waiting for another rank"
        place = f"{answer['stage']}, in {answer['place']} ({how})"
        self._report(
            f"rank {rank}: no step for {self._bound:g} s, {place}. Stacks: {self._stack_file(rank)}"
        )
        if self._store is not None:
            self._keep_collectives(rank)
            self._report(self._verdict(self._store, answer))
        return True

    def _stage(self) -> str:
        """How far this rank is, in words."""
        stage = f"at step {self._step + 1}" if self._stepping else "before the first step"
        return f"{stage}, {self._doing}" if self._doing else stage

    def _answer(self) -> dict[str, Any]:
        """Where this rank is, as it tells the other ranks."""
        place, waiting = where(sys._current_frames().get(self._main))
        return {
            "step": self._step + 1,
            "phase": self._phase,
            "stage": self._stage(),
            "place": place,
            "waiting": waiting,
        }

    def _verdict(self, store: Store, answer: dict[str, Any]) -> str:
        """Who is to blame, from what all ranks answer."""

        def ask_all() -> dict[int, Answer]:
            return self._ask_all(own_connection(store), answer)

        # A call to the store may never return, where the process that holds the store is stopped.
        answers = in_time(ask_all, self._patience() + ANSWER_SECONDS)
        if answers is None or answers[self.launch.rank] is None:
            return (
                f"hung: {self.launch.store_holder}, which holds the store, does not answer "
                "(stopped, or its host is down)"
            )
        return verdict(answers)

    def _ask_all(self, store: Store, answer: dict[str, Any]) -> dict[int, Answer]:
        """The answer of every rank by rank, that of this rank included."""
        publish(store, self.launch.rank, answer)
        store.set(ASKED, str(self.launch.rank))
        # All ranks answer at the same time, so they share the time that there is.
        deadline = time.monotonic() + self._patience()
        answers = {}
        for peer in range(self.launch.world_size):
            answers[peer] = ask(store, peer, max(0.05, deadline - time.monotonic()))
        return answers

    def _answer_peers(self, store: Store) -> None:
        """The thread that answers when another rank's time is up, and then leaves as well.

        The time of this rank need not be up.
        """
        rank = self.launch.rank
        with suppress(RuntimeError):  # the store is gone
            while not self._stopped.wait(self._look_seconds()):
                if store.check([ASKED]):
                    self._leaving.set()
                    publish(store, rank, self._answer())
                    self._dump_stacks(rank)
                    self._keep_collectives(rank)
                    # This process may hold the store, which the one that asked still needs.
                    time.sleep(self._patience() + ANSWER_SECONDS)
                    self._leave(int(ExitCode.HUNG))
                    return

    def _keep_collectives(self, rank: int) -> None:
        """Write this rank's newest collectives, once.

        Both threads may come here at the same moment: this rank's time is up, and another asks.
        """
        if not self._collectives_written.acquire(blocking=False):
            return
        path = self._collectives_file(rank)
        collectives = in_time(lambda: write_collectives(path), ANSWER_SECONDS)
        self._report(f"rank {rank}: its {collectives or 'flight recorder does not answer'}")

    def _collectives_file(self, rank: int) -> Path:
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
    """The same store by another connection; the first may be in a call that never returns."""
    # torch's stubs lack `clone`, hence the annotations.
    connection: Store = store.clone()
    return connection


def in_time(call: Callable[[], T], seconds: float) -> T | None:
    """What `call` returns, or None where it raises or does not return within `seconds`.

    It runs in a thread of its own, which is abandoned when the time is up.
    """
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, name="in time", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def write_collectives(path: Path) -> str:
    """Write the newest collectives of this process as JSON.

    Returns, in words, what the last one was and where the file is, or why there is none.
    """
    # Builds of torch without NCCL have the second name only, old ones neither.
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None) or getattr(
        _distributed_c10d, "_dump_fr_trace_json", None
    )
    try:
        dumped = dump() if dump is not None else b"{}"
        entries = json.loads(dumped).get("entries", [])
        path.write_bytes(dumped if isinstance(dumped, bytes) else dumped.encode())
    except (OSError, ValueError, RuntimeError) as error:
        return f"collectives cannot be written down: {error}"
    if not entries:
        return "collectives are not remembered (parallel.flight_recorder_entries)"

    newest = entries[-1]
    # Which of the two fields an entry has depends on the backend.
    finished = newest.get("retired") or newest.get("state") == "completed"
    state = "finished" if finished else str(newest.get("state"))
    group = newest.get("process_group", ["?"])[0]
    name = newest.get("profiling_name", "?")
    return (
        f"last collective, {name} of {newest.get('input_sizes')} in group {group}, {state}; "
        f"the {len(entries)} newest: {path}"
    )


def publish(store: Any, rank: int, answer: dict[str, Any]) -> bool:
    """Tell the other ranks' watchdogs where this rank is; False when the store's host is gone."""
    try:
        store.set(f"watchdog/{rank}", json.dumps(answer))
    except Exception:  # dist.DistNetworkError and, in other versions, RuntimeError
        return False
    return True


def ask(store: Any, peer: int, seconds: float) -> Answer:
    """What the watchdog of rank `peer` has published, or None when nothing comes in time."""
    try:
        store.wait([f"watchdog/{peer}"], timedelta(seconds=seconds))
        answer: dict[str, Any] = json.loads(store.get(f"watchdog/{peer}"))
    except Exception:  # dist.DistStoreError and, in other versions, RuntimeError
        return None
    return answer


def verdict(answers: dict[int, Answer]) -> str:
    """Who is to blame: ranks without an answer, else those furthest behind, else those not waiting.

    answers: by rank.
    """
    silent = []
    answered: dict[int, dict[str, Any]] = {}
    for rank, answer in answers.items():
        if answer is None:
            silent.append(rank)
        else:
            answered[rank] = answer
    if silent:
        return (
            f"hung: rank {_list(silent)} does not answer (stopped, or its host is down); "
            "the others wait for it"
        )

    progress = {rank: (answer["step"], answer["phase"]) for rank, answer in answered.items()}
    least_progress = min(progress.values())
    culprits = [rank for rank in answered if progress[rank] == least_progress]
    # Where all ranks are equally far, those are to blame that wait for nobody.
    if len(culprits) == len(answered):
        culprits = [rank for rank in answered if not answered[rank]["waiting"]] or culprits
    places = "; ".join(f"rank {rank} in {answered[rank]['place']}" for rank in culprits[:4])
    stage = answered[culprits[0]]["stage"]
    return f"hung {stage}: rank {_list(culprits)} holds the others up: {places}"


def where(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, and whether it waits for other ranks.

    The place is file, line and function of the innermost frame outside of torch.
    """
    waiting = False
    place = None
    while frame is not None:
        code = frame.f_code
        if any(path in code.co_filename for path in WAITING):
            waiting = True
        if place is None and "/torch/" not in code.co_filename:
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return place or "torch", waiting


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
