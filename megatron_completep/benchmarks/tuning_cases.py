"""What the tuner of launch parameters tries: candidates for each entry of the launch table.

Each entry comes with the launches that its candidates are timed on. Candidates are counted in
threads, so that they mean the same on NVIDIA's warps and AMD's wavefronts. The work is the Triton
launchers themselves: on a GPU they run; on torch's `meta` device (a dry run, recorded) their
tensors have shapes and no data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_completep.kernels import Control, Join, Norm, launch, new_control
from megatron_completep.kernels.library import LAUNCHERS
from megatron_completep.kernels.ops.adamw import block_table
from megatron_completep.kernels.ops.residual_norm import (
    launch_residual_norm_backward,
    launch_residual_norm_forward,
)
from megatron_completep.kernels.ops.scaled_add import (
    launch_scaled_add_backward,
    launch_scaled_add_forward,
)
from megatron_completep.kernels.tiling import row_bucket

Work = Callable[[], Any]
Prepare = Callable[[], Work]
Candidates = tuple[tuple[int, ...], ...]

REGISTERS = 65536  # of one NVIDIA multiprocessor


@dataclass(frozen=True)
class Tunable:
    """One entry (operation, bucket of shapes, bytes of the dtype) of the launch table.

    sizes: each makes the call to be timed, while the launch table holds the candidate.
    """

    key: tuple[str, int, int]
    candidates: Candidates
    sizes: tuple[Prepare, ...]

    @property
    def name(self) -> str:
        operation, bucket, itemsize = self.key
        shapes = f" {bucket}" if bucket else ""
        return f"{operation}{shapes} ({itemsize} bytes)"


@dataclass(frozen=True)
class Sweep:
    """The shapes that the table is tuned for."""

    hidden: tuple[int, ...] = (768, 1024, 2048, 4096, 5120, 8192)
    rows: tuple[int, ...] = (4096, 16384)
    vocabularies: tuple[int, ...] = (50_432, 131_072)
    head_dims: tuple[int, ...] = (64, 128)
    parameters: tuple[int, ...] = (1 << 24, 1 << 28)
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class _Target:
    """What to tune for, and the device of the tensors: a GPU of the architecture, or meta."""

    sweep: Sweep
    device: torch.device
    architecture: str

    @property
    def itemsize(self) -> int:
        return self.sweep.dtype.itemsize

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.sweep.dtype)

    def warps(self, threads: int) -> int:
        return launch.warps(threads, self.architecture)


def tunables(sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    """Every entry of the table that the sweep's shapes read."""
    target = _Target(sweep, device, architecture)
    for hidden in sweep.hidden:
        yield from _rows(hidden, target)
    for columns in sorted({launch.column_bucket(4 * hidden) for hidden in sweep.hidden}):
        yield from _swiglu(columns, target)
    yield from _squared_relu(target)
    yield from _float8(target)
    for head_dim in sweep.head_dims:
        yield _rotary(head_dim, target)
        yield _head_norm_backward(head_dim, target)
    yield _reduction(target)
    yield from _optimizer(target)
    yield from _cross_entropy(target)


def _forward_candidates(hidden: int, target: _Target) -> Candidates:
    """(rows, warps): eight to 64 elements a thread."""
    width = row_bucket(hidden)
    candidates = set()
    for rows, threads in itertools.product((1, 2, 4, 8), (32, 64, 128, 256, 512, 1024)):
        elements = rows * width / threads
        # Beyond a width of 1024 a program has one row, as in the rules of kernels/launch.py.
        rows_fit = rows == 1 or width <= 1024
        full_warp = threads >= launch.lanes(target.architecture)
        if 8 <= elements <= 64 and rows_fit and full_warp:
            candidates.add((rows, target.warps(threads)))
    return tuple(sorted(candidates))


