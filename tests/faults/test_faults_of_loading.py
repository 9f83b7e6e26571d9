"""Faults 5 to 7, 10, 11, 21 and 22:
a checkpoint is whole and the right one, or it is refused with the file's name.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.errors import CheckpointError
from tests.faults.harness import count_injection, losses, run

NEWEST = "step_00000006"


def newest(config: Path) -> Path:
    return config.parent / "run" / "checkpoints" / NEWEST


def whole(folder: Path) -> None:
    """Read every tensor."""
    stored = StoredCheckpoint.open(folder)
    for name in stored.manifest.parameters:
        for state in ("master", "exp_avg", "exp_avg_sq"):
            stored.tensor(name, state)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "longer"])
def test_fault_5_a_file_of_another_size_is_refused_before_the_model_is_touched(saved_run, damage):
    path = newest(saved_run) / "rank_00001_of_00002.safetensors"
    size = path.stat().st_size
    match damage:
        case "truncated":
            os.truncate(path, size - 5)
        case "emptied":
            os.truncate(path, 0)
        case "longer":
            os.truncate(path, size + 64)
        case "missing":
            path.unlink()
    expected = (
        "No such file" if damage == "missing" else f"{path.stat().st_size} bytes, expected {size}"
    )
    with pytest.raises(CheckpointError, match=f"rank_00001_of_00002.safetensors: {expected}"):
        StoredCheckpoint.open(path.parent)


def test_fault_5_the_run_stops_with_that_message_and_exit_code_2(saved_run):
    os.truncate(newest(saved_run) / "rank_00001_of_00002.safetensors", 100)
    outcome = run(saved_run)
    assert outcome.exit_codes == [2, 2] and "Traceback" not in outcome.output
    assert outcome.output.count("rank_00001_of_00002.safetensors: 100 bytes, expected") == 2


def test_fault_6_one_flipped_bit_anywhere_is_detected(saved_run):
    folder = newest(saved_run)
    whole(folder)  # the control: as it is, it is fine
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        places = {0, 7, 8, 9, 100, len(data) - 40, len(data) - 1} | set(
            range(0, len(data), len(data) // 40)
        )
        for place in sorted(places):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            count_injection()
            with pytest.raises(CheckpointError, match=path.name):
                whole(folder)
        path.write_bytes(data)
    whole(folder)


def test_fault_6_the_run_that_reads_the_flipped_bit_stops_on_all_ranks(saved_run):
    path = newest(saved_run) / "rank_00001_of_00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    outcome = run(saved_run)
    assert outcome.exit_codes == [2, 2]
    assert "rank_00001_of_00002.safetensors: damaged between bytes" in outcome.output


def test_fault_7_a_shard_of_another_step_is_detected(saved_run):
    name = "rank_00001_of_00002.safetensors"
    older = newest(saved_run).with_name("step_00000003") / name
    # The size tells nothing.
    assert older.stat().st_size == (newest(saved_run) / name).stat().st_size
    shutil.copy(older, newest(saved_run) / name)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        whole(newest(saved_run))


def test_fault_7_a_folder_under_another_steps_name_is_detected(saved_run):
    renamed = newest(saved_run).with_name("step_00000008")
    newest(saved_run).rename(renamed)
    with pytest.raises(CheckpointError, match="holds step 6, but the folder is step_00000008"):
        StoredCheckpoint.open(renamed)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["training.micro_batch_size=1"]),
        pytest.param(2, ["parallel.tensor_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.pipeline_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(
            2,
            ["parallel.optimizer_shard_size=1", "training.micro_batch_size=1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fault_10_another_layout_goes_on_with_the_same_data(saved_run, oracle, world, overrides):
    """Bit-equal state is tested in tests/checkpoint/test_layouts.py;
    here the losses that follow agree to rounding of sums.
    """
    outcome = run(saved_run, world=world, overrides=overrides)
    assert outcome.exit_codes == [0] * world, outcome.output
    expected, found = oracle[0], losses(saved_run)
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 1e-5 for step in expected)


@pytest.mark.parametrize(
    ("override", "shown", "remedy"),
    [
        ("completep.alpha=0.5", "table.alpha", "'checkpoint.allow_changed=["),
        ("completep.base_hidden_size=8", "table.width_multiplier", "'checkpoint.allow_changed=["),
        # Other tensors.
        ("model.activation=gelu", "model.activation", "checkpoint.allow_changed does not help"),
        ("data.seed=5", "data.seed", "checkpoint.allow_changed=[data.seed]"),
    ],
)
def test_fault_11_a_changed_run_is_refused_with_a_table_of_differences(
    saved_run, override, shown, remedy
):
    refused = run(saved_run, world=1, overrides=[override])
    assert refused.exit_codes == [2]
    assert "setting" in refused.output
    assert shown in refused.output
    assert "Traceback" not in refused.output
    assert remedy in refused.output


def test_fault_11_what_is_allowed_by_name_goes_on_and_says_so(saved_run):
    outcome = run(
        saved_run,
        world=1,
        overrides=[
            "data.seed=5",
            "checkpoint.allow_changed=[data.seed]",
            "optimizer.base_lr=2.0e-2",
        ],
    )
    assert outcome.exit_codes == [0], outcome.output
    assert "resuming with data.seed = 5, the checkpoint has 1234" in outcome.output
    # Step 7 of 12, half way down from the present configuration's peak.
    assert "lr 1.00e-02" in outcome.output


def test_fault_11_other_tokens_under_the_same_name_are_refused(saved_run):
    corpus = saved_run.parent / "corpus.bin"
    data = bytearray(corpus.read_bytes())
    corpus.write_bytes(data + b"\1\0" * 32)
    outcome = run(saved_run, world=1)
    assert outcome.exit_codes == [2]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {os.environ['BOMB']}",)


def test_fault_21_a_hostile_pickle_in_any_file_is_never_executed(saved_run, monkeypatch, tmp_path):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb)  # the control: it does go off
    assert (tmp_path / "exploded").exists()
    (tmp_path / "exploded").unlink()
    for name in sorted(os.listdir(newest(saved_run))):
        path = newest(saved_run) / name
        data = path.read_bytes()
        for hostile in (bomb, bomb + data[len(bomb) :]):
            path.write_bytes(hostile)
            count_injection()
            with pytest.raises(CheckpointError, match=name):
                whole(newest(saved_run))
        path.write_bytes(data)
    assert not (tmp_path / "exploded").exists()


def reseal(folder: Path, old: str, new: str) -> None:
    """Change the manifest and give it a right hash: what an attacker would do."""
    import xxhash

    data = (folder / "manifest.json").read_bytes()
    end = data.rindex(b',\n "xxh3": "')
    body = data[:end].replace(old.encode(), new.encode()) + b"\n}"
    assert old.encode() in data
    (folder / "manifest.json").write_bytes(
        body[:-2] + f',\n "xxh3": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()
    )


@pytest.mark.parametrize(
    "name",
    [
        "../step_00000003/rank_00001_of_00002.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..safetensors",
    ],
)
def test_fault_22_a_path_that_leaves_the_folder_is_refused(saved_run, name):
    reseal(newest(saved_run), "rank_00001_of_00002.safetensors", name)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
        StoredCheckpoint.open(newest(saved_run))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"consumed_samples": 24', '"consumed_samples": -5', "state.consumed_samples"),
        ('"step": 6', f'"step": {10**30}', "step"),
        ('"updates": 6.0', '"updates": NaN', "NaN is not a number"),
    ],
)
def test_fault_29_a_manifest_that_counts_wrong_is_refused_by_name(saved_run, old, new, said):
    """The hashes are right: what is refused is what they vouch for."""
    reseal(newest(saved_run), old, new)
    outcome = run(saved_run, world=1)
    assert outcome.exit_codes == [2] and "Traceback" not in outcome.output
    assert f"{NEWEST}/manifest.json: not a manifest" in outcome.output and said in outcome.output
    assert losses(saved_run).keys() == set(range(1, 7))  # nothing was trained, and nothing lost


def test_fault_22_symbolic_links_are_refused(saved_run):
    folder = newest(saved_run)
    path = folder / "rank_00001_of_00002.safetensors"
    outside = saved_run.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a symbolic link, which is not followed"):
        StoredCheckpoint.open(folder)
    path.unlink()
    os.mkfifo(path)  # must not hang either
    with pytest.raises(CheckpointError, match="not a plain file"):
        StoredCheckpoint.open(folder)


def test_sizes_and_headers_are_bounded(saved_run):
    folder = newest(saved_run)
    reseal(folder, '"block_size": 4194304', '"block_size": 99999999999')
    with pytest.raises(CheckpointError, match="block_size"):
        StoredCheckpoint.open(folder)
