"""Files made to do harm: each is refused with its name and one message,
at once, and nothing outside the folder is touched.

Whoever writes such files can give them right hashes, so these tests do, too.
"""

from __future__ import annotations

import ast
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

import megatron_completep
from megatron_completep.checkpoint import StoredCheckpoint, files, manifest
from megatron_completep.checkpoint.examine import verify_checkpoint
from megatron_completep.checkpoint.manifest import MANIFEST
from megatron_completep.errors import CheckpointError
from tests.checkpoint.stored_files import change_manifest, write_manifest
from tests.support.checkpoints import TinyRun, checkpointed_config

NAME = "rank_00000_of_00001.safetensors"


@pytest.fixture
def saved(tmp_path) -> tuple[TinyRun, Path]:
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    return run, tmp_path / "checkpoints" / "step_00000001"


def write_header(folder: Path, header: bytes, length: int | None = None, more: bytes = b"") -> None:
    """Another header in front of the same values (and more),
    and a manifest with the right size and hashes of it.
    """
    data = (folder / NAME).read_bytes()
    (old,) = struct.unpack("<Q", data[:8])
    header += b" " * (-(len(header) + 8) % 64)
    data = (
        struct.pack("<Q", len(header) if length is None else length)
        + header
        + data[8 + old :]
        + more
    )
    (folder / NAME).write_bytes(data)
    blocks = [
        xxhash.xxh3_64_hexdigest(data[i : i + files.BLOCK_SIZE])
        for i in range(0, len(data), files.BLOCK_SIZE)
    ]
    change_manifest(folder, {"files": [{"name": NAME, "size": len(data), "blocks": blocks}]})


def header_of(folder: Path) -> dict[str, Any]:
    data = (folder / NAME).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def refused(saved: tuple[TinyRun, Path], said: str) -> None:
    """By everything that reads it: the run that resumes, and the tool."""
    run, folder = saved
    with pytest.raises(CheckpointError, match=said):
        TinyRun(run.config).resume()
    assert verify_checkpoint(folder)


def test_the_changes_themselves_are_not_what_is_refused(saved):
    """The control: rewritten with right hashes and nothing hostile in them,
    manifest and header are read.
    """
    run, folder = saved
    change_manifest(folder, {})
    write_header(folder, json.dumps(header_of(folder)).encode())
    assert TinyRun(run.config).resume() and not verify_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"name": "../x.safetensors", "size": 1, "blocks": ["0" * 16]}]},
        {"files": [{"name": "x/../../x.safetensors", "size": 1, "blocks": ["0" * 16]}]},
        {"files": [{"name": "/etc/passwd", "size": 1, "blocks": ["0" * 16]}]},
        {"files": [{"name": f"{NAME}\0.safetensors", "size": 1, "blocks": ["0" * 16]}]},
        {"files": [{"name": f"x\n{NAME}", "size": 1, "blocks": ["0" * 16]}]},
        {"block_size": 1},
        {"block_size": 1 << 30},
        {"block_size": 4097},
        {"step": -1},
        {"step": "1"},
        {"step": 10**30, "state": {"step": 10**30, "consumed_samples": 4, "tokens": 32}},
        {"step": 1.5},
        {"step": 2},  # neither its state's nor the folder's
        {"state": {"step": 2, "consumed_samples": 4, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": -5, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": 4.5, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": 10**30, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": True, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": None, "tokens": 32}},
        {"state": {"step": 1, "consumed_samples": 4, "tokens": -1}},
        {"state": {"step": 1, "consumed_samples": 4}},
        {"state": {"step": 1, "evil": 2}},
        {"updates": "1e400"},
        {"updates": -1.0},
        {"updates": 0.5},
        {"updates": 2.0},  # more than steps
        {"updates": float("nan")},
        {"updates": float("inf")},
        {"table": {"alpha": float("nan")}},
        {"elements": 0},
        {
            "parameters": {
                "\x1b[2Jgone": {
                    "role": "embedding",
                    "width_ratio": 1.0,
                    "shape": [1],
                    "dtype": "F32",
                }
            }
        },
        {
            "parameters": {
                "w": {"role": "embedding", "width_ratio": 1.0, "shape": [-4], "dtype": "F32"}
            }
        },
        {
            "parameters": {
                "w": {"role": "embedding", "width_ratio": 1.0, "shape": [1] * 50, "dtype": "F32"}
            }
        },
        {
            "parameters": {
                "w": {"role": "embedding", "width_ratio": 1.0, "shape": [1], "dtype": "O"}
            }
        },
        {"unknown": 1},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items()))))[:60],
)
def test_a_manifest_with_values_that_are_none_is_refused(saved, change):
    change_manifest(saved[1], change)
    refused(saved, r"manifest\.json: not a manifest that this version reads")


