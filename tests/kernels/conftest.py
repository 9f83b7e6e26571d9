"""Kernel tests: on the GPU where there is one, else in Triton's interpreter,
which must be chosen before Triton is imported.
"""

import dataclasses
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.kernels.interpreter_versions import interpreter_problem

FOLDER = Path(__file__).parent

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "Triton was imported before its interpreter was chosen"
    )
    os.environ["TRITON_INTERPRET"] = "1"

    from tests.kernels.triton_interpreter_bf16 import install

    install()


def pytest_collection_modifyitems(items):
    """Skip the tests of this folder where the interpreter would fail them for its own reasons.

    Ahead-of-time compilation needs no interpreter.
    """
    if torch.cuda.is_available():
        return
    problem = interpreter_problem(version("triton"), version("numpy"))
    if problem is None:
        return
    for item in items:
        if FOLDER in item.path.parents and "compilation" not in item.path.name:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture
def far_away(monkeypatch):
    """Programs numbered from 2^31 / 256 on, memory accesses left out, int32 overflow an error:
    the arithmetic of a huge tensor.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    first = 2**31 // 256

    def zeros(self, pointers, mask, other, *_):
        dtype = pointers.get_element_ty()
        return interpreter.TensorHandle(
            torch.zeros(pointers.data.shape).numpy().astype(interpreter._get_np_dtype(dtype)), dtype
        )

    monkeypatch.setattr(
        type(builder),
        "set_grid_idx",
        lambda self, x, y, z: setattr(self, "grid_idx", (x + first, y, z)),
    )
    monkeypatch.setattr(
        type(builder), "create_get_num_programs", lambda self, axis: self.get_int32(2**24)
    )
    monkeypatch.setattr(type(builder), "create_masked_load", zeros)
    monkeypatch.setattr(
        type(builder), "create_masked_store", lambda self, pointers, value, mask, *_: None
    )
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
