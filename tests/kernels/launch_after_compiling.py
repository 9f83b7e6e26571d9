"""Compile ahead of time, then launch as a run would, up to the driver:
does Triton find what was compiled? Prints JSON (run by a test).

A program of its own: a process that has chosen Triton's interpreter cannot compile. The stand-in
for the driver knows the architecture and no device, so each launch ends where the kernel would be
loaded (Triton calls that a warm-up).
"""

import json
import sys
from pathlib import Path

import torch
import triton
from triton.runtime.driver import driver

from megatron_completep.kernels import Join, Norm
from megatron_completep.kernels.ahead_of_time import compile_launch, record, target
from megatron_completep.kernels.ops import residual_norm, swiglu

ARCHITECTURE, CACHE = sys.argv[1], Path(sys.argv[2])


class Driver:
    """What Triton asks of a driver before it loads a kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return target(ARCHITECTURE)


def calls():
    x = torch.empty(512, 768, dtype=torch.bfloat16, device="meta")
    vector = torch.empty(768, dtype=torch.bfloat16, device="meta")
    statistics = torch.empty(512, device="meta")
    how = Join(0.3), Norm("rmsnorm")
    yield lambda: residual_norm.launch_residual_norm_forward(x, x, vector, vector, None, *how)
    saved = (x, x, x, statistics, statistics, vector)
    yield lambda: residual_norm.launch_residual_norm_backward(*saved, True, False, True, *how)
    yield lambda: swiglu.launch_swiglu_forward(
        torch.empty(512, 3072, dtype=torch.bfloat16, device="meta")
    )


def compiled():
    return len([path for path in CACHE.rglob("*") if path.suffix in (".cubin", ".hsaco")])


def launch(recorded, **changes):
    recorded.kernel.run(
        *recorded.arguments, grid=recorded.grid, warmup=True, **{**recorded.parameters, **changes}
    )


def main():
    triton.knobs.cache.dir = str(CACHE)
    launches = [recorded for call in calls() for recorded in record(call, ARCHITECTURE)]
    for recorded in launches:
        compile_launch(recorded, ARCHITECTURE)
    counts = {"launches": len(launches), "compiled ahead": compiled()}
    driver.set_active(Driver())
    for recorded in launches:
        launch(recorded)
    counts["after launching"] = compiled()
    launch(launches[-1], num_warps=2)
    counts["after a launch that was not foreseen"] = compiled()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
