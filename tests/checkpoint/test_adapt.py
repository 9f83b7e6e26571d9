"""A checkpoint adapted to another configuration computes the same function,
and training goes on from it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.adapt import adapt_checkpoint, check_branches, length_notes
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import CheckpointError
from megatron_completep.kernels.control import STEP
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.parameter import declare
from megatron_completep.roles import Role
from megatron_completep.tools import checkpoint as tool
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.configs import TIED_GPT2
from tests.support.models import model_config, model_on_paper, table_for

F64 = {"precision": "float64"}
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
QK = {"qk_norm": True, "position": "alibi", "activation": "squared_relu"}
CHANGES = {
    "base shape": {"completep": {"base_hidden_size": 4, "base_num_layers": 2, "base_head_dim": 1}},
    "alpha": {"completep": {"alpha": 0.5, "base_hidden_size": 8, "base_num_layers": 1}},
    "to standard parameterization": {"completep": {"parameterization": "sp"}},
    "multipliers": {
        "model": {
            "input_multiplier": 3.0,
            "logit_multiplier": 0.7,
            "residual_multiplier": 1.3,
            "attention_multiplier": 2.0,
        }
    },
    "more layers": {"model": {"num_layers": 5}},
}


def trained(folder: Path, model: dict) -> TinyRun:
    run = TinyRun(checkpointed_config(folder, model=model, training=F64))
    run.train(3)
    run.save()
    return run


def adapted(run: TinyRun, folder: Path, model: dict, change: dict, **options) -> TinyRun:
    config = checkpointed_config(
        folder, training=F64, **{**change, "model": {**model, **change.get("model", {})}}
    )
    (source,) = Path(run.config.training.output_dir).glob("checkpoints/step_*")
    adapt_checkpoint(source, config, folder / "checkpoints", **options)
    again = TinyRun(config)
    assert again.resume()
    return again


def gradients(run: TinyRun) -> dict[str, torch.Tensor]:
    """Of the loss of fixed tokens, by parameter."""
    run.optimizer.begin_step(1)
    run.model(TOKENS[:, :-1], labels=TOKENS[:, 1:]).backward()
    for queue in run.optimizer.shards.queues:
        queue.finish_step()
    return {
        name: main_grad_of(parameter).clone()
        for name, parameter in run.optimizer.shards.parameters.items()
    }


@pytest.mark.parametrize("model", [{}, TIED_GPT2, QK], ids=["llama", "gpt2", "qk"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            c, marks=pytest.mark.slow if c in ("alpha", "to standard parameterization") else ()
        )
        for c in CHANGES
    ],
)
def test_the_adapted_model_computes_the_same_function_and_goes_on(tmp_path, model, change):
    run = trained(tmp_path / "old", model)
    again = adapted(run, tmp_path / "new", model, CHANGES[change])
    with torch.no_grad():
        expected, found = run.model(TOKENS[:, :-1]), again.model(TOKENS[:, :-1])
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
        if change != "more layers":  # the control: without the rescaling it is another function
            for name, parameter in again.model.named_parameters():
                parameter.copy_(run.optimizer.shards.parameters[name])
            assert not torch.allclose(again.model(TOKENS[:, :-1]), expected, rtol=1e-6)
            again.resume()
    assert again.state == run.state and again.optimizer.control[STEP] == 3
    assert all(map(torch.isfinite, map(torch.tensor, again.train(2))))


@pytest.mark.parametrize("model", [{}, TIED_GPT2, QK], ids=["llama", "gpt2", "qk"])
def test_moments_follow_the_gradients_of_rescaled_weights(tmp_path, model):
    """First moments are averages of gradients, second ones of their squares:
    the ratios are the gradients' own.
    """
    run = trained(tmp_path / "old", model)
    again = adapted(
        run, tmp_path / "new", model, {**CHANGES["base shape"], **CHANGES["multipliers"]}
    )
    before, after = gradients(run), gradients(again)
    (old,), (new,) = (
        [StoredCheckpoint.open(p) for p in (tmp_path / n).glob("checkpoints/step_*")]
        for n in ("old", "new")
    )
    scaled = 0
    for name in old.manifest.parameters:
        rows = old.manifest.parameters[name].shape[0]
        ratio = after[name][:rows] / before[name][:rows]
        known = before[name][:rows].abs() > 1e-9  # where gradients are not rounding noise
        for state, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            a, b = old.tensor(name, state), new.tensor(name, state)
            assert torch.allclose((a * ratio**power)[known], b[known], rtol=1e-6, atol=1e-15), (
                state,
                name,
            )
        scaled += bool(((ratio[known] - 1).abs() > 1e-3).any())
    assert scaled > 3


def test_new_layers_are_silent_and_otherwise_as_in_a_fresh_model(tmp_path):
    run = trained(tmp_path / "old", {})
    again = adapted(run, tmp_path / "new", {}, CHANGES["more layers"])
    fresh = TinyRun(checkpointed_config(tmp_path / "fresh", model={"num_layers": 5}, training=F64))
    for name, parameter in again.model.named_parameters():
        if not name.startswith(("layers.2.", "layers.3.", "layers.4.")):
            continue
        silent = any(part in name for part in ("attention.output", "mlp.down"))
        assert torch.equal(
            parameter,
            torch.zeros_like(parameter) if silent else dict(fresh.model.named_parameters())[name],
        ), name
    again.train(1)
    assert again.model.layers["4"].mlp.down.weight.abs().sum() > 0  # and they learn


def test_starting_anew_takes_the_weights_alone(tmp_path):
    run = trained(tmp_path / "old", {})
    again = adapted(run, tmp_path / "new", {}, {}, start_anew=True, files=3)
    assert again.state.step == 0
    assert again.optimizer.control[STEP] == 0
    assert not again.optimizer.states["exp_avg"].any()
    assert torch.equal(again.optimizer.shards.master, run.optimizer.shards.master)


LONGER = {"model": {"seq_length": 32, "rope_base": 40000.0}}


def test_a_stage_with_longer_sequences_takes_the_weights_and_begins_the_data_anew(tmp_path):
    run = trained(tmp_path / "old", {})
    again = adapted(run, tmp_path / "new", {}, LONGER, start_anew=True)
    assert again.state.step == 0
    assert torch.equal(again.optimizer.shards.master, run.optimizer.shards.master)
    # As long as before and with the same angles, it is the same function.
    same_angles = {"model": {"seq_length": 32}}
    still = adapted(run, tmp_path / "still", {}, same_angles, start_anew=True)
    with torch.no_grad():
        expected = run.model(TOKENS[:, :-1])
        torch.testing.assert_close(still.model(TOKENS[:, :-1]), expected, rtol=0, atol=1e-12)
        # Eight tokens turn little by a larger base: 3.7e-7, five orders above the tolerance.
        assert (again.model(TOKENS[:, :-1]) - expected).abs().max() > 1e-7


def test_what_longer_sequences_change_in_a_step_is_said(tmp_path):
    completep = {"base_batch_tokens": 32, "base_total_tokens": 320}
    run = trained(tmp_path / "old", {})
    (source,) = (tmp_path / "old").glob("checkpoints/step_*")
    config = checkpointed_config(
        tmp_path / "new", training=F64, model={"seq_length": 32}, completep=completep
    )
    notes = "\n".join(length_notes(source, config))
    assert "a step has 128 tokens where the checkpoint's had 32" in notes
    assert "m_B 1 -> 4, and S, which multiplies every learning rate, 1 -> 1" in notes
    assert "training.global_batch_size = 1 would keep the tokens of a step" in notes
    assert length_notes(source, run.config) == []


@pytest.mark.parametrize(
    ("model", "start_anew", "said"),
    [
        ({}, False, "model.seq_length = 8 tokens.*how many of 32 were read. Add --start-anew"),
        ({"position": "learned"}, True, "learned positions for model.seq_length = 8, and none"),
    ],
)
def test_a_length_that_positions_or_data_do_not_go_with_is_refused(
    tmp_path, model, start_anew, said
):
    run = trained(tmp_path / "old", model)
    with pytest.raises(CheckpointError, match=said):
        adapted(run, tmp_path / "new", model, {"model": {"seq_length": 32}}, start_anew=start_anew)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"hidden_size": 32}}, r"(?s)model.hidden_size +16 +32.*You may add layers"),
        ({"model": {"num_layers": 1}}, "layers can be added, not taken away. Use at least 2"),
        ({"model": {"norm": "layernorm"}}, "model.norm"),
    ],
)
def test_what_the_weights_cannot_take_over_is_refused(tmp_path, change, said):
    run = trained(tmp_path / "old", {})
    with pytest.raises(CheckpointError, match=said):
        adapted(run, tmp_path / "new", {}, change)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_the_tool_writes_where_the_new_run_looks_and_never_over_a_checkpoint(tmp_path, programs):
    trained(tmp_path / "old", {})
    config = checkpointed_config(tmp_path / "new", training=F64, **CHANGES["base shape"])
    values = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(values))
    words = ("adapt", tmp_path / "old", tmp_path / "new.yaml")
    shown = programs.output(tool.main, *words)
    assert "table.width_multiplier" in shown
    assert f"wrote {tmp_path / 'new' / 'checkpoints' / 'step_00000003'}" in shown
    refused = programs.run(tool.main, *words)
    assert refused.code == 2 and "holds a checkpoint of step 3 already" in refused.err


class SilentlyWrong(nn.Module):
    """A branch whose last matrix does not say that it makes the branch's output."""

    def __init__(self, model: ModelConfig, *_: object):
        super().__init__()
        self.out = nn.Linear(model.hidden_size, model.hidden_size, bias=False)
        declare(self.out.weight, Role.HIDDEN_WEIGHT, model.hidden_size, model.hidden_size)

    def forward(self, x: torch.Tensor, inputs: object) -> Branch:
        return Branch(self.out(x))


def test_a_branch_that_does_not_say_what_makes_its_output_is_refused() -> None:
    """The control: the model's own branches do."""
    model = model_config()
    table = table_for(model)
    check_branches(model_on_paper(model, table))
    branches = {**BRANCHES, "extra": SilentlyWrong}
    with pytest.raises(
        CheckpointError, match=r"layer 0, extra; layer 1, extra.*no parameter declares"
    ):
        check_branches(GPT(model, table, ParallelContext.single("meta"), branches=branches))
