"""Any layout loads any checkpoint: every number arrives bit for bit where a layout holds it."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_completep.checkpoint import StoredCheckpoint
from tests.checkpoint.layouts import EXPERT_LAYOUTS, LAYOUTS, TP2_PP2_DP2, load, run, save


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("tied_gpt", ("one", "tp2_cp2", "pp4_uneven")),
        pytest.param("tied_gpt", tuple(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("llama", tuple(LAYOUTS), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_tp2_pp2_dp2_is_read_by_every_layout_and_back(pool, tmp_path, model, names):
    run(pool, save, tmp_path / "first", model, TP2_PP2_DP2)
    for name in names:
        save_to = tmp_path / name
        outcomes = run(pool, load, tmp_path / "first", model, LAYOUTS[name], str(save_to))
        outcomes += run(pool, load, save_to, model, TP2_PP2_DP2)
        assert not [wrong for rank in outcomes for wrong in rank], name


def test_experts_are_read_by_any_number_of_ranks_that_share_them(pool, tmp_path):
    """Over 4 ranks, over 2 in sub-groups, beside tensor ranks, on one stage of two, in one."""
    save_to = tmp_path / "first"
    run(pool, save, save_to, "experts", EXPERT_LAYOUTS["ep4"])
    for name, layout in EXPERT_LAYOUTS.items():
        outcomes = run(pool, load, save_to, "experts", layout, str(tmp_path / name))
        assert not [wrong for rank in outcomes for wrong in rank], name
        save_to = tmp_path / name  # each reads what the one before has saved


def test_every_layout_stores_the_same_tensors_each_element_once(pool, tmp_path):
    stored = {}
    for name in ("one", "tp2_dp2", "tp2_cp2", "pp4_uneven"):
        run(pool, save, tmp_path / name, "tied_gpt", LAYOUTS[name])
        checkpoint = StoredCheckpoint.open(tmp_path / name / "checkpoints" / "step_00000006")
        stored[name] = {
            parameter: checkpoint.tensor(parameter, "exp_avg")
            for parameter in checkpoint.manifest.parameters
        }
        assert checkpoint.manifest.elements == sum(t.numel() for t in stored[name].values())
    for name in stored:
        assert stored[name].keys() == stored["one"].keys()
        assert "unembedding.weight" not in stored[name]
        assert all(torch.equal(stored[name][p], stored["one"][p]) for p in stored["one"])


def test_a_missing_part_is_noticed_by_every_rank(pool, tmp_path):
    """The negative control: take one rank's file away and the load fails,
    on all ranks alike, naming the file.
    """
    layout = LAYOUTS["tp2_dp2"]
    run(pool, save, tmp_path, "llama", layout)
    folder = tmp_path / "checkpoints" / "step_00000006"
    shutil.move(folder / "rank_00002_of_00004.safetensors", tmp_path / "elsewhere")
    with pytest.raises(
        AssertionError,
        match=r"(?s)rank 3:.*CheckpointError.*rank_00002_of_00004.safetensors: No such file",
    ):
        run(pool, load, tmp_path, "llama", layout)
