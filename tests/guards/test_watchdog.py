"""The watchdog with stores that answer, or never do,
and instead of the end of the process an event.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_completep.guards import watchdog as module
from megatron_completep.guards.watchdog import Watchdog
from megatron_completep.launch import Launch
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.dispatch import Dispatch

NEVER = threading.Event()


class Watched:
    """One rank's watchdog, and what came of it."""

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        store: Any = None,
        timeout: float | None = 0.2,
        report: Any = None,
        **launch: Any,
    ) -> None:
        self.said, self.codes, self.left = list[str](), list[int](), threading.Event()
        told = Launch(rank, 2, rank, launched=True, **launch) if store is not None else Launch()
        self.dog = Watchdog(told, folder, timeout, store, report or self.said.append, self._leave)

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()

    def wait(self) -> str:
        assert self.left.wait(60)
        assert self.codes == [77]
        return "\n".join(self.said)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)


class Silent:
    """The store of a process that was stopped: it takes connections, and answers nothing."""

    def clone(self) -> Silent:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: NEVER.wait()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("launcher_holds_store", "who"), [(False, "rank 0"), (True, "the launcher")]
)
def test_a_store_that_never_answers_is_named_and_not_waited_for(
    tmp_path: Path, launcher_holds_store: bool, who: str
) -> None:
    watched = Watched(tmp_path, 1, Silent(), launcher_holds_store=launcher_holds_store)
    watched.dog.step_done(4)
    said = watched.wait()
    assert "rank 1 made no progress for 0.2 s at step 5, in " in said
    assert (
        f"hung: {who}, which hosts the store, does not answer (stopped, or its host is down)"
        in said
    )
    assert "hang_rank_00001.txt" in said
    assert "test_watchdog.py" in (tmp_path / "hang_rank_00001.txt").read_text()


def test_a_store_that_is_gone_is_named(tmp_path: Path) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("Broken pipe")

    store = SimpleNamespace(set=gone, wait=gone, get=gone, check=gone)
    store.clone = lambda: store
    assert (
        "hung: rank 0, which hosts the store, does not answer" in Watched(tmp_path, 1, store).wait()
    )


