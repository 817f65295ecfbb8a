"""Sums per window against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.evaluate.token_scores import compare, score, tree_sum


def _draw(seed, B=3, S=5, V=11, scale=4.0):
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(B, S, V))).astype(np.float32)
    return logits, random.integers(0, V, (B, S)), random.random((B, S)) < 0.7


def _log_p(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sums_are_those_of_the_formulas():
    """Catches KL(arm || base), a delta of the wrong sign, padding that counts."""
    base, targets, mask = _draw(0, B=4, S=9)
    logits = base + _draw(1, B=4, S=9)[0]
    found = compare(base, logits, targets, mask)
    p, q = _log_p(base), _log_p(logits)
    nll = -np.take_along_axis(q, targets[..., None], -1)[..., 0]
    base_nll = -np.take_along_axis(p, targets[..., None], -1)[..., 0]
    wanted = {
        "nll": nll,
        "delta": nll - base_nll,
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "agreed": p.argmax(-1) == q.argmax(-1),
    }
    assert 0 < wanted["agreed"][mask].sum() < mask.sum()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], (value * mask).sum(1), rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(score(logits, targets, mask)["nll"], found["nll"], rtol=1e-6)


def test_a_model_does_not_differ_from_itself():
    """Catches a base and an arm that take different roads to their log-probabilities."""
    logits, targets, mask = _draw(2)
    found = compare(logits, logits, targets, mask)
    assert not np.any(found["delta"])
    assert not np.any(found["kl"])
    np.testing.assert_array_equal(found["agreed"], mask.sum(1))


def test_what_is_masked_may_be_anything():
    """Catches a mask by multiplication, where NaN times zero is NaN."""
    logits, targets, mask = _draw(3)
    spoilt = np.where(mask[..., None], logits, np.nan)
    found = compare(spoilt, spoilt, targets, mask)
    assert all(np.isfinite(value).all() for value in found.values())
    np.testing.assert_array_equal(found["nll"], score(logits, targets, mask)["nll"])


def test_large_logits_keep_their_small_differences():
    """Catches exp without the largest logit taken off, and sums in bfloat16."""
    logits, targets, mask = _draw(4)
    found = score((logits + 1000).astype(np.float32), targets, mask)["nll"]
    shifted = (logits + 1000).astype(np.float32).astype(np.float64) - 1000
    nll = -np.take_along_axis(_log_p(shifted), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, (nll * mask).sum(1), rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((1, 5, 16, 33)), st.sampled_from((0, 1, 40)), st.integers(0, 2**16))
def test_padding_changes_no_bit_of_a_sum(length, padding, seed):
    """Catches a sum left to the compiler, whose order follows the padded length."""
    values = np.random.default_rng(seed).normal(size=length).astype(np.float32)
    longer = np.pad(values, (0, padding))
    np.testing.assert_array_equal(tree_sum(values), tree_sum(longer))
    np.testing.assert_allclose(tree_sum(values), values.astype(np.float64).sum(), atol=1e-5)


def test_a_window_has_the_same_bits_in_any_batch():
    """Catches sums over the whole batch, and windows that see one another."""
    logits, targets, mask = _draw(5, B=8, S=16, V=64)
    base, _, _ = _draw(6, B=8, S=16, V=64)
    whole = jax.device_get(compare(base, logits, targets, mask))
    for size in (1, 3):
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        found = [compare(base[p], logits[p], targets[p], mask[p]) for p in parts]
        for name, value in whole.items():
            joined = np.concatenate([jnp.asarray(part[name]) for part in found])
            np.testing.assert_array_equal(joined, value, err_msg=name)
