"""Makes bf16 right in Triton's CPU interpreter, and casts to float8 (checked on triton 3.6.0 and
3.9.0; casts are bit-exact against torch).

Call `install()` before any interpreted kernel runs. It does not fix `tl.sum` on bf16: cast to fp32
first.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle = interpreter.TensorHandle


FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def float32_to_bf16(values):
    """Round to nearest even, as the hardware does; returns the uint16 bit patterns."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def bf16_to_float32(bits):
    return (
        (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16))
        .view(np.float32)
        .reshape(bits.shape)
    )


def install():
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bf16_fixed", False):
        return
    old_cast, old_binary, old_unary = builder.cast_impl, builder.binary_op, builder.unary_op
    old_dot = builder.create_dot
    old_fp_to_fp = builder.create_fp_to_fp
    old_splat = builder.create_splat

    def is_bf16(handle):
        return handle.dtype.scalar == tl.bfloat16

    def cast(self, source, target):
        from_, to = source.dtype.scalar, target.scalar
        if from_ == tl.bfloat16 and to != from_:
            wide = Handle(bf16_to_float32(source.data), tl.float32)
            return wide if to == tl.float32 else old_cast(self, wide, target)
        if to == tl.bfloat16 and from_ != to:
            return Handle(float32_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return old_cast(self, source, target)

    def fp_to_fp(self, source, target, rounding):
        if target.scalar in FLOAT8 and source.dtype.scalar == tl.float32:
            # The interpreter's own casts round ties away and lose NaN.
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(FLOAT8[target.scalar])
            return Handle(rounded.view(torch.uint8).numpy(), target.scalar)
        if target.scalar == tl.bfloat16 and rounding == interpreter._ir.ROUNDING_MODE.RTNE:
            return cast(self, source, target)
        return old_fp_to_fp(self, source, target, rounding)

    def binary(self, left, right, op):
        if not (is_bf16(left) and is_bf16(right)):
            return old_binary(self, left, right, op)
        out = op(bf16_to_float32(left.data), bf16_to_float32(right.data))
        return (
            Handle(out, tl.int1)
            if out.dtype == np.bool_
            else Handle(float32_to_bf16(out), tl.bfloat16)
        )

    def unary(self, x, op):
        return (
            Handle(float32_to_bf16(op(bf16_to_float32(x.data))), tl.bfloat16)
            if is_bf16(x)
            else old_unary(self, x, op)
        )

    def dot(self, a, b, accumulator, *rest):
        def widen(handle):
            return Handle(bf16_to_float32(handle.data), tl.float32) if is_bf16(handle) else handle

        return old_dot(self, widen(a), widen(b), accumulator, *rest)

    def splat(self, shape_type, value):
        # 3.9.0: a scalar comparison keeps its operand's dtype, and load/store refuse such a mask.
        if value.data.dtype == np.bool_:
            return Handle(
                np.full(shape_type.shape, value.data.reshape(-1)[0], dtype=np.bool_), tl.int1
            )
        return old_splat(self, shape_type, value)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
    builder.binary_op, builder.unary_op = binary, unary
    builder.create_dot, builder.create_splat = dot, splat
    builder._bf16_fixed = True
