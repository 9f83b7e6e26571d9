"""What modules say they cost: a branch that is registered, one that says nothing, activations."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from megatron_completep.completep import Table, table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.flops import forward_flops_per_token, training_flops_per_token
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.mlp import ACTIVATIONS
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.planning.communication import ALL_REDUCE, collectives_per_step
from megatron_completep.planning.scaling import scaling_plan, stage_activations
from megatron_completep.planning.sizes import micro_batch_sizes, rank_stages

INNER = 24
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 37,
    "vocab_multiple": 8,
    "seq_length": 12,
}


class Silent(nn.Module):
    """down(sin(up(x))): trains, and says nothing of what it costs."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool,
    ):
        super().__init__()
        hidden = model.hidden_size
        self.up = ColumnParallelLinear(hidden, {"up": INNER}, table.base_hidden_size, True, context)
        self.down = RowParallelLinear(INNER, hidden, 8, True, context)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        return Branch(self.down(torch.sin(self.up(x))), self.down.bias)


class Sine(Silent):
    """The same branch, which answers."""

    def flops(self, seq_length: int) -> float:
        return self.up.flops() + self.down.flops()

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        sine_input = sizes.tokens * self.up.weight.shape[0] * sizes.element_bytes
        return self.up.activation_bytes(sizes) + sine_input + self.down.activation_bytes(sizes)


def config_of(**sections: Any) -> Config:
    training = {"micro_batch_size": 2, "global_batch_size": 8, "precision": "float32"}
    changes = sections.pop("training", {})
    return bare_config(ModelConfig(**MODEL), training={**training, **changes}, **sections)


def register(monkeypatch: pytest.MonkeyPatch, name: str, branch: type[nn.Module]) -> None:
    monkeypatch.setitem(cast(dict[str, Any], BRANCHES), name, branch)


def kept_bytes(config: Config, recompute: str = "none") -> int:
    """Bytes that a forward pass of the configured model keeps for backward, parameters apart."""
    context = ParallelContext.single()
    model = GPT(config.model, table_of(config), context, recompute=recompute)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    tokens = torch.zeros(config.training.micro_batch_size, config.model.seq_length).long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens.clone())
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 20, "every": 2},
        {
            "num_experts": 8,
            "top_k": 3,
            "gate": "softmax",
            "balance": "none",
            "shared_ffn_hidden_size": 20,
        },
        {"num_experts": 8, "top_k": 2, "balance_loss": 0.1, "router_z_loss": 0.1},
        {
            "num_experts": 8,
            "top_k": 2,
            "gate": "softmax",
            "balance": "loss",
            "balance_loss": 0.1,
            "router_z_loss": 0.1,
        },
    ],
)
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_experts_keep_for_backward_is_planned(moe: dict[str, Any], recompute: str) -> None:
    dense = config_of(training={"recompute": recompute})
    config = dense.model_copy(update={"model": ModelConfig.model_validate({**MODEL, "moe": moe})})
    (stage,) = rank_stages(config, 0)
    planned = stage_activations(config, stage) - stage_activations(dense, stage)
    assert planned == kept_bytes(config, recompute) - kept_bytes(dense, recompute)
    # The control: a choice more is not planned alike.
    more = config.model.model_copy(
        update={"moe": config.model.moe.model_copy(update={"top_k": 4})}  # type: ignore[union-attr]
    )
    assert stage_activations(config.model_copy(update={"model": more}), stage) > planned


def test_of_experts_the_chosen_count_as_flops() -> None:
    moe = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 20, "shared_ffn_hidden_size": 12}
    dense = forward_flops_per_token(ModelConfig(**MODEL))
    experts = forward_flops_per_token(ModelConfig.model_validate({**MODEL, "moe": moe}))
    router = 8 * 32
    assert experts - dense == 4 * 2 * (router + 3 * 32 * (2 * 20 + 12 - 48))


def test_a_registered_branch_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    split = config_of(parallel={"tensor_parallel_size": 2})
    (stage,) = rank_stages(config, 0)

    def plan() -> tuple[float, int, int, int]:
        calls = collectives_per_step(split, 2)
        reduced = sum(c.count for c in calls if (c.axis, c.operation) == ("tensor", ALL_REDUCE))
        flops = forward_flops_per_token(config.model)
        return flops, stage_activations(config, stage), reduced, kept_bytes(config)

    flops, planned, reduced, kept = plan()
    register(monkeypatch, "sine", Sine)
    new_flops, new_planned, new_reduced, new_kept = plan()
    layers = config.model.num_layers
    assert new_flops - flops == layers * 2 * (2 * 32 * INNER)
    assert new_planned - planned == new_kept - kept > 0
    assert new_reduced - reduced == 2 * layers * 4  # forward and backward of four micro-batches


@pytest.mark.parametrize("branch_answers", [True, False])
def test_a_branch_that_does_not_say_what_it_costs_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, branch_answers: bool
) -> None:
    register(monkeypatch, "sine", Sine if branch_answers else Silent)
    config = config_of()
    questions = (
        lambda: training_flops_per_token(config.model),
        lambda: stage_activations(config, rank_stages(config, 0)[0]),
        lambda: scaling_plan(config, 1),
    )
    for ask in questions:
        if branch_answers:
            assert ask()
        else:
            with pytest.raises(ConfigError, match=r"a layer's sine: .* flops\(seq_length\)"):
                ask()


def test_the_flops_of_stages_sum_to_those_of_the_model() -> None:
    config = config_of()
    table, context = table_of(config), ParallelContext.single("meta")
    stages = (
        ChunkRange(0, 1, has_unembedding=False),
        ChunkRange(1, 3, has_embedding=False, has_unembedding=False),
        ChunkRange(3, 4, has_embedding=False),
    )
    total = sum(GPT(config.model, table, context, stage).flops(12) for stage in stages)
    assert total == forward_flops_per_token(config.model)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_keeps_its_input_alone(name: str) -> None:
    """The plan counts on it: torch's relu, which keeps its output, would be counted too high."""
    x = torch.randn(6, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        ACTIVATIONS[name](x)
    assert saved
    assert all(t.untyped_storage()._cdata == x.untyped_storage()._cdata for t in saved)


def test_what_recomputation_makes_again_is_not_counted() -> None:
    sizes = []
    for mode in ("none", "selective", "full"):
        config = config_of(training={"recompute": mode})
        sizes.append(stage_activations(config, rank_stages(config, 0)[0]))
    none, selective, full = sizes
    tokens = micro_batch_sizes(config_of()).tokens
    a_layer = tokens * (48 * 4 + 4 * 4)  # the activation's output, and a logsumexp a head
    assert none - selective == MODEL["num_layers"] * a_layer
    assert full < selective
