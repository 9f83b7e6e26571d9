"""Products through oneDNN: which run takes them, which product goes there, and what comes out.

The processor's maker is an argument, so that every case is tried on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.errors import ConfigError
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.onednn import (
    ALL_PRODUCTS,
    AMD,
    PRODUCTS_ALONE,
    ZEN_5,
    LeastWork,
    Processor,
    find_linear,
    least_work,
    read_processor,
    working,
)
from megatron_completep.parallel.products import (
    OneDnnProducts,
    Products,
    choose_inference_products,
    choose_products,
)
from tests.support.configs import GPT2, small_config

CPU = torch.device("cpu")
INTEL = Processor("GenuineIntel", 6, avx512=True)
ZEN_4 = Processor(AMD, 25, avx512=True)
EVERY = LeastWork(1, 1)


class StandIn:
    """The operator's interface over torch's product; counts its calls, and may be wrong."""

    def __init__(self, error: float = 0.0):
        self.calls = 0
        self.error = error

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        scalars: list[float],
        algorithm: str,
    ) -> Tensor:
        assert (activation, scalars, algorithm) == ("none", [], "")
        self.calls += 1
        out = x.detach() @ weight.detach().t()
        return (out if bias is None else out + bias.detach()) + self.error


def refusing(*_: Any) -> Tensor:
    raise RuntimeError("this build has no oneDNN")


def chosen(setting: str, device: torch.device, precision: torch.dtype, processor: Processor) -> str:
    return choose_products("auto", setting, device, precision, processor, StandIn).library


def test_the_rule_is_the_maker_the_type_and_the_device():
    gpu = torch.device("cuda", 0)
    assert chosen("auto", CPU, torch.float32, ZEN_4) == "onednn"
    assert chosen("onednn", CPU, torch.float32, INTEL) == "onednn"
    assert chosen("torch", CPU, torch.float32, ZEN_4) == "torch"
    assert chosen("auto", CPU, torch.float32, INTEL) == "torch"
    assert chosen("auto", CPU, torch.float32, Processor()) == "torch"
    for precision in (torch.bfloat16, torch.float64):
        assert chosen("auto", CPU, precision, ZEN_4) == "torch"
    assert chosen("auto", gpu, torch.float32, ZEN_4) == "torch"


def test_a_library_that_cannot_serve_is_refused_where_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"onednn serves float32.*float64 on cpu. Use auto"):
        chosen("onednn", CPU, torch.float64, ZEN_4)
    with pytest.raises(ConfigError, match=r"no oneDNN product that works here"):
        choose_products("auto", "onednn", CPU, torch.float32, ZEN_4, lambda: None)
    # A trained model may compute elsewhere than its run did.
    assert type(choose_inference_products("onednn", CPU, torch.float64, ZEN_4)) is Products


@pytest.mark.parametrize("operator", [None, refusing, StandIn(error=1.0), lambda x: x])
def test_without_a_working_operator_the_products_are_torchs(operator):
    assert working(operator) is None
    products = choose_products("auto", "auto", CPU, torch.float32, ZEN_4, lambda: working(operator))
    assert type(products) is Products
    good = StandIn()
    assert working(good) is good  # the control


def test_weight_gradients_go_there_only_where_units_are_as_wide_as_vectors():
    assert least_work(ZEN_4) == PRODUCTS_ALONE
    assert least_work(Processor(AMD, ZEN_5, avx512=True)) == ALL_PRODUCTS
    assert least_work(Processor(AMD, 25, avx512=False)) is None  # Zen 3 was not measured
    assert least_work(INTEL) is None
    stand_in = StandIn()
    total = torch.zeros(4, 16)
    for least, calls in ((LeastWork(1, None), 0), (EVERY, 1)):
        OneDnnProducts(stand_in, least).add_weight_gradient(
            total, random(8, 4), random(8, 16), True
        )
        assert stand_in.calls == calls


def test_the_processor_is_read_from_linux(tmp_path: Path):
    description = tmp_path / "cpuinfo"
    one = (
        "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu avx2 avx512f\n"
    )
    description.write_text(f"processor\t: 0\n{one}\nprocessor\t: 1\n{one}")
    assert read_processor(description) == ZEN_4
    description.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n")
    assert read_processor(description) == Processor()
    assert read_processor(tmp_path / "missing") == Processor()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operator_here() -> Any:
    return find_linear() or pytest.skip("this build of torch has no oneDNN")


@pytest.mark.parametrize("transposed", [False, True])
def test_every_product_is_the_one_of_float64(transposed):
    products = OneDnnProducts(operator_here(), EVERY)
    # Odd sizes, a batch, and operands that are views.
    x = random(7, 9, 33)[:, 1:, :31]
    weight = random(31, 45).t() if transposed else random(45, 31)
    bias = random(45)
    out = products.forward(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)

    d_x = products.input_gradient(out, weight)
    torch.testing.assert_close(d_x, (out.double() @ weight.double()).float(), rtol=1e-5, atol=1e-4)
    rows = out.flatten(0, 1)
    written = torch.full((2 * rows.shape[0], 31), torch.nan)[::2]
    assert products.input_gradient(rows, weight, out=written) is written
    assert torch.equal(written, products.input_gradient(rows, weight))

    inputs = x.flatten(0, 1)
    d_weight = (rows.double().t() @ inputs.double()).float()
    total = torch.full((45, 31), torch.nan)
    products.add_weight_gradient(total, rows, inputs, first=True)
    torch.testing.assert_close(total, d_weight, rtol=1e-5, atol=1e-4)
    products.add_weight_gradient(total, rows, inputs, first=False)
    torch.testing.assert_close(total, 2 * d_weight, rtol=1e-5, atol=2e-4)
    # The control.
    with pytest.raises(AssertionError):
        torch.testing.assert_close(total, d_weight, rtol=1e-5, atol=2e-4)


def test_small_products_and_other_types_stay_with_torch():
    stand_in = StandIn()
    products = OneDnnProducts(stand_in, LeastWork(8 * 16 * 4, 8 * 16 * 4))
    x = random(8, 16)
    weight = random(4, 16)
    assert torch.equal(products.forward(x[:7], weight), Products().forward(x[:7], weight))
    products.forward(x.double(), weight.double())
    products.input_gradient(random(7, 4), weight)
    products.add_weight_gradient(torch.zeros(4, 16), random(7, 4), x[:7], first=True)
    assert stand_in.calls == 0
    products.forward(x, weight)
    products.input_gradient(random(8, 4), weight)
    products.add_weight_gradient(torch.zeros(4, 16), random(8, 4), x, first=True)
    assert stand_in.calls == 3


def test_what_autograd_follows_keeps_its_gradient():
    stand_in = StandIn()
    products = OneDnnProducts(stand_in, EVERY)
    weight = random(4, 16).requires_grad_()
    products.forward(random(8, 16), weight).sum().backward()
    assert weight.grad is not None and stand_in.calls == 0
    with torch.no_grad():
        products.forward(random(8, 16), weight)
    assert stand_in.calls == 1


def test_a_compiled_region_never_holds_the_operator():
    stand_in = StandIn()
    products = OneDnnProducts(stand_in, EVERY)

    def region(x: Tensor, weight: Tensor) -> Tensor:
        return products.forward(x, weight) * 2

    compiled = torch.compile(region, backend="eager", fullgraph=True)
    x, weight = random(8, 16), random(4, 16)
    torch.testing.assert_close(compiled(x, weight), 2 * (x @ weight.t()))
    assert stand_in.calls == 0
    region(x, weight)
    assert stand_in.calls == 1  # the control


def loss_and_gradients(products: Products, labelled: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Of a small float32 model with biases, whose logits are taken in chunks."""
    config = small_config(model=GPT2)
    table = table_of(config)
    gpt = GPT(config.model, table, ParallelContext.single(), products=products)
    initialize(gpt, table, config.optimizer, seed=1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (3, 13), generator=generator)
    if not labelled:
        with torch.no_grad():
            return gpt(tokens[:, :-1]), []
    loss = gpt(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    return loss.detach(), [main_grad_of(parameter) for parameter in gpt.parameters()]


def test_a_model_trains_and_predicts_through_every_product():
    stand_in = StandIn()
    counted = OneDnnProducts(stand_in, EVERY)
    expected, expected_gradients = loss_and_gradients(Products())
    loss, gradients = loss_and_gradients(counted)
    # Four matrices a layer and the unembedding, each forward and in its two gradients.
    assert stand_in.calls == 3 * (4 * 4 + 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)

    stand_in.calls = 0
    logits, _ = loss_and_gradients(counted, labelled=False)
    assert stand_in.calls == 4 * 4 + 1
    torch.testing.assert_close(logits, loss_and_gradients(Products(), labelled=False)[0])

    real = OneDnnProducts(operator_here(), EVERY)
    loss, gradients = loss_and_gradients(real)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
