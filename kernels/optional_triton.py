"""Triton, or a stand-in where it is not installed.

With the stand-in the kernels' files can be imported all the same, and CPU tensors need no more.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload


class _Triton(Protocol):
    """The part of `triton` that is used here. Triton has no types of its own."""

    @overload
    def jit(self, fn: Callable[..., Any]) -> Any: ...

    @overload
    def jit(self, *, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...


class _Missing:
    """Answers to every name, and leaves what it decorates as it is."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, function: Any = None, **options: Any) -> Any:
        return self if function is None else function


triton: _Triton
# In a kernel `tl.tensor` is anything but a constant: a pointer, a number or a block. A pointer may
# also be None, which Triton compiles in.
tl: Any
try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    triton = _Missing()
    tl = _Missing()
else:
    triton = _triton
    tl = _language
