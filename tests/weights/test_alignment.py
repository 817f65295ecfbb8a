"""Hidden units in one order: assignment against brute force, and the barycentre."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError
from moejax.weights import align, barycentre


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_no_order_is_nearer(seed, units):
    """Catches a greedy match, a match by cosine, and the inverse of the permutation."""
    a, b = np.random.default_rng(seed).normal(size=(2, units, 3))
    found = np.square(a[align(a, b)] - b).sum()
    every = itertools.permutations(range(units))
    assert found == pytest.approx(min(np.square(a[list(o)] - b).sum() for o in every))


def test_a_permuted_copy_is_put_back():
    """Catches an order that moves units away from where they belong."""
    units = np.random.default_rng(0).normal(size=(12, 5))
    order = np.random.default_rng(1).permutation(12)
    np.testing.assert_array_equal(units[order][align(units[order], units)], units)


def test_experts_of_different_shapes_are_refused():
    """Catches an assignment of a part of the units."""
    with pytest.raises(SpecError, match=r"\(4, 3\) and \(5, 3\).*\n.*one width"):
        align(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(SpecError, match="NaN"):
        align(np.full((4, 3), np.nan), np.zeros((4, 3)))


def test_the_barycentre_of_permuted_copies_is_the_original():
    """Catches a plain mean (arXiv:2503.06881: all residuals of a planted layer are zero)."""
    draw = np.random.default_rng(0)
    original = draw.normal(size=(10, 6))
    copies = np.stack([original, *(original[draw.permutation(10)] for _ in range(4))])
    centre, order = barycentre(copies)
    np.testing.assert_allclose(centre, original, atol=1e-12)
    aligned = np.take_along_axis(copies, order[..., None], axis=1)
    np.testing.assert_allclose(aligned, np.broadcast_to(centre, aligned.shape), atol=1e-12)


def test_the_barycentre_is_nearer_than_the_mean_and_than_an_expert():
    """Catches a centre that is not the mean of what is transported to it."""
    draw = np.random.default_rng(3)
    base = draw.normal(size=(8, 6))
    experts = np.stack(
        [(base + 0.5 * draw.normal(size=base.shape))[draw.permutation(8)] for _ in range(5)]
    )
    centre, order = barycentre(experts)
    aligned = np.take_along_axis(experts, order[..., None], axis=1)
    energy = np.square(aligned - centre).sum()
    assert energy < np.square(experts - experts.mean(0)).sum()
    to_first = np.stack([e[align(e, experts[0])] for e in experts])
    assert energy < np.square(to_first - experts[0]).sum()
    np.testing.assert_allclose(centre, aligned.mean(0))
