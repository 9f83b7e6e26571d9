"""Fused operations for transformers trained under CompleteP: Triton on GPU tensors, plain torch on CPU tensors.

Needs torch, and Triton once a GPU tensor arrives; knows nothing of models. `reference.py` defines every operation. The files named
after an operation hold, in this order: its kernels, their launchers, its operators in torch's library, its autograd function.
"""

# transformers imports whatever is called `kernels`, to ask for its version. In a checkout that is this folder, and it must answer
# with nothing, not with an error: a second registration of the operations would fail. tests/interop/test_import.py needs this.
if __name__ != "kernels":
    from .adamw import CONTROL_SIZE, adamw_, block_table, device_segments
    from .cross_entropy import cross_entropy_backward_, cross_entropy_forward, cross_entropy_loss, unembedding_cross_entropy
    from .grad_norm import begin_step_, sum_of_squares
    from .partial_sums import reduce_partials
    from .residual_norm import norm, residual_norm_backward, residual_norm_forward, scaled_residual_norm
    from .rotary_kernel import rotary, rotary_
    from .scaled_add_kernel import scaled_add, scaled_add_backward, scaled_add_forward
    from .squared_relu_kernel import squared_relu
    from .swiglu_kernel import swiglu
    from .wide_product import add_product

__all__ = [
    "CONTROL_SIZE",
    "add_product",
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
