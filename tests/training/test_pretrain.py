"""Whole runs: what they compute, what they write, how they stop and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.config import Config, load_config, save_config
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.data.loader import Loader
from megatron_completep.errors import ConfigError
from megatron_completep.pretrain import pretrain
from megatron_completep.run.state import ExitCode
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.metrics import read_metrics
from tests.support.runs import rows_of, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def weights_of(config: Config, step: int) -> dict[str, torch.Tensor]:
    stored = StoredCheckpoint.open(
        Path(config.training.output_dir) / f"checkpoints/step_{step:08d}"
    )
    return {name: stored.tensor(name) for name in stored.manifest.parameters}


def losses_of(config: Config) -> list[float]:
    return [row["loss"] for row in rows_of(config)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Config:
    """A run from the first step to the last, never interrupted."""
    config = tiny_config(folder, output="whole")
    assert pretrain(config) == ExitCode.DONE
    return config


def test_a_run_writes_one_row_a_step_and_learns(whole: Config) -> None:
    rows = read_metrics(Path(whole.training.output_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 13)]
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 12]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["memory_bytes"] > 0
        assert row["grad_norm"] > 0
        assert row["data_wait_seconds"] >= 0
        assert row["mfu"] is None and row["skipped"] is False  # the table of peaks knows no CPU


def test_the_resolved_configuration_is_saved_with_the_run(whole: Config) -> None:
    assert load_config(Path(whole.training.output_dir) / "config.yaml") == whole


def test_a_run_of_static_steps_equals_the_run_bit_for_bit_over_a_resume(
    folder: Path, whole: Config
) -> None:
    """With validation, telemetry and a checkpoint between the steps."""
    for overrides in (["training.stop_at_step=7"], []):
        config = tiny_config(folder, "training.cuda_graph=true", *overrides, output="static")
        assert pretrain(config) == ExitCode.DONE
    assert rows_of(config) == rows_of(whole)
    for name, weight in weights_of(whole, 12).items():
        assert torch.equal(weights_of(config, 12)[name], weight), name


def test_half_a_run_resumed_equals_the_whole_run_bit_for_bit(folder: Path, whole: Config) -> None:
    first = tiny_config(folder, "training.stop_at_step=6", output="halves")
    assert pretrain(first) == ExitCode.DONE
    assert len(rows_of(first)) == 6
    second = tiny_config(folder, output="halves")
    assert pretrain(second) == ExitCode.DONE
    assert rows_of(second) == rows_of(whole)
    for name, weight in weights_of(whole, 12).items():
        assert torch.equal(weights_of(second, 12)[name], weight), name


def test_a_resumed_run_that_forgets_its_place_in_the_data_is_caught(
    folder: Path, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny_config(folder, "training.stop_at_step=6", output="forgets"))
    monkeypatch.setattr(Loader, "seek", lambda self, consumed_samples: None)
    config = tiny_config(folder, output="forgets")
    pretrain(config)
    assert losses_of(config)[:6] == losses_of(whole)[:6]
    assert losses_of(config)[6:] != losses_of(whole)[6:]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP],
    ids=lambda number: number.name,
)
def test_a_signal_saves_between_steps_and_the_run_goes_on(
    folder: Path,
    whole: Config,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, original = tiny_config(folder, output=number.name), TrainingStep.run
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # as without nohup, however this test was started
    before = signal.getsignal(number)

    def run(self: TrainingStep, batches: Any, step: int, stop: bool = False) -> Any:
        if step == 8:
            signal.raise_signal(number)  # whose handler has run when this returns
        return original(self, batches, step, stop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run", run)
        assert pretrain(config) == ExitCode.REQUEUE
    stopped_at = len(rows_of(config))
    assert stopped_at == 9  # the step after the one in which it arrives
    assert (Path(config.training.output_dir) / f"checkpoints/step_{stopped_at:08d}").is_dir()
    assert pretrain(config) == ExitCode.DONE
    assert rows_of(config) == rows_of(whole)
    assert signal.getsignal(number) == before


def test_accumulated_micro_batches_equal_one_large_batch(folder: Path, whole: Config) -> None:
    config = tiny_config(folder, "training.micro_batch_size=1", output="accumulated")
    assert micro_batches_per_step(config, 1) == 8
    pretrain(config)
    torch.testing.assert_close(losses_of(config), losses_of(whole), rtol=1e-11, atol=0)
    validation = [
        [row.get("validation_loss") for row in rows_of(run) if "validation_loss" in row]
        for run in (config, whole)
    ]
    torch.testing.assert_close(*validation, rtol=1e-11, atol=0)


def test_another_seed_of_the_data_gives_other_losses(folder: Path, whole: Config) -> None:
    config = tiny_config(folder, "data.seed=7", "training.train_steps=12", output="other")
    pretrain(config)
    assert max(abs(a - b) for a, b in zip(losses_of(config), losses_of(whole), strict=True)) > 1e-3


def test_validation_and_tokenizer_are_optional(folder: Path) -> None:
    config = tiny_config(
        folder,
        "data.validation=null",
        "training.train_steps=2",
        "checkpoint.interval=null",
        output="plain",
    )
    assert pretrain(config) == ExitCode.DONE
    assert not any("validation_loss" in row for row in rows_of(config))
    assert weights_of(config, 2)  # saved at the end without an interval


def test_dropout_trains_and_validation_has_none(folder: Path) -> None:
    def run(output: str, *overrides: str) -> list[dict[str, Any]]:
        config = tiny_config(
            folder,
            *overrides,
            "training.validation_interval=1",
            "training.train_steps=2",
            output=output,
        )
        pretrain(config)
        return rows_of(config)

    with_dropout = run("a", "model.dropout=0.5")
    again = run("b", "model.dropout=0.5")
    without = run("c")
    assert with_dropout == again  # its seed is a function of the run and the step
    assert with_dropout[0]["loss"] != without[0]["loss"]
    frozen = [
        run(name, dropout, "optimizer.base_lr=1e-30")
        for name, dropout in (("d", "model.dropout=0.5"), ("e", "model.dropout=0"))
    ]
    assert frozen[0][0]["validation_loss"] == pytest.approx(
        frozen[1][0]["validation_loss"], rel=1e-12
    )


def test_an_output_folder_that_cannot_be_made_is_a_clear_error(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        pretrain(tiny_config(folder, output="file/run"))


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_users_mistake_gives_one_message_and_exit_code_2(folder: Path) -> None:
    save_config(tiny_config(folder), folder / "run.yaml")
    result = launch(
        "megatron_completep.pretrain", str(folder / "run.yaml"), "parallel.tensor_parallel_size=2"
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "world size 1" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_two_processes_under_torchrun_equal_one(folder: Path, whole: Config) -> None:
    config = tiny_config(folder, output="two")
    save_config(config, folder / "two.yaml")
    result = launch(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_completep.pretrain",
        str(folder / "two.yaml"),
    )
    assert result.returncode == 0, result.stderr
    assert "tensor 1 x pipeline 1 x data 2" in result.stdout
    torch.testing.assert_close(losses_of(config), losses_of(whole), rtol=1e-10, atol=0)
    assert rows_of(config)[-1]["validation_loss"] == pytest.approx(
        rows_of(whole)[-1]["validation_loss"], rel=1e-10
    )
