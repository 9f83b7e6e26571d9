"""What all tests share: one thread a process, no GPU unless asked for, no clock in hypothesis."""

from __future__ import annotations

import os
import random

# Before torch is imported anywhere: tests run side by side, each on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.ranks import WorkerPool

if TYPE_CHECKING:
    from tests.support.commands import Programs

settings.register_profile(
    "project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Ranks for distributed tests, started once."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture
def programs(capsys: pytest.CaptureFixture[str]) -> Programs:
    """Runs programs of the project in this process."""
    from tests.support.commands import Programs

    return Programs(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files that the tests of a module share; each run has an output folder of its own."""
    return tmp_path_factory.mktemp("runs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairs-seed",
        type=int,
        help=(
            "which rows tests/parallel/test_feature_pairs.py takes; a random seed where none "
            "is given"
        ),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Processes of one run that collect tests must collect the same rows:
    they are handed the seed of the first.
    """
    if hasattr(config, "workerinput"):
        config.option.pairs_seed = config.workerinput["pairs_seed"]
    elif config.option.pairs_seed is None:
        config.option.pairs_seed = random.randrange(10**6)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist is about to start a process."""
    node.workerinput["pairs_seed"] = node.config.option.pairs_seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"pairs of features: --pairs-seed {config.option.pairs_seed} takes the same rows again"
