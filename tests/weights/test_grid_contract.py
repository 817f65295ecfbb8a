"""What every grid must do; the grids come from grids.py."""

from __future__ import annotations

import dataclasses
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError, from_json, to_json
from moejax.weights import BinaryGrid, ClippedGrid, Grid, Log2Grid, SymmetricGrid, TernaryGrid

# Tests are no package: the list is loaded from the file beside this one.
_found = util.spec_from_file_location("weights_grids", Path(__file__).with_name("grids.py"))
shared = util.module_from_spec(_found)
_found.loader.exec_module(shared)
E, K, N, GROUP = 2, 64, 4, shared.GROUP
w_ExKxN = jnp.asarray(shared.drawn(0, (E, K, N)))


@pytest.fixture(params=list(shared.GRIDS))
def grid(request) -> Grid:
    return shared.GRIDS[request.param]


def test_codes_and_values_are_those_of_the_format(grid):
    """Catches a format that means other values than the grid does, and codes out of range."""

    @jax.jit
    def by_parts(w):
        scale, zero = grid.scales(w.reshape(E, K // GROUP, GROUP, N))
        codes = grid.codes(w.reshape(E, K // GROUP, GROUP, N), scale, zero)
        return codes, grid.values(codes, scale, zero), scale, zero

    codes, values, scale, zero = by_parts(w_ExKxN)
    assert isinstance(grid, Grid) and codes.dtype == jnp.uint8 and values.dtype == jnp.float32
    assert int(codes.max()) < 2**grid.bits
    assert scale.shape == (E, K // GROUP, 1, N) and scale.dtype == jnp.float16
    near = grid(w_ExKxN).materialize()
    np.testing.assert_allclose(near, values.reshape(E, K, N), rtol=1e-6, atol=1e-6)
    zero = None if zero is None else zero.reshape(E, -1, N)
    packed = grid.pack(codes.reshape(E, K, N), scale.reshape(E, -1, N), zero)
    np.testing.assert_allclose(packed.materialize(), near, rtol=1e-6, atol=1e-6)


def test_codes_are_the_nearest_level(grid):
    """Catches codes that are not the best for their scale: all 2**bits levels are tried."""
    w = np.asarray(w_ExKxN[0]).reshape(-1, GROUP, N)
    scale, zero = jax.jit(grid.scales)(w)

    def distance(levels):
        levels = np.float64(levels)
        if not isinstance(grid, Log2Grid):
            return np.abs(levels - w)
        apart = np.abs(np.log2(np.abs(levels)) - np.log2(np.abs(w)))
        return apart + 100 * ((levels > 0) != (w >= 0))

    unused = isinstance(grid, TernaryGrid)  # code 0, of the level -2
    every = jnp.arange(unused, 2**grid.bits, dtype=jnp.uint8)[:, None, None, None]
    least = distance(grid.values(every, scale, zero)).min(0)
    near = distance(grid.values(grid.codes(w, scale, zero), scale, zero))
    assert np.all(near <= least + 1e-5)


def test_bytes_are_codes_and_scales(grid):
    """Catches binary codes in two bits, ternary ones in eight, and surplus levels."""
    weight = grid(w_ExKxN)
    per_matrix = {"log2": 4 * 2**grid.bits, "binary": 4 * 2}  # float32 levels
    name = next(name for name, other in shared.GRIDS.items() if other is grid)
    zero = {"asymmetric": 1, "clipped": 1, "hqq": 2}.get(name, 0)
    count = K // GROUP * N
    want = K * N * grid.bits // 8 + count * (2 + zero) + per_matrix.get(name, 0)
    assert weight.nbytes == E * want


def test_batched_and_jitted_equal_one_by_one(grid):
    """Catches statistics shared between experts or layers."""
    whole = jax.jit(grid)(w_ExKxN)
    for e in range(E):
        for a, b in zip(jax.tree.leaves(grid(w_ExKxN[e])), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[e])


def test_extreme_weights(grid):
    """Catches 0 / 0 in empty groups, scales that underflow, and NaN or overflow without a word."""
    for magnitude in (0.0, 1e-12, 1e-7, 1e-5):
        w = w_ExKxN * magnitude
        near, largest = np.asarray(grid(w).materialize()), float(jnp.abs(w).max())
        assert np.isfinite(near).all()
        assert np.abs(near - np.asarray(w)).max() <= max(largest, 1.3e-7)
        assert magnitude > 0 or not near.any()
    for wrong in (np.nan, np.inf, -1e8):
        w = w_ExKxN.at[1, GROUP : 2 * GROUP, 2].set(wrong)
        with pytest.raises(SpecError, match=r"of layers\.0\.up is not finite"):
            grid(w, name="layers.0.up")


def test_json_and_shapes(grid):
    """Catches grids that no config or manifest can hold, and silent remainders of a group."""
    again = from_json(to_json(grid))
    assert again == grid and hash(again) == hash(grid)
    with pytest.raises(SpecError, match="16 does not divide the 24 inputs of up"):
        grid(w_ExKxN[:, :24], name="up")
    abstract = jax.eval_shape(grid, w_ExKxN)
    assert abstract.shape == (E, K, N)
    assert jax.tree.structure(abstract) == jax.tree.structure(grid(w_ExKxN))


def test_a_spec_takes_any_grid():
    """Catches type checks of configs that know the first grids only, or want a group."""
    for inner in (*shared.GRIDS.values(), SymmetricGrid(bits=4, group=None)):
        outer = ClippedGrid(grid=inner)
        assert (outer.bits, outer.group) == (inner.bits, inner.group)
    with pytest.raises(SpecError, match="ClippedGrid.grid"):
        ClippedGrid(grid=4)
    with pytest.raises(SpecError, match="candidates"):
        ClippedGrid(grid=inner, candidates=(1.0,))
    for wrong in (BinaryGrid, TernaryGrid):
        with pytest.raises(SpecError, match="group"):
            wrong(group=0)
    assert not isinstance(3, Grid) and "bits" not in {
        f.name for f in dataclasses.fields(BinaryGrid)
    }
