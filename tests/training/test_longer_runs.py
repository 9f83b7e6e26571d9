"""Runs that are made longer: they go on with the samples that they have not read,
or say that they would not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_completep.checkpoint.manifest import MANIFEST, read_manifest, seal
from megatron_completep.config import Config
from megatron_completep.errors import CheckpointError
from megatron_completep.pretrain import pretrain
from megatron_completep.run.state import ExitCode
from tests.support.corpora import write_ramps
from tests.support.runs import rows_of, tiny_config

PLANNED = 4 * 8  # samples of a run of four steps


def config_of(folder: Path, kind: str, output: str, steps: int, *overrides: str) -> Config:
    """Runs of constant learning rate over more than one epoch of a small corpus."""
    for name in ("few", "more"):
        if not (folder / f"{name}.idx").exists():
            write_ramps(folder / name, 10, seed=len(name))
    sources: dict[str, list[dict[str, Any]]] = {
        "megatron": [{"prefix": str(folder / "few")}],
        "epochs beside weights": [
            {"prefix": str(folder / "few"), "epochs": 0.5},
            {"prefix": str(folder / "more"), "weight": 1.0},
        ],
        "permutation": [{"prefix": str(folder / "few")}],
    }
    data = {
        "train": sources[kind],
        "validation": None,
        "order": "megatron" if kind == "megatron" else "permutation",
        "prefetch": 0,
    }
    optimizer = {"base_lr": 0.03, "warmup_fraction": None, "schedule": "constant"}
    words = ("checkpoint.interval=2", f"training.train_steps={steps}", *overrides)
    return tiny_config(folder, *words, output=output, data=data, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["megatron", "epochs beside weights"])
def test_a_run_whose_order_would_change_is_refused_and_keeps_it_on_request(
    folder: Path, kind: str
) -> None:
    name = f"longer {kind}"
    assert pretrain(config_of(folder, kind, name, 4, "training.stop_at_step=2")) == ExitCode.DONE
    for steps in (12, 3) if kind == "megatron" else (12,):
        with pytest.raises(CheckpointError) as refused:
            pretrain(config_of(folder, kind, name, steps))
        said = str(refused.value)
        if steps == 12:
            assert (
                "has read 16 samples in an order that was planned for 32; planned for 96, as now"
                in said
            )
            assert "data.order_samples=32" in said
            assert "checkpoint.allow_changed=[data.order_samples]" in said
    kept = config_of(folder, kind, name, 12, "data.order_samples=32")
    assert pretrain(kept) == ExitCode.DONE
    short = config_of(folder, kind, f"short {kind}", 4)
    pretrain(short)
    whole = config_of(folder, kind, f"whole {kind}", 12, "data.order_samples=32")
    pretrain(whole)
    assert [row["loss"] for row in rows_of(kept)] == [row["loss"] for row in rows_of(whole)]
    assert [row["loss"] for row in rows_of(kept)][:4] == [row["loss"] for row in rows_of(short)]


def test_a_run_whose_order_does_not_depend_on_its_length_is_just_made_longer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config_of(folder, "permutation", "free", 4))
    longer = config_of(folder, "permutation", "free", 6)
    capsys.readouterr()
    assert pretrain(longer) == ExitCode.DONE
    assert "order" not in capsys.readouterr().out
    manifest = read_manifest(Path(longer.training.output_dir) / "checkpoints/step_00000006")
    assert manifest.order is not None and manifest.order.planned_samples == 48


def test_what_is_meant_is_allowed_by_name_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config_of(folder, "megatron", "meant", 4, "training.stop_at_step=2"))
    capsys.readouterr()
    assert (
        pretrain(
            config_of(
                folder, "megatron", "meant", 6, "checkpoint.allow_changed=[data.order_samples]"
            )
        )
        == ExitCode.DONE
    )
    assert (
        "the order begins with other samples: some are read twice, others never"
        in capsys.readouterr().out
    )


def test_another_seed_of_the_data_that_is_allowed_is_not_refused_again(folder: Path) -> None:
    """The digest answers for the length alone:
    who changes the data on purpose names the setting once.
    """
    pretrain(config_of(folder, "megatron", "reseeded", 4, "training.stop_at_step=2"))
    words = ("data.seed=5", "checkpoint.allow_changed=[data.seed]")
    assert pretrain(config_of(folder, "megatron", "reseeded", 6, *words)) == ExitCode.DONE


def test_a_checkpoint_of_before_the_digest_loads_with_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = config_of(folder, "permutation", "older", 4, "training.stop_at_step=2")
    pretrain(first)
    checkpoint = Path(first.training.output_dir) / "checkpoints/step_00000002"
    (checkpoint / MANIFEST).write_bytes(sealed_without_order(read_manifest(checkpoint)))
    capsys.readouterr()
    assert pretrain(config_of(folder, "permutation", "older", 4)) == ExitCode.DONE
    assert "does not say in which order its data were read" in capsys.readouterr().out


def sealed_without_order(manifest: Any) -> bytes:
    """As an earlier version wrote it: without the field."""

    class Earlier:
        def model_dump(self, mode: str) -> dict[str, Any]:
            return {
                name: value
                for name, value in manifest.model_dump(mode=mode).items()
                if name != "order"
            }

    return seal(Earlier())  # type: ignore[arg-type]
