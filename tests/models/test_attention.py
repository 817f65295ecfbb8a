"""What families add to attention, each against a NumPy formula, in prefill and in decode."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError, taps
from moejax.models import (
    AttentionSpec,
    HeadNorm,
    LocalFilterSpec,
    ProjectionNorm,
    Rope,
    RotatedHeadNorm,
)
from moejax.models.rope import LongRope
from tests.models.mixing import (
    at_once,
    built,
    by_steps,
    inputs,
    rms,
    rotated,
    softmax_mix,
    step,
    values,
)

PLAIN = AttentionSpec(heads=4, kv_heads=2, head_width=8, rope=Rope(base=100.0))

FEATURES = {
    "plain": {},
    "no positions": {"rope": None},
    "part of a head rotated": {"rope": Rope(base=100.0, width=4)},
    "pairs side by side": {"rope": Rope(base=100.0, interleaved=True)},
    "biases": {"qkv_bias": True, "o_bias": True},
    "norm of the projection, clipped": {"qk_norm": ProjectionNorm(), "clip": 0.8},
    "norm of heads": {"qk_norm": HeadNorm()},
    "norm of rotated heads": {"qk_norm": RotatedHeadNorm(), "rope": Rope(base=100.0, width=4)},
    "clip": {"clip": 0.5},
    "window": {"window": 3},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 2},
    "soft cap and scale": {"soft_cap": 0.7, "scale": 0.9},
    "local filter": {"filter": LocalFilterSpec()},
}


def filtered(p, x):
    """Two convolutions that see the token before; a text begins with zeros for both."""
    D = x.shape[1]
    before = np.concatenate([np.zeros((1, D)), x[:-1]])
    inner = before @ p["first"][:D] + x @ p["first"][D:] + p["first_bias"]
    before = np.concatenate([np.zeros((1, D // 2)), inner[:-1]])
    outer = before @ p["second"][: D // 2] + inner @ p["second"][D // 2 :] + p["second_bias"]
    return rms(outer + x, p["norm.scale"], 1e-6)


def reference(p, a, x):
    """y [S, D] of one text, from the formulas."""
    S = len(x)
    sees = x
    if a.filter is not None:
        inner = {n.removeprefix("filter."): v for n, v in p.items() if n.startswith("filter.")}
        sees = filtered(inner, x)
    clip = (lambda t: t) if a.clip is None else (lambda t: np.clip(t, -a.clip, a.clip))

    def turn(t):
        t = clip(t)
        return t if a.rope is None else rotated(t, 100.0, a.rope.width, a.rope.interleaved)

    def made(name, heads):
        t = sees @ p[name] + p.get(f"{name}_bias", 0.0)
        scale = p.get(f"{name}_norm.scale")
        if isinstance(a.qk_norm, ProjectionNorm):
            t = rms(t, scale)
        t = t.reshape(S, heads, a.head_width)
        if isinstance(a.qk_norm, HeadNorm):
            t = rms(t, scale)
        t = turn(t)
        return rms(t, scale) if isinstance(a.qk_norm, RotatedHeadNorm) else t

    v = clip(x @ p["v"] + p.get("v_bias", 0.0)).reshape(S, a.kv_heads, a.head_width)
    scale = a.head_width**-0.5 if a.scale is None else a.scale
    mixed = softmax_mix(
        made("q", a.heads), made("k", a.kv_heads), v, scale, a.window, a.soft_cap, p.get("sinks")
    )
    return mixed @ p["o"] + p.get("o_bias", 0.0)


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_their_formulas(name):
    """Catches each feature left out, in another place (a norm on the other side of the rotation, a
    cap before the scale, a clip behind it, a window off by one, a sink with a value), and a decode
    that forgets it."""
    spec = dataclasses.replace(PLAIN, **FEATURES[name])
    module, x = built(spec), inputs()
    y = np.asarray(at_once(module, x)[0])
    expected = np.stack([reference(values(module), spec, np.asarray(row, np.float64)) for row in x])
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, atol=bound)
    np.testing.assert_allclose(by_steps(module, x), expected, atol=bound)
    if name != "plain":  # or the test could not see the feature
        named = values(module)
        plain = np.stack([reference(named, PLAIN, np.asarray(row, np.float64)) for row in x])
        known = ("biases", "sinks")  # these lie in the parameters, which the plain formula reads
        assert name.startswith(known) or np.abs(plain - expected).max() > 100 * bound


def test_sinks_and_biases_are_seen():
    """Catches a comparison above that biases and sinks of zero would pass."""
    x = inputs()
    for changes in ({"sinks": True}, {"qkv_bias": True}, {"o_bias": True}):
        with_it = built(dataclasses.replace(PLAIN, **changes))
        without = built(PLAIN)
        assert float(jnp.abs(at_once(with_it, x)[0] - at_once(without, x)[0]).max()) > 1e-2


def test_left_padding_is_zeros_to_a_filter():
    """Catches a convolution that reads padding as the token before the first."""
    module, x = built(dataclasses.replace(PLAIN, rope=None, filter=LocalFilterSpec())), inputs()
    padded = jnp.concatenate([jnp.ones((2, 3, 12)), x], axis=1)
    mask = jnp.broadcast_to(jnp.arange(10) >= 3, (2, 10))
    y = at_once(module, padded, mask)[0]
    np.testing.assert_allclose(y[:, 3:], at_once(module, x)[0], atol=1e-5)


def test_mass_of_a_cached_text_is_of_its_new_tokens():
    """Catches a mass per slot of the cache, which has other places than the tokens."""
    module, x = built(PLAIN), inputs()
    whole = at_once(module, x)[2][taps.ATTENTION_MASS]
    state = PLAIN.init_state(12, 2, 11, jnp.float32)
    position = jnp.broadcast_to(jnp.arange(7), (2, 7))
    everyone = jnp.ones((2, 7), bool)
    cached = step(*nnx.split(module), x, state, position, everyone, {})[2][taps.ATTENTION_MASS]
    np.testing.assert_allclose(cached, whole, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_width": 5},
        {"kv_heads": 3},
        {"window": 0},
        {"clip": -1.0},
        {"rope": Rope(width=16)},
        {"rope": Rope(scaling=LongRope(short=(1.0,), long=(2.0,), original_length=4))},
    ],
)
def test_impossible_attention_is_refused(changes):
    """Catches specs that fail, or silently mean something else, when the first text arrives."""
    with pytest.raises(SpecError):
        dataclasses.replace(PLAIN, **changes)
