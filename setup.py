"""Packaging. `kernels/` and `tools/` are parts of the package through symlinks of these names in `megatron_completep/`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_completep/__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

DATA = ["tokenizers", "tiktoken", "pyarrow", "zstandard", "orjson"]
DEV = [
    *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"),
    # Its token files and samples are compared with ours. Wheels exist for these versions of Python only.
    "megatron-core==0.16.1; platform_system == 'Linux' and platform_machine == 'x86_64' and python_version < '3.14'",
]

setup(
    name="megatron-completep",
    version=VERSION[1],
    description="Train CompleteP transformers: hyperparameters tuned on a small proxy hold at any width and depth",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_completep", "megatron_completep.*"]),
    package_data={"megatron_completep": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",  # comes with torch's GPU build; the CPU build needs it for the kernel tests
        "numpy",
        "pydantic>=2.10",
        "pyyaml",
        "sentencepiece",
        "safetensors",
        "xxhash",
        "psutil",
        "rich",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "data": DATA,
        "dev": DATA + DEV,
        "docs": ["mkdocs-material"],
        "eval": ["lm-eval"],
        "gpu": ["triton>=3.6"],
        "hf": ["transformers"],
        "ray": ["ray"],
        "tracking": ["wandb"],
    },
)
