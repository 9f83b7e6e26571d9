"""Fused operations for transformers trained under CompleteP.

GPU tensors run Triton kernels, CPU tensors plain torch. The package needs torch, and Triton once a
GPU tensor arrives; it knows nothing of models. `reference.py` defines every operation; `ops/` holds
one a file, and `cpu/` what CPU tensors run; `control.py` is the record that the optimizer's
operations share.
"""

# transformers imports whatever is called `kernels`, to ask for its version. In a checkout that is
# this folder, and it must answer with nothing, not with an error: a second registration of the
# operations would fail. tests/interop/test_import.py needs this.
if __name__ != "kernels":
    from .control import Control, new_control, read_control
    from .cpu.compiled import CompiledDefinitions
    from .ops.adamw import adamw_, device_segments
    from .ops.cross_entropy import (
        cross_entropy_backward_,
        cross_entropy_forward,
        cross_entropy_loss,
        unembedding_cross_entropy,
    )
    from .ops.float8 import float8_cast, largest_magnitude, largest_of_segments
    from .ops.grad_norm import begin_step_, sum_of_squares
    from .ops.head_norm import normed_heads
    from .ops.join_heads import join_heads
    from .ops.partial_sums import Sink, reduce_partials
    from .ops.residual_norm import norm, scaled_residual_norm
    from .ops.rotary import rotary, rotary_
    from .ops.scaled_add import scaled_add
    from .ops.squared_relu import squared_relu
    from .ops.swiglu import swiglu
    from .ops.wide_product import add_product
    from .reference import Join, Norm, dropout_seed

__all__ = [
    "CompiledDefinitions",
    "Control",
    "Join",
    "Norm",
    "Sink",
    "add_product",
    "adamw_",
    "begin_step_",
    "cross_entropy_backward_",
    "cross_entropy_forward",
    "cross_entropy_loss",
    "device_segments",
    "dropout_seed",
    "float8_cast",
    "join_heads",
    "largest_magnitude",
    "largest_of_segments",
    "new_control",
    "norm",
    "normed_heads",
    "read_control",
    "reduce_partials",
    "rotary",
    "rotary_",
    "scaled_add",
    "scaled_residual_norm",
    "squared_relu",
    "sum_of_squares",
    "swiglu",
    "unembedding_cross_entropy",
]