def _backward_candidates(hidden: int, target: _Target) -> Candidates:
    """(rows, warps, stages, programs a processor, register cap).

    Eight to 32 elements a thread, 128 to 1024 threads a processor.
    """
    width = row_bucket(hidden)
    is_nvidia = target.architecture.startswith("sm_")
    candidates = set()
    for rows, threads, resident_threads, stages in itertools.product(
        (1, 2, 4), (32, 64, 128, 256, 512), (128, 256, 512, 1024), (1, 2, 3)
    ):
        elements = rows * width / threads
        full_warp = threads >= launch.lanes(target.architecture)
        if not 8 <= elements <= 32 or threads > resident_threads or not full_warp:
            continue
        # A thread has at most 255 registers, so 256 threads are resident without a cap (0).
        cap = 0
        if is_nvidia and resident_threads >= 512:
            cap = REGISTERS // resident_threads
        programs = resident_threads // threads
        candidates.add((rows, target.warps(threads), stages, programs, cap))
    return tuple(sorted(candidates))


class _RowCalls:
    """The calls over rows of `hidden` elements: the norms and the add."""

    def __init__(self, hidden: int, target: _Target):
        self._hidden = hidden
        self._target = target
        self._weight = target.random(hidden)
        self._d_weight = torch.zeros(hidden, device=target.device)
        self._join = Join(0.3)
        self._norm = Norm("rmsnorm")

    def _stream(self, rows: int) -> Tensor:
        return self._target.random(rows, self._hidden)

    def forward(self, rows: int) -> Work:
        residual = self._stream(rows)
        branch = self._stream(rows)
        vectors = (None, self._weight, None)  # branch bias, gain, bias
        inputs = (residual, branch, *vectors)
        return partial(launch_residual_norm_forward, *inputs, self._join, self._norm)

    def backward(self, rows: int) -> Work:
        d_y = self._stream(rows)
        d_out = self._stream(rows)
        y = self._stream(rows)
        mean = torch.empty(0, device=self._target.device)  # RMSNorm has none
        rstd = torch.rand(rows, device=self._target.device)
        call = partial(
            launch_residual_norm_backward,
            *(d_y, d_out, y, mean, rstd, self._weight),
            has_branch=True,
            has_bias=False,
            has_branch_bias=False,
            join=self._join,
            norm=self._norm,
        )
        return partial(self._reduced, call)

    def add(self, rows: int) -> Work:
        residual = self._stream(rows)
        branch = self._stream(rows)
        return partial(launch_scaled_add_forward, residual, branch, None, self._join)

    def add_backward(self, rows: int) -> Work:
        dtype = self._target.sweep.dtype
        call = partial(launch_scaled_add_backward, self._stream(rows), True, self._join, dtype)
        return partial(self._reduced, call)

    def _reduced(self, backward: Work) -> None:
        """A backward with the reduction of its partial sums.

        The reduction's cost grows with the number of programs, which is being tuned.
        """
        partials = backward()[-1]
        LAUNCHERS["reduce_partials_"](partials, self._d_weight, None, None, 0)


def _rows(hidden: int, target: _Target) -> Iterator[Tunable]:
    """The operations over rows of `hidden` elements."""
    bucket = row_bucket(hidden)
    calls = _RowCalls(hidden, target)
    forwards = _forward_candidates(hidden, target)
    backwards = _backward_candidates(hidden, target)
    for operation, candidates, prepare in (
        ("norm_forward", forwards, calls.forward),
        ("norm_backward", backwards, calls.backward),
        ("scaled_add_forward", forwards, calls.add),
        ("scaled_add_backward", backwards, calls.add_backward),
    ):
        sizes = tuple(partial(prepare, rows) for rows in target.sweep.rows)
        yield Tunable((operation, bucket, target.itemsize), candidates, sizes)


def _tiles(
    elements: tuple[int, ...], elements_a_thread: int, target: _Target
) -> list[tuple[int, int]]:
    """(elements, warps) of one-dimensional tiles: eight to `elements_a_thread` for each thread."""
    tiles = []
    for count, threads in itertools.product(elements, (128, 256, 512)):
        if 8 <= count / threads <= elements_a_thread:
            tiles.append((count, target.warps(threads)))
    return tiles


def _activation_tiles(target: _Target) -> list[tuple[int, int]]:
    return _tiles((1024, 2048, 4096, 8192), 32, target)


def _swiglu(columns: int, target: _Target) -> Iterator[Tunable]:
    """SwiGLU with an output of `columns`, at the first number of rows."""

    def forward(rows: int) -> Work:
        return partial(LAUNCHERS["swiglu_forward"], target.random(rows, 2 * columns))

    def backward(rows: int) -> Work:
        d_out = target.random(rows, columns)
        gate_up = target.random(rows, 2 * columns)
        return partial(LAUNCHERS["swiglu_backward"], d_out, gate_up)

    for operation, prepare in (("swiglu_forward", forward), ("swiglu_backward", backward)):
        key = (operation, launch.column_bucket(columns), target.itemsize)
        sizes = (partial(prepare, target.sweep.rows[0]),)
        yield Tunable(key, tuple(_activation_tiles(target)), sizes)


