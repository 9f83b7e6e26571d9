"""Compile the model's kernels ahead of time and print what their machine code uses, as JSON (run by a test).

A program of its own: a process that has chosen Triton's interpreter cannot compile. Each argument is ARCHITECTURE:HIDDEN:DTYPE,
with :rms for RMSNorm without biases, else LayerNorm with every optional vector; :all adds the kernels beside the residual norm,
:controls what the code looks like without the stages, the register cap and the alignment.
"""

import dataclasses
import json
import sys

import torch

from megatron_completep.kernels import launch, residual_norm, rotary_kernel, squared_relu_kernel, swiglu_kernel
from megatron_completep.kernels.ahead_of_time import Launch, compile_launch, record, resources

ROWS = 8192


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(hidden, dtype, rms):
    """(name, launcher call) for a stream [8192, hidden]."""
    x, vector, statistics = meta(ROWS, hidden, dtype=dtype), meta(hidden, dtype=dtype), meta(ROWS)
    bias = None if rms else vector
    has = not rms
    yield "norm", lambda: residual_norm.norm_forward(x, vector, bias, 1e-5, rms, dtype)
    yield "forward", lambda: residual_norm.residual_norm_forward(x, x, bias, vector, bias, 0.3, 1e-5, rms, 0.0, None)
    saved = (x, x, x, statistics, statistics, vector)
    yield "backward", lambda: residual_norm.residual_norm_backward(*saved, True, has, has, 0.3, rms, 0.0, None)
    yield "add", lambda: residual_norm.scaled_add_forward(x, x, bias, 0.3, 0.0, None)
    yield "add backward", lambda: residual_norm.scaled_add_backward(x, has, 0.3, 0.0, None, dtype)
    yield "reduce", lambda: residual_norm.reduce_partials(meta(264, 3, hidden), 1, meta(hidden))
    wide = meta(ROWS, 8 * hidden, dtype=dtype)
    yield "swiglu", lambda: swiglu_kernel.swiglu_forward(wide)
    yield "swiglu backward", lambda: swiglu_kernel.swiglu_backward(meta(ROWS, 4 * hidden, dtype=dtype), wide)
    yield "squared relu", lambda: squared_relu_kernel.squared_relu_forward(wide)
    yield "squared relu backward", lambda: squared_relu_kernel.squared_relu_backward(wide, wide)
    heads, angle = meta(2048, 4, hidden // 64, 64, dtype=dtype), meta(2048, 1, 32)
    yield "rotary", lambda: rotary_kernel.rotary(heads, angle, angle, False)
    yield "rotary in place", lambda: rotary_kernel.rotary_(heads, angle, angle, True)


def report(recorded, architecture):
    used = resources(compile_launch(recorded, architecture))
    programs = recorded.grid[0] / launch.processors(architecture)
    return {**dataclasses.asdict(used), "threads": 32 * recorded.parameters["num_warps"], "programs_per_processor": programs}


def controls(found, architecture, hidden, dtype, rms):
    """What the machine code looks like without the things that the checks ask for."""
    (backward,) = (r for name, call in calls(hidden, dtype, rms) if name == "backward" for r in record(call, architecture))
    unstaged = Launch(backward.kernel, backward.grid, backward.arguments, {**backward.parameters, "STAGES": 1})
    found["backward without stages"] = report(unstaged, architecture)
    uncapped = {name: value for name, value in backward.parameters.items() if name != "maxnreg"}
    found["backward without register cap"] = report(Launch(backward.kernel, backward.grid, backward.arguments, uncapped), architecture)
    # 8193 elements, the first left out: addresses that are not multiples of 16 bytes.
    shifted = meta(ROWS * 2 * hidden + 1, dtype=dtype)[1:].view(ROWS, 2 * hidden)
    (unaligned,) = record(lambda: swiglu_kernel.swiglu_forward(shifted), architecture)
    found["swiglu of unaligned rows"] = report(unaligned, architecture)


def main():
    found = {}
    for argument in sys.argv[1:]:
        architecture, hidden, dtype, *rest = argument.split(":")
        shape = (int(hidden), getattr(torch, dtype), "rms" in rest)
        kernels = found[argument] = {}
        for name, call in calls(*shape):
            if "all" not in rest and name not in ("forward", "backward"):
                continue  # the code of the others hardly depends on the width
            for recorded in record(call, architecture):
                kernels[name if recorded.name != "vector_gradient_kernel" else "vector gradients"] = report(recorded, architecture)
        if "controls" in rest:
            controls(kernels, architecture, *shape)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
