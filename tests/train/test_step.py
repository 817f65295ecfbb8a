"""The training step: accumulation, router state, compute dtype, what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.models import combine, forward
from moejax.moe import RouterZLoss, TopKLoadBalance
from moejax.train import AdamW, start, train_step

# Updates linear in the gradient show its errors; Adam's first step would show its sign only.
RULE = AdamW(peak_learning_rate=1e-2, warmup=0, epsilon=1.0, weight_decay=0.0, clip_norm=1e9)
STEPS = 10


@pytest.fixture
def step_once(model, tokens_BxS1):
    def run(**how):
        structure, state = start(model, RULE, STEPS)
        step = train_step(structure, RULE, STEPS, losses=(RouterZLoss(weight=0.1),), **how)
        copy = jax.tree.map(jnp.array, state)
        return structure, *step(copy, tokens_BxS1)

    return run


def test_accumulation_gives_the_gradient_of_the_whole_batch(step_once):
    """Catches micro-batches that are summed, not averaged, or that leave rows out."""
    _, one, said_one = step_once()
    _, two, said_two = step_once(accumulate=2)
    np.testing.assert_allclose(said_one.loss, said_two.loss, rtol=1e-6)
    np.testing.assert_allclose(said_one.objective, said_two.objective, rtol=1e-6)
    np.testing.assert_allclose(said_one.gradient_norm, said_two.gradient_norm, rtol=1e-4)
    for name in one.trainable:
        a, b = one.trainable[name], two.trainable[name]
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)
    for a, b in zip(said_one.counts, said_two.counts, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sum() == 4 * 8 * 2  # rows, tokens, experts per token


def test_loss_is_that_of_the_model_and_the_router_state_moves(model, parts, tokens_BxS1):
    """Catches targets that are off by one, and a router whose bias never leaves zero."""
    structure, state = start(model, RULE, STEPS)
    loss_of = jax.jit(
        lambda trainable, frozen: _nll(combine(structure, trainable, frozen), tokens_BxS1)
    )
    expected = loss_of(state.trainable, state.frozen)
    step = train_step(structure, RULE, STEPS, losses=(RouterZLoss(weight=0.1),))
    after, said = step(state, tokens_BxS1)
    np.testing.assert_allclose(said.loss, expected, rtol=1e-5)
    assert said.objective > said.loss and set(said.router_losses) == {"RouterZLoss"}
    assert int(after.step) == 1
    np.testing.assert_allclose(said.learning_rate, 1e-2, rtol=1e-6)
    bias_LxE = np.asarray(after.frozen["runs.0.moe.router.selector.bias"])
    counts_LxE = np.stack(said.counts)
    np.testing.assert_allclose(
        bias_LxE, 0.01 * np.sign(counts_LxE.mean(-1, keepdims=True) - counts_LxE)
    )
    assert bias_LxE.any(), "the batch must be unbalanced, or this test shows nothing"
    assert all(not np.array_equal(after.trainable[n], parts[1][n]) for n in parts[1])


def _nll(model, tokens_BxS1):
    logits = forward(model, tokens_BxS1[:, :-1]).logits_BxSxV
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, tokens_BxS1[:, 1:, None], axis=-1).mean()


def test_bfloat16_compute_keeps_float32_masters(step_once):
    """Catches parameters or moments that are stored in the compute dtype and lose small updates."""
    _, after, said = step_once(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in after.trainable.values())
    moments = [leaf.dtype for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim]
    assert set(moments) == {jnp.dtype(jnp.float32)} and said.loss.dtype == jnp.float32
    _, exact, said_exact = step_once()
    np.testing.assert_allclose(said.loss, said_exact.loss, rtol=5e-3)
    assert float(said.loss) != float(said_exact.loss), "nothing was computed in bfloat16"
    for name, leaf in exact.trainable.items():
        np.testing.assert_allclose(after.trainable[name], leaf, atol=2e-4, err_msg=name)


def test_a_batch_that_cannot_be_cut_is_refused(model, tokens_BxS1):
    """Catches rows dropped in silence."""
    structure, state = start(model, RULE, STEPS)
    with pytest.raises(SpecError, match="4 rows .* 3 micro-batches"):
        train_step(structure, RULE, STEPS, accumulate=3)(state, tokens_BxS1)


def test_frozen_parameters_stay(model, tokens_BxS1):
    """Catches weight decay or moments applied to what `trains` left out."""
    structure, state = start(model, RULE, STEPS, trains=lambda name: "experts" in name)
    assert set(state.trainable) == {f"runs.0.moe.experts.{m}" for m in ("gate", "up", "down")}
    before = np.asarray(state.frozen["embed"])
    step = train_step(structure, RULE, STEPS, losses=(TopKLoadBalance(),))
    after, _ = step(state, tokens_BxS1)
    np.testing.assert_array_equal(after.frozen["embed"], before)
