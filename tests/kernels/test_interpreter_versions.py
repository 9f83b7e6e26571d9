"""Kernel tests on a CPU are skipped with a reason where numpy is too new for the interpreter."""

import pytest

from tests.kernels.interpreter_versions import interpreter_problem


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.7.1+git12", "2.10.0", False),
        ("3.8.0", "2.5.5", True),
        ("3.10.0", "2.5.5", True),
    ],
)
def test_an_old_interpreter_needs_an_old_numpy(triton: str, numpy: str, works: bool) -> None:
    problem = interpreter_problem(triton, numpy)
    assert (problem is None) == works
    if problem is not None:
        assert numpy in problem and "numpy<2.4" in problem