def _squared_relu(target: _Target) -> Iterator[Tunable]:
    """Squared ReLU: its tiles do not see the width, so one width stands for all."""
    width = 4 * target.sweep.hidden[0]

    def prepare(operation: str, tensors: int, rows: int) -> Work:
        inputs = [target.random(rows, width) for _ in range(tensors)]
        return partial(LAUNCHERS[operation], *inputs)

    candidates = tuple((*tile, 1) for tile in _activation_tiles(target))  # in one stage
    for operation, tensors in (("squared_relu_forward", 1), ("squared_relu_backward", 2)):
        sizes = tuple(partial(prepare, operation, tensors, rows) for rows in target.sweep.rows)
        yield Tunable((operation, 0, target.itemsize), candidates, sizes)


def _float8(target: _Target) -> Iterator[Tunable]:
    """The passes over an operand of float8: its largest magnitude, and the cast to two copies."""
    width = 4 * target.sweep.hidden[0]

    def largest(rows: int) -> Work:
        return partial(LAUNCHERS["float8_largest"], target.random(rows, width))

    def cast(rows: int) -> Work:
        amax = torch.ones((), device=target.device)
        return partial(LAUNCHERS["float8_cast"], target.random(rows, width), amax, False, True)

    blocks = tuple((*tile, 1) for tile in _activation_tiles(target))
    sizes = tuple(partial(largest, rows) for rows in target.sweep.rows)
    yield Tunable(("float8_largest", 0, target.itemsize), blocks, sizes)
    tiles = []
    for rows, columns, threads in itertools.product((32, 64, 128), (64, 128), (128, 256)):
        tiles.append((rows, columns, target.warps(threads)))
    sizes = tuple(partial(cast, rows) for rows in target.sweep.rows)
    yield Tunable(("float8_cast", 0, target.itemsize), tuple(tiles), sizes)


