"""Shuffles of which any place can be asked for: permutations, uniform, and the same for ever."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from adm_rt.data.keyed_random import CROP_DRAWS, GLYPH_DRAWS, shuffled, uniform

STORED_ORDER = [2, 3, 4, 1, 5, 6, 7, 0]
STORED_DRAWS = [0.7155196611992554, 0.7950579660782158, 0.638117906678826, 0.026417463220831272]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1797, 65537])
def test_every_epoch_is_a_permutation(size):
    places = np.arange(size)
    for epoch in (0, 1, 2**40):
        order = shuffled(places, size, 7, epoch)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), places)
    if size > 4:
        assert not np.array_equal(order, shuffled(places, size, 7, 0))
        assert not np.array_equal(order, shuffled(places, size, 8, 2**40))


def test_any_places_can_be_asked_for():
    whole = shuffled(np.arange(1000), 1000, 3, 5)
    some = np.array([999, 0, 17, 17, 500])
    assert np.array_equal(shuffled(some, 1000, 3, 5), whole[some])
    far = shuffled(np.array([0, 2**62]), 2**62 + 1, 3, 5)  # no permutation is made
    assert (0 <= far).all() and (far <= 2**62).all()


def test_all_orders_are_equally_likely():
    counts = Counter(tuple(shuffled(np.arange(4), 4, 11, epoch).tolist()) for epoch in range(2400))
    observed = np.array([counts[order] for order in permutations(range(4))])
    chi_square = ((observed - 100) ** 2 / 100).sum()
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


def test_every_image_comes_at_every_place_equally_often():
    size, epochs = 50, 1500
    seen = np.zeros((size, size))
    together = np.zeros((size, size))
    for epoch in range(epochs):
        order = shuffled(np.arange(size), size, 0, epoch)
        seen[np.arange(size), order] += 1
        together[order[:-1], order[1:]] += 1  # who follows whom
    expected = epochs / size
    assert ((seen - expected) ** 2 / expected).sum() < 2624  # 49 x 49 degrees, p = 0.001
    pairs = together[~np.eye(size, dtype=bool)]
    expected = epochs * (size - 1) / pairs.size
    assert ((pairs - expected) ** 2 / expected).sum() < 2670  # at most 2449 degrees, p = 0.001


def test_what_a_seed_means_does_not_change():
    assert shuffled(np.arange(8), 8, 1, 2).tolist() == STORED_ORDER
    np.testing.assert_allclose(uniform(1, np.array([2], np.uint64), 4, CROP_DRAWS)[0], STORED_DRAWS)


def test_purposes_are_separate_streams():
    index = np.arange(1000, dtype=np.uint64)
    a, b = (uniform(1, index, 2, purpose) for purpose in (GLYPH_DRAWS, CROP_DRAWS))
    assert not np.isin(a, b).any()
