"""Fault 25: corpus input that cannot be read is counted and named by file and line,
and nothing half-built looks whole.

Faults 32 and 33: what is read back beside a corpus, or changes under a run, is noticed.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_completep.config import load_config
from megatron_completep.config.derived import total_samples
from megatron_completep.data.corpus import prebuild
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.errors import DataError
from tests.faults.harness import count_injection, run, start, write_corpus

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
GOOD = b'{"text": "a good document"}\n'


def command(folder: Path, *arguments: str) -> list[str]:
    fixed = [
        "--input",
        str(folder / "in"),
        "--output-prefix",
        str(folder / "out"),
        "--tokenizer-type",
        "bytes",
        "--append-eod",
    ]
    return [sys.executable, str(TOOL), *fixed, "--workers", "1", *arguments]


def preprocess(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        command(folder, *arguments),
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def indices(folder: Path) -> list[Path]:
    return sorted(folder.glob("out*.idx"))


def truncated_archive() -> bytes:
    lines = b"".join(
        b'{"text": "%s"}\n' % random.Random(number).randbytes(2000).hex().encode()
        for number in range(100)
    )
    whole = gzip.compress(lines)
    return whole[: len(whole) // 2]


CORRUPTED = {
    "invalid UTF-8": ("bad.jsonl", GOOD * 2 + b'{"text": "a\xff"}\n', "bad.jsonl, line 3: "),
    "a missing key": (
        "bad.jsonl",
        GOOD + b'{"words": "a"}\n',
        "bad.jsonl, line 2: key text is missing",
    ),
    "broken JSON": ("bad.jsonl", GOOD * 3 + b'{"text": "a\n', "bad.jsonl, line 4: "),
    "a truncated archive": ("bad.jsonl.gz", truncated_archive(), "bad.jsonl.gz"),
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=pytest.mark.slow if d != "invalid UTF-8" else ()) for d in CORRUPTED],
)
def test_fault_25_bad_input_is_named_by_file_and_line_counted_and_left_out_within_the_limit(
    tmp_path, damage
):
    name, data, said = CORRUPTED[damage]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(GOOD * 5)
    (tmp_path / "in" / name).write_bytes(data)
    count_injection()
    refused = preprocess(tmp_path)
    assert refused.returncode == 2
    assert "1 documents are bad, --max-bad-documents is 0" in refused.stderr
    assert said in refused.stderr
    assert not indices(tmp_path)
    allowed = preprocess(tmp_path, "--max-bad-documents", "1", "--json")
    report = json.loads(allowed.stdout)
    assert allowed.returncode == 0
    assert report["bad_documents"] == 1
    assert said in report["bad_examples"][0]
    (index,) = indices(tmp_path)
    assert not IndexedDataset(index.with_suffix("")).problems()
    assert len(IndexedDataset(index.with_suffix(""))) == report["documents"] >= 5


def test_fault_25_empty_files_leave_nothing_that_looks_valid(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.jsonl").touch()
    count_injection()
    done = preprocess(tmp_path)
    assert done.returncode == 2
    assert "no document is left of 1 input files" in done.stderr
    assert not indices(tmp_path)


@pytest.mark.slow
def test_fault_25_an_interrupted_build_leaves_no_index_and_goes_on(tmp_path):
    """kill -9 of the tool, of its workers with it, wherever it is;
    the next run ends with the bytes of one that was never killed.
    """
    (tmp_path / "in").mkdir()
    generator = random.Random(5)
    for part in "ab":
        lines = [
            b'{"text": "%s"}\n' % generator.randbytes(generator.randrange(3000)).hex().encode()
            for _ in range(2500)
        ]
        (tmp_path / "in" / f"{part}.jsonl").write_bytes(b"".join(lines))
    assert preprocess(tmp_path).returncode == 0
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("out_text_document.*")}
    for path in tmp_path.glob("out*"):
        path.unlink()
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    unfinished = 0
    for delay in (0.0, 0.15, 0.3):
        process = subprocess.Popen(
            command(tmp_path),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            process_group=0,
        )
        while process.poll() is None and not (tmp_path / "out.preprocess").exists():
            time.sleep(0.005)
        time.sleep(delay)
        running = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if running else None
        process.wait()
        count_injection()
        unfinished += running
        for index in indices(tmp_path):  # there only when the build was done
            assert not IndexedDataset(index.with_suffix("")).problems()
    assert unfinished
    assert preprocess(tmp_path).returncode == 0
    assert {
        path.name: path.read_bytes() for path in tmp_path.glob("out_text_document.*")
    } == expected


def test_fault_25_token_files_without_a_whole_index_are_refused_by_training(tmp_path):
    """The control: what an interrupted build would have left, had it written in place."""
    write_corpus(tmp_path)
    data = (tmp_path / "corpus.idx").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "corpus.idx").write_bytes(data[:size])
        count_injection()
        with pytest.raises(DataError, match=r"corpus\.idx"):
            IndexedDataset(tmp_path / "corpus")


def flip_middle_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    count_injection()


def test_fault_32_a_flipped_bit_in_a_journal_is_said_and_changes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(GOOD * 50)
    assert preprocess(tmp_path).returncode == 0
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("out_text_document.*")}
    for path in tmp_path.glob("out*"):
        path.unlink()
    assert preprocess(tmp_path, "--shard", "0/1").returncode == 0
    (journal,) = (tmp_path / "out.preprocess").glob("*.journal")
    flip_middle_bit(journal)
    done = preprocess(tmp_path)
    assert done.returncode == 0 and f"that work is done again: {journal}, line " in done.stderr
    assert {
        path.name: path.read_bytes() for path in tmp_path.glob("out_text_document.*")
    } == expected


@pytest.mark.parametrize(
    "table", ["document_index.npy", pytest.param("shuffle_index.npy", marks=pytest.mark.slow)]
)
def test_fault_32_a_flipped_bit_in_a_prebuilt_order_is_named_at_the_start(config, table):
    loaded = load_config(config, ["data.order=megatron"])
    ((folder, _),) = prebuild(
        loaded.data,
        seq_length=loaded.model.seq_length,
        total_samples=total_samples(loaded.training),
    )
    flip_middle_bit(folder / table)
    outcome = run(config, world=1, overrides=["data.order=megatron"])
    assert outcome.exit_codes == [2]
    assert f"{folder / table}: content: " in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("suffix", [".idx", pytest.param(".bin", marks=pytest.mark.slow)])
def test_fault_33_a_token_file_truncated_under_a_run_ends_it_with_its_name(config, suffix):
    """Where a mapped page beyond the new end would have killed the process without a word."""
    path, metrics = config.parent / f"corpus{suffix}", config.parent / "run" / "metrics.jsonl"
    ranks = start(
        config, world=1, overrides=["training.train_steps=1000000", "checkpoint.interval=1000000"]
    )
    while not (metrics.exists() and metrics.stat().st_size) and ranks.processes[0].is_alive():
        time.sleep(0.01)
    os.truncate(path, 10)
    count_injection()
    outcome = ranks.wait()
    assert outcome.exit_codes == [2]
    assert f"{path}: " in outcome.output
    assert "was shortened" in outcome.output
    assert "Traceback" not in outcome.output
