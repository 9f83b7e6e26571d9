"""In which type a run computes, and on how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute type; `auto`: bf16 where the hardware has units for it, else float32."""
    if precision != "auto":
        return DTYPES[precision]
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def precision_of_run(
    wanted: str, trained: str, device: torch.device, say: Callable[[str], None]
) -> torch.dtype:
    """The type in which a tool computes with a trained model. `auto`: that of the run, where the device has units for it.

    trained: the run's training.precision. What else is used, and why, is said.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if trained == "auto":
        chosen = choose_precision("auto", device)
        say(
            f"the run's training.precision is auto, which is {name_of(chosen)} on this device; --precision chooses another."
        )
        return chosen
    if trained == "bf16" and not has_bf16_units(device):
        say(
            "the run was trained in bf16, for which this device has no units: float32 is used. --precision bf16 emulates it."
        )
        return torch.float32
    return DTYPES[trained]


def name_of(dtype: torch.dtype) -> str:
    """The name of a type in settings."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def has_bf16_units(device: torch.device) -> bool:
    """CUDA from compute capability 8.0 on; CPUs with AMX or AVX512-BF16 (elsewhere bf16 is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(probe is not None and probe() for probe in probes)


def use_threads(threads: int | None, local_processes: int) -> int:
    """Let this process compute on `threads`, or on its share of the cores (torchrun alone would leave it one); returns the number."""
    share = max(1, len(os.sched_getaffinity(0)) // local_processes)
    torch.set_num_threads(threads or share)
    return threads or share
