"""A thread that notices when a run gets no further, says which rank is to blame, and ends the process.

In a hang every rank waits for one. The one that does not wait inside a collective, or does not answer at all, is named.
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

import torch.distributed as dist
from torch._C import _distributed_c10d

from megatron_completep.launch import Launch
from megatron_completep.run.state import ExitCode

WAITING = (
    "/torch/distributed/",
    "/parallel/collectives.py",
    "/parallel/rendezvous.py",
)  # files whose functions wait for other ranks
ANSWER_SECONDS = 3.0
ASKED = "watchdog/asked"  # set by the first rank that expires: all others say where they are

Answer = TypeVar("Answer")


class Watchdog:
    """Counts from the last sign of life: a phase of the start (`enter`), a finished step (`beat`), or `progress` within either.

    When none comes for `timeout_seconds` (None: for ever), or for as long as the phase asked for: stacks, a verdict, exit code HUNG.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        timeout_seconds: float | None,
        store: dist.Store | None,
        report: Callable[[str], None],
        leave: Callable[[int], Any] = os._exit,
    ):
        self.launch, self.folder, self.timeout = launch, folder, timeout_seconds or float("inf")
        self._report, self._leave = report, leave
        self._main = threading.get_ident()
        self._step, self._phase, self._stepping, self._doing = 0, 0, False, ""
        self._beat_at, self._bound = time.monotonic(), self.timeout
        self._stopped, self._leaving = threading.Event(), threading.Event()
        self._collectives_kept = (
            threading.Lock()
        )  # held for good by the thread that writes them down
        self._store = store
        self._threads: list[threading.Thread] = []
        if timeout_seconds is not None:
            self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
            if store is not None:
                self._threads.append(
                    threading.Thread(
                        target=self._answer_peers,
                        args=(own_connection(store),),
                        name="watchdog answers",
                        daemon=True,
                    )
                )
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        """Where the watchdog is about to leave, its verdict and its exit code come first: the collective may have timed out as well."""
        self.stop()
        if self._leaving.is_set():
            for thread in self._threads:
                thread.join()

    def enter(self, doing: str, at_least_seconds: float = 0.0) -> None:
        """A phase of the start begins, the same ones on all ranks. It may take the time-out, or `at_least_seconds` if that is longer."""
        self._phase += 1
        self._bound = max(self.timeout, at_least_seconds)
        self.progress(doing)

    def beat(self, step: int) -> None:
        """The loop stands after `step`: it begins, or the step is done."""
        self._step, self._stepping, self._bound = step, True, self.timeout
        self.progress("")

    def progress(self, doing: str) -> None:
        """A sign of life from something long, from any thread: the time-out counts anew. `doing` is said if no other follows."""
        self._doing, self._beat_at = doing, time.monotonic()

    def stay(self) -> None:
        """No step is done, but what training waits for gets on: a save, or a load."""
        self._beat_at = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _look_seconds(self) -> float:
        return min(1.0, self.timeout / 10)

    def _watch(self) -> None:
        while not self._stopped.wait(self._look_seconds()):
            if time.monotonic() - self._beat_at > self._bound:
                self._leaving.set()
                bound = 2 * ANSWER_SECONDS + 2 * self._patience()
                in_time(self._expire, bound)  # even a terminal may hang that takes no text
                self._leave(int(ExitCode.HUNG))
                return

    def _expire(self) -> bool:
        """Say all that can be found out."""
        rank, answer = self.launch.rank, self._answer()
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
        stage = f"at step {self._step + 1}" if self._stepping else "before the first step"
        return f"{stage}, {self._doing}" if self._doing else stage

    def _answer(self) -> dict[str, Any]:
        place, waiting = where(sys._current_frames().get(self._main))
        return {
            "step": self._step + 1,
            "phase": self._phase,
            "stage": self._stage(),
            "place": place,
            "waiting": waiting,
        }

    def _patience(self) -> float:
        return ANSWER_SECONDS + self.timeout / 5

    def _verdict(self, store: dist.Store, answer: dict[str, Any]) -> str:
        """What the other ranks say. Every call to the store may itself never return, where the process that holds it is stopped."""
        answers = in_time(
            lambda: self._ask_all(own_connection(store), answer), self._patience() + ANSWER_SECONDS
        )
        if answers is None or answers[self.launch.rank] is None:
            return f"hung: {self.launch.store_holder}, which holds the store, does not answer (stopped, or its host is down)"
        return verdict(answers)

    def _ask_all(
        self, store: dist.Store, answer: dict[str, Any]
    ) -> dict[int, dict[str, Any] | None]:
        publish(store, self.launch.rank, answer)
        store.set(ASKED, str(self.launch.rank))
        deadline = time.monotonic() + self._patience()
        return {
            peer: ask(store, peer, max(0.05, deadline - time.monotonic()))
            for peer in range(self.launch.world_size)
        }

    def _answer_peers(self, store: dist.Store) -> None:
        """When another rank's watchdog has expired, say where this rank is, though its own time may not be up, and leave as well."""
        with suppress(RuntimeError):  # the store is gone
            while not self._stopped.wait(self._look_seconds()):
                if store.check([ASKED]):
                    self._leaving.set()
                    publish(store, self.launch.rank, self._answer())
                    self._dump_stacks(self.launch.rank)
                    self._keep_collectives(self.launch.rank)
                    time.sleep(self._patience() + ANSWER_SECONDS)  # the store may be held here
                    self._leave(int(ExitCode.HUNG))
                    return

    def _keep_collectives(self, rank: int) -> None:
        """Once a rank, whether its own time was up first or another rank asked: both may come at the same moment."""
        if self._collectives_kept.acquire(blocking=False):
            collectives = in_time(
                lambda: write_collectives(self._collectives_file(rank)), ANSWER_SECONDS
            )
            self._report(f"rank {rank}: its {collectives or 'flight recorder does not answer'}")

    def _collectives_file(self, rank: int) -> Path:
        return self.folder / f"hang_rank_{rank:05d}.collectives.json"

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"hang_rank_{rank:05d}.txt"

    def _dump_stacks(self, rank: int) -> None:
        try:
            with open(self._stack_file(rank), "w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass  # the disk may be what hangs
        with suppress(OSError, ValueError, AttributeError):  # a terminal that is gone, or none
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def own_connection(store: Any) -> dist.Store:
    """The same store by another connection: the first may be in use by a call that does not return. (torch's stubs lack `clone`.)"""
    connection: dist.Store = store.clone()
    return connection


def in_time(call: Callable[[], Answer], seconds: float) -> Answer | None:
    """What `call` returns, or None where it raises or does not return within `seconds`: then its thread is left behind."""
    answers: list[Answer] = []

    def run() -> None:
        with suppress(Exception):
            answers.append(call())

    thread = threading.Thread(target=run, name="in time", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def write_collectives(path: Path) -> str:
    """Write the newest collectives of this process as JSON; returns what the last one was, and where the file is."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None) or getattr(
        _distributed_c10d, "_dump_fr_trace_json", None
    )
    try:
        text = dump() if dump is not None else b"{}"
        entries = json.loads(text).get("entries", [])
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    except (OSError, ValueError, RuntimeError) as error:
        return f"collectives cannot be written down: {error}"
    if not entries:
        return "collectives are not remembered (parallel.flight_recorder_entries)"
    last = entries[-1]
    state = (
        "finished"
        if last.get("retired") or last.get("state") == "completed"
        else str(last.get("state"))
    )
    group, name = last.get("process_group", ["?"])[0], last.get("profiling_name", "?")
    return f"last collective, {name} of {last.get('input_sizes')} in group {group}, {state}; the {len(entries)} newest: {path}"


def publish(store: Any, rank: int, answer: dict[str, Any]) -> bool:
    """Tell the peers' watchdogs where this rank is; False when the store's host is gone."""
    try:
        store.set(f"watchdog/{rank}", json.dumps(answer))
    except Exception:  # dist.DistNetworkError and, in other versions, RuntimeError
        return False
    return True


def ask(store: Any, peer: int, seconds: float) -> dict[str, Any] | None:
    """What a peer's watchdog says, or None when it says nothing in time."""
    try:
        store.wait([f"watchdog/{peer}"], timedelta(seconds=seconds))
        return json.loads(store.get(f"watchdog/{peer}"))
    except Exception:  # dist.DistStoreError and, in other versions, RuntimeError
        return None


def verdict(answers: dict[int, dict[str, Any] | None]) -> str:
    """Who is to blame: ranks without an answer, else those furthest behind, else those that wait for nobody."""
    silent = [rank for rank, answer in answers.items() if answer is None]
    if silent:
        return f"hung: rank {_list(silent)} does not answer (stopped, or its host is down); the others wait for it"
    known = {rank: answer for rank, answer in answers.items() if answer is not None}
    first = min((answer["step"], answer["phase"]) for answer in known.values())
    behind = [rank for rank, answer in known.items() if (answer["step"], answer["phase"]) == first]
    if len(behind) == len(known):
        behind = [rank for rank, answer in known.items() if not answer["waiting"]] or behind
    places = "; ".join(f"rank {rank} in {known[rank]['place']}" for rank in behind[:4])
    return f"hung {known[behind[0]]['stage']}: rank {_list(behind)} holds the others up: {places}"


def where(frame: FrameType | None) -> tuple[str, bool]:
    """File, line and function that a thread is in, the innermost outside of torch; and whether it waits for other ranks."""
    waiting, place = False, None
    while frame is not None:
        code = frame.f_code
        waiting = waiting or any(part in code.co_filename for part in WAITING)
        if place is None and "/torch/" not in code.co_filename:
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return place or "torch", waiting


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
