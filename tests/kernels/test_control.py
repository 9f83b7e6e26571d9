"""The record of an optimizer step: eight numbers, each with one name and one place."""

import ast
from pathlib import Path

import pytest
import torch

from megatron_completep.kernels import Control, control, new_control, read_control
from tests.kernels.step_kernels import DEVICE, IMPLEMENTATIONS

ROOT = Path(__file__).parents[2]
FIELDS = [name for name in Control._fields if name != "unused"]


@pytest.mark.parametrize("field", FIELDS)
def test_host_and_kernels_mean_the_same_number_by_a_name(field):
    position = getattr(control, field.upper())
    in_kernels = getattr(control, f"AT_{field.upper()}")
    assert isinstance(position, int) and getattr(in_kernels, "value", in_kernels) == position
    record = new_control(DEVICE)
    record[position] = 2.5
    assert read_control(record) == Control(**{field: 2.5})


def test_a_new_record_is_eight_zeros_in_float64_or_what_it_is_given():
    record = new_control("cpu")
    assert record.dtype == torch.float64 and record.tolist() == [0.0] * 8
    given = Control(
        1e-3, step=7, clip=0.5, skip=1, correction1=0.1, correction2=0.2, grad_norm=3, unused=4
    )
    assert read_control(new_control("cpu", given)) == given


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_step_writes_every_field_but_the_learning_rate(name):
    """Each number of its own size, so that one in another's place would show."""
    record = new_control(DEVICE, Control(0.25, step=2, unused=9))
    total = torch.tensor(16.0, dtype=torch.float64, device=DEVICE)
    IMPLEMENTATIONS[name].begin_step_(record, total, 1.0, 0.5, 0.75)
    after = read_control(record)
    expected = Control(
        0.25,
        step=3,
        clip=1 / (4 + 1e-6),
        correction1=1 - 0.5**3,
        correction2=1 - 0.75**3,
        grad_norm=4,
        unused=9,
    )
    assert after == pytest.approx(expected, rel=1e-12)


def numbered_reads(source: str) -> list[str]:
    """`control[3]`, `control[1:2]` and `tl.load(control + 3)`, whatever stands before the name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript):
            record, place = node.value, node.slice
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            record, place = node.left, node.right
        else:
            continue
        name = ast.unparse(record).rpartition(".")[2]
        numbers = [
            part
            for part in ast.walk(place)
            if isinstance(part, ast.Constant) and isinstance(part.value, int)
        ]
        if name == "control" and numbers:
            found.append(ast.unparse(node))
    return found


def test_nobody_reads_the_record_by_number():
    for folder in ("kernels", "megatron_completep", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if "control" in path.read_text():
                assert numbered_reads(path.read_text()) == [], path


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.control[1:2].item()",
        "control[0] = 1",
        "tl.load(control + 3)",
        "x = run.control[[0, 4]]",
    ],
)
def test_a_read_by_number_is_noticed(line):
    assert numbered_reads(line)