def test_a_folder_that_is_named_for_another_step_is_refused(saved):
    """The step of a checkpoint is in its name, its manifest and its state: all three."""
    run, folder = saved
    other = folder.with_name("step_00000007")
    folder.rename(other)
    with pytest.raises(
        CheckpointError, match=r"holds step 1, but the folder is step_00000007\. Rename it back"
    ):
        TinyRun(run.config).resume()
    huge = folder.with_name(f"step_{10**30}")
    other.rename(huge)
    change_manifest(
        huge, {"step": 10**30, "state": {"step": 10**30, "consumed_samples": 4, "tokens": 32}}
    )
    refused(
        (run, huge), r"step: Input should be less than or equal to 9007199254740992, found 1000000"
    )


def test_a_count_of_elements_that_is_not_the_parameters_is_refused(saved):
    change_manifest(saved[1], {"elements": 10**15})
    refused(saved, "the manifest counts 1000000000000000 elements, its parameters have ")


@pytest.mark.parametrize(
    "change",
    [
        {
            "parameters": {
                "w": {
                    "role": "embedding",
                    "width_ratio": 1.0,
                    "shape": [1 << 60, 1 << 60],
                    "dtype": "F32",
                }
            }
        },
        {
            "parameters": {
                "w": {"role": "embedding", "width_ratio": 1.0, "shape": [], "dtype": "F32"}
            }
        },
    ],
    ids=["enormous", "no dimensions"],
)
def test_shapes_that_no_file_holds_are_refused_before_memory_is_asked_for(saved, change):
    change_manifest(saved[1], change)
    with pytest.raises(CheckpointError, match="tensors are not whole"):
        StoredCheckpoint.open(saved[1])


@pytest.mark.parametrize("change", [{"rng": {}}, {"rng": {"python": [3, "AAAA", None]}}])
def test_generators_that_are_none_are_refused(saved, change):
    change_manifest(saved[1], change)
    with pytest.raises(
        CheckpointError, match="the manifest of step 1 holds no state that this version reads"
    ):
        TinyRun(saved[0].config).resume()


