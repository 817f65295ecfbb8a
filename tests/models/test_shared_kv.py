"""Layers that read the keys and values of a layer below them (arXiv:2405.12981)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    EarlierKV,
    LayerSpec,
    ModelSpec,
    Rope,
    RotatedHeadNorm,
    SharedKV,
    cache_bytes_per_token,
    count_parameters,
    generate,
    init_state,
    parameters,
    with_parameters,
)
from tests.models.mixing import rms, rotated, softmax_mix
from tests.models.test_decoder import silu

GIVES = AttentionSpec(
    heads=4,
    kv_heads=2,
    head_width=4,
    rope=Rope(base=100.0),
    qk_norm=RotatedHeadNorm(),
    kv=SharedKV(),
)
READS = dataclasses.replace(GIVES, kv=EarlierKV())


def spec_of(*mixers):
    stack = tuple(LayerSpec(mixer=mixer, ffn=DenseSpec(width=16)) for mixer in mixers)
    return ModelSpec(vocab=24, width=16, layers=stack, init_scale=0.3)


@pytest.fixture(scope="module")
def model():
    model = DecoderLM(spec_of(GIVES, READS, READS, GIVES, READS), rngs=nnx.Rngs(0))
    draws = np.random.default_rng(0)
    named = parameters(model)
    for name, value in named.items():
        if name.endswith("_norm.scale"):
            named[name] = jnp.asarray(draws.uniform(0.5, 1.5, value.shape), jnp.float32)
    return with_parameters(model.spec, named)


def reference(model, tokens_S):
    """Logits from the formulas; a layer that reads norms the earlier keys with its own scale."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters(model).items()}
    x, S = p["embed"][tokens_S], len(tokens_S)
    for i, layer in enumerate(model.spec.layers):
        a, n = layer.mixer, f"layers.{i}.attention."
        h = rms(x, p[f"layers.{i}.attention_norm.scale"])
        if isinstance(a.kv, SharedKV):
            k, v = ((h @ p[n + m]).reshape(S, a.kv_heads, -1) for m in "kv")
            k = rotated(k)
        q = rotated((h @ p[n + "q"]).reshape(S, a.heads, -1))
        q, own = rms(q, p[n + "q_norm.scale"]), rms(k, p[n + "k_norm.scale"])
        x = x + softmax_mix(q, own, v, a.head_width**-0.5) @ p[n + "o"]
        h, n = rms(x, p[f"layers.{i}.ffn_norm.scale"]), f"layers.{i}.ffn."
        x = x + (silu(h @ p[n + "gate"]) * (h @ p[n + "up"])) @ p[n + "down"]
    return rms(x, p["final_norm.scale"]) @ p["embed"].T


def test_logits_equal_the_formulas(run, model):
    """Catches keys of the layer's own, those of the first layer for all, keys normed by the layer
    that made them, and keys rotated twice."""
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 24)
    logits = run(model, tokens).logits_BxSxV
    for row in range(2):
        expected = reference(model, np.asarray(tokens[row]))
        np.testing.assert_allclose(logits[row], expected, atol=1e-5 * np.abs(expected).max())


def test_decoding_reads_the_cache_of_the_layer_below(run, model):
    """Catches a carry of the new tokens alone, which is all that a step computes."""
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 24)
    text = jnp.pad(tokens, ((0, 0), (0, 3)))
    for at in range(5, 8):
        text = text.at[:, at].set(run(model, text).logits_BxSxV[:, at - 1].argmax(-1))
    np.testing.assert_array_equal(generate(model, tokens, 3), text[:, 5:])


def test_readers_have_no_cache_and_no_key_parameters(model):
    """Catches a cache per layer: two of five layers hold keys and values here, half in Hunyuan."""
    carried = [sorted(model.spec.carried_into(layer)) for layer in range(5)]
    # Where nothing is carried, a walk may begin from the residual stream alone.
    assert carried == [[], ["kv"], ["kv"], [], ["kv"]]
    kinds = [type(run.spec.mixer.kv).__name__ for run in model.runs]
    assert kinds == ["SharedKV", "EarlierKV", "SharedKV", "EarlierKV"]  # equal neighbours scan
    state = init_state(model, 3, 10)
    held = [0 if s is None else sum(leaf.size for leaf in s.cached) for s in state]
    assert held == [3 * 10 * 2 * 2 * 4, 0, 3 * 10 * 2 * 2 * 4, 0]
    assert cache_bytes_per_token(model.spec, jnp.float32) == 4 * 2 * (2 * 2 * 4)
    half = spec_of(*[GIVES, READS] * 4)
    full = spec_of(*[dataclasses.replace(GIVES, kv=SharedKV())] * 8)
    assert 2 * cache_bytes_per_token(half) == cache_bytes_per_token(full)
    assert count_parameters(full).total - count_parameters(half).total == 4 * 2 * 16 * 8
    named = parameters(model)
    assert "layers.1.attention.k" not in named and "layers.1.attention.k_norm.scale" in named


@pytest.mark.parametrize("mixers", [(READS,), (READS, GIVES), (None, READS)])
def test_a_reader_needs_a_giver_below(mixers):
    """Catches a layer dropped whose keys others read: a KeyError deep inside a jitted step."""
    with pytest.raises(SpecError, match="SharedKV"):
        spec_of(*mixers)
