"""The type in which a run computes, and the number of its threads."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from megatron_completep.parallel.bf16_units import has_bf16_units

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute type; `auto` is bf16 where the hardware has units for it, else float32."""
    if precision != "auto":
        return DTYPES[precision]
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def precision_of_run(
    wanted: str, trained: str, device: torch.device, say: Callable[[str], None]
) -> torch.dtype:
    """The type in which a tool computes with a trained model.

    wanted: the tool's option; `auto` takes the type of the run where the device has units for it.
    trained: the run's training.precision.
    say: is told which type is used, and why, where it is not the run's own.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if trained == "auto":
        dtype = choose_precision("auto", device)
        say(
            f"the run's training.precision is auto, which is {name_of(dtype)} on this device; "
            "--precision chooses another."
        )
        return dtype
    if trained == "bf16" and not has_bf16_units(device):
        say(
            "the run was trained in bf16, for which this device has no units: float32 is used. "
            "--precision bf16 emulates it."
        )
        return torch.float32
    return DTYPES[trained]


def name_of(dtype: torch.dtype) -> str:
    """The name of a type in settings."""
    return next(name for name, candidate in DTYPES.items() if candidate == dtype)


def use_threads(threads: int | None, local_processes: int) -> int:
    """Let this process compute on `threads`, or on its share of the cores; returns the number.

    Without this, torchrun would leave a process one thread.
    """
    share = max(1, len(os.sched_getaffinity(0)) // local_processes)
    threads = threads or share
    torch.set_num_threads(threads)
    return threads
