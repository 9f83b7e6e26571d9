"""docs/kernels.md: its examples run, and what it says of the files is so."""

import re
from pathlib import Path

import torch

from megatron_completep import kernels

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()


def test_the_examples_of_the_documentation_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["weight"].grad is not None
    assert names["x"].grad is not None
    assert names["unembedding"].grad is not None
    assert kernels.read_control(names["control"]).step == 1, "the optimizer did not step"
    assert names["logits"].abs().sum() > 0 and torch.isfinite(names["loss"]).all()


def test_every_file_of_the_package_and_every_public_function_is_named():
    folder = Path(str(kernels.__file__)).parent
    for path in folder.rglob("*.py"):
        assert path.name in PAGE or path.name == "__init__.py", path.name
    for name in kernels.__all__:
        assert name in PAGE, name
