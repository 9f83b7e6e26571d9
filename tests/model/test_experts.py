"""Mixtures of experts on one rank, against a twin that computes token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ExpertsDoNotFit
from megatron_completep.model.gpt import GPT
from megatron_completep.model.routing import Routing, fixing, observing, routers
from megatron_completep.parallel import dispatch, grouped
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.grouped import (
    accumulate_grouped,
    grouped_input_gradient,
    grouped_product,
    looped_product,
    takes_one_call,
)
from megatron_completep.parallel.products import Products
from megatron_completep.run.step import naming_work
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    completep_config,
    model_config,
    table_for,
    train_step,
)
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

EXPERTS: dict[str, Any] = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 20}
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid, biased": EXPERTS,
    "softmax, shared": {
        **EXPERTS,
        "gate": "softmax",
        "balance": "none",
        "shared_ffn_hidden_size": 28,
    },
    "sigmoid, after a dense layer": {**EXPERTS, "top_k": 3, "first_dense_layers": 1},
}
SIZES = [5, 0, 1, 8, 0, 2]  # rows of the groups


def model_of(moe: dict[str, Any], **changes: Any) -> ModelConfig:
    return model_config(num_layers=2, moe=moe, **changes)


def gradients_of(gpt: GPT, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    gpt.queue.begin_step(gpt.parameters(), 1)
    loss = gpt(tokens, labels=labels)
    loss.backward()
    gpt.queue.finish_step()
    return loss.detach(), {n: main_grad_of(p).clone() for n, p in gpt.named_parameters()}


def twin_gradients(
    gpt: GPT, model: ModelConfig, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    weights = {n: p.detach().clone().requires_grad_() for n, p in gpt.named_parameters()}
    loss = cross_entropy_sum(PlainTwin(weights, model, completep_config()).logits(tokens), labels)
    names = [name for name in weights if not name.endswith("router.bias")]
    gradients = torch.autograd.grad(loss, [weights[name] for name in names])
    return loss.detach(), dict(zip(names, gradients, strict=True))


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of a gradient, relative to its largest element."""
    return max(
        float((ours[n].reshape(g.shape) - g).abs().max() / g.abs().max().clamp_min(1e-9))
        for n, g in theirs.items()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
def test_loss_and_every_gradient_are_those_of_the_plain_twin(kind: str, activation: str) -> None:
    model = model_of(KINDS[kind], activation=activation)
    gpt = build_model(model)
    tokens, labels = batch_of(model)
    loss, gradients = gradients_of(gpt, tokens, labels)
    expected_loss, expected = twin_gradients(gpt, model, tokens, labels)
    assert float((loss - expected_loss).abs() / expected_loss) < 1e-12
    assert furthest(gradients, expected) < 1e-10

    # The control: two experts that changed places are another function.
    up = gpt.get_parameter("layers.1.mlp.experts.up")
    up.data = up.data[torch.tensor([1, 0, 2, 3, 4, 5])]
    assert furthest(gradients_of(gpt, tokens, labels)[1], expected) > 1e-3


def test_one_expert_with_the_weight_1_is_the_dense_model() -> None:
    dense_model = model_config(num_layers=2, ffn_hidden_size=48)
    model = model_of({"num_experts": 1, "top_k": 1, "gate": "softmax", "balance": "none"})
    model = model.model_copy(update={"ffn_hidden_size": 48})
    dense = build_model(dense_model)
    gpt = build_model(model)
    weights = dict(dense.named_parameters())
    for name, parameter in gpt.named_parameters():
        counterpart = name.replace("experts.up", "up.weight").replace("experts.down", "down.weight")
        if counterpart in weights:
            parameter.data.copy_(weights[counterpart].data.view_as(parameter))
    tokens, labels = batch_of(model)
    loss, gradients = gradients_of(gpt, tokens, labels)
    expected_loss, expected = gradients_of(dense, tokens, labels)
    renamed = {
        n.replace("experts.up", "up.weight").replace("experts.down", "down.weight"): g
        for n, g in gradients.items()
    }
    assert float((loss - expected_loss).abs() / expected_loss) < 1e-12
    assert furthest(renamed, expected) < 1e-12
    assert not gradients["layers.0.mlp.router.weight"].any()  # the weight is 1 whatever its logit


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_one_call_for_all_groups_computes_what_the_loop_does(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), 24, generator=generator)
    weight = torch.randn(len(SIZES), 16, 24, generator=generator)
    d_out = torch.randn(sum(SIZES), 16, generator=generator)
    products = Products()
    wide = [looped_product(x.double(), weight.double(), SIZES, products)]
    wide.append(grouped_input_gradient(d_out.double(), weight.double(), SIZES, products))
    x, weight, d_out = x.to(dtype), weight.to(dtype), d_out.to(dtype)
    assert takes_one_call(x, weight, SIZES)
    assert not takes_one_call(x.double(), weight.double(), SIZES)
    for ours, exact in zip(
        [
            grouped_product(x, weight, SIZES, products),
            grouped_input_gradient(d_out, weight, SIZES, products),
        ],
        wide,
        strict=True,
    ):
        assert float((ours.double() - exact).abs().max() / exact.abs().max()) < tolerance

    # Stale numbers of the step before go, also where a group has no rows.
    total = torch.full((len(SIZES), 16, 24), 7.0)
    accumulate_grouped(products, d_out, x, SIZES)(total, True)
    once = total.clone()
    accumulate_grouped(products, d_out, x, SIZES)(total, False)
    assert not total[1].any() and torch.allclose(total, 2 * once, atol=1e-5)
    start = 0
    for group, size in enumerate(SIZES):
        rows = slice(start, start + size)
        exact = d_out[rows].double().T @ x[rows].double()
        largest = float(exact.abs().max()) if size else 1.0
        assert float((once[group].double() - exact).abs().max()) < tolerance * largest
        start += size


