"""Round-to-nearest on every grid: error bounds, edge cases, storage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError, from_json, to_json
from moejax.weights import AsymmetricGrid, Log2Grid, SymmetricGrid, relative_error, unpack_codes

K, N, GROUP = 32, 4, 16


def drawn(seed, magnitude):
    """[2, K, N] heavy-tailed weights, some columns of one sign."""
    w = np.random.default_rng(seed).standard_t(3, (2, K, N)) * magnitude
    w[0, :, 0] = np.abs(w[0, :, 0])
    return jnp.asarray(w, jnp.float32)


def steps(weight):
    """float64 scale of every weight."""
    return np.repeat(np.float64(weight.scale), weight.group, axis=-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", [SymmetricGrid, AsymmetricGrid])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-9, 3))
def test_error_is_at_most_half_a_step(grid, bits, seed, exponent):
    """Catches codes computed with the unrounded scale, truncation, and cut-off outliers."""
    w = drawn(seed, 10.0**exponent)
    weight = grid(bits=bits, group=GROUP)(w)
    assert weight.scale.dtype == jnp.float16
    error = np.abs(np.float64(w) - np.float64(weight.materialize()))
    assert np.all(error <= 0.5 * steps(weight) * (1 + 2e-3 * 2**bits))


def test_symmetric_scale_is_the_largest_weight():
    """Catches max / 2**(bits-1), which wastes a level, and one scale for the whole matrix."""
    w = drawn(0, 1.0)
    weight = SymmetricGrid(bits=4, group=GROUP)(w)
    want = np.abs(np.asarray(w)).reshape(2, K // GROUP, GROUP, N).max(2) / 7
    np.testing.assert_array_equal(weight.scale, want.astype(np.float16))
    want = np.round(np.float64(w) / steps(weight)) + 8
    np.testing.assert_array_equal(unpack_codes(weight.words, 4, K), want)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_asymmetric_edge_groups(bits):
    """Catches 0 / 0 in constant groups, and zeros that are not exact."""
    w = np.zeros((K, 6), np.float32)
    w[:, 1] = 0.75  # all equal
    w[:, 2] = -0.75
    w[3, 3] = 100.0  # a single outlier among zeros
    w[:, 4] = np.linspace(-1, 1, K)
    w[:, 5] = 1e-9  # below float16
    weight = AsymmetricGrid(bits=bits, group=None)(jnp.asarray(w))
    near = np.asarray(weight.materialize())
    assert np.isfinite(near).all() and np.isfinite(weight.scale).all()
    np.testing.assert_array_equal(near[:, 0], 0)
    np.testing.assert_allclose(near[:, [1, 2]], w[:, [1, 2]], rtol=1e-3)
    np.testing.assert_array_equal(near[w[:, 3] == 0, 3], 0)
    np.testing.assert_allclose(near[3, 3], 100, rtol=1e-3)
    np.testing.assert_allclose(near[:, 5], 1e-9, atol=3.1e-8)


@pytest.mark.parametrize(
    "grid", [SymmetricGrid(bits=8, group=GROUP), Log2Grid(bits=4, group=GROUP)]
)
def test_tiny_weights_keep_the_bound(grid):
    """Catches float16 scales that underflow to zero and turn small weights to NaN or infinity."""
    for magnitude in (1e-5, 1e-7, 1e-12, 0.0):
        w = drawn(1, magnitude)
        near = np.asarray(grid(w).materialize())
        largest = np.abs(np.asarray(w)).max()
        assert np.isfinite(near).all()
        assert np.abs(near - np.asarray(w)).max() <= max(0.5 * largest, 3.1e-8)
    np.testing.assert_array_equal(near, 0)


@pytest.mark.parametrize("grid", [SymmetricGrid, AsymmetricGrid, Log2Grid])
@pytest.mark.parametrize("wrong", [1e7, np.nan, np.inf])
def test_weights_beyond_float16_are_refused(grid, wrong):
    """Catches a NaN checkpoint or an overflowing scale that quantizes without a word."""
    w = drawn(0, 1.0).at[1, 5, 2].set(wrong)
    with pytest.raises(SpecError, match=r"of layers\.0\.up is not finite"):
        grid(bits=4, group=GROUP)(w, name="layers.0.up")
    hidden = jax.jit(grid(bits=4, group=GROUP))(w).materialize()
    assert not np.isfinite(np.asarray(hidden)[1]).all()


def test_log2_levels_and_rounding():
    """Catches a linear grid, a lost sign, and rounding of |w| instead of its logarithm."""
    grid = Log2Grid(bits=3, group=None)
    exact = np.float32([1, 0.5, 0.25, 0.125, -1, -0.5, -0.25, -0.125] * 4)[:, None]
    exact = np.broadcast_to(exact, (2, K, N))
    np.testing.assert_array_equal(grid(jnp.asarray(exact)).materialize(), exact)
    w = drawn(0, 1.0)
    weight = grid(w)
    near = np.float64(weight.materialize())
    assert np.all((near > 0) == (np.asarray(w) >= 0))
    exponent = -np.log2(np.abs(near) / steps(weight))
    ratio = np.maximum(np.abs(np.float64(w)) / steps(weight), 2.0**-9)
    want = np.clip(np.round(-np.log2(ratio)), 0, 3)
    assert np.mean(np.isclose(exponent, want)) > 0.99


def test_log2_scale_is_refined():
    """Catches the scale left at max|w|: the refined one has a smaller squared error."""
    grid, w = Log2Grid(bits=3, group=None), drawn(3, 1.0)

    @jax.jit
    def unrefined(w):
        scale = jnp.abs(w).max(-2, keepdims=True)
        return grid.values(grid.codes(w, scale), scale)

    error, plain = (np.asarray(relative_error(w, near)) for near in (grid(w), unrefined(w)))
    assert np.all(error <= plain + 1e-3) and error.mean() < 0.95 * plain.mean()


@pytest.mark.parametrize("grid", [SymmetricGrid, AsymmetricGrid, Log2Grid])
def test_batched_and_jitted_equal_one_by_one(grid):
    """Catches statistics shared between experts or layers."""
    w = drawn(0, 1.0)
    quantize = grid(bits=4, group=GROUP)
    whole = jax.jit(quantize)(w)
    for e in range(2):
        one = quantize(w[e])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[e])


def test_grids_travel_as_json_and_refuse_the_impossible():
    """Catches grids that a config cannot hold, 1 bit without a level, and a silent remainder."""
    for grid in (SymmetricGrid(bits=3, group=None), Log2Grid(bits=4, group=32)):
        assert from_json(to_json(grid)) == grid
    with pytest.raises(SpecError, match="bits"):
        SymmetricGrid(bits=1, group=None)
    with pytest.raises(SpecError, match="group"):
        AsymmetricGrid(bits=4, group=0)
    w = jnp.zeros((40, 4))
    with pytest.raises(SpecError, match="24 does not divide the 40 inputs of up"):
        SymmetricGrid(bits=4, group=24)(w, name="up")
    with pytest.raises(SpecError, match="40 inputs of up at 3 bits"):
        SymmetricGrid(bits=3, group=None)(w, name="up")
