"""A thread that notices when steps stop coming, says which rank is to blame, and ends the process.

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
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.state import ExitCode

WAITING = ("/torch/distributed/", "/parallel/collectives.py")  # files whose functions wait for other ranks
ANSWER_SECONDS = 3.0


class Watchdog:
    """Counts from the last `beat`: the loop's beginning, then every finished step. Expiry: stacks, a verdict, exit code HUNG."""

    def __init__(
        self, context: ParallelContext, folder: Path, timeout_seconds: float, report: Callable[[str], None], leave: Callable = os._exit
    ):
        self.context, self.folder, self.timeout = context, folder, timeout_seconds
        self._report, self._leave = report, leave
        self._main = threading.get_ident()
        self._step, self._beat_at = 0, float("inf")
        self._stopped = threading.Event()
        self._store = _default_store() if context.world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """A step is done."""
        self._step, self._beat_at = step, time.monotonic()

    def stay(self) -> None:
        """No step is done, but what training waits for gets on: a save, or a load."""
        if self._beat_at != float("inf"):  # the watch begins with the first step
            self._beat_at = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self._beat_at > self.timeout:
                self._expire()
                return

    def _expire(self) -> None:
        """Everything that may itself hang comes last, and is bounded."""
        rank, step = self.context.rank, self._step + 1
        place, waiting = where(sys._current_frames().get(self._main))
        self._dump_stacks(rank)
        how = "waiting for other ranks" if waiting else "not waiting for another rank"
        self._report(f"rank {rank}: no step for {self.timeout:g} s, at step {step}, in {place} ({how}). Stacks: {self._stack_file(rank)}")
        if self._store is not None:
            answered = publish(self._store, rank, {"step": step, "place": place, "waiting": waiting})
            self._report(f"rank {rank}: {self._dump_collectives(rank)}")
            self._report(self._verdict(self._store) if answered else f"rank {rank}: the launcher's store does not answer")
        self._leave(int(ExitCode.HUNG))

    def _verdict(self, store: Any) -> str:
        deadline = time.monotonic() + ANSWER_SECONDS + self.timeout / 5
        answers = {peer: ask(store, peer, max(0.05, deadline - time.monotonic())) for peer in range(self.context.world_size)}
        if answers[self.context.rank] is None:
            return f"rank {self.context.rank}: the launcher's store does not answer any more"
        return verdict(answers)

    def _dump_collectives(self, rank: int) -> str:
        """What the flight recorder remembers, into a file, and its newest entry in words. It may itself wait for the device: bounded."""
        said: list[str] = []
        path = self.folder / f"hang_rank_{rank:05d}.collectives.json"
        thread = threading.Thread(target=lambda: said.append(write_collectives(path)), name="flight recorder", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        return said[0] if said else "the flight recorder does not answer"

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"hang_rank_{rank:05d}.txt"

    def _dump_stacks(self, rank: int) -> None:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            with open(self._stack_file(rank), "w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass  # the disk may be what hangs


def write_collectives(path: Path) -> str:
    """Write the newest collectives of this process as JSON; returns what the last one was, and where the file is."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None) or getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    try:
        text = dump() if dump is not None else b"{}"
        entries = json.loads(text).get("entries", [])
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    except (OSError, ValueError, RuntimeError) as error:
        return f"the collectives cannot be written down: {error}"
    if not entries:
        return "no collective is remembered (parallel.flight_recorder_entries)"
    last = entries[-1]
    state = "finished" if last.get("retired") or last.get("state") == "completed" else str(last.get("state"))
    group, name = last.get("process_group", ["?"])[0], last.get("profiling_name", "?")
    return f"its last collective, {name} of {last.get('input_sizes')} in group {group}, {state}; the {len(entries)} newest: {path}"


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
    first = min(answer["step"] for answer in known.values())
    behind = [rank for rank, answer in known.items() if answer["step"] == first]
    if len(behind) == len(known):
        behind = [rank for rank, answer in known.items() if not answer["waiting"]] or behind
    places = "; ".join(f"rank {rank} in {known[rank]['place']}" for rank in behind[:4])
    return f"hung at step {first}: rank {_list(behind)} holds the others up: {places}"


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


def _default_store() -> Any:
    """The launcher's key-value store, which answers as long as the launcher lives."""
    return dist.distributed_c10d._get_default_store()
