"""Channels that go in training (LoSparse) against the formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.train import AdamW, PrunesChannels, channels_left

INNER = AdamW(peak_learning_rate=0.05, warmup=0, weight_decay=0.0)
S, U = "runs.0.moe.experts.up.terms[1]", "runs.0.moe.experts.up.terms[0].u"
SHAPES = {S: (2, 3, 4, 8), U: (2, 3, 4, 2), "embed": (5, 4)}
STEPS = 6


def drawn(seed):
    draw = np.random.default_rng(seed)
    return {n: jnp.asarray(draw.normal(size=shape), jnp.float32) for n, shape in SHAPES.items()}


def trained(rule, steps=STEPS):
    """Leaves after every step of `rule` on fixed gradients, and the updates of the first."""
    transformation, leaves, found = rule.transformation(steps), drawn(0), []
    update = jax.jit(transformation.update)
    memory = transformation.init(leaves)
    for step in range(steps):
        updates, memory = update(drawn(step + 1), memory, leaves)
        leaves = {n: leaves[n] + updates[n] for n in leaves}
        found.append(leaves)
    return found


def test_shares_by_hand():
    """Catches a schedule that is linear, begins before the warm-up, or ends a step too late."""
    rule = PrunesChannels(left=0.2, warmup=2, settled=3, optimizer=INNER)
    found = [float(rule.share(step, 9)) for step in range(9)]
    falling = [0.2 + 0.8 * (1 - i / 4) ** 3 for i in range(1, 5)]
    np.testing.assert_allclose(found, [1, 1, *falling, 0.2, 0.2, 0.2], rtol=1e-6)


def test_the_channels_of_largest_importance_stay():
    """Catches |w| or |dL/dw| alone, inputs in the place of outputs, a mean over experts, an
    average that forgets nothing, and channels that are masked in the gradient alone."""
    rule = PrunesChannels(left=0.25, warmup=1, settled=2, optimizer=INNER)
    inner, leaves, average = INNER.transformation(STEPS), drawn(0), 0.0
    memory = inner.init(leaves)
    for step, found in enumerate(trained(rule)):
        gradients = drawn(step + 1)
        updates, memory = inner.update(gradients, memory, leaves)
        leaves = {n: np.asarray(leaves[n] + updates[n]) for n in leaves}
        sensitivity = np.abs(leaves[S] * np.asarray(gradients[S])).mean(-2)
        average = 0.85 * average + 0.15 * sensitivity
        done = min(max((step + 1 - 1) / 3, 0), 1)
        share = 0.25 if step >= 4 else 0.25 + 0.75 * (1 - done) ** 3
        count = int(np.floor(share * 8 + 0.5))
        last = np.sort(average, axis=-1)[..., -count][..., None]
        leaves[S] = np.where((average >= last)[..., None, :], leaves[S], 0)
        for name in SHAPES:
            np.testing.assert_allclose(found[name], leaves[name], atol=1e-6, err_msg=name)
        leaves = {n: jnp.asarray(leaf) for n, leaf in leaves.items()}
    left = (np.asarray(leaves[S]) != 0).any(-2).sum(-1)
    assert (left == channels_left(0.25, 8)).all() and channels_left(0.25, 8) == 2


def test_none_may_be_left_and_all():
    """Catches a last channel that never goes, and a share of one that still prunes."""
    nothing = trained(PrunesChannels(left=0.0, warmup=0, settled=1, optimizer=INNER))[-1]
    assert not np.asarray(nothing[S]).any() and np.asarray(nothing[U]).all()
    whole = trained(PrunesChannels(left=1.0, warmup=0, settled=1, optimizer=INNER))[-1]
    alone = trained(INNER)[-1]
    for name in SHAPES:
        np.testing.assert_array_equal(whole[name], alone[name])


def test_what_cannot_be_pruned_is_refused():
    """Catches a schedule longer than the run, and a run that has nothing to prune."""
    with pytest.raises(SpecError, match=r"settled = 5.*\n.*warmup = 2 .* 6 steps"):
        PrunesChannels(left=0.5, warmup=2, settled=5).transformation(6)
    with pytest.raises(SpecError, match=r"no leaf that trains ends in .*\n.*LowRankAndRest"):
        PrunesChannels(left=0.5, warmup=0, settled=1).transformation(6).init({"embed": 1.0})
