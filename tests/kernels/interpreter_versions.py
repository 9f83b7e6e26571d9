"""Which versions of triton and numpy the interpreter works with."""


def interpreter_problem(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter cannot run kernels with these versions; None where it can.

    Below 3.8 it turns arrays of one element into Python numbers, which numpy refuses from 2.4 on.
    """
    if _release(triton) >= (3, 8) or _release(numpy) < (2, 4):
        return None
    return (
        f"triton {triton} interprets kernels with numpy below 2.4 only, and this is numpy {numpy}. "
        "Install megatron-completep[old-triton] (numpy<2.4), or triton 3.8 or later"
    )


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
