from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.data import blend as blend_module
from megatron_completep.data.blend import Blend
from megatron_completep.errors import DataError


def worst_deviation(blend, counts, start, samples):
    """Largest |count - share| over the prefixes start+1 .. start+samples, in exact arithmetic;
    checks the sample numbers on the way.
    """
    counts, worst = list(counts), Fraction(0)
    for k in range(start, start + samples):
        source, number = blend[k]
        assert number == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, blend.weights, strict=True):
            worst = max(worst, abs(count - Fraction(weight * (k + 1), blend.total)))
    return worst


@pytest.mark.parametrize(
    "weights", [[1.0], [0.3, 0.7], [0.5, 0.25, 0.25], [5.0, 3.0, 1.0, 0.01], [0.123456, 7.1, 3.3]]
)
def test_every_prefix_is_exact_to_one_sample(weights):
    blend = Blend(weights)
    assert worst_deviation(blend, [0] * len(weights), 0, 6000) < 1


weights_strategy = st.lists(st.integers(1, 10**9) | st.integers(1, 20), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(weights=weights_strategy, block=st.integers(0, 10**9))
def test_every_prefix_is_exact_across_block_boundaries_far_out(weights, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "BLOCK", 8)
        patch.setattr(blend_module, "WHOLE_PERIOD", 0)
        smallest_share = max(1, sum(weights) // 300)
        blend = Blend([Fraction(max(weight, smallest_share)) for weight in weights])
        start = block * blend.block + blend.block // 2
        assert worst_deviation(blend, blend.counts(start), start, min(2 * blend.block, 700)) < 1


def test_a_jump_gives_what_a_walk_gives():
    weights = [Fraction(w) for w in (900_001, 70_003, 29_999)]
    walked = Blend(weights)
    sequence = [walked[k] for k in range(10_000)]
    for k in (9_999, 5_000, 4_096, 4_095, 0):
        assert Blend(weights)[k] == sequence[k]
        assert (
            Blend(weights).counts(k)
            == np.bincount([s for s, _ in sequence[:k]], minlength=3).tolist()
        )


def test_decimal_weights_are_taken_as_written():
    assert Blend([0.3, 0.7]).weights == [3, 7]
    assert Blend([0.1, 0.2, 1e-3]).weights == [100, 200, 1]
    assert Blend([2.0, 4.0]).weights == [1, 2]


def test_the_blend_is_frozen():
    assert [Blend([0.3, 0.7])[k] for k in range(10)] == [
        (1, 0),
        (1, 1),
        (0, 0),
        (1, 2),
        (1, 3),
        (0, 1),
        (1, 4),
        (1, 5),
        (0, 2),
        (1, 6),
    ]


def test_the_deviation_check_finds_a_random_blend():
    """Negative control: drawing each sample's source at random is not exact."""

    class Random:
        weights, total = [1, 1], 2

        def __init__(self):
            self.sources = np.random.default_rng(0).integers(2, size=1000)
            self.numbers = [int((self.sources[:k] == s).sum()) for k, s in enumerate(self.sources)]

        def __getitem__(self, k):
            return int(self.sources[k]), self.numbers[k]

    assert worst_deviation(Random(), [0, 0], 0, 1000) >= 1


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")]])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(DataError, match="must be positive"):
        Blend(weights)
