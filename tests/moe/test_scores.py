"""Router logits against NumPy in float64, token by token, written from papers and released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.moe import (
    AttentionScores,
    LinearScores,
    RouterContext,
    StandardisedScores,
    TanhScores,
)

T, D, E = 9, 7, 5


def scored(scores, **changed):
    """(logits, x and parameters in float64); `changed` parameters are put in place of the drawn."""
    parameters = scores.init(D, E, 0.8, jax.random.key(3)) | changed
    x_TxD = jax.random.normal(jax.random.key(4), (T, D))
    logits_TxE = scores(parameters, x_TxD, RouterContext())
    assert logits_TxE.dtype == jnp.float32
    assert scores.axes().keys() == parameters.keys()
    doubles = {name: np.asarray(p, np.float64) for name, p in parameters.items()}
    return np.asarray(logits_TxE), np.asarray(x_TxD, np.float64), doubles


def test_linear_bias_is_added_to_logits():
    """Catches a bias that is dropped, or added to probabilities as a selector's bias is."""
    bias_E = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])
    logits, x, p = scored(LinearScores(bias=True), bias=bias_E)
    np.testing.assert_allclose(logits, x @ p["kernel"] + np.asarray(bias_E), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [3, E, 8 * E])
def test_tanh_scores_are_two_layers(hidden):
    """Catches a tanh on the logits, a missing tanh, and an inner width tied to E."""
    logits, x, p = scored(TanhScores(hidden=hidden))
    assert p["hidden"].shape == (D, hidden) and p["kernel"].shape == (hidden, E)
    np.testing.assert_allclose(logits, np.tanh(x @ p["hidden"]) @ p["kernel"], rtol=2e-5, atol=1e-6)


def test_attention_scores_equal_the_loop_over_pairs():
    """Catches a softmax over queries, a scaled product, and q, k, v in the wrong places."""
    logits, x, p = scored(AttentionScores())
    expected = np.zeros((T, E))
    for t in range(T):
        q, k, v = (x[t] @ p[name] for name in ("query", "key", "value"))
        for i in range(E):
            weight = np.exp([q[i] * k[j] for j in range(E)])
            expected[t, i] = sum(weight[j] * v[j] for j in range(E)) / weight.sum()
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=1e-6)


def test_experts_of_attention_scores_permute():
    """Catches logits that depend on the place of an expert (catalog: Yuan2.0-M32, works when)."""
    logits, x, p = scored(AttentionScores())
    order = np.array([3, 0, 4, 1, 2])
    moved = {name: jnp.asarray(value[:, order], jnp.float32) for name, value in p.items()}
    permuted = AttentionScores()(moved, jnp.asarray(x, jnp.float32), RouterContext())
    np.testing.assert_allclose(permuted, logits[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("correction", [0, 1])
def test_standardised_rows_have_mean_zero_and_the_deviation(correction):
    """Catches a standard deviation over tokens, one of the wrong divisor, and a lambda lost."""
    scores = StandardisedScores(
        scores=LinearScores(bias=True), deviation=1.7, correction=correction
    )
    logits, x, p = scored(scores, bias=jnp.array([4.0, 0.0, -1.0, 2.0, 0.0]))
    z = x @ p["kernel"] + p["bias"]
    expected = 1.7 * (z - z.mean(1, keepdims=True)) / z.std(1, ddof=correction, keepdims=True)
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(logits.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(logits.std(1, ddof=correction), 1.7, rtol=1e-5)
    louder, _, _ = scored(
        scores,
        kernel=jnp.asarray(10 * p["kernel"], jnp.float32),
        bias=jnp.asarray(10 * p["bias"], jnp.float32),
    )
    np.testing.assert_allclose(louder, logits, rtol=2e-5, atol=1e-5)


def test_equal_logits_stay_finite():
    """Catches a router that starts at zero (Grok-1, LLaMA-MoE) and divides by its deviation 0."""
    scores = StandardisedScores()

    def total(kernel):
        x_TxD = jnp.ones((T, D))
        return jnp.sum(scores({"kernel": kernel}, x_TxD, RouterContext()) ** 2)

    value, gradient = jax.value_and_grad(total)(jnp.zeros((D, E)))
    assert value == 0 and np.isfinite(gradient).all()


def test_impossible_scores_are_refused():
    """Catches a divisor E - 2 and an inner width of zero."""
    with pytest.raises(SpecError, match="correction = 2"):
        StandardisedScores(correction=2)
    with pytest.raises(SpecError, match="hidden = 0"):
        TanhScores(hidden=0)
