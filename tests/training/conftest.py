"""What the tests of training share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files that the tests of a module share; each run has an output folder of its own."""
    return tmp_path_factory.mktemp("runs")
