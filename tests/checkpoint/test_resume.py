"""A run that was saved and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import shlex

import pytest
import torch
import yaml
from safetensors import safe_open

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.manifest import read_manifest
from megatron_completep.errors import CheckpointError
from tests.support.checkpoints import TinyRun, checkpointed_config


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
@pytest.mark.parametrize("async_save", [False, True])
def test_resumed_run_continues_bit_for_bit(tmp_path, precision, async_save):
    config = checkpointed_config(
        tmp_path, training={"precision": precision}, checkpoint={"async_save": async_save}
    )
    whole = TinyRun(config)
    expected = whole.train(3)
    whole.save()
    expected += whole.train(3)  # while an asynchronous save may still be writing
    whole.checkpointer.close()
    resumed = TinyRun(config)
    assert resumed.resume() and resumed.state.step == 3 and resumed.state.consumed_samples == 12
    assert expected[3:] == resumed.train(3)
    assert resumed.bits() == whole.bits()


def test_without_the_moments_the_resumed_run_differs(tmp_path):
    """The negative control: the comparison above can fail."""
    config = checkpointed_config(tmp_path)
    whole = TinyRun(config)
    whole.train(3)
    whole.save()
    expected = whole.train(3)
    resumed = TinyRun(config)
    resumed.resume()
    resumed.optimizer.states["exp_avg"].mul_(1 + 1e-6)
    assert expected != resumed.train(3)


def test_files_are_ordinary_safetensors_of_logical_tensors(tmp_path):
    config = checkpointed_config(tmp_path)
    run = TinyRun(config)
    run.train(1)
    run.save()
    folder = tmp_path / "checkpoints" / "step_00000001"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "rank_00000_of_00001.safetensors",
    ]
    with safe_open(folder / "rank_00000_of_00001.safetensors", "pt") as file:
        embedding = file.get_tensor("master/embedding.weight@0,0")
        gain = file.get_tensor("exp_avg/final_norm.weight@0")
    assert embedding.shape == (61, 16)  # padding rows are not stored
    assert torch.equal(embedding, run.model.embedding.weight[:61])
    assert gain.shape == (16,) and gain.abs().sum() > 0
    assert torch.equal(StoredCheckpoint.open(folder).tensor("embedding.weight"), embedding)


def test_newest_is_the_highest_step_and_retention_keeps_what_it_should(tmp_path):
    config = checkpointed_config(
        tmp_path, checkpoint={"async_save": False, "interval": 1, "keep": 2, "keep_every": 3}
    )
    run = TinyRun(config)
    for _ in range(7):
        run.train(1)
        run.save()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000007"]
    (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").touch()  # times mean nothing
    resumed = TinyRun(config)
    resumed.resume()
    assert resumed.state.step == 7


def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path):
    run = TinyRun(checkpointed_config(tmp_path))
    assert not run.resume() and run.state.step == 0


def test_resume_false_refuses_a_folder_that_holds_checkpoints(tmp_path):
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    other = TinyRun(
        checkpointed_config(tmp_path, checkpoint={"async_save": False, "resume": False})
    )
    with pytest.raises(CheckpointError, match=r"step 1.*resume = false"):
        other.resume()


def test_saving_a_step_again_replaces_it(tmp_path):
    config = checkpointed_config(tmp_path)
    run = TinyRun(config)
    run.train(2)
    run.save()
    run.optimizer.shards.master.mul_(2.0)
    run.save()
    again = TinyRun(config)
    again.resume()
    assert torch.equal(again.optimizer.shards.master, run.optimizer.shards.master)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002"]


def test_a_resume_says_every_setting_that_changed_old_and_new(tmp_path):
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    same = TinyRun(checkpointed_config(tmp_path, logging={"interval": 3}))
    # The control.
    assert same.resume()
    assert not [line for line in same.messages if line.startswith("resuming with")]
    changes = {
        "optimizer": {
            "base_lr": 0.02,
            "schedule": "cosine",
            "warmup_steps": None,
            "warmup_fraction": 0.1,
        },
        "training": {
            "global_batch_size": 8,
            "precision": "bf16",
            "seed": 7,
            "train_steps": 20,
            "batch_ramp": {"start": 4, "increment": 4, "steps": 4},
        },
        "data": {"seed": 5},
        "checkpoint": {"allow_changed": ["data.seed"]},
    }
    other = TinyRun(checkpointed_config(tmp_path, **changes))
    assert other.resume()
    said = {line for line in other.messages if line.startswith("resuming with")}
    assert said >= {
        "resuming with optimizer.base_lr = 0.02, the checkpoint has 0.01",
        'resuming with optimizer.schedule = "cosine", the checkpoint has "linear"',
        "resuming with optimizer.warmup_steps = null, the checkpoint has 2",
        "resuming with training.global_batch_size = 8, the checkpoint has 4",
        'resuming with training.precision = "bf16", the checkpoint has "float32"',
        "resuming with training.seed = 7, the checkpoint has 1234",
        "resuming with training.train_steps = 20, the checkpoint has 10",
        "resuming with training.batch_ramp.steps = 4, the checkpoint has null",
        "resuming with data.seed = 5, the checkpoint has 1234",
    }
    # Each once.
    assert len(said) == len([line for line in other.messages if line.startswith("resuming with")])


def test_a_resume_under_another_library_of_products_says_so(tmp_path):
    config = checkpointed_config(tmp_path)
    run = TinyRun(config, products="onednn")
    run.train(1)
    run.save()
    assert read_manifest(tmp_path / "checkpoints/step_00000001").versions["products"] == "onednn"
    lines = {}
    for library in ("torch", "onednn"):
        resumed = TinyRun(config, products=library)
        assert resumed.resume()
        lines[library] = [line for line in resumed.messages if "matrix products" in line]
    (line,) = lines["torch"]
    assert line.startswith(
        "resuming with matrix products by torch, the checkpoint was written with onednn"
    )
    assert lines["onednn"] == []  # the control


def test_a_list_of_sections_that_grew_is_one_changed_setting(tmp_path):
    """By element, a first override would read
    `optimizer.overrides = null, the checkpoint has []`.
    """
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    one, other = {"pattern": "layers.0.*", "lr": 2.0}, {"pattern": "layers.1.*", "lr": 3.0}
    changed = TinyRun(
        checkpointed_config(
            tmp_path, optimizer={"overrides": [one]}, training={"skip_steps": [{"first": 5}]}
        )
    )
    assert changed.resume()
    said = [
        line.removeprefix("resuming with ")
        for line in changed.messages
        if line.startswith("resuming with")
    ]
    assert [line for line in said if "overrides" in line] == [
        'optimizer.overrides = [{"pattern": "layers.0.*", "lr": 2.0, "init_std": 1.0, '
        '"weight_decay": 1.0, "eps": 1.0}], '
        "the checkpoint has []"
    ]
    assert [line for line in said if "skip_steps" in line] == [
        'training.skip_steps = [{"first": 5, "last": null}], the checkpoint has []'
    ]
    changed.train(1)
    changed.save()
    grown = TinyRun(checkpointed_config(tmp_path, optimizer={"overrides": [one, other]}))
    assert grown.resume()
    said = [line for line in grown.messages if "overrides" in line]
    assert len(said) == 1 and said[0].count("layers.0") == 2 and said[0].count("layers.1") == 1
    # The control: same length, by element.
    moved = TinyRun(checkpointed_config(tmp_path, optimizer={"overrides": [{**one, "lr": 5.0}]}))
    assert moved.resume()
    assert "resuming with optimizer.overrides.0.lr = 5.0, the checkpoint has 2.0" in moved.messages


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dropout": 0.1, "rope_base": 500.0}, "data": {"seed": 5}},
        {
            "completep": {"alpha": 0.5, "base_hidden_size": 16, "base_num_layers": 2},
            "data": {"order": "megatron"},
        },
        {
            "data": {"seed": 5},
            "model": {"dropout": 0.1},
            "checkpoint": {"allow_changed": ["model.dropout"]},
        },
        {
            "model": {
                "num_attention_heads": 2,
                "norm_eps": 1e-3,
                "input_multiplier": 2.0,
                "logit_multiplier": 2.0,
                "dropout": 0.2,
            }
        },
    ],
    ids=["few", "table", "added to what is allowed", "many"],
)
def test_what_a_refusal_offers_is_not_refused_next(tmp_path, changes):
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    with pytest.raises(CheckpointError) as refusal:
        TinyRun(checkpointed_config(tmp_path, **changes)).resume()
    (line,) = [
        line
        for line in str(refusal.value).splitlines()
        if line.startswith("If the change is meant: ")
    ]
    word = shlex.split(line)[-1]  # as a shell takes it
    assert word.startswith("checkpoint.allow_changed=")
    allowed = yaml.safe_load(word.rstrip(".").partition("=")[2])
    again = TinyRun(
        checkpointed_config(tmp_path, **{**changes, "checkpoint": {"allow_changed": allowed}})
    )
    assert again.resume() and again.state.step == 1


@pytest.mark.parametrize(
    ("model", "adapt"),
    [
        ({"tied_embeddings": True}, False),
        ({"vocab_size": 62}, False),
        ({"qk_norm": True}, False),
        ({"num_layers": 3}, True),
        ({"num_layers": 1}, False),
    ],
)
def test_a_refusal_offers_no_remedy_where_the_tensors_are_others(tmp_path, model, adapt):
    """To allow the setting would be refused next, as the tensors differ: so it is not offered.

    Layers may be added by the tool.
    """
    run = TinyRun(checkpointed_config(tmp_path))
    run.train(1)
    run.save()
    for allowed in ([], ["*"]):
        with pytest.raises(CheckpointError) as refusal:
            TinyRun(
                checkpointed_config(tmp_path, model=model, checkpoint={"allow_changed": allowed})
            ).resume()
        assert "allow_changed=" not in str(refusal.value)
        assert "allow_changed does not help" in str(refusal.value)
        assert ("tools/checkpoint.py adapt" in str(refusal.value)) == (adapt and not allowed)
