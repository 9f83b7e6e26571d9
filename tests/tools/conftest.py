"""What command lines read, and how they are run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

from megatron_completep.config import save_config
from tests.support.commands import Programs
from tests.support.configs import SMALLEST, merged, small_config
from tests.support.corpora import write_documents
from tests.tools.usages import Usage


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the command lines read, by name, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("place")
    write_documents(folder / "corpus", [[range(200)]])
    own = {
        "data": {"train": [{"prefix": str(folder / "corpus")}], "prefetch": 0},
        "training": {
            "global_batch_size": 2,
            "train_steps": 2,
            "output_dir": str(folder / "run"),
        },
    }
    save_config(small_config(**merged(SMALLEST, own)), folder / "config.yaml")
    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("some text")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    names = {"config": "config.yaml", "prefix": "corpus", "text": "text.txt"}
    return {
        name: folder / names.get(name, name)
        for name in ("config", "prefix", "text", "folder", "pipe", "loop")
    }


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Callable[..., tuple[int, str]]:
    """(usage, words) -> exit code and what was printed.

    Ends the test where a traceback would have been seen.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.knobs.cache, "dir", triton.knobs.cache.dir)

    def run(usage: Usage, words: list[str]) -> tuple[int, str]:
        ended = programs.run(usage.module.main, *words)
        return ended.code, ended.out + ended.err

    return run
