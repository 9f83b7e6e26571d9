"""Float8 products: torch's own product is the judge, and layouts agree where they promise to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.float8 import Float8Products, Float8Settings, Operand, multiply
from megatron_completep.parallel.parameter import Spec, declare, make_parameter
from megatron_completep.parallel.products import Products
from megatron_completep.planning.scaling import rank_memory
from megatron_completep.roles import Role
from megatron_completep.run.assemble import assemble
from tests.parallel.float8_runs import (
    casts_of_weights,
    config_of,
    loss_after_loading,
    matrices_of,
    train,
)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, gradient: bool) -> Operand:
    return Operand(*kernels.float8_cast(x, kernels.largest_magnitude(x), gradient, True))


@pytest.mark.parametrize(("left", "right"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", [64, 240])
def test_the_emulation_has_the_bits_of_torch_s_scaled_product(left, right, size):
    a, b = rounded(gaussian(48, size), left), rounded(gaussian(32, size, seed=1), right)
    judged = torch._scaled_mm(
        a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=torch.float32
    )
    assert torch.equal(multiply(a, b, torch.float32, fast=False), judged)
    other = a._replace(scale=a.scale * (1 + 2**-20))  # control: another scale is seen
    assert not torch.equal(multiply(other, b, torch.float32, fast=False), judged)


def products_of(out_size: int, in_size: int, weight_gradient: str) -> tuple[Products, Tensor]:
    spec = Spec(Role.HIDDEN_WEIGHT, (out_size, in_size), fan_in=in_size, base_fan_in=in_size)
    weight = make_parameter(spec, ParallelContext.single())
    with torch.no_grad():
        weight.copy_(gaussian(out_size, in_size, seed=2, scale=in_size**-0.5))
    return Float8Products(Products(), Float8Settings(weight_gradient, 16)).of(weight), weight


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_errors_of_gaussian_operands_do_not_depend_on_the_size(size):
    products, weight = products_of(size, size, "float8")
    x, d_out = gaussian(256, size), gaussian(256, size, seed=1, scale=1e-5)
    exact = weight.double().detach()
    out = products.forward(x, weight)
    assert relative_error(out, x.double() @ exact.t()) == pytest.approx(0.0375, abs=0.005)
    d_x = products.input_gradient(d_out, weight)
    assert relative_error(d_x, d_out.double() @ exact) == pytest.approx(0.059, abs=0.008)
    total = torch.full((size, size), 7.0)
    products.add_weight_gradient(total, d_out, x, True)
    expected = d_out.double().t() @ x.double()
    assert relative_error(total, expected) == pytest.approx(0.058, abs=0.008)
    products.add_weight_gradient(total, d_out, x, False)
    assert relative_error(total, 2 * expected) == pytest.approx(0.058, abs=0.008)


def test_a_high_weight_gradient_is_that_of_the_operands_as_they_are():
    products, _ = products_of(64, 32, "high")
    x, d_out = gaussian(48, 32), gaussian(48, 64, seed=1)
    total, plain = torch.zeros(64, 32), torch.zeros(64, 32)
    products.add_weight_gradient(total, d_out, x, True)
    Products().add_weight_gradient(plain, d_out, x, True)
    assert torch.equal(total, plain)


def test_small_matrices_and_those_of_other_roles_are_left_out():
    settings = Float8Settings(least_size=32)
    assert settings.takes(Role.HIDDEN_WEIGHT, (64, 32))
    assert not settings.takes(Role.HIDDEN_WEIGHT, (64, 16))  # too small
    assert not settings.takes(Role.HIDDEN_WEIGHT, (64, 40))  # no multiple of 16
    assert not settings.takes(Role.UNEMBEDDING, (64, 64))
    assert not settings.takes(Role.HIDDEN_WEIGHT, (4, 64, 64))  # experts


def test_a_model_of_which_nothing_would_be_converted_is_refused():
    config = config_of({"training": {"float8_least_size": 2048}})
    with pytest.raises(ConfigError, match="converts no matrix of this model"):
        assemble(config, ParallelContext.single())


def test_every_weight_is_rounded_once_a_step():
    casts, matrices = casts_of_weights(steps=3, micro_batches=4)
    assert casts == 3 * matrices and matrices == 8


SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, SEQUENCE), (4, {"tensor_parallel_size": 2, "bucket_megabytes": 0.005})],
)
def test_weights_of_any_layout_are_rounded_to_the_same_bytes(pool, ranks, parallel):
    expected = train(0, {}, steps=0)
    for outcome in pool.run(ranks, train, {"parallel": parallel}, 0):
        assert outcome.scales == expected.scales
        for name, data in expected.rounded.items():
            spec = outcome.weights[name]
            assert torch.equal(outcome.rounded[name], spec.to_local(data)), name


def test_inputs_that_are_gathered_have_the_scale_of_the_whole_sequence(pool):
    expected = train(0, {}, steps=1).magnitudes
    site = "layers.0.attention.qkv input"
    for outcome in pool.run(2, train, {"parallel": SEQUENCE}, 1):
        assert outcome.magnitudes[site] == expected[site]
    forgotten = pool.run(2, train, {"parallel": SEQUENCE}, 1, True)  # control
    assert any(outcome.magnitudes[site] != expected[site] for outcome in forgotten)


ZERO_BUBBLE = {"pipeline_parallel_size": 2, "schedule": "zero_bubble"}
ALL_FLOAT8 = {"training": {"float8_weight_gradient": "float8"}}


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (2, {"parallel": SEQUENCE, **ALL_FLOAT8}),
        (2, {"parallel": ZERO_BUBBLE}),
        (2, {"parallel": {"sharding": "gradients"}, "training": {"recompute": "full"}}),
    ],
)
def test_layouts_train_alike_up_to_the_scales_of_their_parts(pool, ranks, sections):
    training = sections.get("training", {})
    expected = train(0, {"training": training}, steps=3).losses
    for outcome in pool.run(ranks, train, sections, 3):
        assert outcome.losses[0] == pytest.approx(expected[0], rel=1e-6)
        assert outcome.losses == pytest.approx(expected, rel=1e-3)
    without = train(0, {"training": {"float8": "none"}}, steps=1).losses  # control
    assert without[0] != pytest.approx(expected[0], rel=1e-3)


def test_the_plan_counts_the_rounded_weights_and_their_transposes():
    planned = []
    for float8 in ("tensorwise", "none"):
        config = config_of({"training": {"float8": float8, "precision": "bf16"}})
        planned.append(rank_memory(config, 0, 1, 1).parameters)
    config = config_of({"training": {"precision": "bf16"}})
    matrices = matrices_of(assemble(config, ParallelContext.single())).values()
    held = sum(m.rounded().data.nbytes + m.rounded().transposed.nbytes for m in matrices)
    assert planned[0] - planned[1] == held > 0


def test_a_run_goes_on_from_its_masters_alone():
    on, resumed, states = loss_after_loading(renews=True)
    assert on == resumed
    assert states == {"master", "exp_avg", "exp_avg_sq"}
    on, resumed, _ = loss_after_loading(renews=False)  # control
    assert on != resumed


def test_without_float8_no_layer_has_other_products():
    config = config_of({"training": {"float8": "none"}})
    assert not matrices_of(assemble(config, ParallelContext.single()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight_gradient", ["high", "float8"])
def test_a_gpu_computes_what_the_emulation_does(weight_gradient):
    products, weight = products_of(256, 128, weight_gradient)
    x, d_out = gaussian(64, 128), gaussian(64, 256, seed=1, scale=1e-3)
    on_gpu = Parameter(weight.detach().cuda())
    declare(on_gpu, Role.HIDDEN_WEIGHT, 128, 128)
    settings = Float8Settings(weight_gradient, 16)
    there = Float8Products(Products(), settings).of(on_gpu)
    # Fast accumulation has some 14 bits.
    out = there.forward(x.cuda(), on_gpu).cpu()
    torch.testing.assert_close(out, products.forward(x, weight), rtol=1e-2, atol=1e-2)
    d_x = there.input_gradient(d_out.cuda(), on_gpu).cpu()
    torch.testing.assert_close(d_x, products.input_gradient(d_out, weight), rtol=1e-3, atol=1e-5)
    total, total_there = torch.zeros(256, 128), torch.zeros(256, 128, device="cuda")
    products.add_weight_gradient(total, d_out, x, True)
    there.add_weight_gradient(total_there, d_out.cuda(), x.cuda(), True)
    torch.testing.assert_close(total_there.cpu(), total, rtol=1e-3, atol=1e-5)
