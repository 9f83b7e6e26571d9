"""Launch parameters: a pure function of shape, dtype and architecture, from the tables below.

Nothing is tuned at run time, so every rank and every restart launches the same reduction order and gets the same bits.
An architecture is a string: "sm_90", "gfx942", or "interpreter" for CPU tensors under Triton's interpreter.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .tuned import TUNED


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" and the like, or "interpreter" for anything that is not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# Streaming multiprocessors (compute units) of the largest part of each architecture; a number of programs, not a claim about
# the part at hand. The interpreter pays for each program, so it gets few.
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 3}
_DEFAULT_PROCESSORS = 108


def processors(architecture: str) -> int:
    return _PROCESSORS.get(architecture, _DEFAULT_PROCESSORS)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def segments(hidden: int) -> tuple[int, int]:
    """Two powers of two that cover `hidden` with the fewest idle lanes: 768 = 512 + 256, 1000 -> 1024 + 0, 5120 = 4096 + 1024."""
    whole = max(16, next_power_of_two(hidden))
    first = whole // 2
    second = next_power_of_two(hidden - first) if hidden > first else 0
    return (first, max(second, 128)) if hidden > 512 and second < first else (whole, 0)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the distance between its rows [..., H], in elements; copied only when its rows are not evenly spaced."""
    hidden = x.shape[-1]
    if x.is_contiguous():
        return x, hidden
    x = x.reshape(-1, hidden)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


class NormForwardShape(NamedTuple):
    first: int
    second: int
    rows: int
    options: dict[str, int]


class NormBackwardShape(NamedTuple):
    first: int
    second: int
    rows: int
    stages: int
    programs: int
    holds_vectors: bool
    options: dict[str, int]


class TileShape(NamedTuple):
    rows: int
    columns: int
    options: dict[str, int]


def _options(num_warps: int) -> dict[str, int]:
    return {"num_warps": num_warps, "enable_fp_fusion": True}


@functools.cache
def norm_forward_shape(hidden: int) -> NormForwardShape:
    """Up to 1024 wide a warp has a row to itself (no exchange through shared memory), beyond that a program has one row."""
    first, second = segments(hidden)
    width = next_power_of_two(first + second)
    if width <= 1024:
        return NormForwardShape(first, second, max(4, 4096 // width), _options(num_warps=4))
    return NormForwardShape(first, second, 1, _options(num_warps=min(16, max(4, first // 512))))


def norm_backward_shape(hidden: int, dtype: torch.dtype, device: torch.device) -> NormBackwardShape:
    return _norm_backward_shape(hidden, dtype, architecture(device))


@functools.cache
def _norm_backward_shape(hidden: int, dtype: torch.dtype, architecture: str) -> NormBackwardShape:
    """Sixteen elements a thread, 512 threads a processor: accumulators, gain and the rows in flight then fit without spilling.

    From 2048 on the compiler needs to be held to the 128 registers that this leaves (it takes 170, and halves the occupancy).
    """
    first, second = segments(hidden)
    width = next_power_of_two(first + second)
    if width > 8192:
        return NormBackwardShape(first, second, 1, 1, processors(architecture), False, _options(num_warps=16))
    num_warps = max(4, width // 512)
    options = _options(num_warps)
    if width > 1024 and architecture.startswith("sm_"):
        options["maxnreg"] = 128
    programs_each = 3 if width <= 1024 else 16 // num_warps
    return NormBackwardShape(first, second, max(1, 2048 // width), 2, programs_each * processors(architecture), True, options)


def vector_gradient_shape(device: torch.device) -> TileShape:
    return TileShape(8, _columns(128, device), _options(num_warps=4))


def reduction_shape(device: torch.device) -> TileShape:
    return TileShape(64, _columns(32, device), _options(num_warps=4))


def _columns(columns: int, device: torch.device) -> int:
    """The interpreter pays for each program, so it gets few."""
    return 4096 if architecture(device) == "interpreter" else columns


@functools.cache
def pointwise_shape(columns: int) -> TileShape:
    """A tile of 2048 elements, one row high where rows are long: two 128-bit loads of bf16 a thread (one where a warp has 64)."""
    width = min(2048, max(16, next_power_of_two(columns)))
    return TileShape(2048 // width, width, _options(num_warps=4))


@functools.cache
def flat_shape() -> TileShape:
    return TileShape(1, 2048, _options(num_warps=4))


@functools.cache
def rotary_shape(heads: int, half: int) -> TileShape:
    """Heads of one token, up to 1024 pairs."""
    width = max(16, next_power_of_two(half))
    rows = max(1, min(next_power_of_two(heads), 1024 // width))
    return TileShape(rows, width, _options(num_warps=min(4, max(1, rows * width // 256))))


def partial_rows(device: torch.device, dtype: torch.dtype, hidden: int) -> int:
    """P of the partial sums [P, K, H] that a norm's backward returns on `device`; 1 where torch's own operators run."""
    if device.type != "cuda" or dtype == torch.float64:
        return 1
    return norm_backward_shape(hidden, dtype, device).programs


class BlockShape(NamedTuple):
    block: int  # elements of one program, or of one turn of its loop
    num_warps: int


# AdamW: four float32 elements a thread, one 128-bit access to each tensor (a wavefront of AMD has 64 threads).
_BLOCK_SHAPES = {
    "adamw": BlockShape(1024, 8),
    "sum_of_squares": BlockShape(1024, 4),
    "cross_entropy_forward": BlockShape(4096, 8),
    "cross_entropy_backward": BlockShape(4096, 8),
}


def block_shape(operation: str, device: torch.device) -> BlockShape:
    return _block_shape(operation, architecture(device))


@functools.cache
def _block_shape(operation: str, architecture: str) -> BlockShape:
    found = TUNED.get(architecture, {}).get(operation)
    if found is not None:
        return BlockShape(*found)
    block, num_warps = _BLOCK_SHAPES[operation]
    return BlockShape(block, num_warps // 2 if architecture.startswith("gfx") else num_warps)
