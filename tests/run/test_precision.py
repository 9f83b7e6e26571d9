"""`auto` takes bf16 exactly where the hardware has units for it."""

import os

import pytest
import torch

from megatron_completep.parallel.bf16_units import has_bf16_units
from megatron_completep.run.precision import (
    choose_precision,
    name_of,
    precision_of_run,
    use_threads,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_is_bf16_on_gpus_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == expected


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_is_bf16_on_cpus_with_matrix_units(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert choose_precision("auto", CPU) == expected


def test_a_torch_that_cannot_tell_has_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not has_bf16_units(CPU)


def test_what_is_asked_for_by_name_is_taken() -> None:
    named = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
    assert {name: choose_precision(name, CPU) for name in named} == named


def test_processes_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert [
        use_threads(None, 1),
        use_threads(None, 3),
        use_threads(None, 16),
        use_threads(5, 2),
    ] == [8, 2, 1, 5]
    assert asked == [8, 2, 1, 5]


@pytest.mark.parametrize(
    ("wanted", "trained", "units", "expected", "said"),
    [
        ("auto", "float32", True, torch.float32, ""),  # not the hardware's bf16
        ("auto", "float64", True, torch.float64, ""),
        ("auto", "bf16", True, torch.bfloat16, ""),
        (
            "auto",
            "bf16",
            False,
            torch.float32,
            "trained in bf16, for which this device has no units: float32 is used",
        ),
        (
            "auto",
            "auto",
            True,
            torch.bfloat16,
            "training.precision is auto, which is bf16 on this device",
        ),
        (
            "auto",
            "auto",
            False,
            torch.float32,
            "training.precision is auto, which is float32 on this device",
        ),
        ("bf16", "float32", False, torch.bfloat16, ""),  # what is asked for by name is taken
        ("float64", "bf16", True, torch.float64, ""),
    ],
)
def test_a_tools_auto_is_the_type_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    trained: str,
    units: bool,
    expected: torch.dtype,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    lines: list[str] = []
    assert precision_of_run(wanted, trained, CPU, lines.append) == expected
    assert bool(lines) == bool(said) and said in "".join(lines)
    assert choose_precision(name_of(expected), CPU) == expected
