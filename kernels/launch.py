"""Launch parameters: a pure function of shape, dtype and architecture.

Nothing is tuned at run time, so every rank and every restart launches the same reduction order and
gets the same bits. An architecture is a string: "sm_90", "gfx942", or "interpreter" for CPU tensors
under Triton's interpreter. Each operation asks with its bucket of shapes (below) and its dtype's
bytes. What tuned.py holds under (operation, bucket, bytes) goes before the rules of this file.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from .tiling import next_power_of_two, row_bucket, segments
from .tuned import TUNED

_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" and the like, or "interpreter" for what is not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# Streaming multiprocessors (compute units) of the largest GPU of each architecture. This sets a
# number of programs and makes no claim about the GPU at hand. The interpreter pays for each
# program, so it gets few.
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 3}
_DEFAULT_PROCESSORS = 108


def processors(architecture: str) -> int:
    """How many multiprocessors (compute units) are counted on."""
    return _PROCESSORS.get(architecture, _DEFAULT_PROCESSORS)


def lanes(architecture: str) -> int:
    """Threads of a warp (AMD: wavefront).

    The interpreter pays for each program, so a row's tile there is as for four warps.
    """
    if architecture == "interpreter":
        return 128
    return 64 if architecture.startswith("gfx") else 32


def warps(threads: int, architecture: str) -> int:
    """How many warps hold `threads` threads, at least one."""
    return max(1, threads // lanes(architecture))


def tuned_or(
    default: tuple[int, ...], architecture: str, operation: str, bucket: int, itemsize: int
) -> tuple[int, ...]:
    """The table's parameters for an operation, or the `default` where it has none."""
    table = TUNED.get(architecture, {})
    return table.get((operation, bucket, itemsize), default)


def options(num_warps: int, maxnreg: int = 0) -> dict[str, int]:
    """Triton's options. `maxnreg` 0 leaves the number of registers to the compiler."""
    # Whether multiplications and additions are fused by default depends on the version of Triton.
    launch_options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if maxnreg:
        launch_options["maxnreg"] = maxnreg
    return launch_options


_caches: list["functools._lru_cache_wrapper[Any]"] = []


