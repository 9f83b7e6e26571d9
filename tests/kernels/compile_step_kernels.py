"""Compile the optimizer and loss kernels ahead of time and print what their machine code uses,
as JSON (run by a test).

A program of its own: a process that has chosen Triton's interpreter cannot compile.
"""

import dataclasses
import json
import sys

import torch

from megatron_completep.kernels import new_control
from megatron_completep.kernels.ahead_of_time import compile_launch, record, resources
from megatron_completep.kernels.ops import adamw, cross_entropy, grad_norm
from tests.kernels.step_kernels import mutant


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def calls():
    """The launchers as a bf16 run calls them:
    1000 parameters, a vocabulary of 50,304 padded to 50,432.
    """
    state = [meta(64_000) for _ in range(4)]
    segments, groups = meta(1000, 3, dtype=torch.int64), meta(1000, 3, dtype=torch.float64)
    control, scalar = new_control("meta"), meta(dtype=torch.float64)
    yield (
        "adamw",
        lambda: adamw.launch_adamw_(
            meta(64_000, dtype=torch.bfloat16), *state, segments, groups, control, 0.9, 0.95
        ),
    )
    yield (
        "adamw float32",
        lambda: adamw.launch_adamw_(None, *state, segments, groups, control, 0.9, 0.95),
    )
    unhinted = mutant("ops.adamw", "tl.multiple_of(tl.load(row), 64)", "tl.load(row)")
    yield (
        "adamw without its hint",
        lambda: unhinted.launch_adamw_(None, *state, segments, groups, control, 0.9, 0.95),
    )
    yield "sum_of_squares", lambda: grad_norm.launch_sum_of_squares(state[0], segments)
    yield "begin_step", lambda: grad_norm.launch_begin_step_(control, scalar, 1.0, 0.9, 0.95)
    logits, labels = meta(8192, 50_432, dtype=torch.bfloat16), meta(8192, dtype=torch.int64)
    yield (
        "cross_entropy_forward",
        lambda: cross_entropy.launch_cross_entropy_forward(logits, labels, 0, 50_304, 0.25, False),
    )
    backward = (labels, 0, meta(8192), meta(8192), -100, 1e-4, 0.0, 50_304, 0.25)
    yield (
        "cross_entropy_backward",
        lambda: cross_entropy.launch_cross_entropy_backward_(logits, *backward),
    )


def main():
    found = {}
    for architecture in sys.argv[1:]:
        found[architecture] = {}
        for name, call in calls():
            (launch,) = record(call, architecture)
            found[architecture][name] = dataclasses.asdict(
                resources(compile_launch(launch, architecture))
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
