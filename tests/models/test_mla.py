"""Latent attention against its formulas, expanded and absorbed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import MLASpec, Rope
from tests.models.mixing import at_once, built, by_steps, inputs, rms, rotated, softmax_mix, values

SPEC = MLASpec(
    heads=3,
    nope_width=6,
    rope_width=4,
    value_width=5,
    kv_rank=7,
    q_rank=8,
    rope=Rope(base=100.0, interleaved=True),
)
SPECS = {
    "with a query latent": SPEC,
    "without": dataclasses.replace(SPEC, q_rank=None, scale=0.8),
    "halves rotated": dataclasses.replace(SPEC, rope=Rope(base=100.0)),
}


def reference(p, a, x):
    """arXiv:2405.04434, equations 37 to 47, with keys and values of every head."""
    S = len(x)
    if a.q_rank is None:
        q = x @ p["q"]
    else:
        q = rms(x @ p["q_down"], p["q_norm.scale"], 1e-6) @ p["q_up"]
    q = q.reshape(S, a.heads, -1)
    turn = lambda t: rotated(t, 100.0, interleaved=a.rope.interleaved)
    q = np.concatenate([q[..., : a.nope_width], turn(q[..., a.nope_width :])], -1)
    down = x @ p["kv_down"]
    up = rms(down[:, : a.kv_rank], p["kv_norm.scale"], 1e-6) @ p["kv_up"]
    up = up.reshape(S, a.heads, -1)
    shared = np.repeat(turn(down[:, None, a.kv_rank :]), a.heads, axis=1)
    k = np.concatenate([up[..., : a.nope_width], shared], -1)
    scale = (a.nope_width + a.rope_width) ** -0.5 if a.scale is None else a.scale
    return softmax_mix(q, k, up[..., a.nope_width :], scale) @ p["o"]


@pytest.mark.parametrize("name", SPECS)
def test_both_forms_equal_the_formulas(name):
    """Catches an absorbed form that differs from the expanded one (a transposed projection, a scale
    of the latent's width), values read from the key's part, and the other rotation layout."""
    spec = SPECS[name]
    module, x = built(spec), inputs()
    expected = np.stack([reference(values(module), spec, np.asarray(row, np.float64)) for row in x])
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(at_once(module, x)[0], expected, atol=bound)
    np.testing.assert_allclose(by_steps(module, x), expected, atol=bound)  # steps are absorbed


def test_the_cache_holds_a_latent_and_one_rotated_key():
    """Catches a cache of expanded keys and values, 3 (6 + 4 + 5) numbers instead of 7 + 4."""
    state = SPEC.init_state(12, 2, 9, jnp.bfloat16)
    numbers = sum(leaf.size for leaf in state.cached)
    assert numbers == 2 * 9 * (7 + 4) == 2 * 9 * SPEC.cached_per_token
    assert jax.tree.leaves(state.cached)[0].dtype == jnp.bfloat16
