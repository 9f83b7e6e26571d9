"""What the tuner of launch parameters tries: for each entry of the launch table its candidates, and the launches they are timed on.

Candidates are counted in threads, so that they mean the same on NVIDIA's warps and AMD's wavefronts. The work is the Triton launchers
themselves: on a GPU they run, on torch's `meta` device (a dry run, recorded) they have shapes and no data.
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

Prepare = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Tunable:
    """One entry (operation, bucket, bytes) of the launch table. `sizes`: each makes, under the candidate, the call to be timed."""

    key: tuple[str, int, int]
    candidates: tuple[tuple[int, ...], ...]
    sizes: tuple[Prepare, ...]

    @property
    def name(self) -> str:
        operation, bucket, itemsize = self.key
        return f"{operation} {bucket or ''} ({itemsize} bytes)".replace("  ", " ")


@dataclass(frozen=True)
class Sweep:
    """The shapes that the table is tuned for."""

    hidden: tuple[int, ...] = (768, 1024, 2048, 4096, 5120, 8192)
    rows: tuple[int, ...] = (4096, 16384)
    vocabularies: tuple[int, ...] = (50_432, 131_072)
    head_dims: tuple[int, ...] = (64, 128)
    parameters: tuple[int, ...] = (1 << 24, 1 << 28)
    dtype: torch.dtype = torch.bfloat16


def tunables(sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    """Every entry of the table that the sweep's shapes read."""
    for hidden in sweep.hidden:
        yield from _rows(hidden, sweep, device, architecture)
    for columns in sorted({launch.column_bucket(4 * hidden) for hidden in sweep.hidden}):
        yield from _pointwise(columns, sweep, device, architecture)
    yield from _squared_relu(sweep, device, architecture)
    for head_dim in sweep.head_dims:
        yield _rotary(head_dim, sweep, device)
    yield _reduction(sweep, device, architecture)
    yield from _optimizer(sweep, device, architecture)
    yield from _cross_entropy(sweep, device, architecture)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _forward_candidates(hidden: int, architecture: str) -> tuple[tuple[int, ...], ...]:
    """(rows, warps): eight to 64 elements a thread."""
    width = row_bucket(hidden)
    threads = (32, 64, 128, 256, 512, 1024)
    found = {
        (rows, launch.warps(count, architecture))
        for rows, count in itertools.product((1, 2, 4, 8), threads)
        if 8 <= rows * width / count <= 64
        and (rows == 1 or width <= 1024)
        and count >= launch.lanes(architecture)
    }
    return tuple(sorted(found))


