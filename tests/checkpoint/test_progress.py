"""A slow save is not a hang: what gets on is told to whoever watches the steps,
and only while training waits for it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_completep.checkpoint import files
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.guards import watchdog
from megatron_completep.guards.watchdog import Watchdog
from megatron_completep.launch import Launch
from megatron_completep.parallel.exchange import Exchange, LongWork
from tests.checkpoint.stored_files import use_small_blocks
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.ranks import context_on

GENEROUS = 120.0  # seconds that a test waits for an event before it fails


@pytest.fixture
def small_blocks(monkeypatch):
    use_small_blocks(monkeypatch)


def blocks_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) for path in folder.glob("*.safetensors"))


def test_every_block_of_a_save_that_training_waits_for_is_heard_of(tmp_path, small_blocks):
    heard: list[int] = []
    tiny = TinyRun(checkpointed_config(tmp_path), heartbeat=lambda: heard.append(1))
    tiny.train(1)
    assert not heard
    tiny.save()
    assert len(heard) >= blocks_of(tmp_path / "checkpoints" / "step_00000001") > 5
    before = len(heard)
    tiny.train(1)
    assert len(heard) == before


def test_a_save_in_the_background_is_heard_of_only_while_training_waits_for_it(
    tmp_path, small_blocks
):
    """Else it would hide a hang of training itself."""
    heard: list[str] = []
    half_way, go_on, on_disk = threading.Event(), threading.Event(), threading.Event()

    def fail_point(name: str) -> None:
        if name == "save.values_half_written" and not half_way.is_set():
            half_way.set()
            assert go_on.wait(GENEROUS)
        if name == "save.committed":
            on_disk.set()

    config = checkpointed_config(tmp_path, checkpoint={"async_save": True})
    tiny = TinyRun(config, fail_point=fail_point, heartbeat=lambda: heard.append("here"))
    tiny.train(1)
    tiny.save()
    assert half_way.wait(GENEROUS)
    tiny.train(1)
    assert heard == []  # training goes on, and nobody need be told

    def when_training_waits() -> None:
        while not tiny.checkpointer._training_waits:
            pass
        go_on.set()

    helper = threading.Thread(target=when_training_waits)
    helper.start()
    tiny.save()  # the next one is due, and waits for the one before
    helper.join()
    assert len(heard) > 3
    tiny.checkpointer.close()


def test_a_load_in_the_middle_of_a_run_is_heard_of(tmp_path, small_blocks):
    heard: list[int] = []
    tiny = TinyRun(checkpointed_config(tmp_path), heartbeat=lambda: heard.append(1))
    for _ in range(2):
        tiny.train(1)
        tiny.save()
    heard.clear()
    tiny.checkpointer.go_back(1)
    # Once a round of at most 8 blocks.
    assert len(heard) >= blocks_of(tmp_path / "checkpoints" / "step_00000001") / 8 > 1


def unequal_work(rank: int, pieces: tuple[int, ...]) -> tuple[list[str], int]:
    heard: list[int] = []
    context = context_on(rank, ParallelConfig())
    work = LongWork(Exchange(context, 1.0), 0.0, lambda: heard.append(1))
    for _ in range(pieces[rank]):
        work.goes_on()
    return work.gather_results(f"rank {rank}"), len(heard)


def test_a_rank_that_is_done_hears_that_the_others_get_on(pool):
    """Every piece of the slow rank's work is a round here;
    the fast one waits through them and ends with it.
    """
    results = pool.run(2, unequal_work, (7, 0))
    assert [told for told, _ in results] == [["rank 0", "rank 1"]] * 2
    assert [heard for _, heard in results] == [8, 8]
    # The control: nobody worked.
    assert [heard for _, heard in pool.run(2, unequal_work, (0, 0))] == [1, 1]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The watchdog's time, which a test moves, and how often it was looked at."""
    clock = SimpleNamespace(now=1000.0, looks=0, looked=threading.Condition())

    def monotonic() -> float:
        with clock.looked:
            clock.looks += 1
            clock.looked.notify_all()
        return clock.now

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=monotonic))
    return clock


def wait_for_looks(clock: SimpleNamespace, count: int) -> None:
    with clock.looked:
        until = clock.looks + count
        assert clock.looked.wait_for(lambda: clock.looks >= until, GENEROUS)


def test_the_watchdog_counts_from_the_last_progress_and_ends_what_makes_none(tmp_path, clock):
    left: list[int] = []
    gone = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        gone.set()

    dog = Watchdog(Launch(), tmp_path, 0.2, None, lambda text: None, leave)
    dog.enter_phase("reading", at_least_seconds=20.0)
    clock.now += 10.0  # a phase of the start has the time that it asked for
    wait_for_looks(clock, 3)
    assert not left
    dog.step_done(6)
    for _ in range(5):
        clock.now += 0.15
        dog.heartbeat()
    wait_for_looks(clock, 3)
    assert not left  # 0.75 s without a step, but with progress
    clock.now += 0.3
    assert gone.wait(GENEROUS) and left == [77]
    dog.stop()


def test_the_disk_really_takes_what_is_reported_as_progress(tmp_path, monkeypatch):
    """Handing bytes to the system may only fill memory:
    after every SYNC_BYTES the disk has them, so that the last wait is short.
    """
    synced: list[int] = []
    monkeypatch.setattr(files, "SYNC_BYTES", 3 * 4096)
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(files.os, "fdatasync", lambda descriptor: synced.append(descriptor))
    tiny = TinyRun(checkpointed_config(tmp_path))
    tiny.save()
    (path,) = (tmp_path / "checkpoints" / "step_00000000").glob("*.safetensors")
    assert len(synced) == path.stat().st_size // (3 * 4096)
