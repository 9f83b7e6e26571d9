"""Signals by a clock of the test's own: what is heard, when, and what follows."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_completep.run.signals import StopSignals


class Listener:
    """Signals with a clock that stands,
    and instead of the end of the process a list of exit codes.
    """

    def __init__(self, **settings: Any) -> None:
        self.time, self.codes, self.said = 1000.0, list[int](), list[str]()
        self.heard = threading.Semaphore(0)
        self.signals = StopSignals(self._say, now=lambda: self.time, leave=self._leave, **settings)

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.heard.release()

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.heard.release()

    def send(self, number: int, answers: int = 1) -> None:
        """To this process; returns when so many lines and exits have followed."""
        os.kill(os.getpid(), number)
        for _ in range(answers):
            assert self.heard.acquire(timeout=60)


@pytest.fixture(autouse=True)
def hangup_is_not_ignored() -> Iterator[None]:
    """As without nohup, however these tests were started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("number", ALL)
def test_in_training_a_signal_asks_for_a_stop_and_a_later_second_one_leaves(
    number: signal.Signals,
) -> None:
    listener = Listener()
    with listener.signals as signals:
        signals.begin()
        assert not signals.asked
        listener.send(number)
        assert signals.asked
        assert listener.said == [
            f"{number.name}: saving after this step, then leaving; once more leaves at once"
        ]
        listener.time += 1.9  # an echo
        signals._hear(number)
        assert listener.codes == []
        listener.time += 0.2
        listener.send(signal.SIGTERM)
    assert listener.codes == [128 + signal.SIGTERM] and len(listener.said) == 1


def test_a_terminal_that_closes_while_the_run_saves_does_not_end_it() -> None:
    listener = Listener()
    with listener.signals as signals:
        signals.begin()
        listener.send(signal.SIGINT)
        listener.time += 3600
        signals._hear(signal.SIGHUP)
        assert listener.codes == []
        listener.send(signal.SIGINT)
    assert listener.codes == [128 + signal.SIGINT]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_before_training_there_is_nothing_to_save_and_a_signal_leaves_with_the_code_of_a_requeue(
    number: signal.Signals,
) -> None:
    listener = Listener()
    with listener.signals as signals:
        listener.send(number, answers=2)
        assert not signals.asked  # it is not a stop after a step
    assert listener.codes == [75]
    assert listener.said == [
        f"{number.name} before the first step: there is nothing new to save; leaving"
    ]


def test_before_training_ctrl_c_is_an_exception_as_ever() -> None:
    listener = Listener()
    with pytest.raises(KeyboardInterrupt), listener.signals:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)
    assert listener.codes == []


def test_before_training_ctrl_c_ends_a_process_that_cannot_hear_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StopSignals, "GRACE", 0.01)
    # As where the main thread waits inside a collective.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    listener = Listener()
    try:
        with listener.signals:
            listener.send(signal.SIGINT, answers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert listener.codes == [130]
    assert listener.said == [
        "interrupted before the first step: nothing was trained, nothing is lost"
    ]


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_nohup_is_respected_but_not_by_torchruns_workers(by_torchrun: bool) -> None:
    """torchrun takes SIGHUP whatever it inherited, hands it on,
    and ends with SIGKILL whoever does not leave.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listener = Listener(by_torchrun=by_torchrun)
    with listener.signals as signals:
        signals.begin()
        os.kill(os.getpid(), signal.SIGHUP)
        listener.send(signal.SIGUSR1, answers=0 if by_torchrun else 1)
        assert listener.heard.acquire(timeout=60) if by_torchrun else True
        assert listener.said[0].startswith("SIGHUP" if by_torchrun else "SIGUSR1") and signals.asked
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in ALL]
    with Listener().signals as signals:
        signals.begin()
        assert all(signal.getsignal(number) != old for number, old in zip(ALL, before, strict=True))
    assert [signal.getsignal(number) for number in ALL] == before


def test_the_time_to_leave_goes_by_the_clock_that_is_handed_in() -> None:
    listener = Listener(exit_after_minutes=1.0, elapsed_seconds=30.0)
    assert not listener.signals.asked
    listener.time += 29.9
    assert not listener.signals.asked
    listener.time += 0.2
    assert listener.signals.asked and listener.signals.asked
    assert listener.said == [
        "training.exit_after_minutes: the time is up; saving after this step, then leaving"
    ]