def _backward_candidates(hidden: int, architecture: str) -> tuple[tuple[int, ...], ...]:
    """(rows, warps, stages, programs a processor, register cap): eight to 32 elements a thread, 128 to 1024 threads a processor."""
    width = row_bucket(hidden)
    found = set()
    for rows, count, resident, stages in itertools.product(
        (1, 2, 4), (32, 64, 128, 256, 512), (128, 256, 512, 1024), (1, 2, 3)
    ):
        if (
            not 8 <= rows * width / count <= 32
            or count > resident
            or count < launch.lanes(architecture)
        ):
            continue
        cap = (
            min(255, 65536 // resident) if architecture.startswith("sm_") and resident >= 512 else 0
        )
        found.add((rows, launch.warps(count, architecture), stages, resident // count, cap))
    return tuple(sorted(found))


def _rows(hidden: int, sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    dtype, bucket = sweep.dtype, (row_bucket(hidden), sweep.dtype.itemsize)
    weight = _random(hidden, dtype=dtype, device=device)

    def stream(rows: int) -> Tensor:
        return _random(rows, hidden, dtype=dtype, device=device)

    join, norm = Join(0.3), Norm("rmsnorm")

    def forward(rows: int) -> Callable[[], Any]:
        given = (stream(rows), stream(rows), None, weight, None, join, norm)
        return partial(launch_residual_norm_forward, *given)

    def backward(rows: int) -> Callable[[], Any]:
        saved = (
            stream(rows),
            stream(rows),
            stream(rows),
            torch.empty(0, device=device),
            torch.rand(rows, device=device),
            weight,
        )
        call = partial(launch_residual_norm_backward, *saved, True, False, False, join, norm)
        return partial(reduced, call)

    def add(rows: int) -> Callable[[], Any]:
        return partial(launch_scaled_add_forward, stream(rows), stream(rows), None, join)

    def add_backward(rows: int) -> Callable[[], Any]:
        return partial(
            reduced, partial(launch_scaled_add_backward, stream(rows), True, join, dtype)
        )

    def reduced(work: Callable[[], Any]) -> None:
        """With the reduction, whose cost grows with the number of programs."""
        LAUNCHERS["reduce_partials_"](work()[-1], 0, d_weight)

    d_weight = torch.zeros(hidden, device=device)
    forwards, backwards = (
        _forward_candidates(hidden, architecture),
        _backward_candidates(hidden, architecture),
    )
    for operation, candidates, prepare in (
        ("norm_forward", forwards, forward),
        ("norm_backward", backwards, backward),
        ("scaled_add_forward", forwards, add),
        ("scaled_add_backward", backwards, add_backward),
    ):
        yield Tunable(
            (operation, *bucket), candidates, tuple(partial(prepare, rows) for rows in sweep.rows)
        )


def _tiles(architecture: str) -> tuple[tuple[int, ...], ...]:
    """(elements, warps): eight to 32 elements a thread."""
    pairs = itertools.product((1024, 2048, 4096, 8192), (128, 256, 512))
    return tuple(
        (elements, launch.warps(threads, architecture))
        for elements, threads in pairs
        if 8 <= elements / threads <= 32
    )


def _pointwise(
    columns: int, sweep: Sweep, device: torch.device, architecture: str
) -> Iterator[Tunable]:
    def forward(rows: int) -> Callable[[], Any]:
        return partial(
            LAUNCHERS["swiglu_forward"],
            _random(rows, 2 * columns, dtype=sweep.dtype, device=device),
        )

    def backward(rows: int) -> Callable[[], Any]:
        d_out, gate_up = (
            _random(rows, width, dtype=sweep.dtype, device=device)
            for width in (columns, 2 * columns)
        )
        return partial(LAUNCHERS["swiglu_backward"], d_out, gate_up)

    for operation, prepare in (("swiglu_forward", forward), ("swiglu_backward", backward)):
        key = (operation, launch.column_bucket(columns), sweep.dtype.itemsize)
        yield Tunable(key, _tiles(architecture), (partial(prepare, sweep.rows[0]),))


def _squared_relu(sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    def prepare(operation: str, rows: int) -> Callable[[], Any]:
        tensors = 1 if operation.endswith("forward") else 2
        return partial(
            LAUNCHERS[operation],
            *(
                _random(rows, 4 * sweep.hidden[0], dtype=sweep.dtype, device=device)
                for _ in range(tensors)
            ),
        )

    for operation in ("squared_relu_forward", "squared_relu_backward"):
        sizes = tuple(partial(prepare, operation, rows) for rows in sweep.rows)
        yield Tunable(
            (operation, 0, sweep.dtype.itemsize),
            tuple((*tile, 1) for tile in _tiles(architecture)),
            sizes,
        )


def _rotary(head_dim: int, sweep: Sweep, device: torch.device) -> Tunable:
    def prepare(rows: int) -> Callable[[], Any]:
        angle = torch.rand(rows, 1, head_dim // 2, device=device) * 6.3
        x = _random(rows, 1, 16, head_dim, dtype=sweep.dtype, device=device)
        return partial(LAUNCHERS["rotary_"], x, angle.cos(), angle.sin(), False)

    key = ("rotary", launch.column_bucket(head_dim // 2), sweep.dtype.itemsize)
    return Tunable(
        key,
        ((256,), (512,), (1024,), (2048,)),
        tuple(partial(prepare, rows) for rows in sweep.rows),
    )


def _reduction(sweep: Sweep, device: torch.device, architecture: str) -> Tunable:
    def prepare(hidden: int) -> Callable[[], Any]:
        partials = torch.randn(launch.processors(architecture) * 4, 1, hidden, device=device)
        return partial(
            LAUNCHERS["reduce_partials_"], partials, 0, torch.zeros(hidden, device=device)
        )

    shapes = ((32, 32, 128), (64, 32, 128), (128, 32, 256), (32, 128, 256), (64, 64, 256))
    candidates = tuple(
        (rows, columns, launch.warps(threads, architecture)) for rows, columns, threads in shapes
    )
    return Tunable(
        ("reduce_partials", 0, 4),
        candidates,
        tuple(partial(prepare, hidden) for hidden in sweep.hidden),
    )


def _optimizer(sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    def adamw(parameters: int) -> Callable[[], Any]:
        """The segments are cut by the table, so they are made anew for each candidate."""
        state = [torch.randn(parameters, device=device).abs() for _ in range(4)]
        half = torch.empty(parameters, dtype=torch.bfloat16, device=device)
        pieces = torch.tensor([[0, parameters // 2, 0], [parameters // 2, parameters // 2, 1]])
        segments = block_table(pieces, launch.block_shape("adamw", torch.float32, device).block).to(
            device
        )
        groups = torch.tensor(
            [[1.0, 0.1, 1e-12], [0.5, 0.1, 1e-12]], dtype=torch.float64, device=device
        )
        step = Control(1e-3, step=1, clip=1, correction1=0.1, correction2=0.05, grad_norm=1)
        control = new_control(device, step)
        return partial(LAUNCHERS["adamw_"], half, *state, segments, groups, control, 0.9, 0.95)

    def norm(parameters: int) -> Callable[[], Any]:
        return partial(LAUNCHERS["sum_of_squares"], torch.randn(parameters, device=device), None)

    blocks = tuple(
        (block, launch.warps(block // each, architecture), 1)
        for block in (512, 1024, 2048, 4096)
        for each in (4, 8)
    )
    yield Tunable(
        ("adamw", 0, 4), blocks, tuple(partial(adamw, count) for count in sweep.parameters)
    )
    yield Tunable(
        ("sum_of_squares", 0, 4), blocks, tuple(partial(norm, count) for count in sweep.parameters)
    )


def _cross_entropy(sweep: Sweep, device: torch.device, architecture: str) -> Iterator[Tunable]:
    def logits(vocabulary: int) -> tuple[Tensor, Tensor]:
        rows = sweep.rows[0]
        return _random(rows, vocabulary, dtype=sweep.dtype, device=device), torch.zeros(
            rows, dtype=torch.int64, device=device
        )

    def forward(vocabulary: int) -> Callable[[], Any]:
        return partial(
            LAUNCHERS["cross_entropy_forward"], *logits(vocabulary), 0, vocabulary, 0.5, False
        )

    def backward(vocabulary: int) -> Callable[[], Any]:
        x, labels = logits(vocabulary)
        lse, one = torch.full((len(labels),), 20.0, device=device), torch.ones(1, device=device)
        return partial(
            LAUNCHERS["cross_entropy_backward_"],
            x,
            labels,
            0,
            lse,
            one,
            -100,
            0.0,
            0.0,
            vocabulary,
            0.5,
        )

    pairs = itertools.product((1024, 2048, 4096, 8192, 16384), (128, 256, 512))
    blocks = tuple(
        (block, launch.warps(threads, architecture))
        for block, threads in pairs
        if 8 <= block / threads <= 64
    )
    for operation, prepare, stages in (
        ("cross_entropy_forward", forward, (1, 2, 3)),
        ("cross_entropy_backward", backward, (1,)),
    ):
        sizes = tuple(partial(prepare, vocabulary) for vocabulary in sweep.vocabularies)
        yield Tunable(
            (operation, 0, sweep.dtype.itemsize),
            tuple((*block, count) for block in blocks for count in stages),
            sizes,
        )
