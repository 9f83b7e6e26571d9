"""tools/show_plan.py --world-size: what a run asks of each GPU, as text and as JSON."""

import json

import pytest

from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError
from megatron_completep.planning.communication import collectives_per_step
from megatron_completep.planning.scaling import gpu_of
from megatron_completep.tools import show_plan
from tests.support.commands import Programs

CONFIG = "configs/completep_1b.yaml"
LARGE = "training.global_batch_size=8192"


def test_the_text_has_memory_traffic_time_assumptions_and_warnings(programs: Programs):
    text = programs.output(show_plan.main, CONFIG, "--world-size", "4096", "--gpu", "h100", LARGE)
    for part in (
        "optimizer",
        "activations",
        "communication",
        "pipeline bubble",
        "GFLOP a token",
        "Assumed",
        "a checkpoint is",
        "Warning",
    ):
        assert part in text
    assert "4096 h100: tensor 2 x pipeline 1 x data 2048" in text


def test_the_object_says_what_the_library_says(programs: Programs):
    printed = json.loads(
        programs.output(show_plan.main, CONFIG, "--world-size", "64", "--gpu", "b200", "--json")
    )
    scaling = printed["scaling"]
    assert printed["parameters"]
    assert scaling["gpu"] == "b200"
    assert scaling["data_parallel_size"] == 32
    assert [m["total"] for m in scaling["memory"]] == [
        sum(v for k, v in m.items() if k != "total") for m in scaling["memory"]
    ]
    planned = collectives_per_step(load_config(CONFIG), 64)
    assert sum(c["count"] for c in scaling["collectives"]) == sum(c.count for c in planned)


def test_without_a_world_size_nothing_is_said_of_gpus(programs: Programs):
    assert "scaling" not in json.loads(programs.output(show_plan.main, CONFIG, "--json"))


def test_a_world_size_that_does_not_fit_is_refused_with_a_remedy(programs: Programs):
    refused = programs.run(show_plan.main, CONFIG, "--world-size", 4096)
    assert refused.code == 2 and "Use 8192" in refused.err


def test_an_unknown_gpu_is_refused(programs: Programs):
    refused = programs.run(show_plan.main, CONFIG, "--world-size", 64, "--gpu", "voodoo2")
    assert refused.code == 2
    assert "--gpu = voodoo2: not known. Use one of: a100, h100" in refused.err
    with pytest.raises(ConfigError, match="voodoo2"):  # by the library as well
        gpu_of("voodoo2")


def test_a_gpu_of_ones_own_figures_is_planned_with_them(programs: Programs):
    own = ("--gpu", "a100", "--gpu-tflops", "181", "--gpu-memory", "48")
    text = programs.output(show_plan.main, CONFIG, "--world-size", "16", *own)
    assert "16 a100, 181 TFLOP/s, 48 GB: tensor 2" in text and "65% of 181 TFLOP/s" in text
    refused = programs.run(show_plan.main, CONFIG, "--gpu-memory", "48")
    assert refused.code == 2 and "--gpu-memory = 48.0: says nothing without" in refused.err
    refused = programs.run(show_plan.main, CONFIG, "--world-size", "16", "--gpu-tflops", "181")
    assert refused.code == 2 and "Name the nearest one by --gpu." in refused.err
