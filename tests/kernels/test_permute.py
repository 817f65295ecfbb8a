"""Tokens to rows and back, against products with one-hot matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.permute import BACKENDS, permute, unpermute
from moejax_kernels.route import sort_by_expert

T, K, D, E = 6, 2, 3, 4
A = T * K


def lists(seed, capacity=None):
    """(assignment_R, row_A) of random choices; with a capacity rows are empty and choices drop."""
    generator = np.random.default_rng(seed)
    order = sort_by_expert(jnp.asarray(generator.integers(0, E, A)), E)
    if capacity is None:
        return order.order_A, order.place_A
    assignment, row, start = np.full(E * capacity, A), np.full(A, E * capacity), 0
    for e, size in enumerate(np.asarray(order.group_sizes_E)):
        for i in range(min(size, capacity)):
            a = order.order_A[start + i]
            assignment[e * capacity + i], row[a] = a, e * capacity + i
        start += size
    return jnp.asarray(assignment, jnp.int32), jnp.asarray(row, jnp.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("capacity", [None, 2, 5])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_both_directions_and_their_gradients(capacity, seed):
    """Catches a gradient that misses a choice of a token, or reaches dropped ones."""
    assignment_R, row_A = lists(seed, capacity)
    x, gate, weight = normal(seed, T, D), normal(seed + 1, T, K), normal(seed + 2, T, D)

    def round_trip(x, gate, backend):
        rows = jnp.tanh(permute(x, assignment_R, row_A, backend=backend))
        y = unpermute(rows, gate, assignment_R, row_A, backend=backend)
        return (y * weight).sum(), (rows, y)

    both = [
        jax.value_and_grad(round_trip, (0, 1), has_aux=True)(x, gate, backend)
        for backend in BACKENDS
    ]
    for got, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_no_scatter():
    """Catches a gather whose gradient is a scatter."""
    assignment_R, row_A = lists(0)

    def total(x, gate):
        return unpermute(permute(x, assignment_R, row_A), gate, assignment_R, row_A).sum()

    text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(normal(0, T, D), normal(1, T, K)))
    assert "scatter" not in text and "gather" in text


def test_rows_that_serve_nothing_may_hold_anything():
    """Catches 0 * NaN from an empty row in outputs or gradients."""
    assignment_R, row_A = lists(3, 5)
    empty_R = np.asarray(assignment_R) == A
    assert empty_R.any()
    rows = normal(0, len(empty_R), D).at[empty_R].set(jnp.nan)
    y, pull_back = jax.vjp(
        lambda rows, gate: unpermute(rows, gate, assignment_R, row_A), rows, normal(1, T, K)
    )
    drows, dgate = pull_back(jnp.ones_like(y))
    assert np.isfinite(y).all() and np.isfinite(dgate).all()
    assert not np.any(np.asarray(drows)[empty_R])


def test_sums_in_float32():
    """Catches a token's rows summed in bfloat16, where 256 + 1 = 256."""
    rows = jnp.asarray([[256.0], [1.0], [1.0], [-256.0]], jnp.bfloat16)
    index = jnp.arange(4, dtype=jnp.int32)
    y = unpermute(rows, jnp.ones((1, 4)), index, index)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 2.0


@pytest.mark.parametrize("check", [False, True])
def test_under_vmap_scan_and_shard_map(check):
    """Catches indices that belong to another member of a batch."""
    batch = [lists(seed) for seed in range(3)]
    assignment = jnp.stack([a for a, _ in batch])
    row = jnp.stack([r for _, r in batch])
    x = normal(0, 3, T, D)
    wanted = jnp.stack([permute(x[i], assignment[i], row[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(permute)(x, assignment, row), wanted)
    _, scanned = jax.lax.scan(lambda c, one: (c, permute(*one)), None, (x, assignment, row))
    np.testing.assert_array_equal(scanned, wanted)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        permute, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=check
    )
    total = jax.jit(jax.grad(lambda x: jnp.square(sharded(x, assignment[0], row[0])).sum()))
    plain = jax.grad(lambda x: jnp.square(permute(x, assignment[0], row[0])).sum())
    np.testing.assert_allclose(total(x[0]), plain(x[0]), rtol=1e-6)


def test_wrong_calls_say_what_is_wrong():
    """Catches lists that do not belong to the arrays."""
    assignment_R, row_A = lists(0)
    with pytest.raises(ValueError, match=r"\[T \* K\]"):
        permute(normal(0, 5, D), assignment_R, row_A)
    with pytest.raises(ValueError, match="assignment"):
        unpermute(normal(0, A - 1, D), normal(1, T, K), assignment_R, row_A)
    with pytest.raises(ValueError, match="integer"):
        permute(normal(0, T, D), assignment_R.astype(float), row_A)
    with pytest.raises(ValueError, match="unknown"):
        permute(normal(0, T, D), assignment_R, row_A, backend="fast")
