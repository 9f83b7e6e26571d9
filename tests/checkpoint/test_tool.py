"""tools/checkpoint.py: what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint, save
from megatron_completep.errors import CheckpointError, UserError
from megatron_completep.tools import checkpoint as tool
from tests.support.checkpoints import TinyRun, tiny_config


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 1, 2 and 3."""
    tiny = TinyRun(tiny_config(tmp_path / "run"))
    for _ in range(3):
        tiny.train(1)
        tiny.save()
    return tmp_path / "run"


def call(monkeypatch, capsys, *arguments: object) -> tuple[int | None, str]:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    code = tool.main()
    return code, capsys.readouterr().out


def test_list_and_inspect(run, monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "list", run, "--json")
    assert code == 0 and [row["step"] for row in json.loads(text)["checkpoints"]] == [1, 2, 3]
    code, text = call(monkeypatch, capsys, "inspect", run, "--json")
    value = json.loads(text)
    assert code == 0 and value["step"] == 3 and value["state"]["consumed_samples"] == 12
    assert value["table"]["width_multiplier"] == 2.0 and value["parameters"]["embedding.weight"][
        "shape"
    ] == [61, 16]
    assert value["elements"] == sum(
        torch.Size(p["shape"]).numel() for p in value["parameters"].values()
    )
    assert "layers.1.mlp.down.weight" in call(monkeypatch, capsys, "inspect", run)[1]


def test_verify_names_the_damaged_file_and_exits_1(run, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "verify", run)[0] == 0
    path = run / "checkpoints" / "step_00000003" / "rank_00000_of_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, text = call(monkeypatch, capsys, "verify", run)
    assert code == 1 and str(path) in text and "damaged" in text
    (run / "checkpoints" / "step_00000002" / "stray").touch()
    code, text = call(monkeypatch, capsys, "verify", run / "checkpoints" / "step_00000002")
    assert code == 1 and "stray: does not belong" in text


def test_diff_shows_settings_and_tensors(run, monkeypatch, capsys):
    checkpoints = run / "checkpoints"
    assert call(monkeypatch, capsys, "diff", run, checkpoints / "step_00000003")[0] == 0
    code, text = call(monkeypatch, capsys, "diff", checkpoints / "step_00000002", run, "--json")
    value = json.loads(text)
    assert code == 1 and {"path": "state.step", "stored": 2, "present": 3} in value["settings"]
    largest = {row["tensor"]: row["largest_difference"] for row in value["tensors"]}
    name = "master/embedding.weight"
    stored = [
        StoredCheckpoint.open(checkpoints / f"step_0000000{step}").tensor("embedding.weight")
        for step in (2, 3)
    ]
    assert largest[name] == (stored[0].double() - stored[1].double()).abs().max().item() > 0


@pytest.mark.parametrize("files", [1, 3])
def test_reshard_keeps_every_bit(run, tmp_path, monkeypatch, capsys, files):
    output = tmp_path / "again"
    code, _ = call(monkeypatch, capsys, "reshard", run, "--files", files, "--output", output)
    assert code == 0 and len(list((output / "step_00000003").glob("part_*.safetensors"))) == files
    assert call(monkeypatch, capsys, "diff", run, output / "step_00000003")[0] == 0
    with pytest.raises(CheckpointError, match="exists"):
        call(monkeypatch, capsys, "reshard", run, "--output", output)


def test_prune_keeps_the_newest(run, monkeypatch, capsys):
    _, text = call(monkeypatch, capsys, "prune", run, "--keep", 1, "--dry-run")
    assert text.count("would remove") == 2 and len(list((run / "checkpoints").iterdir())) == 3
    call(monkeypatch, capsys, "prune", run, "--keep", 1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_folder_without_checkpoints_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match="no checkpoints"):
        call(monkeypatch, capsys, "list", tmp_path)


@pytest.mark.parametrize("command", tool.EXAMPLES)
def test_every_command_has_help_with_an_example_that_parses(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", command, "--help"])
    with pytest.raises(SystemExit) as left:
        tool.main()
    example = f"python tools/checkpoint.py {tool.EXAMPLES[command][1]}"
    assert left.value.code == 0 and example in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", example.split()[1:])
    assert tool.parse_arguments().command == command


@pytest.mark.parametrize("command", ["list", "inspect", "verify", "prune"])
def test_every_command_prints_one_json_object(run, monkeypatch, capsys, command):
    more = ["--keep", 1] if command == "prune" else []
    code, text = call(monkeypatch, capsys, command, run, "--json", *more)
    assert code == 0 and isinstance(json.loads(text), dict)


def test_prune_keeps_every_mth(run, monkeypatch, capsys):
    call(monkeypatch, capsys, "prune", run, "--keep", 1, "--keep-every", 2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000003",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "x", "--keep", "0"],
        ["prune", "x", "--keep", "two"],
        ["reshard", "x", "--files", "0", "--output", "y"],
    ],
)
def test_numbers_below_one_are_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *arguments])
    with pytest.raises(SystemExit) as left:
        tool.main()
    assert left.value.code == 2 and "give a whole number from 1 to" in capsys.readouterr().err


def test_reshard_needs_room_and_leaves_nothing_when_there_is_none(
    run, tmp_path, monkeypatch, capsys
):
    usage = save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError,
        match=r"a checkpoint needs [\d.]+ \wB \(16.8 MB of it a reserve\), 1\.0 kB are free",
    ):
        call(monkeypatch, capsys, "reshard", run, "--output", tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


def test_a_file_where_the_output_should_be_is_an_error(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "again").write_text("")
    with pytest.raises(UserError, match="is a file, but a folder is to be written"):
        call(monkeypatch, capsys, "reshard", run, "--output", tmp_path / "again")
