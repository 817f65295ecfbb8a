"""Grouped outer products against a float64 oracle, and the memory they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.grouped_outer import grouped_outer, reference

K, N = 6, 5


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("groups", [1, 4])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_group_sizes_and_weights(rows, groups, data):
    """Catches rows counted twice where the last block is moved back, spilling into the next group,
    lost groups, weights on both factors, and sums that forget what was there."""
    cuts = sorted(data.draw(st.integers(0, rows)) for _ in range(groups))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    x, y, weight, into = (
        normal(0, rows, K),
        normal(1, rows, N),
        normal(2, rows),
        normal(3, groups, K, N),
    )
    weight = weight.at[:: data.draw(st.integers(1, 3))].set(0)
    found = grouped_outer(x, y, jnp.asarray(sizes), weight_R=weight, into=into)
    expected = reference.grouped_outer(np.asarray(x), np.asarray(y), sizes, np.asarray(weight))
    np.testing.assert_allclose(found, expected + np.asarray(into), atol=2e-5)


def test_rows_that_do_not_count_may_hold_anything():
    """Catches 0 * NaN, in either factor and beyond the last group."""
    x, y, sizes = normal(0, 40, K), normal(1, 40, N), jnp.asarray([20, 10], jnp.int32)
    weight = jnp.ones(40).at[:3].set(0)
    clean = grouped_outer(x, y, sizes, weight_R=weight)
    dirty = grouped_outer(
        x.at[30:].set(jnp.nan).at[0].set(jnp.inf),
        y.at[35:].set(jnp.nan).at[1].set(jnp.nan),
        sizes,
        weight_R=weight,
    )
    np.testing.assert_array_equal(clean, dirty)


def test_the_reference_is_the_definition():
    """Catches an oracle that shares a mistake."""
    x, y = np.asarray(normal(0, 9, K)), np.asarray(normal(1, 9, N))
    np.testing.assert_allclose(
        reference.grouped_outer(x, y, np.asarray([9]))[0], x.T @ y, atol=1e-5
    )


@pytest.mark.parametrize("columns", [6, 512])
def test_sums_are_float32_of_any_rows(columns):
    """Catches sums in bfloat16, tiles of columns that are lost, and int weights."""
    x = normal(0, 200, columns, dtype=jnp.bfloat16)
    sizes = jnp.asarray([150, 50], jnp.int32)
    found = grouped_outer(x, x, sizes)
    assert found.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    for g, rows in enumerate((exact[:150], exact[150:])):
        np.testing.assert_allclose(found[g], rows.T @ rows, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 64])
def test_sums_grow_in_place(groups):
    """Catches a second array of the size of the sums, or a copy of the donated one."""
    sums = jax.ShapeDtypeStruct((groups, 1024, 64), jnp.float32)
    rows = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    other = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def add(into, x, y, sizes):
        return grouped_outer(x, y, sizes, into=into)

    compiled = jax.jit(add, donate_argnums=0).lower(sums, rows, other, sizes).compile()
    memory = compiled.memory_analysis()
    size = groups * 1024 * 64 * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes <= 1.3 * 1024 * 64 * 4  # one group's, at most


def test_shapes_that_do_not_fit_are_refused():
    """Catches broadcasting where shapes disagree."""
    x, y, sizes = normal(0, 8, K), normal(1, 8, N), jnp.asarray([8], jnp.int32)
    for bad in (
        lambda: grouped_outer(x, y[:7], sizes),
        lambda: grouped_outer(x, y, sizes[0]),
        lambda: grouped_outer(x, y, sizes, weight_R=jnp.ones(7)),
        lambda: grouped_outer(x, y, sizes, into=jnp.zeros((1, N, K))),
    ):
        with pytest.raises(ValueError):
            bad()