def _cached(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Remember the answers until `forget`: they would cost host time at every launch."""
    cached = functools.cache(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Read the table of tuned.py again: the tuner changes it."""
    for cached in _caches:
        cached.cache_clear()


class RowShape(NamedTuple):
    """How an operation on rows of H elements is launched.

    With `programs` 0 every program handles one tile; otherwise so many programs take the tiles in
    turn.
    """

    widths: tuple[int, ...]  # of the segments of a row
    rows: int  # of a tile
    stages: int  # of the loop over tiles: 1 loads a tile in its own turn, 2 prefetches the next one
    programs: int
    options: dict[str, int]


WIDEST_IN_REGISTERS = 8192  # elements of a row whose vector gradients a program can hold


def forward_shape(
    operation: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> RowShape:
    """The launch of a forward over rows of `hidden` elements."""
    return _forward_shape(operation, hidden, dtype.itemsize, architecture(device))


@_cached
def _forward_shape(operation: str, hidden: int, itemsize: int, architecture: str) -> RowShape:
    widths = segments(hidden)
    covered = sum(widths)
    if covered <= 1024:
        # A warp has rows to itself: no exchange through shared memory.
        default = (max(1, 1024 // covered, 8 * lanes(architecture) // widths[0]), 1)
    else:
        # A program has one row, with 16 elements a thread as far as 128 to 512 threads allow.
        threads = 32 * (next_power_of_two(covered) // 512)
        default = (1, warps(min(512, max(128, threads)), architecture))
    rows, num_warps = tuned_or(default, architecture, operation, row_bucket(hidden), itemsize)
    return RowShape(widths, rows, 1, 0, options(num_warps))


def backward_shape(
    operation: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> RowShape:
    """The launch of a backward over rows of `hidden` elements."""
    return _backward_shape(operation, hidden, dtype.itemsize, architecture(device))


@_cached
def _backward_shape(operation: str, hidden: int, itemsize: int, architecture: str) -> RowShape:
    default = _default_backward(hidden, architecture)
    bucket = row_bucket(hidden)
    tuned = tuned_or(default, architecture, operation, bucket, itemsize)
    rows, num_warps, stages, programs_each, maxnreg = tuned
    programs = programs_each * processors(architecture)
    return RowShape(segments(hidden), rows, stages, programs, options(num_warps, maxnreg))


def _default_backward(hidden: int, architecture: str) -> tuple[int, ...]:
    """(rows, warps, stages, programs a processor, register cap)."""
    widths = segments(hidden)
    width = next_power_of_two(sum(widths))
    if width > WIDEST_IN_REGISTERS:
        return 1, warps(512, architecture), 1, 1, 0

    # 384 and 768 have a warp to a row, with twice the registers and half the threads of the rule
    # below, and prefetch two rows.
    if len(widths) == 3:
        rows = 8 * lanes(architecture) // widths[0]
        stages = 2 if architecture.startswith("gfx") else 3
        return rows, 1, stages, 4, 0

    # Sixteen elements a thread and 512 threads a processor: then the accumulators, the gain and the
    # rows in flight fit without spilling. From 2048 on the compiler is held to the 128 registers
    # that this leaves.
    threads = max(128, width // 16)
    programs_each = 3 if width <= 1024 else 512 // threads
    register_cap = 128 if width > 1024 and architecture.startswith("sm_") else 0
    return max(1, 2048 // width), warps(threads, architecture), 2, programs_each, register_cap


def partial_rows(operation: str, device: torch.device, dtype: torch.dtype, hidden: int) -> int:
    """P of the partial sums [P, K, H] that a backward returns on `device`.

    It is 1 where torch's own operators run.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return 1
    return backward_shape(operation, hidden, dtype, device).programs


class TileShape(NamedTuple):
    """How an operation on tiles of a matrix is launched: the tile of one program."""

    rows: int
    columns: int
    options: dict[str, int]


def vector_gradient_shape(device: torch.device) -> TileShape:
    """The launch that sums the vector gradients of rows too wide for the backward kernel."""
    return TileShape(8, _columns(128, device), options(num_warps=4))


def reduction_shape(device: torch.device) -> TileShape:
    """The launch that sums partial sums."""
    return _reduction_shape(architecture(device))


@_cached
def _reduction_shape(architecture: str) -> TileShape:
    rows, columns, num_warps = tuned_or((64, 32, 4), architecture, "reduce_partials", 0, 4)
    if architecture == "interpreter":
        columns = 4096
    return TileShape(rows, columns, options(num_warps))


def _columns(columns: int, device: torch.device) -> int:
    """The interpreter pays for each program, so it gets few."""
    return 4096 if architecture(device) == "interpreter" else columns


def column_bucket(columns: int) -> int:
    """Numbers of columns that are launched alike."""
    return min(16384, max(16, next_power_of_two(columns)))


def pointwise_shape(
    operation: str, columns: int, dtype: torch.dtype, device: torch.device
) -> TileShape:
    """The launch of an elementwise operation on rows of `columns` elements."""
    return _pointwise_shape(operation, columns, dtype.itemsize, architecture(device))


@_cached
def _pointwise_shape(operation: str, columns: int, itemsize: int, architecture: str) -> TileShape:
    bucket = column_bucket(columns)
    # 2048 elements, one row high where rows are long: two 128-bit loads of bf16 a thread.
    default = (2048, warps(128, architecture))
    elements, num_warps = tuned_or(default, architecture, operation, bucket, itemsize)
    width = min(elements, bucket)
    return TileShape(elements // width, width, options(num_warps))


def rotary_shape(heads: int, half: int, dtype: torch.dtype, device: torch.device) -> TileShape:
    """The launch of the rotation of `heads` heads of `half` pairs: heads of one token a program."""
    return _rotary_shape(heads, half, dtype.itemsize, architecture(device))


@_cached
def _rotary_shape(heads: int, half: int, itemsize: int, architecture: str) -> TileShape:
    width = column_bucket(half)
    (pairs,) = tuned_or((1024,), architecture, "rotary", width, itemsize)
    rows = max(1, min(next_power_of_two(heads), pairs // width))
    num_warps = warps(rows * width // 8, architecture)  # eight pairs a thread
    return TileShape(rows, width, options(min(4, num_warps)))


def head_norm_backward_shape(
    heads: int, half: int, dtype: torch.dtype, device: torch.device
) -> RowShape:
    """The launch of the backward of QK-norm: heads of one token a tile, `half` pairs each."""
    return _head_norm_backward_shape(heads, half, dtype.itemsize, architecture(device))


@_cached
def _head_norm_backward_shape(heads: int, half: int, itemsize: int, architecture: str) -> RowShape:
    width = column_bucket(half)
    # Eight pairs a thread, so that bf16 is loaded in whole vectors of 128 bits: four accumulators
    # and four gains of eight floats each, which two warps to a program leave room for.
    default = (512, 6, 2)
    bucket = tuned_or(default, architecture, "head_norm_backward", width, itemsize)
    pairs, programs_each, stages = bucket
    rows = max(1, min(next_power_of_two(heads), pairs // width))
    num_warps = min(4, warps(rows * width // 8, architecture))
    programs = programs_each * processors(architecture)
    return RowShape((width,), rows, stages, programs, options(num_warps))


class BlockShape(NamedTuple):
    """How an operation on flat buffers, or on the columns of one row, is launched."""

    block: int  # elements of one program, or of one turn of its loop
    num_warps: int
    stages: int  # of its loop: 1 loads a turn's elements in that turn, 3 prefetches the next two's


# Elements, threads, stages. AdamW: four float32 elements a thread, so one 128-bit access a tensor.
_BLOCKS = {
    "adamw": (1024, 256, 1),
    "sum_of_squares": (1024, 128, 1),
    "cross_entropy_forward": (4096, 256, 3),
    "cross_entropy_backward": (4096, 256, 1),
}
_ELEMENTWISE = (2048, 128, 1)  # of every other operation: two 128-bit loads of bf16 a thread


def block_shape(operation: str, dtype: torch.dtype, device: torch.device) -> BlockShape:
    """The launch of an operation on blocks of elements."""
    return _block_shape(operation, dtype.itemsize, architecture(device))


@_cached
def _block_shape(operation: str, itemsize: int, architecture: str) -> BlockShape:
    block, threads, stages = _BLOCKS.get(operation, _ELEMENTWISE)
    default = (block, warps(threads, architecture), stages)
    return BlockShape(*tuned_or(default, architecture, operation, 0, itemsize))


def float8_tile(dtype: torch.dtype, device: torch.device) -> TileShape:
    """The launch of the cast to float8: square tiles, as both dimensions are written along."""
    return _float8_tile(dtype.itemsize, architecture(device))


@_cached
def _float8_tile(itemsize: int, architecture: str) -> TileShape:
    default = (64, 64, warps(128, architecture))
    rows, columns, num_warps = tuned_or(default, architecture, "float8_cast", 0, itemsize)
    return TileShape(rows, columns, options(num_warps))