def routings_of(gpt: GPT, tokens: Tensor, labels: Tensor | None = None) -> dict[int, Routing]:
    seen: dict[int, Routing] = {}
    with torch.no_grad(), observing(gpt, seen.__setitem__):
        gpt(tokens, labels=labels)
    return seen


def test_all_tokens_to_two_experts_train_these_alone_and_none_is_dropped() -> None:
    model = model_of(EXPERTS)
    gpt = build_model(model)
    tokens, labels = batch_of(model)
    choices = torch.tensor([[1, 4]]).expand(tokens.numel(), 2)
    with fixing(gpt, {0: choices, 1: choices}):
        loss, gradients = gradients_of(gpt, tokens, labels)
        seen = routings_of(gpt, tokens)
    for layer in (0, 1):
        assert seen[layer].load().tolist() == [0, tokens.numel(), 0, 0, tokens.numel(), 0]
        moved = gradients[f"layers.{layer}.mlp.experts.down"].flatten(1).any(1)
        assert moved.tolist() == [False, True, False, False, True, False]
    assert loss.isfinite()
    # The control: by their scores tokens go to others, too.
    assert len(routings_of(gpt, tokens)[0].experts.unique()) > 2


def test_scores_entropies_and_loads_can_be_read() -> None:
    model = model_of(EXPERTS)
    gpt = build_model(model)
    tokens, _ = batch_of(model)
    routing = routings_of(gpt, tokens)[1]
    assert routing.scores.shape == (tokens.numel(), 6)
    assert routing.load().sum() == 2 * tokens.numel()
    assert bool((routing.entropy() <= torch.tensor(6.0).log()).all())
    assert not routers(gpt)[0].observers


def test_a_recomputed_forward_pass_keeps_the_routing_of_the_first() -> None:
    model = model_of(EXPERTS)
    tokens, labels = batch_of(model)
    plain = build_model(model)
    expected = gradients_of(plain, tokens, labels)[1]
    gpt = build_model(model, recompute="full")
    chosen: dict[int, list[Tensor]] = {}
    with observing(gpt, lambda layer, r: chosen.setdefault(layer, []).append(r.experts)):
        gpt.queue.begin_step(gpt.parameters(), 1)
        loss = gpt(tokens, labels=labels)
        # What recomputation would choose now is something else.
        for router in routers(gpt):
            assert router.bias is not None
            router.bias.data.copy_(torch.tensor([9.0, 0, 0, 9, 0, 0]))
        loss.backward()
    for first, again in chosen.values():
        assert torch.equal(first, again)
    gradients = {n: main_grad_of(p) for n, p in gpt.named_parameters()}
    assert furthest(gradients, {n: expected[n] for n in expected if "bias" not in n}) < 1e-12
    # The control: the bias does choose others.
    assert not torch.equal(routings_of(gpt, tokens)[0].experts, chosen[0][0])


def test_a_step_is_the_same_to_the_bit_twice() -> None:
    model = model_of(KINDS["softmax, shared"])
    results = []
    for _ in range(2):
        table = table_for(model)
        gpt = build_model(model, table, torch.float32)
        optimizer = build_optimizer(gpt, table, precision=torch.float32)
        train_step(gpt, optimizer, 1e-2, batch_of(model), batch_of(model, seed=1))
        results.append(optimizer.shards.flat.clone())
    assert torch.equal(*results)


# --- balancing by bias ----------------------------------------------------------------------------


def biases_after_a_step(*batches: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Any]:
    model = model_of({**EXPERTS, "bias_rate": 0.01})
    table = table_for(model)
    gpt = build_model(model, table, random_vectors=False)
    optimizer = build_optimizer(gpt, table)
    result = train_step(gpt, optimizer, 0.0, *batches)
    return {n: p.detach().clone() for n, p in gpt.named_parameters() if "router.bias" in n}, result


