"""The oracle of the fault tests: a run that nothing happened to, made once."""

import shutil
from pathlib import Path

import pytest
from harness import final_state, losses, run, write_corpus


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Losses by step, and the step and tensors of the last checkpoint, of the uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("oracle")
    config = write_corpus(folder)
    outcome = run(config)
    assert outcome.exit_codes == [0, 0], outcome.output
    return losses(config), final_state(config)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a run in a folder of its own."""
    return write_corpus(tmp_path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a run that was saved at step 6; copied by `saved_run`."""
    folder = tmp_path_factory.mktemp("saved")
    config = write_corpus(folder)
    outcome = run(config, overrides=["training.stop_at_step=6"])
    assert outcome.exit_codes == [0, 0], outcome.output
    return folder


@pytest.fixture
def saved_run(saved, tmp_path) -> Path:
    """The configuration of a run that was saved at steps 3 and 6."""
    shutil.copytree(saved / "run", tmp_path / "run")
    return write_corpus(tmp_path)
