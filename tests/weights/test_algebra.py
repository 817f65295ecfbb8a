"""Low rank, sums, buckets, and the error measure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.weights import (
    Buckets,
    LowRank,
    Sum,
    SymmetricGrid,
    code_bits,
    concatenate,
    grouped_matmul,
    materialize,
    nbytes,
    relative_error,
    take,
    truncated_svd,
)

E, K, N = 4, 32, 6
w_ExKxN = jnp.asarray(np.random.default_rng(0).standard_normal((E, K, N)), jnp.float32)
x_RxK = jnp.asarray(np.random.default_rng(1).standard_normal((12, K)), jnp.float32)
SIZES = jnp.asarray([4, 0, 7, 1])


def test_truncated_svd_is_the_best_of_its_rank():
    """Catches unsorted or dropped singular values: the error is that of Eckart-Young."""
    near = truncated_svd(w_ExKxN, 2)
    values = np.linalg.svd(np.float64(w_ExKxN), compute_uv=False)
    want = np.sqrt((values[:, 2:] ** 2).sum(1) / (values**2).sum(1))
    np.testing.assert_allclose(relative_error(w_ExKxN, near), want, rtol=1e-4)
    np.testing.assert_allclose(relative_error(w_ExKxN, truncated_svd(w_ExKxN, N)), 0, atol=1e-5)
    for rank in (0, N + 1):
        with pytest.raises(SpecError, match="rank"):
            truncated_svd(w_ExKxN, rank)


def test_factors_get_gradients():
    """Catches factors that stay behind while x alone is differentiated."""
    factors = truncated_svd(w_ExKxN, 3)

    def total(factors, product):
        return jnp.square(product(factors)).sum()

    def through_factors(f):
        return grouped_matmul(x_RxK, f, SIZES)

    def through_product(f):
        return grouped_matmul(x_RxK, f.u @ f.v, SIZES)

    got = jax.jit(jax.grad(total), static_argnums=1)(factors, through_factors)
    want = jax.jit(jax.grad(total), static_argnums=1)(factors, through_product)
    np.testing.assert_allclose(got.u, want.u, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got.v, want.v, rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(got.u)).max() > 0.1


def test_sum_closes_the_gap():
    """Catches a correction that is added twice or left out of the bytes."""
    coarse = SymmetricGrid(bits=2, group=16)(w_ExKxN)
    rest = truncated_svd(w_ExKxN - coarse.materialize(), 4, jnp.float16)
    both = Sum((coarse, rest))
    assert np.all(relative_error(w_ExKxN, both) < 0.6 * relative_error(w_ExKxN, coarse))
    assert nbytes(both) == nbytes(coarse) + nbytes(rest)
    assert code_bits(both) == 2 + 16 * (K + N) * 4 / (K * N)


def test_buckets_select_in_order_only():
    """Catches experts that silently change places when a selection mixes the buckets."""
    grid = SymmetricGrid(bits=2, group=16)
    weight = Buckets((grid(w_ExKxN[:1]), w_ExKxN[1:]))
    assert weight.sizes == (1, 3)
    part = take(weight, np.asarray([3, 2]))  # one bucket, any order
    np.testing.assert_array_equal(materialize(part), w_ExKxN[jnp.asarray([3, 2])])
    np.testing.assert_array_equal(take(weight, -1), w_ExKxN[3])
    with pytest.raises(SpecError, match="SlotMap"):
        take(weight, np.asarray([2, 0]))
    assert code_bits(weight) == (2 + 3 * 32) / 4


def test_malformed_members_are_refused():
    """Catches sums of different shapes, empty members and factors that do not meet."""
    for wrong in (
        Sum(()),
        Sum((w_ExKxN, w_ExKxN[:, :-1])),
        Buckets(()),
        Buckets((w_ExKxN, w_ExKxN[:, :-1])),
        Buckets((w_ExKxN[0],)),
        LowRank(w_ExKxN, w_ExKxN),
        LowRank(jnp.ones((4, 2), jnp.int8), jnp.ones((2, 4))),
        Sum((LowRank(w_ExKxN, w_ExKxN),)),
    ):
        with pytest.raises(SpecError):
            wrong.check()


def test_concatenate_refuses_other_formats():
    """Catches codes of different widths joined into one array of words."""
    two, four = (SymmetricGrid(bits=b, group=16)(w_ExKxN) for b in (2, 4))
    with pytest.raises(SpecError, match="Buckets"):
        concatenate([two, w_ExKxN])
    with pytest.raises(SpecError, match="Buckets"):
        concatenate([two, four])
    with pytest.raises(SpecError):
        concatenate([])


def test_grouped_matmul_wants_one_leading_axis():
    """Catches a stacked weight whose layers would be taken for experts."""
    stacked = SymmetricGrid(bits=4, group=16)(jnp.stack([w_ExKxN, w_ExKxN]))
    for weight in (stacked, take(take(stacked, 0), 0)):
        with pytest.raises(SpecError, match="leading axis"):
            grouped_matmul(x_RxK, weight, SIZES)


def test_relative_error_of_zero_and_of_extremes():
    """Catches 0 / 0, and squares that underflow or overflow float32."""
    zero = jnp.zeros((3, 4, 4))
    other = zero.at[1].set(1e-30)
    np.testing.assert_array_equal(relative_error(zero, other), [0, np.inf, 0])
    for magnitude in (1e-30, 1e30):
        w = w_ExKxN * magnitude
        np.testing.assert_allclose(relative_error(w, 0.5 * w), 0.5, rtol=1e-5)
    assert relative_error(w_ExKxN[0], w_ExKxN[0]).shape == ()
    with pytest.raises(SpecError, match="shapes"):
        relative_error(w_ExKxN, w_ExKxN[0])
