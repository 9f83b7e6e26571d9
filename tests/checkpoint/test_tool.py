"""tools/checkpoint.py: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint, save
from megatron_completep.tools import checkpoint as tool
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.commands import Programs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    tiny = TinyRun(checkpointed_config(tmp_path / "run"))
    for _ in range(3):
        tiny.train(1)
        tiny.save()
    return tmp_path / "run"


def printed_object(programs: Programs, *words: object) -> dict[str, Any]:
    """The JSON object that a command prints."""
    printed = json.loads(programs.run(tool.main, *words, "--json").out)
    assert isinstance(printed, dict)
    return printed


def test_list_and_inspect(run: Path, programs: Programs) -> None:
    listed = printed_object(programs, "list", run)
    assert [row["step"] for row in listed["checkpoints"]] == [1, 2, 3]
    inspected = printed_object(programs, "inspect", run)
    assert inspected["step"] == 3 and inspected["state"]["consumed_samples"] == 12
    assert inspected["table"]["width_multiplier"] == 2.0
    parameters = inspected["parameters"]
    assert parameters["embedding.weight"]["shape"] == [61, 16]
    sizes = [torch.Size(parameter["shape"]).numel() for parameter in parameters.values()]
    assert inspected["elements"] == sum(sizes)
    assert "layers.1.mlp.down.weight" in programs.output(tool.main, "inspect", run)


def test_verify_names_the_damaged_file_and_exits_1(run: Path, programs: Programs) -> None:
    assert programs.run(tool.main, "verify", run).code == 0
    path = run / "checkpoints" / "step_00000003" / "rank_00000_of_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ended = programs.run(tool.main, "verify", run)
    assert ended.code == 1 and str(path) in ended.out and "damaged" in ended.out
    second = run / "checkpoints" / "step_00000002"
    (second / "stray").touch()
    ended = programs.run(tool.main, "verify", second)
    assert ended.code == 1 and "stray: does not belong" in ended.out


def test_diff_shows_settings_and_tensors(run: Path, programs: Programs) -> None:
    checkpoints = run / "checkpoints"
    assert programs.run(tool.main, "diff", run, checkpoints / "step_00000003").code == 0
    ended = programs.run(tool.main, "diff", checkpoints / "step_00000002", run, "--json")
    printed = json.loads(ended.out)
    assert ended.code == 1
    assert {"path": "state.step", "stored": 2, "present": 3} in printed["settings"]
    largest = {row["tensor"]: row["largest_difference"] for row in printed["tensors"]}
    before, after = (
        StoredCheckpoint.open(checkpoints / f"step_0000000{step}").tensor("embedding.weight")
        for step in (2, 3)
    )
    expected = (before.double() - after.double()).abs().max().item()
    assert largest["master/embedding.weight"] == expected > 0


@pytest.mark.parametrize("files", [1, 3])
def test_reshard_keeps_every_bit(run: Path, tmp_path: Path, programs: Programs, files: int) -> None:
    output = tmp_path / "again"
    programs.output(tool.main, "reshard", run, "--files", files, "--output", output)
    assert len(list((output / "step_00000003").glob("part_*.safetensors"))) == files
    assert programs.run(tool.main, "diff", run, output / "step_00000003").code == 0
    refused = programs.run(tool.main, "reshard", run, "--output", output)
    assert refused.code == 2 and "exists" in refused.err


def test_prune_keeps_the_newest(run: Path, programs: Programs) -> None:
    text = programs.output(tool.main, "prune", run, "--keep", 1, "--dry-run")
    assert text.count("would remove") == 2 and len(list((run / "checkpoints").iterdir())) == 3
    programs.output(tool.main, "prune", run, "--keep", 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, programs: Programs) -> None:
    refused = programs.run(tool.main, "list", tmp_path)
    assert refused.code == 2 and "no checkpoints" in refused.err


@pytest.mark.parametrize("command", tool.EXAMPLES)
def test_every_command_has_help_with_an_example_that_parses(
    command: str, programs: Programs
) -> None:
    example = f"python tools/checkpoint.py {tool.EXAMPLES[command][1]}"
    assert example in programs.output(tool.main, command, "--help")
    assert tool.parse_arguments(example.split()[2:]).command == command


@pytest.mark.parametrize("command", ["list", "inspect", "verify", "prune"])
def test_every_command_prints_one_json_object(run: Path, programs: Programs, command: str) -> None:
    more = ["--keep", 1] if command == "prune" else []
    assert printed_object(programs, command, run, *more)


def test_prune_keeps_every_mth(run: Path, programs: Programs) -> None:
    programs.output(tool.main, "prune", run, "--keep", 1, "--keep-every", 2)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "x", "--keep", "0"],
        ["prune", "x", "--keep", "two"],
        ["reshard", "x", "--files", "0", "--output", "y"],
    ],
)
def test_numbers_below_one_are_refused(programs: Programs, arguments: list[str]) -> None:
    refused = programs.run(tool.main, *arguments)
    assert refused.code == 2 and "give a whole number from 1 to" in refused.err


def test_reshard_needs_room_and_leaves_nothing_when_there_is_none(
    run: Path, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    refused = programs.run(tool.main, "reshard", run, "--output", tmp_path / "again")
    message = (
        r"a checkpoint needs [\d.]+ \wB \(including a reserve of 16\.8 MB\), but only 1\.0 kB are "
        "free"
    )
    assert refused.code == 2 and re.search(message, refused.err)
    assert not list((tmp_path / "again").iterdir())


def test_a_file_where_the_output_should_be_is_an_error(
    run: Path, tmp_path: Path, programs: Programs
) -> None:
    (tmp_path / "again").write_text("")
    refused = programs.run(tool.main, "reshard", run, "--output", tmp_path / "again")
    assert refused.code == 2 and "is a file, but a folder is to be written" in refused.err
