"""Packaging.

`kernels/`, `tools/` and `configs/` are parts of the package through symlinks of these names in
`megatron_completep/`. A wheel holds what they lead to; a source distribution holds links and
folders as a checkout does, so that it builds and tests as one.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
# Where the sources are published. A page that shows the README elsewhere links to it.
REPOSITORY = "https://github.com/megatron-completep/megatron-completep"
LINKS = ("kernels", "tools", "configs")
# Read, not imported: importing the package would need what this file is about to install.
SOURCE = (HERE / "megatron_completep/__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)
assert VERSION is not None

# Ranges: the lower end and the newest version were installed and tested; of torch 2.13, triton 3.9,
# ruff, mypy, docs, lm-eval, submitit and optuna only the newest. Versions beyond the upper end did
# not exist.
DATA = [
    "tokenizers>=0.21,<0.24",
    "tiktoken>=0.12,<0.15",
    "pyarrow>=18,<27",
    "zstandard>=0.23,<0.26",
]
DOCS = ["mkdocs-material>=9.8.1,<10", "mkdocstrings[python]>=1.0.8,<2"]
TRACKING = ["wandb>=0.21,<0.32", "trackio>=0.40,<0.44"]
HF = ["transformers>=4.51.3,<6"]
SLURM = ["submitit>=1.5.4,<2"]
TUNE = ["optuna>=5,<6"]
EVAL = ["lm-eval>=0.4.13,<0.5", *HF]
DEV = [
    "pytest>=8.3,<10",
    "pytest-timeout>=2.3.1,<3",
    "pytest-xdist>=3.6.1,<4",
    "hypothesis>=6.112,<7",
    "ruff>=0.17.6,<0.18",
    "mypy>=2.4.1,<3",
    "types-PyYAML>=6.0.12,<7",
    "accelerate>=1.15,<2",  # lm-eval's own back end, with which ours is compared
    "babel>=2.19,<3",  # names of languages in all scripts, which tokenizers are compared on
    # Its token files and samples are compared with ours. Wheels exist for these versions of Python
    # only.
    "megatron-core==0.16.1; platform_system == 'Linux' and platform_machine == 'x86_64' "
    "and python_version < '3.14'",
]
# The interpreter of triton below 3.8, which torch 2.11 brings, fails with newer versions of numpy:
# kernel tests on a CPU need this beside it. On a GPU nothing does.
OLD_TRITON = ["numpy>=2,<2.4"]
DESCRIPTION = (
    "Train CompleteP transformers: "
    "hyperparameters tuned on a small proxy hold at any width and depth"
)

CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]


def with_absolute_links(markdown: str) -> str:
    """A text of the repository's top level, to be shown elsewhere: its links lead to the sources.

    Pictures are wanted as files, pages as GitHub shows them.
    """
    picture = re.compile(r"(!\[[^\]]*\]\()(?!https?:|#)")
    link = re.compile(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)")
    pictures = picture.sub(rf"\g<1>{REPOSITORY}/raw/v{VERSION[1]}/", markdown)
    return link.sub(rf"\g<1>{REPOSITORY}/blob/v{VERSION[1]}/", pictures)


class SourceDistribution(sdist):
    """Keeps the package's links, instead of a second copy of what they lead to."""

    def make_release_tree(self, base_dir, files):
        linked = tuple(f"megatron_completep/{name}/" for name in LINKS)
        super().make_release_tree(base_dir, [file for file in files if not file.startswith(linked)])
        for name in LINKS:
            link = Path(base_dir) / "megatron_completep" / name
            if not link.is_symlink():
                link.symlink_to(f"../{name}")


setup(
    name="megatron-completep",
    version=VERSION[1],
    description=DESCRIPTION,
    long_description=with_absolute_links((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/blob/v{VERSION[1]}/docs/index.md",
        "Changelog": f"{REPOSITORY}/blob/v{VERSION[1]}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    author="The megatron-completep authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["CompleteP", "muP", "hyperparameter transfer", "transformers", "Megatron"],
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_completep", "megatron_completep.*"]),
    package_data={"megatron_completep": ["py.typed", "configs/*", "configs/launch/*"]},
    entry_points={
        "console_scripts": ["megatron-completep = megatron_completep.__main__:main"],
    },
    cmdclass={"sdist": SourceDistribution},
    install_requires=[
        "torch>=2.11",
        # It comes with torch's GPU build; beside the CPU build the kernel tests need it.
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "pydantic>=2.11",
        "pyyaml",
        "sentencepiece",
        "safetensors",
        "orjson>=3.10.7",
        "xxhash",
        "psutil",
        "rich",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "data": DATA,
        "dev": DATA + DOCS + TRACKING + EVAL + SLURM + TUNE + DEV,
        "docs": DOCS,
        "eval": EVAL,
        "gpu": ["triton>=3.6,<4"],
        "hf": HF,
        "old-triton": OLD_TRITON,
        "ray": ["ray>=2.49,<3"],
        "slurm": SLURM,
        "tracking": TRACKING,
        "tune": TUNE,
    },
)
