"""Gate weights against NumPy in float64, written from the released code's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.moe import (
    ChosenSoftmaxGates,
    PNormGates,
    SigmoidGates,
    SoftmaxGates,
    SparseMixerGates,
)

T, E, K = 50, 6, 3


def weighed(gates, logits, experts):
    """Gates in float32 of the experts named, [T, K]."""
    logits_TxE = jnp.asarray(logits, jnp.float32)
    chosen_TxK = jnp.asarray(experts, jnp.int32)
    return np.asarray(gates.weigh(logits_TxE, gates.probabilities(logits_TxE), chosen_TxK))


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(scale=2, size=(T, E)).astype(np.float32)


@pytest.fixture
def highest(logits):
    return np.argsort(-logits, axis=1, kind="stable")[:, :K]


def softmax(l):
    e = np.exp(l - l.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
def test_p_norm_of_the_chosen(logits, highest, order):
    """Catches a norm over all experts, and a sum where the order is not 1 (DBRX)."""
    p = np.take_along_axis(softmax(np.float64(logits)), highest, 1)
    expected = p / (p**order).sum(1, keepdims=True) ** (1 / order)
    np.testing.assert_allclose(weighed(PNormGates(order=order), logits, highest), expected, 2e-5)


def test_p_norm_of_order_one_is_the_renormalised_softmax(logits, highest):
    """Catches two rules where DBRX's released config wants Mixtral's."""
    renormalised = weighed(SoftmaxGates(renormalise=True), logits, highest)
    np.testing.assert_allclose(weighed(PNormGates(), logits, highest), renormalised, rtol=1e-5)


def test_p_norm_survives_small_probabilities():
    """Catches powers of small probabilities that underflow to a division by zero."""
    logits = np.array([[0.0, -40.0, -41.0]])
    got = weighed(PNormGates(order=4.0), logits, [[1, 2]])
    ratio = np.exp(-1.0)
    np.testing.assert_allclose(got, [np.array([1, ratio]) / (1 + ratio**4) ** 0.25], rtol=1e-5)


@pytest.mark.parametrize(
    ("gates", "plain"),
    [
        (ChosenSoftmaxGates(scale=4.0), ChosenSoftmaxGates()),
        (SoftmaxGates(scale=16.0), SoftmaxGates()),
        (SoftmaxGates(renormalise=True, scale=16.0), SoftmaxGates(renormalise=True)),
        (SigmoidGates(scale=2.5), SigmoidGates()),
    ],
)
def test_a_scale_multiplies_gates_after_everything_else(gates, plain, logits, highest):
    """Catches a scale inside the softmax, or one that renormalising cancels."""
    np.testing.assert_allclose(
        weighed(gates, logits, highest), gates.scale * weighed(plain, logits, highest), rtol=1e-6
    )


def test_sigmoids_that_vanish_give_zero_and_not_nan():
    """Catches the missing 1e-20 of DeepSeek-V3's denominator."""
    assert np.array_equal(weighed(SigmoidGates(), np.full((1, E), -120.0), [[0, 1]]), [[0.0, 0.0]])


def sparsemixer(logits, k, jitter):
    """Phi-3.5-MoE's evaluation rule for one token, (experts, gates), in plain Python floats."""
    left, experts, gates = {e: float(l) for e, l in enumerate(logits)}, [], []
    for _ in range(k):
        best = max(left.values())
        chosen = min(e for e in left if left[e] == best)
        near = [
            l
            for e, l in left.items()
            if not (best - l) / max(abs(float(logits[e])), best) > 2 * jitter
        ]
        experts.append(chosen)
        gates.append(1 / sum(np.exp(l - best) for l in near))
        del left[chosen]
    return experts, gates


@pytest.mark.parametrize("jitter", [0.01, 0.2])
@pytest.mark.parametrize("shift", [0.0, -6.0, 6.0])
def test_sparsemixer_draws_among_the_near(logits, jitter, shift):
    """Catches a threshold relative to the maximum alone, or to masked logits; joint normalising.

    Negative logits take |l| as the divisor, positive ones the maximum where it is larger.
    """
    moved = (logits * 0.5 + shift).astype(np.float32)
    experts, expected = zip(*(sparsemixer(row, K, jitter) for row in moved), strict=True)
    got = weighed(SparseMixerGates(jitter=jitter), moved, experts)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.sum(1).max() > 1.5


def test_sparsemixer_gates_are_one_when_an_expert_is_far_ahead():
    """Catches gates that compare the second draw with the first expert."""
    np.testing.assert_array_equal(
        weighed(SparseMixerGates(), [[9.0, 5.0, 1.0, -3.0]], [[0, 1]]), [[1.0, 1.0]]
    )
    near = weighed(SparseMixerGates(), [[9.0, 8.9, 1.0, -3.0]], [[0, 1]])
    np.testing.assert_allclose(near, [[1 / (1 + np.exp(-0.1)), 1.0]], rtol=1e-5)


def test_sparsemixer_has_a_finite_gradient_everywhere():
    """Catches infinities of masked experts in the derivative, and 0 / 0 at equal zero logits."""
    logits_TxE = jnp.stack([jnp.zeros(E), 5 + 0.01 * jnp.arange(E), jnp.arange(E) - 3.0])
    gates = SparseMixerGates()
    chosen = jnp.argsort(-logits_TxE, axis=1)[:, :K]

    def total(logits_TxE):
        return jnp.sum(gates.weigh(logits_TxE, gates.probabilities(logits_TxE), chosen) ** 2)

    gradient = jax.grad(total)(logits_TxE)
    assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)


def test_impossible_gates_are_refused():
    """Catches an order below 1, where the norm is none, and a jitter that masks the best expert."""
    with pytest.raises(SpecError, match="order"):
        PNormGates(order=0.5)
    with pytest.raises(SpecError, match="jitter"):
        SparseMixerGates(jitter=-0.1)
