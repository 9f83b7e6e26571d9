"""Fused operations for transformers trained under CompleteP: Triton on GPU tensors, plain torch on CPU tensors.

Needs torch, and Triton once a GPU tensor arrives; knows nothing of models. `reference.py` defines every operation,
`operators.py` registers them with torch, the files named after an operation hold its Triton kernels.
"""

# transformers imports whatever is called `kernels`, to ask for its version. In a checkout that is this folder, and it must answer
# with nothing: a second registration of the operations would fail.
if __name__ != "kernels":
    from .loss_operators import cross_entropy_backward_, cross_entropy_forward, cross_entropy_loss, unembedding_cross_entropy
    from .operators import (
        norm,
        reduce_partials,
        residual_norm_backward,
        residual_norm_forward,
        rotary,
        rotary_,
        scaled_add,
        scaled_add_backward,
        scaled_add_forward,
        scaled_residual_norm,
        squared_relu,
        swiglu,
    )
    from .optimizer_operators import CONTROL_SIZE, adamw_, begin_step_, block_table, device_segments, sum_of_squares

__all__ = [
    "CONTROL_SIZE",
    "adamw_",
    "begin_step_",
    "block_table",
    "cross_entropy_backward_",
    "cross_entropy_forward",
    "cross_entropy_loss",
    "device_segments",
    "norm",
    "reduce_partials",
    "residual_norm_backward",
    "residual_norm_forward",
    "rotary",
    "rotary_",
    "scaled_add",
    "scaled_add_backward",
    "scaled_add_forward",
    "scaled_residual_norm",
    "squared_relu",
    "sum_of_squares",
    "swiglu",
    "unembedding_cross_entropy",
]
