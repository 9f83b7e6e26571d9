"""The layout search against brute force over the same grid, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_completep.config import Config
from megatron_completep.config.check import check_world
from megatron_completep.errors import ConfigError
from megatron_completep.planning.layout_search import (
    USABLE,
    Axes,
    Bounds,
    Layout,
    any_fits,
    candidates,
    memory_fits,
    order,
    search,
)
from megatron_completep.planning.scaling import Gpu, scaling_plan
from tests.support.configs import small_config

MODEL = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_attention_heads": 4,
    "ffn_hidden_size": 1024,
    "vocab_size": 512,
    "seq_length": 512,
}
AXES = Axes((1, 2), (1, 2), (1, 2), (1, 2), (1, 2), ("none", "full"), (None, 2))
GPUS = 4
# Fast links, but memory for a few layouts only.
SCARCE = Gpu("scarce", 60e6, 2e12, 300e12, 300e9, 25e9, per_node=2)
ROOMY = Gpu("roomy", 80e9, 2e12, 300e12, 300e9, 25e9, per_node=2)


def config() -> Config:
    return small_config(
        model=MODEL,
        completep={"base_hidden_size": None, "base_num_layers": None},
        training={"global_batch_size": 8, "precision": "bf16"},
    )


def all_layouts() -> Iterator[Layout]:
    """Every layout of the grid that the rules between settings allow."""
    for candidate in candidates(config(), GPUS, AXES):
        try:
            check_world(candidate, GPUS)
        except ConfigError:
            continue
        yield Layout(candidate, scaling_plan(candidate, GPUS, SCARCE))


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return list(all_layouts())


def test_the_search_finds_what_brute_force_finds(layouts: list[Layout]):
    assert len(layouts) > 30
    for gpu in (SCARCE, ROOMY):
        fitting = [layout for layout in layouts if layout.fits(gpu)]
        fastest = sorted(fitting, key=order)[:4]
        found = search(config(), GPUS, gpu, 4, AXES)
        assert [layout.plan.step_seconds for layout in found] == [
            layout.plan.step_seconds for layout in fastest
        ]
        assert str(found[0]) == str(fastest[0])
        assert all(layout.fits(gpu) for layout in found)
    # The scarce memory decides: without it the answer is another.
    assert any(not layout.fits(SCARCE) for layout in layouts)
    assert str(search(config(), GPUS, ROOMY, 1, AXES)[0]) != str(
        search(config(), GPUS, SCARCE, 1, AXES)[0]
    )


def test_no_layout_beats_its_bounds(layouts: list[Layout]):
    bounds = Bounds(config(), GPUS, SCARCE)
    for layout in layouts:
        assert bounds.least_seconds(layout.config) <= layout.plan.step_seconds
        assert bounds.least_memory(layout.config) <= layout.memory


def test_too_few_gpus_are_refused_with_the_number_that_would_do():
    tiny = Gpu("tiny", 22e6, 2e12, 300e12, 300e9, 25e9, per_node=2)
    with pytest.raises(ConfigError, match=r"--gpus 1: no layout .* Use at least 8 GPUs"):
        search(config(), 1, tiny, 4, AXES)
    # What is named does, and half of it does not.
    assert search(config(), 8, tiny, 1, AXES)
    with pytest.raises(ConfigError):
        search(config(), 4, tiny, 1, AXES)
    hopeless = Gpu("hopeless", 1e6, 2e12, 300e12, 300e9, 25e9)
    said: list[str] = []
    with pytest.raises(ConfigError, match="Not even"):
        search(config(), 1, hopeless, 1, AXES, said.append)
    assert said[0] == "no layout fits 1 GPUs; trying 2"


def test_the_leanest_layouts_tell_whether_any_fits(layouts: list[Layout]):
    """The question how many GPUs would do is answered without plans, as all plans would."""
    leanest = min(layout.memory for layout in layouts)
    for share in (0.99, 1.01, 1.5):
        gpu = replace(SCARCE, memory=share * leanest / USABLE)
        assert any_fits(config(), GPUS, gpu, AXES) == any(layout.fits(gpu) for layout in layouts)
    for layout in layouts[::7]:
        assert memory_fits(layout.config, GPUS, SCARCE) == layout.fits(SCARCE)