def test_a_hang_before_the_first_step_is_named_with_its_phase(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.dog.enter_phase("building the model")
    assert (
        "rank 0 made no progress for 0.2 s before the first step (building the model), in "
        "threading.py" in watched.wait()
    )


def test_a_rank_whose_time_is_not_up_says_where_it_is_when_another_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 hangs in an earlier phase than rank 0,
    which has waited for less long, and for rank 1.
    """
    monkeypatch.setattr(module, "ANSWER_SECONDS", 60.0)
    # Within which the one that was asked does not leave.
    monkeypatch.setattr(Watchdog, "_patience", lambda self: 60.0)
    store = dist.HashStore()
    patient = Watched(tmp_path, 0, store, timeout=600.0)
    patient.dog._poll_seconds = lambda: 0.01  # type: ignore[method-assign]
    hung = Watched(tmp_path, 1, store, timeout=1.0)
    for phase in ("building the model", "opening the data"):
        patient.dog.enter_phase(phase)
    hung.dog.enter_phase("building the model")
    said = hung.wait()
    assert (
        "hung before the first step (building the model): rank 1 holds the others up: rank 1 in "
        in said
    )
    assert patient.codes == []


def test_a_rank_that_was_asked_leaves_as_well(tmp_path: Path) -> None:
    store = dist.HashStore()
    watched = Watched(tmp_path, 0, store, timeout=600.0)
    watched.dog._patience = lambda: 0.0  # type: ignore[method-assign]
    store.set(module.ASKED, "1")
    with watched.dog:
        # And the exception that follows a lost peer does not come first.
        assert watched.dog._leaving.wait(60)
    said = watched.wait()
    assert module.ask(store, 0, 1.0) is not None and (tmp_path / "hang_rank_00000.txt").exists()
    # Its collectives explain the hang as much as those of the rank that asked: they are written
    # down, once.
    assert said.count("rank 0: no collectives are recorded") == 1
    assert (tmp_path / "hang_rank_00000.collectives.json").exists()
    watched.dog._dump_flight_recorder(0)
    assert "\n".join(watched.said) == said


def test_the_second_thread_that_would_dump_the_flight_recorder_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end the process, and the record with it, if both ranks time out together."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 60.0)
    writes, may_end = threading.Event(), threading.Event()

    def slow_dump(path: Path) -> str:
        writes.set()
        may_end.wait(60)
        path.write_text("{}")
        return "written"

    monkeypatch.setattr(module, "dump_flight_recorder", slow_dump)
    watched = Watched(tmp_path, timeout=600.0)
    first, second = (
        threading.Thread(target=watched.dog._dump_flight_recorder, args=(0,)) for _ in range(2)
    )
    first.start()
    assert writes.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_end.set()
    second.join(60)
    assert (tmp_path / "hang_rank_00000.collectives.json").exists()
    first.join(60)
    assert watched.said == ["rank 0: written"]
    watched.dog.stop()


def test_signs_of_life_keep_the_watchdog_quiet_and_the_last_one_is_said(tmp_path: Path) -> None:
    watched = Watched(tmp_path, timeout=600.0)
    watched.dog.step_done(8)
    watched.dog._last_sign_of_life = 0.0
    watched.dog.progress("saving step 8")
    assert watched.dog._last_sign_of_life > 0.0
    assert watched.dog._answer()["progress"] == "at step 9 (saving step 8)"
    watched.dog.step_done(9)
    assert watched.dog._answer()["progress"] == "at step 10"
    watched.dog.stop()


def test_a_phase_may_ask_for_more_time_and_a_step_is_back_at_the_time_out(tmp_path: Path) -> None:
    watched = Watched(tmp_path, timeout=600.0)
    bounds = []
    watched.dog.enter_phase("loading the checkpoint", at_least_seconds=1800.0)
    bounds.append(watched.dog._allowed_seconds)
    watched.dog.enter_phase("preparing the first step")
    bounds.append(watched.dog._allowed_seconds)
    watched.dog.enter_phase("loading", at_least_seconds=5.0)
    bounds.append(watched.dog._allowed_seconds)
    watched.dog.step_done(0)
    assert [*bounds, watched.dog._allowed_seconds] == [1800.0, 600.0, 600.0, 600.0]
    watched.dog.stop()


def test_without_a_time_out_nobody_watches(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    watched = Watched(tmp_path, 0, dist.HashStore(), timeout=None)
    watched.dog.enter_phase("building the model")
    assert set(threading.enumerate()) == before
    with watched.dog as same:
        assert same is watched.dog


def test_a_terminal_that_takes_no_text_does_not_keep_a_hung_process_alive(tmp_path: Path) -> None:
    watched = Watched(tmp_path, report=lambda text: NEVER.wait())
    assert watched.left.wait(60) and watched.codes == [77]


def test_asking_is_bounded_for_each_rank() -> None:
    asked: list[timedelta] = []

    class Store(dist.HashStore):
        def wait(self, keys: list[str], timeout: timedelta) -> None:
            asked.append(timeout)
            raise RuntimeError("timeout")

    assert module.ask(Store(), 3, 0.5) is None and asked == [timedelta(seconds=0.5)]


class HostReads(TorchFunctionMode):
    """Notes of every read by the host whether the watchdog takes it for waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[bool] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.tolist:
            self.waiting.append(module.where(sys._getframe())[1])
        return function(*args, **(kwargs or {}))


def test_a_host_that_reads_the_numbers_of_experts_tokens_waits_for_the_others() -> None:
    """On a GPU it stands there in a hang; the control is a read of this rank's own numbers."""
    dispatch = Dispatch(torch.tensor([[0, 1], [1, 2]]), 4, Axis("expert", 0, 1), layer=0)
    with HostReads() as reads:
        dispatch.to_experts(torch.ones(2, 3))
        dispatch.counts.tolist()
    assert reads.waiting == [True, False]
    assert dispatch.sizes == [1, 2, 1, 0]
