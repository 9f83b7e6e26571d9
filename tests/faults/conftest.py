"""The oracle of the fault tests: a run that nothing happened to, made once."""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from tests.faults.harness import COUNTS, final_state, losses, run, write_corpus

FAULTS = {
    1: "kill -9 at a point of a save",
    2: "save again where a partial folder stands",
    3: "kill at random times",
    4: "SIGTERM, SIGUSR1, second signal",
    5: "truncated, emptied, missing shard",
    6: "one flipped bit",
    7: "shard or folder of another step",
    8: "disk full",
    9: "unwritable output folder",
    10: "another world size or layout",
    11: "changed model, table or data",
    12: "corrupted token file",
    13: "token id out of range",
    14: "NaN gradient on one rank",
    15: "NaN at every step",
    16: "flipped bit in a replica's weights",
    17: "loss spike",
    18: "hung or stopped rank",
    19: "straggler",
    20: "malformed YAML",
    21: "hostile pickle",
    22: "path traversal, symbolic link",
    23: "two trainers on one folder",
    24: "restarts",
    25: "corrupted corpus input",
    26: "kill -9 of the launcher",
    27: "damaged snapshot, nothing else to load",
    28: "copied run beside its original",
    29: "hostile manifest with right hashes",
    30: "retention or folder that fails",
    31: "save slower than the watchdog's bound",
    32: "flipped bit in a journal or prebuilt order",
    33: "token file truncated under a run",
    34: "closed terminal",
    35: "hang that hosts the store, or before the first step",
    36: "launcher killed during imports or rendezvous",
    37: "clock set during the start",
    38: "broken launch environment",
}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Losses by step, and the step and tensors of the last checkpoint,
    of the uninterrupted run on two ranks.
    """
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


def pytest_addoption(parser):
    parser.addoption(
        "--fault-table",
        action="store_true",
        help="print a table of faults: injections, survived, silent, hung",
    )


@pytest.fixture(autouse=True)
def counted(request):
    """What the test injected goes into its report.

    A test whose damage is done to files counts as one.
    """
    COUNTS.update(injections=0, hung=0)
    yield
    request.node.user_properties.append(("counts", (max(1, COUNTS["injections"]), COUNTS["hung"])))


def pytest_terminal_summary(terminalreporter, config):
    """`make faults`: a test that fails without a hang counts as silent,
    which is the worse reading.
    """
    if not config.getoption("--fault-table", default=False):
        return
    rows = defaultdict(lambda: [0, 0, 0, 0])
    outcomes = {
        r.nodeid: r.outcome
        for kind in ("passed", "failed")
        for r in terminalreporter.stats.get(kind, [])
        if r.when == "call"
    }
    for report in (
        r
        for reports in terminalreporter.stats.values()
        for r in reports
        if getattr(r, "when", "") == "teardown"
    ):
        found = re.search(r"test_faults?_(\d+)(?:_and_(\d+))?_", report.nodeid)
        counts = dict(report.user_properties).get("counts")
        if not found or counts is None:
            continue
        injections, hung = counts
        survived = outcomes.get(report.nodeid) == "passed"
        for number in filter(None, found.groups()):
            row = rows[int(number)]
            row[0] += injections
            row[1] += injections if survived else 0
            row[2] += 0 if survived or hung else injections
            row[3] += 0 if survived or not hung else injections
    terminalreporter.write_line(
        "\n| # | fault | injections | survived | silent | hung |\n|---|---|---|---|---|---|"
    )
    for number, name in FAULTS.items():
        row = " | ".join(map(str, rows[number])) if number in rows else "not run | | | "
        terminalreporter.write_line(f"| {number} | {name} | {row} |")
