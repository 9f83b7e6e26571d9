"""training.deterministic: what it asks of torch and of cuBLAS, and that a step runs under it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

from megatron_completep.launch import set_defaults
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from tests.support.configs import GPT2, small_config
from tests.telemetry.test_telemetry import batch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the variable, and with torch's settings of before when the test is over."""
    monkeypatch.setenv(CUBLAS, "")
    monkeypatch.delenv(CUBLAS)
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def losses(deterministic: bool, **model: object) -> list[float]:
    config = small_config(
        model=model, training={"deterministic": deterministic, "global_batch_size": 4}
    )
    step = assemble(config, ParallelContext.single()).step
    return [step.run([batch(config, n), batch(config, n + 9)], n).read().loss for n in (1, 2)]


@pytest.mark.usefixtures("as_before")
def test_a_run_that_asks_for_it_computes_with_algorithms_that_repeat_their_bits() -> None:
    expected = losses(False, **GPT2)
    assert not torch.are_deterministic_algorithms_enabled() and CUBLAS not in os.environ
    # Where an operator had no such algorithm, torch would raise an error.
    assert losses(True, **GPT2) == expected
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert os.environ[CUBLAS] == ":4096:8"


@pytest.mark.usefixtures("as_before")
def test_a_variable_that_the_user_has_set_keeps_its_value() -> None:
    os.environ[CUBLAS] = ":16:8"
    set_defaults({CUBLAS: ":4096:8"})
    assert os.environ[CUBLAS] == ":16:8"
