"""AdamW against its formulas: schedule, decay mask, clipping."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.core import SpecError
from moejax.train import AdamW

LEAVES = {
    "embed": jnp.full((3, 2), 2.0),
    "final_norm.scale": jnp.full(2, 2.0),
    "runs.0.attention.q": jnp.full((4, 2, 2), 2.0),
    "runs.0.ffn_norm.scale": jnp.full((4, 2), 2.0),
    "runs.0.moe.experts.gate": jnp.full((4, 3, 2, 2), 2.0),
    "runs.0.moe.experts.gate_bias": jnp.full((4, 3, 2), 2.0),
    "runs.0.moe.router.scores.kernel": jnp.full((4, 2, 3), 2.0),
}


def test_schedule_by_hand():
    """Catches a first step at rate 0, a peak that is missed, an end that is not reached."""
    rule = AdamW(peak_learning_rate=2.0, warmup=4, final_fraction=0.1)
    found = [float(rule.learning_rate(t, 15)) for t in range(15)]
    np.testing.assert_allclose(found[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found[9], 2.0 * (0.1 + 0.9 / 2), rtol=1e-6)  # half of the cosine
    np.testing.assert_allclose(found[14], 0.2, rtol=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(found[4:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 3), (5, 3), (3, 3)])
def test_schedule_of_short_runs_is_finite(warmup, steps):
    """Catches a division by zero when the run is no longer than its warm-up."""
    rule = AdamW(peak_learning_rate=1.0, warmup=warmup)
    rates = [float(rule.learning_rate(t, steps)) for t in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_matrices_decay_and_vectors_do_not():
    """Catches a mask by ndim alone: a stack of norm scales [L, D] has two dimensions too, the
    biases of a run's experts [L, E, N] have three."""
    rule = AdamW(peak_learning_rate=0.5, warmup=0, weight_decay=0.1).transformation(10)
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in LEAVES.items()}
    updates, _ = rule.update(zeros, rule.init(LEAVES), LEAVES)
    for name, update in updates.items():
        expected = 0.0 if name.endswith(("norm.scale", "bias")) else -0.5 * 0.1 * 2.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_first_updates_follow_the_formula():
    """Catches swapped betas, a bias correction left out, clipping after the moments."""
    rule = AdamW(peak_learning_rate=0.5, warmup=0, final_fraction=1, weight_decay=0, clip_norm=1)
    transformation = rule.transformation(10)
    leaves = {"embed": jnp.zeros((2, 2))}
    memory = transformation.init(leaves)
    m = v = np.zeros((2, 2))
    value = np.zeros((2, 2))
    for t, scale in enumerate((10.0, 0.1), 1):
        gradient = scale * np.array([[1.0, -2.0], [0.5, 3.0]])
        clipped = gradient / max(1.0, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
        value = value - 0.5 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        updates, memory = transformation.update({"embed": jnp.float32(gradient)}, memory, leaves)
        leaves = optax.apply_updates(leaves, updates)
        np.testing.assert_allclose(leaves["embed"], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("peak_learning_rate", 0.0), ("beta2", 1.0), ("clip_norm", 0.0)]
)
def test_impossible_values_are_named(field, value):
    """Catches a value that trains to NaN instead of being refused."""
    with pytest.raises(SpecError, match=f"AdamW.{field}"):
        AdamW(**{field: value})
