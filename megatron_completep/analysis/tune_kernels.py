"""Times candidate launch shapes on the GPU at hand and writes the best into the launch table (kernels/tuned.py)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

from megatron_completep.analysis.kernel_cases import Case, cross_entropy_cases, optimizer_cases
from megatron_completep.kernels import launch, tuned

# The operation of the launch table that each timed kernel belongs to, and the shapes tried: (block, num_warps).
CANDIDATES: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "adamw": ("adamw", [(block, warps) for block in (512, 1024, 2048) for warps in (4, 8) if block // warps in (128, 256)]),
    "gradient norm": ("sum_of_squares", [(1024, 2), (1024, 4), (1024, 8)]),
    "cross-entropy forward": ("cross_entropy_forward", [(block, warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16)]),
    "cross-entropy forward + backward": (
        "cross_entropy_backward",
        [(block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8)],
    ),
}


def tuning_cases(device: torch.device) -> Iterator[Case]:
    """What is timed: two sizes of every operation, from the kernel benchmark."""
    for parameters in (1 << 24, 1 << 28):
        yield from optimizer_cases(parameters, device)
    for vocabulary in (32_000, 131_072):
        yield from cross_entropy_cases(8192, vocabulary, torch.bfloat16, device, with_compile=False)


@contextmanager
def launch_shape(architecture: str, operation: str, shape: tuple[int, int]) -> Iterator[None]:
    """Let `operation` launch with `shape` inside the block."""
    before = tuned.TUNED.get(architecture, {}).get(operation)
    table = tuned.TUNED.setdefault(architecture, {})
    table[operation] = shape
    launch._block_shape.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del table[operation]
        else:
            table[operation] = before
        launch._block_shape.cache_clear()


def median_microseconds(run: Callable[[], object]) -> float:
    return 1e3 * triton.testing.do_bench(run, warmup=10, rep=60, quantiles=[0.5])


def tune(
    device: torch.device,
    cases: Callable[[torch.device], Iterable[Case]] = tuning_cases,
    time: Callable[[Callable[[], object]], float] = median_microseconds,
    say: Callable[[str], None] = print,
) -> dict[str, tuple[int, int]]:
    """Best shape of every operation: the smallest geometric mean of the times over its cases."""
    architecture = launch.architecture(device)
    times: dict[str, dict[tuple[int, int], list[float]]] = {}
    # AdamW's blocks are cut by the table, so the cases are built anew for each of its shapes.
    for index in range(max(len(shapes) for _, shapes in CANDIDATES.values())):
        tried = {kernel: (operation, shapes[index]) for kernel, (operation, shapes) in CANDIDATES.items() if index < len(shapes)}
        with _all_shapes(architecture, tried.values()):
            for case in cases(device):
                if case.kernel in tried:
                    operation, shape = tried[case.kernel]
                    took = time(case.implementations["ours"])
                    times.setdefault(operation, {}).setdefault(shape, []).append(took)
                    say(f"{operation} {shape[0]} elements, {shape[1]} warps, {case.rows} x {case.columns}: {took:.1f} us")
    return {operation: min(found, key=lambda shape: statistics.geometric_mean(found[shape])) for operation, found in times.items()}


@contextmanager
def _all_shapes(architecture: str, tried: Iterable[tuple[str, tuple[int, int]]]) -> Iterator[None]:
    pairs = list(tried)
    if not pairs:
        yield
        return
    with launch_shape(architecture, *pairs[0]), _all_shapes(architecture, pairs[1:]):
        yield


def write_table(path: Path, architecture: str, found: dict[str, tuple[int, int]], where: str) -> None:
    """Write kernels/tuned.py with `found` for `architecture` and what it already held for others. `where`: what it was timed on."""
    table = {**tuned.TUNED, architecture: dict(found)}
    lines = [
        '"""Launch parameters found by tools/tune_kernels.py: {architecture: {operation: (block, num_warps)}}.',
        "",
        f"Last entry: {architecture}, timed on {where}.",
        '"""',
        "",
        "TUNED: dict[str, dict[str, tuple[int, int]]] = {",
    ]
    for name, operations in sorted(table.items()):
        lines.append(f'    "{name}": {{')
        lines += [f'        "{operation}": ({block}, {warps}),' for operation, (block, warps) in sorted(operations.items())]
        lines.append("    },")
    path.write_text("\n".join([*lines, "}"]) + "\n")
