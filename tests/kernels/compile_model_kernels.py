"""Compile the model's kernels ahead of time and print what their machine code uses,
as JSON (run by a test).

A program of its own: a process that has chosen Triton's interpreter cannot compile. Each argument
is ARCHITECTURE:HIDDEN:DTYPE, with :rms for RMSNorm without biases, else LayerNorm with every
optional vector; :dropout for the residual norm with dropout; :all adds the kernels beside the
residual norm, :controls what the code looks like without the stages, the register cap
and the alignment.
"""

import dataclasses
import json
import sys

import torch

from megatron_completep.kernels import Join, Norm, launch
from megatron_completep.kernels.ahead_of_time import Launch, compile_launch, record, resources
from megatron_completep.kernels.ops import (
    float8,
    head_norm,
    join_heads,
    partial_sums,
    residual_norm,
    rotary,
    scaled_add,
    squared_relu,
    swiglu,
)
from tests.kernels.step_kernels import launchers

ROWS = 8192
norms = launchers(residual_norm, scaled_add, partial_sums)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(hidden, dtype, rms, dropout, norms=norms):
    """(name, launcher call) for a stream [8192, hidden]."""
    x, vector, statistics = meta(ROWS, hidden, dtype=dtype), meta(hidden, dtype=dtype), meta(ROWS)
    bias = None if rms else vector
    has = not rms
    join = Join(0.3, 0.1, meta(7, dtype=torch.int64)) if dropout else Join(0.3)
    norm = Norm("rmsnorm" if rms else "layernorm")
    yield "norm", lambda: norms.norm_forward(x, vector, bias, norm, dtype)
    yield "forward", lambda: norms.residual_norm_forward(x, x, bias, vector, bias, join, norm)
    saved = (x, x, x, statistics, statistics, vector)
    yield "backward", lambda: norms.residual_norm_backward(*saved, True, has, has, join, norm)
    yield "add", lambda: norms.scaled_add_forward(x, x, bias, join)
    yield "add backward", lambda: norms.scaled_add_backward(x, has, join, dtype)
    sums = (meta(hidden), meta(hidden), meta(hidden))
    yield "reduce", lambda: norms.reduce_partials(meta(264, 3, hidden), *sums, 0)
    wide = meta(ROWS, 8 * hidden, dtype=dtype)
    yield "swiglu", lambda: swiglu.launch_swiglu_forward(wide)
    yield (
        "swiglu backward",
        lambda: swiglu.launch_swiglu_backward(meta(ROWS, 4 * hidden, dtype=dtype), wide),
    )
    yield "squared relu", lambda: squared_relu.launch_squared_relu_forward(wide)
    yield "squared relu backward", lambda: squared_relu.launch_squared_relu_backward(wide, wide)
    heads, angle = meta(2048, 4, hidden // 64, 64, dtype=dtype), meta(2048, 1, 32)
    yield "rotary", lambda: rotary.launch_rotary(heads, angle, angle, False)
    size = 128 if hidden >= 2048 else 64
    normed = meta(2048, 4, 24, size, dtype=dtype)
    gain, half = meta(size, dtype=dtype), meta(2048, 1, size // 2)
    gains = (gain, gain, half, half)
    yield "head norm", lambda: head_norm.launch_head_norm_forward(normed, *gains, 16, 1e-5)
    # Gradients as attention leaves them: [B, N, S, D] in memory.
    parts = [meta(4, count, 2048, size, dtype=dtype).permute(2, 0, 1, 3) for count in (16, 4, 4)]
    rstds = (meta(ROWS * 16), meta(ROWS * 4))
    yield (
        "head norm backward",
        lambda: head_norm.launch_head_norm_backward(*parts, normed, *rstds, *gains),
    )
    yield "join heads", lambda: join_heads.launch_join_heads(*parts, half, half)
    yield "rotary in place", lambda: rotary.launch_rotary_(heads, angle, angle, True)
    amax, table = meta(), meta(128, 3, dtype=torch.int64)
    yield "float8 largest", lambda: float8.launch_largest(x)
    flat = meta(ROWS * hidden, dtype=dtype)
    yield "float8 of segments", lambda: float8.launch_largest_of_segments(flat, table, 4)
    yield "float8 cast", lambda: float8.launch_cast(x, amax, True, False)
    yield "float8 cast, turned", lambda: float8.launch_cast(x, amax, False, True)


def report(recorded, architecture):
    used = resources(compile_launch(recorded, architecture))
    parameters = recorded.parameters
    return {
        **dataclasses.asdict(used),
        "threads": launch.lanes(architecture) * parameters["num_warps"],
        "programs_per_processor": recorded.grid[0] / launch.processors(architecture),
        # Of a load inside a loop: those before it, and the one in it.
        "copies": parameters.get("STAGES", 1),
        "rows": parameters.get("ROWS", 1),
        "segments": len(parameters.get("WIDTHS", "1")),
    }


def controls(found, architecture, hidden, dtype, rms, dropout):
    """What the machine code looks like without the things that the checks ask for."""

    def backward_of(norms, **changes):
        (call,) = (
            call for name, call in calls(hidden, dtype, rms, dropout, norms) if name == "backward"
        )
        (recorded,) = record(call, architecture)
        parameters = {
            name: value
            for name, value in {**recorded.parameters, **changes}.items()
            if value is not None
        }
        return report(
            Launch(recorded.kernel, recorded.grid, recorded.arguments, parameters), architecture
        )

    found["backward without stages"] = backward_of(norms, STAGES=1)
    found["backward without register cap"] = backward_of(norms, WIDTHS=(hidden,), maxnreg=None)
    # 8193 elements, the first left out: addresses that are not multiples of 16 bytes.
    shifted = meta(ROWS * 2 * hidden + 1, dtype=dtype)[1:].view(ROWS, 2 * hidden)
    (unaligned,) = record(lambda: swiglu.launch_swiglu_forward(shifted), architecture)
    found["swiglu of unaligned rows"] = report(unaligned, architecture)


def main():
    found = {}
    for argument in sys.argv[1:]:
        architecture, hidden, dtype, *rest = argument.split(":")
        shape = (int(hidden), getattr(torch, dtype), "rms" in rest, "dropout" in rest)
        kernels = found[argument] = {}
        for name, call in calls(*shape):
            if "all" not in rest and name not in ("forward", "backward"):
                continue  # the code of the others hardly depends on the width
            for recorded in record(call, architecture):
                kernels[
                    name if recorded.name != "norm_vector_gradients_kernel" else "vector gradients"
                ] = report(recorded, architecture)
        if "controls" in rest:
            controls(kernels, architecture, *shape)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
