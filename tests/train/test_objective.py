"""The chunked cross entropy against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.train import cross_entropy

D, V = 5, 11
BOTH = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)), static_argnums=3)


def oracle(hidden, table, target):
    """Loss and its gradients in float64."""
    logits = hidden @ table.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    T = len(target)
    loss = -np.log(p[np.arange(T), target]).mean()
    p[np.arange(T), target] -= 1
    return loss, p @ table / T, p.T @ hidden / T


@settings(max_examples=12, deadline=None)
@given(T=st.sampled_from([1, 6, 7, 8]), chunk=st.sampled_from([1, 4, 512]), seed=st.integers(0, 99))
def test_loss_and_gradients_are_those_of_whole_logits(T, chunk, seed):
    """Catches a last chunk that counts its padding, a mean over chunks, a gradient not scaled."""
    generator = np.random.default_rng(seed)
    hidden, table = generator.standard_normal((T, D)), generator.standard_normal((V, D))
    target = generator.integers(0, V, T)
    arrays = (jnp.float32(hidden), jnp.float32(table), jnp.int32(target))
    found, (dhidden, dtable) = BOTH(*arrays, chunk)
    loss, dhidden64, dtable64 = oracle(hidden, table, target)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(dhidden, dhidden64, atol=1e-6)
    np.testing.assert_allclose(dtable, dtable64, atol=1e-6)
    np.testing.assert_allclose(cross_entropy(*arrays, chunk), loss, rtol=1e-5)


def test_large_logits_do_not_overflow():
    """Catches a log-sum-exp without its maximum taken out: exp(300) is infinite in float32."""
    hidden, table = jnp.full((2, D), 60.0), jnp.ones((V, D)).at[3].set(2.0)
    found, gradients = BOTH(hidden, table, jnp.int32([3, 0]), 512)
    np.testing.assert_allclose(found, (0 + 300) / 2)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_inputs_have_float32_logits():
    """Catches a log-sum-exp in bfloat16, whose loss is off by a percent."""
    generator = np.random.default_rng(0)
    hidden = jnp.bfloat16(generator.standard_normal((64, D)))
    table = jnp.bfloat16(3 * generator.standard_normal((V, D)))
    target = generator.integers(0, V, 64)
    found, (dhidden, dtable) = BOTH(hidden, table, jnp.int32(target), 16)
    loss, dhidden64, _ = oracle(np.float64(hidden), np.float64(table), target)
    assert found.dtype == jnp.float32 and dhidden.dtype == dtable.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(np.float64(dhidden), dhidden64, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 2.5])
def test_the_incoming_gradient_scales_both(factor):
    """Catches a backward pass that ignores what the loss is multiplied by."""
    arrays = (jnp.ones((3, D)), jnp.eye(V, D), jnp.int32([1, 2, 3]))
    plain = jax.grad(cross_entropy, argnums=(0, 1))(*arrays)
    scaled = jax.grad(lambda *a: factor * cross_entropy(*a), argnums=(0, 1))(*arrays)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(factor * a, b, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_parts_change_the_order_alone(chunk):
    """Catches a gradient that lands at another token when each device does chunks of its own."""
    generator = np.random.default_rng(0)
    hidden, table = generator.standard_normal((12, D)), generator.standard_normal((V, D))
    target = generator.integers(0, V, 12)

    def loss_of(hidden_TxD):
        return cross_entropy(hidden_TxD, jnp.float32(table), jnp.int32(target), chunk, 4)

    loss, dhidden64, _ = oracle(hidden, table, target)
    found, dhidden = jax.value_and_grad(loss_of)(jnp.float32(hidden))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(dhidden, dhidden64, atol=1e-6)
