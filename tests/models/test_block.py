"""What families change around mixers and feed-forwards, against NumPy formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError, taps
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerNorm,
    LayerSpec,
    ModelSpec,
    RMSNorm,
    Rope,
    layers,
    parameters,
    with_layers,
    with_parameters,
)
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK
from tests.models.mixing import rms, rotated, softmax_mix
from tests.models.test_decoder import silu

MIXER = AttentionSpec(heads=2, kv_heads=1, head_width=4, rope=Rope(base=100.0))
DENSE = LayerSpec(mixer=MIXER, ffn=DenseSpec(width=8))
ROUTED = MoESpec(
    experts=3, width=8, router=RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True))
)
ARCTIC = LayerSpec(mixer=MIXER, ffn=ROUTED, dense_residual=DenseSpec(width=8))
BASE = ModelSpec(vocab=24, width=12, layers=(DENSE, DENSE), init_scale=0.4)

CHANGES = {
    "LayerNorm": {"norm": LayerNorm()},
    "LayerNorm without bias": {"norm": LayerNorm(bias=False)},
    "another epsilon": {"norm": RMSNorm(epsilon=0.5)},
    "norms behind as before (Grok-1)": {"post_norm": True},
    "Granite's multipliers": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_multiplier": 0.3,
    },
    "capped logits and a head with bias": {
        "tie_embeddings": False,
        "head_bias": True,
        "logits_multiplier": 2.0,
        "logits_soft_cap": 1.5,
    },
    "a dense layer without a mixer (OpenMoE)": {
        "layers": (DENSE, LayerSpec(mixer=None, ffn=DenseSpec(width=8)))
    },
    "a dense residual (Arctic)": {"layers": (ARCTIC, ARCTIC)},
}


def built(spec):
    """Vectors are not the zeros and ones they start as."""
    model, draws = DecoderLM(spec, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    named = parameters(model)
    for name, value in named.items():
        if value.ndim == 1:
            named[name] = jnp.asarray(draws.uniform(0.5, 1.5, value.shape), jnp.float32)
    return with_parameters(spec, named)


def reference(model, tokens_S):
    spec = model.spec
    p = {name: np.asarray(value, np.float64) for name, value in parameters(model).items()}

    def norm(x, name):
        if isinstance(spec.norm, RMSNorm):
            return rms(x, p[name + ".scale"], spec.norm.epsilon)
        x = x - x.mean(-1, keepdims=True)
        return rms(x, p[name + ".scale"], spec.norm.epsilon) + p.get(name + ".bias", 0.0)

    def added(x, y, name):
        return x + spec.residual_multiplier * (norm(y, name) if spec.post_norm else y)

    def dense(x, n):
        return (silu(x @ p[n + "gate"]) * (x @ p[n + "up"])) @ p[n + "down"]

    def routed(x, n):
        e = np.exp(x @ p[n + "router.scores.kernel"])
        y = np.zeros_like(x)
        for s in range(len(x)):
            top = np.argsort(-e[s])[:2]
            for chosen in top:
                bank = {f"one.{m}": p[n + f"experts.{m}"][chosen] for m in ("gate", "up", "down")}
                inner = silu(x[s] @ bank["one.gate"]) * (x[s] @ bank["one.up"])
                y[s] += e[s, chosen] / e[s, top].sum() * (inner @ bank["one.down"])
        return y

    x, S = p["embed"][tokens_S] * spec.embedding_multiplier, len(tokens_S)
    for i, layer in enumerate(spec.layers):
        n, before = f"layers.{i}.", x
        if layer.mixer is not None:
            h, a = norm(x, n + "attention_norm"), n + "attention."
            q, k, v = ((h @ p[a + m]).reshape(S, -1, 4) for m in "qkv")
            y = softmax_mix(rotated(q), rotated(k), v, 0.5) @ p[a + "o"]
            x = added(x, y, n + "attention_post_norm")
        branches = [dense(norm(x, n + "ffn_norm"), n + "ffn.")]
        if layer.dense_residual is not None:
            branches.append(routed(norm(before, n + "moe_norm"), n + "moe."))
        for y in branches:
            x = added(x, y, n + "ffn_post_norm")
    logits = norm(x, "final_norm") @ (p["embed"].T if spec.tie_embeddings else p["head"])
    logits = spec.logits_multiplier * (logits + p.get("head_bias", 0.0))
    cap = spec.logits_soft_cap
    return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_equal_their_formulas(run, name):
    """Catches each left out or put elsewhere: a norm behind the sum, a multiplier on the stream
    instead of on what is added, a bias scaled not at all, a routed branch behind the mixer."""
    model = built(dataclasses.replace(BASE, **CHANGES[name]))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 24)
    logits = run(model, tokens).logits_BxSxV
    for row in range(2):
        expected = reference(model, np.asarray(tokens[row]))
        np.testing.assert_allclose(logits[row], expected, atol=1e-5 * np.abs(expected).max())


def test_a_dense_residual_takes_the_stream_and_experts_the_input(run):
    """Catches a routed branch fed behind the mixer, taps of the wrong branch, and experts that
    leave something once their outputs are zero (Arctic is then a dense transformer)."""
    model = built(dataclasses.replace(BASE, layers=(ARCTIC,)))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 24)
    named = parameters(model)
    other = {**named, "layers.0.attention.o": 2 * named["layers.0.attention.o"]}
    first, second = (run(m, tokens).taps[0] for m in (model, with_parameters(model.spec, other)))
    np.testing.assert_array_equal(first[taps.FFN_INPUT], second[taps.FFN_INPUT])
    assert float(jnp.abs(first[taps.DENSE_INPUT] - second[taps.DENSE_INPUT]).max()) > 1e-2
    silent = {**named, "layers.0.moe.experts.down": 0 * named["layers.0.moe.experts.down"]}
    dense = dataclasses.replace(BASE, layers=(DENSE,))
    kept = {n: w for n, w in named.items() if ".moe" not in n}
    np.testing.assert_allclose(
        run(with_parameters(model.spec, silent), tokens).logits_BxSxV,
        run(with_parameters(dense, kept), tokens).logits_BxSxV,
        atol=1e-5,
    )


def test_layers_that_differ_in_a_window_do_not_share_a_run(run):
    """Catches a scan that gives every layer the window of the first."""
    windowed = dataclasses.replace(DENSE, mixer=dataclasses.replace(MIXER, window=2))
    model = built(dataclasses.replace(BASE, layers=(windowed, windowed, DENSE)))
    assert [len(layers(with_layers(model, [b]))) for b in model.runs[1:]] == [1]
    assert [run.spec for run in model.runs] == [windowed, DENSE]


def test_dense_residuals_stand_beside_experts_only():
    """Catches a residual that a dense layer would silently ignore."""
    with pytest.raises(SpecError, match="dense_residual"):
        LayerSpec(mixer=MIXER, ffn=DenseSpec(width=8), dense_residual=DenseSpec(width=8))
