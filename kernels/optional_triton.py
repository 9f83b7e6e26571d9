"""Triton, or a stand-in where it is not installed: the kernels' files can then be imported, and CPU tensors need no more."""

from typing import Any


class _Missing:
    """Answers to every name, and leaves what it decorates as it is."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, function: Any = None, **options: Any) -> Any:
        return self if function is None else function


triton: Any
tl: Any
try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    triton = tl = _Missing()
else:
    triton, tl = _triton, _language