def test_a_manifest_that_is_too_deep_too_long_or_no_text_is_refused(saved):
    _, folder = saved
    write_manifest(folder, b'{"state": ' + b"[" * 100_000 + b"]" * 100_000 + b"\n}")
    refused(saved, r"manifest\.json: not a manifest")
    write_manifest(folder, b'{"state": "\xff\xfe"\n}')
    refused(saved, r"manifest\.json: not a manifest")
    with open(folder / MANIFEST, "wb") as file:
        # Takes no room on the disk, and would take a lot of memory.
        file.truncate(manifest.MAX_BYTES + 1)
    refused(
        saved,
        (
            rf"{manifest.MAX_BYTES + 1} bytes, more than the {manifest.MAX_BYTES} that such a "
            r"file may have"
        ),
    )


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 1 << 63),
        (b"{}", 200 << 20),
        (b"{}", 0),
        (b"[" * 100_000, None),
        (b'{"a": ' * 50_000, None),
        (b"[]", None),
        (b"null", None),
        (b'{"master/w@0": null}', None),
        (b'{"master/w@0": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', None),
        (b'{"master/w@0": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', None),
        (b'{"master/w@-1": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
        (b'{"master/w@0": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', None),
        (b'{"master/w@0": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}', None),
        (
            (
                b'{"master/w@0": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": '
                b"[0, 18446744073709551616]}}"
            ),
            None,
        ),
        (b'{"master/w@0,0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
        (b'{"no key": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
        (b'{"master/w@0": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', None),
        (b"\xff" * 100, None),
        (
            b'{"master/w@'
            + b"9" * 5000
            + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            None,
        ),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(saved, header, length):
    write_header(saved[1], header, length)
    refused(saved, rf"{NAME}: not a tensor file of a checkpoint")


@pytest.mark.parametrize(
    "damage", ["twice", "overlapping", "of another shape", "unlisted", "of more dimensions"]
)
def test_boxes_that_do_not_make_up_the_tensors_are_refused(saved, damage):
    _, folder = saved
    header = header_of(folder)
    key = "master/layers.0.mlp.down.weight@0,0"
    begin, end = header[key]["data_offsets"]
    last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    behind = {**header[key], "data_offsets": [last, last + end - begin]}
    more = b""
    match damage:
        case "twice":
            header["master/layers.0.mlp.down.weight@00,0"], more = behind, bytes(end - begin)
        case "overlapping":
            header["master/layers.0.mlp.down.weight@1,0"] = header.pop(key)
        case "of another shape":
            header[key]["shape"] = header[key]["shape"][::-1]
        case "unlisted":
            header["master/evil@0,0"], more = behind, bytes(end - begin)
        case "of more dimensions":
            header[f"{key},0"] = {**header.pop(key), "shape": [*header_of(folder)[key]["shape"], 1]}
    write_header(folder, json.dumps(header).encode(), more=more)
    refused(saved, "tensors are not whole")


@pytest.mark.parametrize("damage", ["shared", "shifted", "crossed", "gap", "behind the last"])
def test_bytes_that_belong_to_two_tensors_or_to_none_are_refused(saved, damage):
    """Keys, shapes and sizes are right in each: only where the values lie is not."""
    _, folder = saved
    header, more = header_of(folder), b""
    first, second = (
        header[f"{state}/layers.0.mlp.down.weight@0,0"]["data_offsets"]
        for state in ("master", "exp_avg_sq")
    )
    match damage:
        case "shared":
            second[:] = first
        case "shifted":
            first[:] = [first[0] - 4, first[1] - 4]
        case "crossed":
            first[:] = [first[0] + 64, first[1] + 64]
        case "gap":
            more = bytes(second[1] - second[0])
            last = max(
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            )
            second[:] = [last, last + len(more)]
        case "behind the last":
            more = bytes(64)
    write_header(folder, json.dumps(header).encode(), more=more)
    refused(saved, rf"{NAME}: not a tensor file of a checkpoint: .*(another tensor's|no tensor's)")


def test_links_lead_nowhere(saved, tmp_path):
    """Whatever in a run's folder is a symbolic link:
    not followed, not removed, not written through.
    """
    run, folder = saved
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    checkpoints = folder.parent
    os.symlink(outside, checkpoints / ".step_00000005.deadbeef")
    os.symlink(outside, checkpoints / ".removing.step_00000005")
    os.symlink(folder, checkpoints / "step_00000009")
    again = TinyRun(run.config)  # cleans up what interrupted saves left
    assert again.resume() and again.state.step == 1  # a linked folder is no checkpoint
    (folder / MANIFEST).rename(outside / MANIFEST)
    os.symlink(outside / MANIFEST, folder / MANIFEST)
    refused(saved, "is a symbolic link, which is not followed")
    assert (outside / "precious").read_text() == "precious" and len(os.listdir(outside)) == 2


@pytest.mark.parametrize(
    "content",
    [
        "../../elsewhere0",
        "0" * 65,
        "0123456789abcdeg",
        "{}",
        '{"number": "../../elsewhere0", "folder": "", "came_from": [], "earlier": []}',
    ],
)
def test_a_runs_number_cannot_lead_snapshots_elsewhere(tmp_path, content):
    config = checkpointed_config(
        tmp_path / "run", checkpoint={"local_dir": str(tmp_path / "node"), "local_interval": 1}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run_id").write_text(content)
    with pytest.raises(CheckpointError, match=r"\.run_id: "):
        TinyRun(config)
    (tmp_path / "run" / ".run_id").unlink()
    os.symlink(tmp_path / "written through", tmp_path / "run" / ".run_id")
    with pytest.raises(CheckpointError, match=r"\.run_id: not a plain file"):
        TinyRun(config)
    assert not (tmp_path / "written through").exists()


def test_nothing_in_the_package_can_execute_what_it_reads():
    """No unpickling anywhere: neither the modules,
    nor the functions of torch, numpy and yaml that do it.
    """
    forbidden = re.compile(
        r"\b(import|from) "
        r"(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b|torch\.load\(|allow_pickle=True|"
        r"yaml\.(load|unsafe_load|full_load)\(|trust_remote_code=True|FileSystemReader|weights_only=False"
    )
    # The control.
    assert forbidden.search("import pickle") and forbidden.search("x = torch.load(path)")
    root = Path(megatron_completep.__file__).parent
    for path in [
        *root.rglob("*.py"),
        *(root / "kernels").rglob("*.py"),
        *(root / "tools").rglob("*.py"),
    ]:
        text = path.read_text()
        assert not forbidden.search(text), f"{path}: {forbidden.search(text)}"
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, path