def test_biases_move_by_the_rate_towards_equal_loads_of_counted_tokens() -> None:
    """Megatron-LM's #6114: tokens that do not count, such as padding, are no load."""
    model = model_of(EXPERTS)
    tokens, labels = batch_of(model, ignored=0.0)
    gpt = build_model(model, random_vectors=False)
    routing = routings_of(gpt, tokens)[0]
    # The tokens of the fullest expert do not count.
    fullest = int(routing.load().argmax())
    counted = (routing.experts != fullest).all(1)
    labels = labels.masked_fill(~counted.view(labels.t().shape).t(), -100)
    load = routing.load(counted)
    share = int(counted.sum()) * 2 / 6
    biases, _ = biases_after_a_step((tokens, labels))
    expected = 0.01 * (share - load.double()).sign()
    assert torch.equal(biases["layers.0.mlp.router.bias"], expected)
    of_all = 0.01 * (tokens.numel() * 2 / 6 - routing.load().double()).sign()
    assert not torch.equal(expected, of_all)  # the control


def test_biases_do_not_depend_on_the_size_of_a_micro_batch() -> None:
    """As Megatron-LM's #5798, which is about a loss: loads are those of the global batch."""
    tokens, labels = batch_of(model_of(EXPERTS), batch=4)
    whole, result = biases_after_a_step((tokens, labels))
    parts, in_parts = biases_after_a_step((tokens[:1], labels[:1]), (tokens[1:], labels[1:]))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert float(result.grad_norm) == pytest.approx(float(in_parts.grad_norm), rel=1e-12)


def test_loads_are_no_part_of_the_gradient_norm() -> None:
    model = model_of(EXPERTS)
    batch = batch_of(model)
    _, result = biases_after_a_step(batch)
    gpt = build_model(model, random_vectors=False)
    gradients = gradients_of(gpt, *batch)[1]
    squares = sum(
        float(gradient.square().sum()) for n, gradient in gradients.items() if "bias" not in n
    )
    counted = int((batch[1] != -100).sum())
    assert float(result.grad_norm) == pytest.approx(squares**0.5 / counted, rel=1e-10)


def fullest_over_mean(rate: float) -> float:
    """The largest load over the mean, after steps from an expert that is 2 s.d. ahead."""
    model = model_of({**EXPERTS, "bias_rate": rate})
    table = table_for(model)
    gpt = build_model(model, table, random_vectors=False)
    optimizer = build_optimizer(gpt, table)
    batch = batch_of(model, batch=8, ignored=0.0)
    router = routers(gpt)[0]
    assert router.bias is not None
    spread = float(routings_of(gpt, batch[0])[0].scores.std())
    router.bias.data[3] += 2 * spread
    for _ in range(30):
        train_step(gpt, optimizer, 0.0, batch)
    load = routings_of(gpt, batch[0])[0].load().double()
    return float(load.max() / load.mean())


def test_a_router_that_prefers_an_expert_is_balanced_and_without_a_rate_it_is_not() -> None:
    assert fullest_over_mean(6e-3) <= 1.5
    assert fullest_over_mean(1e-9) > 2


# --- what does not fit ----------------------------------------------------------------------------


def test_rows_that_do_not_fit_name_step_layer_and_load(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(EXPERTS)
    gpt = build_model(model)

    def refuse(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(dispatch._Spread, "apply", refuse)
    said = r"step 12, layer 0: the experts of this rank have 72 rows, 1\.00 times the mean"
    with pytest.raises(ExpertsDoNotFit, match=said), naming_work("step 12"):
        gpt(batch_of(model)[0])

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(dispatch._Spread, "apply", fail)
    with pytest.raises(RuntimeError, match="something else"), naming_work("step 12"):
        gpt(batch_of(model)[0])


class NoMemoryAt(TorchDispatchMode):
    """The n-th index_select finds no memory."""

    def __init__(self, number: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func is torch.ops.aten.index_select.default
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


def refuse_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("place", ["sums", "rows", "input", "weight"])
def test_rows_that_do_not_fit_in_backward_name_step_layer_and_load(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sums over the slots, tokens, and both gradients of the experts' products."""
    gpt = build_model(model_of(EXPERTS))
    tokens, labels = batch_of(gpt.config)
    gpt.queue.begin_step(gpt.parameters(), 1)
    loss = gpt(tokens, labels=labels)
    if place == "input":
        monkeypatch.setattr(grouped, "grouped_input_gradient", refuse_memory)
    if place == "weight":
        monkeypatch.setattr(grouped, "accumulate_grouped", lambda *_: refuse_memory)
    # Backward of the sums selects twice, that of the tokens' rows once.
    at = {"sums": 1, "rows": 3}.get(place, 1000)
    said = r"step 12, layer 1: the experts of this rank have 72 rows, 1\.00 times the mean"
    with pytest.raises(ExpertsDoNotFit, match=said), naming_work("step 12"), NoMemoryAt(at):
        loss.backward()
        gpt.queue.finish_step()