def _rotary(head_dim: int, target: _Target) -> Tunable:
    """The rotation of 16 heads."""

    def prepare(rows: int) -> Work:
        angle = torch.rand(rows, 1, head_dim // 2, device=target.device) * 6.3  # about 2 pi
        x = target.random(rows, 1, 16, head_dim)
        return partial(LAUNCHERS["rotary_"], x, angle.cos(), angle.sin(), False)

    key = ("rotary", launch.column_bucket(head_dim // 2), target.itemsize)
    candidates = ((256,), (512,), (1024,), (2048,))
    sizes = tuple(partial(prepare, rows) for rows in target.sweep.rows)
    return Tunable(key, candidates, sizes)


def _head_norm_backward(head_dim: int, target: _Target) -> Tunable:
    """The backward of QK-norm with rotation, over 16 heads of queries and 4 of keys."""

    def prepare(rows: int) -> Work:
        angle = torch.rand(rows, 1, head_dim // 2, device=target.device) * 6.3  # about 2 pi
        counts = (16, 4, 4)
        gradients = [target.random(rows, 1, count, head_dim) for count in counts]
        heads = target.random(rows, 1, sum(counts), head_dim)
        rstds = [torch.rand(rows * count, device=target.device) for count in counts[:2]]
        gain = target.random(head_dim)
        inputs = (*gradients, heads, *rstds, gain, gain, angle.cos(), angle.sin())
        return partial(LAUNCHERS["head_norm_backward"], *inputs)

    width = launch.column_bucket(head_dim // 2)
    # (pairs, programs a processor, stages).
    candidates = tuple(itertools.product((256, 512, 1024), (3, 4, 6, 8), (1, 2, 3)))
    sizes = tuple(partial(prepare, rows) for rows in target.sweep.rows)
    return Tunable(("head_norm_backward", width, target.itemsize), candidates, sizes)


def _reduction(target: _Target) -> Tunable:
    """The sum of the partial sums that the backward of a norm leaves."""
    # As many partial sums as four programs a processor leave.
    programs = launch.processors(target.architecture) * 4

    def prepare(hidden: int) -> Work:
        partials = torch.randn(programs, 1, hidden, device=target.device)
        total = torch.zeros(hidden, device=target.device)
        return partial(LAUNCHERS["reduce_partials_"], partials, total, None, None, 0)

    # (rows, columns, threads) of a tile.
    shapes = ((32, 32, 128), (64, 32, 128), (128, 32, 256), (32, 128, 256), (64, 64, 256))
    candidates = tuple((rows, columns, target.warps(threads)) for rows, columns, threads in shapes)
    sizes = tuple(partial(prepare, hidden) for hidden in target.sweep.hidden)
    return Tunable(("reduce_partials", 0, 4), candidates, sizes)


def _optimizer(target: _Target) -> Iterator[Tunable]:
    """AdamW and the gradient norm over a flat buffer of float32."""
    device = target.device

    def adamw(parameters: int) -> Work:
        # The segments are cut into blocks of the candidate's size, so they are made in this call.
        shape = launch.block_shape("adamw", torch.float32, device)
        half = parameters // 2
        segment_table = torch.tensor([[0, half, 0], [half, half, 1]])  # start, length, group
        segments = block_table(segment_table, shape.block).to(device)

        state = [torch.randn(parameters, device=device).abs() for _ in range(4)]
        copy = torch.empty(parameters, dtype=torch.bfloat16, device=device)
        rows = [[1.0, 0.1, 1e-12], [0.5, 0.1, 1e-12]]  # lr factor, weight decay, eps
        groups = torch.tensor(rows, dtype=torch.float64, device=device)
        step = Control(1e-3, step=1, clip=1, correction1=0.1, correction2=0.05, grad_norm=1)
        control = new_control(device, step)
        return partial(LAUNCHERS["adamw_"], copy, *state, segments, groups, control, 0.9, 0.95)

    def norm(parameters: int) -> Work:
        gradient = torch.randn(parameters, device=device)
        return partial(LAUNCHERS["sum_of_squares"], gradient, None)

    blocks = []
    for block, elements_a_thread in itertools.product((512, 1024, 2048, 4096), (4, 8)):
        blocks.append((block, target.warps(block // elements_a_thread), 1))
    for operation, prepare in (("adamw", adamw), ("sum_of_squares", norm)):
        sizes = tuple(partial(prepare, count) for count in target.sweep.parameters)
        yield Tunable((operation, 0, 4), tuple(blocks), sizes)


def _cross_entropy(target: _Target) -> Iterator[Tunable]:
    """Cross-entropy of logits, forward and backward, at the first number of rows."""
    rows = target.sweep.rows[0]
    device = target.device

    def inputs(vocabulary: int) -> tuple[Tensor, Tensor]:
        logits = target.random(rows, vocabulary)
        return logits, torch.zeros(rows, dtype=torch.int64, device=device)

    def forward(vocabulary: int) -> Work:
        logits, labels = inputs(vocabulary)
        logit_scale = 0.5
        with_sum = False
        arguments = (logits, labels, 0, vocabulary, logit_scale, with_sum)
        return partial(LAUNCHERS["cross_entropy_forward"], *arguments)

    def backward(vocabulary: int) -> Work:
        logits, labels = inputs(vocabulary)
        lse = torch.full((rows,), 20.0, device=device)
        grad_scale = torch.ones(1, device=device)
        # The ignored label, z loss, label smoothing, true vocabulary and logit scale.
        settings = (-100, 0.0, 0.0, vocabulary, 0.5)
        arguments = (logits, labels, 0, lse, grad_scale, *settings)
        return partial(LAUNCHERS["cross_entropy_backward_"], *arguments)

    tiles = _tiles((1024, 2048, 4096, 8192, 16384), 64, target)
    for operation, prepare, stage_counts in (
        ("cross_entropy_forward", forward, (1, 2, 3)),
        # The backward reads each logit in a program of its own, so there is no loop to pipeline.
        ("cross_entropy_backward", backward, (1,)),
    ):
        candidates = tuple(
            (*tile, stages) for tile, stages in itertools.product(tiles, stage_counts)
        )
        sizes = tuple(partial(prepare, vocabulary) for vocabulary in target.sweep.vocabularies)
        yield Tunable((operation, 0, target.itemsize), candidates, sizes)
