"""The distributed optimizer: what it hides, what it sends,
and that shards cut parameters without a trace.
"""

from __future__ import annotations

import pytest

from tests.parallel.layouts import Case, relative_error, train
from tests.parallel.slow_group import exposed_communication, shard_sizes

# Ticks: a layer's forward (and backward), and one collective on the slow network.
LAYER, DELAY = (8, 5)


def test_exposed_communication_is_at_most_the_last_gradient_and_the_first_parameter_bucket(pool):
    for seen in pool.run(2, exposed_communication, LAYER, DELAY, False):
        assert seen["buckets"] >= 8
        assert seen["gradients"] <= 2.5 * DELAY
        assert seen["parameters"] <= 2.5 * DELAY


def test_waiting_for_all_parameters_before_the_forward_would_be_seen(pool):
    """Negative control: the same measurement, without the overlap."""
    for seen in pool.run(2, exposed_communication, LAYER, DELAY, True):
        assert seen["parameters"] >= 0.7 * seen["buckets"] * DELAY


def test_shards_that_cut_parameters_keep_groups_apart_that_differ_in_eps_alone(pool):
    overrides = [
        {"pattern": "layers.*.mlp.up.weight", "eps": 1e3},
        {"pattern": "layers.1.*", "eps": 10.0},
    ]
    settings = {"base_eps": 1e-4, "overrides": overrides}
    case = Case(
        {"world_size": 4, "bucket_megabytes": 0.05}, {}, settings, steps=3, precision="float64"
    )
    outcomes = pool.run(4, train, case)
    expected = train(0, Case({}, {}, settings, steps=3, precision="float64"))
    assert max(relative_error(outcomes, expected, "parameters").values()) <= 1e-11
    groups = outcomes[0].groups
    first, second = groups["layers.0.mlp.up.weight.up"], groups["layers.0.attention.qkv.weight.k"]
    assert (first.lr_factor, first.weight_decay) == (
        second.lr_factor,
        second.weight_decay,
    )
    assert first.eps != second.eps
    without = train(0, Case({}, {}, {"base_eps": 1e-4}, steps=3, precision="float64"))
    assert max(relative_error([without], expected, "parameters").values()) > 1e-3


def test_gradients_sent_in_bf16_are_near_but_not_equal(pool):
    case = Case({"world_size": 2, "gradient_dtype": "bf16"}, {}, {"base_eps": 1e-3}, steps=3)
    expected = train(0, Case({}, {}, {"base_eps": 1e-3}, steps=3))
    errors = relative_error(pool.run(2, train, case), expected, "parameters")
    assert 1e-7 < max(errors.values()) < 2e-2


@pytest.mark.parametrize("shard", [1, 2, 4])
def test_the_optimizer_state_of_a_rank_shrinks_with_the_shard_size(pool, shard):
    sizes = pool.run(4, shard_sizes, {"world_size": 4, "optimizer_shard_size": shard})
    whole, own = sizes[0]
    assert own * shard == whole and all(size == sizes[0] for size in sizes)
