"""Launch parameters: a pure function of shape, dtype and architecture, from the rules below and the committed table of tuned.py.

Nothing is tuned at run time, so every rank and every restart launches the same reduction order and gets the same bits.
An architecture is a string: "sm_90", "gfx942", or "interpreter" for CPU tensors under Triton's interpreter. Each operation asks
with its bucket of shapes (below) and its dtype's bytes; what tuned.py holds under (operation, bucket, bytes) goes before the rule.
"""

import functools
from typing import Any, NamedTuple

import torch

from .tiling import next_power_of_two, row_bucket, segments
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


def lanes(architecture: str) -> int:
    """Threads of a warp (AMD: wavefront). The interpreter pays for each program, so a row's tile there is as for four warps."""
    return 64 if architecture.startswith("gfx") else 128 if architecture == "interpreter" else 32


def warps(threads: int, architecture: str) -> int:
    return max(1, threads // lanes(architecture))


def tuned_or(
    default: tuple[int, ...], architecture: str, operation: str, bucket: int, itemsize: int
) -> tuple[int, ...]:
    return TUNED.get(architecture, {}).get((operation, bucket, itemsize), default)


def options(num_warps: int, maxnreg: int = 0) -> dict[str, int]:
    """Triton's options; 0: as many registers as the compiler likes. The default of fusion depends on the version of Triton."""
    return {
        "num_warps": num_warps,
        "enable_fp_fusion": True,
        **({"maxnreg": maxnreg} if maxnreg else {}),
    }


_caches: list[Any] = []


def _cached(function: Any) -> Any:
    """Remember the answers (they cost host time at every launch) until the table changes under them."""
    cached = functools.cache(function)
    _caches.append(cached)
    return cached


def forget() -> None:
    """Read the table again; for the tuner, which changes it."""
    for cached in _caches:
        cached.cache_clear()


# --- rows of H elements: the norms and the add --------------------------------------------------------------------------------------


class RowShape(NamedTuple):
    """A program handles a tile of `rows` rows, or such tiles in turn where there are `programs` of them (else 0)."""

    widths: tuple[int, ...]
    rows: int
    stages: int
    programs: int
    options: dict[str, int]


WIDEST_IN_REGISTERS = 8192  # elements of a row whose vector gradients a program can hold


def forward_shape(
    operation: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> RowShape:
    return _forward_shape(operation, hidden, dtype.itemsize, architecture(device))


@_cached
def _forward_shape(operation: str, hidden: int, itemsize: int, architecture: str) -> RowShape:
    """Up to 1024 wide a warp has rows to itself (no exchange through shared memory), beyond that a program has one row."""
    widths = segments(hidden)
    if sum(widths) <= 1024:
        default = (max(1, 1024 // sum(widths), 8 * lanes(architecture) // widths[0]), 1)
    else:
        default = (
            1,
            warps(min(512, max(128, 32 * (next_power_of_two(sum(widths)) // 512))), architecture),
        )
    rows, num_warps = tuned_or(default, architecture, operation, row_bucket(hidden), itemsize)
    return RowShape(widths, rows, 1, 0, options(num_warps))


def backward_shape(
    operation: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> RowShape:
    return _backward_shape(operation, hidden, dtype.itemsize, architecture(device))


@_cached
def _backward_shape(operation: str, hidden: int, itemsize: int, architecture: str) -> RowShape:
    """Sixteen elements a thread, 512 threads a processor: accumulators, gain and the rows in flight then fit without spilling.

    From 2048 on the compiler is held to the 128 registers that this leaves. 384 and 768 have a warp to a row, with twice the registers
    and half the threads, and prefetch two rows.
    """
    widths = segments(hidden)
    width = next_power_of_two(sum(widths))
    cap = 128 if width > 1024 and architecture.startswith("sm_") else 0
    default: tuple[int, ...]
    if width > WIDEST_IN_REGISTERS:
        default = (1, warps(512, architecture), 1, 1, 0)
    elif len(widths) == 3:
        default = (
            8 * lanes(architecture) // widths[0],
            1,
            2 if architecture.startswith("gfx") else 3,
            4,
            0,
        )
    else:
        threads = max(128, width // 16)
        default = (
            max(1, 2048 // width),
            warps(threads, architecture),
            2,
            3 if width <= 1024 else 512 // threads,
            cap,
        )
    rows, num_warps, stages, programs_each, maxnreg = tuned_or(
        default, architecture, operation, row_bucket(hidden), itemsize
    )
    return RowShape(
        widths, rows, stages, programs_each * processors(architecture), options(num_warps, maxnreg)
    )


def partial_rows(operation: str, device: torch.device, dtype: torch.dtype, hidden: int) -> int:
    """P of the partial sums [P, K, H] that a backward returns on `device`; 1 where torch's own operators run."""
    if device.type != "cuda" or dtype == torch.float64:
        return 1
    return backward_shape(operation, hidden, dtype, device).programs


# --- tiles and flat buffers -----------------------------------------------------------------------------------------------------------


class TileShape(NamedTuple):
    rows: int
    columns: int
    options: dict[str, int]


def vector_gradient_shape(device: torch.device) -> TileShape:
    return TileShape(8, _columns(128, device), options(num_warps=4))


def reduction_shape(device: torch.device) -> TileShape:
    return _reduction_shape(architecture(device))


@_cached
def _reduction_shape(architecture: str) -> TileShape:
    rows, columns, num_warps = tuned_or((64, 32, 4), architecture, "reduce_partials", 0, 4)
    return TileShape(rows, 4096 if architecture == "interpreter" else columns, options(num_warps))


def _columns(columns: int, device: torch.device) -> int:
    """The interpreter pays for each program, so it gets few."""
    return 4096 if architecture(device) == "interpreter" else columns


def column_bucket(columns: int) -> int:
    return min(16384, max(16, next_power_of_two(columns)))


def pointwise_shape(
    operation: str, columns: int, dtype: torch.dtype, device: torch.device
) -> TileShape:
    return _pointwise_shape(operation, columns, dtype.itemsize, architecture(device))


@_cached
def _pointwise_shape(operation: str, columns: int, itemsize: int, architecture: str) -> TileShape:
    """A tile of 2048 elements, one row high where rows are long: two 128-bit loads of bf16 a thread."""
    bucket = column_bucket(columns)
    elements, num_warps = tuned_or(
        (2048, warps(128, architecture)), architecture, operation, bucket, itemsize
    )
    width = min(elements, bucket)
    return TileShape(elements // width, width, options(num_warps))


def rotary_shape(heads: int, half: int, dtype: torch.dtype, device: torch.device) -> TileShape:
    return _rotary_shape(heads, half, dtype.itemsize, architecture(device))


@_cached
def _rotary_shape(heads: int, half: int, itemsize: int, architecture: str) -> TileShape:
    """Heads of one token, up to 1024 pairs, eight a thread."""
    width = column_bucket(half)
    (pairs,) = tuned_or((1024,), architecture, "rotary", width, itemsize)
    rows = max(1, min(next_power_of_two(heads), pairs // width))
    return TileShape(rows, width, options(min(4, warps(rows * width // 8, architecture))))


class BlockShape(NamedTuple):
    block: int  # elements of one program, or of one turn of its loop
    num_warps: int
    stages: int  # of its loop: 1 loads a turn's elements in that turn, 3 prefetches those of the next two


# Elements, threads, stages. AdamW: four float32 elements a thread, one 128-bit access to each tensor.
_BLOCKS = {
    "adamw": (1024, 256, 1),
    "sum_of_squares": (1024, 128, 1),
    "cross_entropy_forward": (4096, 256, 3),
    "cross_entropy_backward": (4096, 256, 1),
}
_ELEMENTWISE = (2048, 128, 1)  # of every other operation: two 128-bit loads of bf16 a thread


def block_shape(operation: str, dtype: torch.dtype, device: torch.device) -> BlockShape:
    return _block_shape(operation, dtype.itemsize, architecture(device))


@_cached
def _block_shape(operation: str, itemsize: int, architecture: str) -> BlockShape:
    block, threads, stages = _BLOCKS.get(operation, _ELEMENTWISE)
    return BlockShape(
        *tuned_or(
            (block, warps(threads, architecture), stages), architecture, operation, 0, itemsize
        )
    )
