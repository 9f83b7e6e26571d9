import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.data.permutation import Permutation, derive_key


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_permutation_is_a_bijection(n, key):
    images = Permutation(n, key).take(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_one_index_and_many_agree_at_any_size(n, key, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, key)
    images = permutation.take(indices)
    assert images.tolist() == [permutation[i] for i in indices]
    assert all(0 <= image < n for image in images)
    assert len(set(images.tolist())) == len(set(indices))


def test_the_permutation_is_frozen():
    """A change of these values would change the order of every run that is resumed."""
    key = derive_key(1234, 0, 0)
    assert key == 5960182133528308962
    assert Permutation(10, key).take(np.arange(10)).tolist() == [3, 5, 4, 8, 0, 1, 6, 2, 7, 9]
    assert Permutation(10**12, key).take(np.arange(4)).tolist() == [
        6704279792,
        134133344928,
        166179303959,
        463348716050,
    ]


def test_indices_outside_are_refused():
    permutation = Permutation(5, 0)
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            permutation[wrong]
        with pytest.raises(IndexError):
            permutation.take([0, wrong])


@pytest.mark.parametrize("n", [5, 16])
def test_every_element_reaches_every_place_equally_often(n):
    """Chi-square over 2,000 keys, of the place of each element and of ordered pairs;
    a rotation (the control) fails the pairs.
    """
    keys = 2000
    images = np.stack(
        [Permutation(n, derive_key(7, key)).take(np.arange(n)) for key in range(keys)]
    )
    places = np.stack([np.bincount(images[:, i], minlength=n) for i in range(n)])
    assert chi_square_sigmas(places, keys / n, (n - 1) * (n - 1)) < 4.5

    rotations = (
        np.arange(n)[None, :] + np.random.default_rng(0).integers(n, size=keys)[:, None]
    ) % n
    for sample, limit in ((images, True), (rotations, False)):
        pairs = np.bincount(sample[:, 0] * n + sample[:, 1], minlength=n * n).reshape(n, n)
        off_diagonal = pairs[~np.eye(n, dtype=bool)]
        assert (chi_square_sigmas(off_diagonal, keys / (n * n - n), n * n - n - 1) < 4.5) == limit


def chi_square_sigmas(counts, expected, degrees):
    """How many standard deviations the chi-square statistic lies above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - degrees) / (2 * degrees) ** 0.5
