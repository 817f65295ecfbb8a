"""The decoder against a float64 NumPy reference written from the formulas."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.core import taps
from moejax.models import DecoderLM, forward, layers, parameters, with_layers, with_parameters
from moejax.moe import Capacity, Dense


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def rope(x_SxHxW, base):
    """Complex rotation of the pairs (i, i + W/2)."""
    S, _, W = x_SxHxW.shape
    z = x_SxHxW[..., : W // 2] + 1j * x_SxHxW[..., W // 2 :]
    angle = np.arange(S)[:, None] * base ** (-np.arange(W // 2) / (W // 2))
    z = z * np.exp(1j * angle)[:, None, :]
    return np.concatenate([z.real, z.imag], -1)


def reference(spec, named, tokens_S):
    p = {k: np.asarray(v, np.float64) for k, v in named.items()}
    x = p["embed"][tokens_S]
    S = len(tokens_S)
    for i, layer in enumerate(spec.layers):
        a, n = layer.mixer, f"layers.{i}."
        h = rms(x, p[n + "attention_norm.scale"])
        q = rms(h @ p[n + "attention.q"], p[n + "attention.q_norm.scale"])
        k = rms(h @ p[n + "attention.k"], p[n + "attention.k_norm.scale"])
        q = rope(q.reshape(S, a.heads, a.head_width), a.rope.base)
        k = rope(k.reshape(S, a.kv_heads, a.head_width), a.rope.base)
        v = (h @ p[n + "attention.v"]).reshape(S, a.kv_heads, a.head_width)
        out = np.zeros((S, a.heads, a.head_width))
        for head in range(a.heads):
            g = head // (a.heads // a.kv_heads)
            for s in range(S):
                e = np.exp(k[: s + 1, g] @ q[s, head] / np.sqrt(a.head_width))
                out[s, head] = (e / e.sum()) @ v[: s + 1, g]
        x = x + out.reshape(S, -1) @ p[n + "attention.o"]
        h = rms(x, p[n + "ffn_norm.scale"])
        if n + "ffn.gate" in p:
            y = (silu(h @ p[n + "ffn.gate"]) * (h @ p[n + "ffn.up"])) @ p[n + "ffn.down"]
        else:
            m = n + "moe."
            y = (silu(h @ p[m + "shared.gate"]) * (h @ p[m + "shared.up"])) @ p[m + "shared.down"]
            e = np.exp(h @ p[m + "router.scores.kernel"])
            prob = e / e.sum(-1, keepdims=True)
            for s in range(S):
                top = np.argsort(-prob[s])[:2]
                for chosen in top:
                    bank = [p[m + f"experts.{name}"][chosen] for name in ("gate", "up", "down")]
                    out_e = (silu(h[s] @ bank[0]) * (h[s] @ bank[1])) @ bank[2]
                    y[s] = y[s] + prob[s, chosen] / prob[s, top].sum() * out_e
        x = x + y
    x = rms(x, p["final_norm.scale"])
    return x @ (p["embed"].T if spec.tie_embeddings else p["head"])


def test_logits_equal_the_formulas(run, spec, model, tokens_BxS):
    """Catches a wrong RoPE layout, head grouping, norm placement, gate or residual."""
    logits = run(model, tokens_BxS).logits_BxSxV
    for row in range(2):
        expected = reference(spec, parameters(model), np.asarray(tokens_BxS[row]))
        np.testing.assert_allclose(logits[row], expected, atol=2e-4, rtol=2e-4)


def test_untied_head(run, spec, tokens_BxS):
    """Catches a head that is silently the embedding."""
    untied = DecoderLM(dataclasses.replace(spec, tie_embeddings=False), rngs=nnx.Rngs(3))
    expected = reference(untied.spec, parameters(untied), np.asarray(tokens_BxS[0]))
    np.testing.assert_allclose(
        run(untied, tokens_BxS[:1]).logits_BxSxV[0], expected, atol=2e-4, rtol=2e-4
    )


def test_dispatch_does_not_change_the_model(run, spec, model, tokens_BxS):
    """Catches a dispatch that is more than bookkeeping, at model scale."""
    logits = run(model, tokens_BxS).logits_BxSxV
    for dispatch in (Dense(), Capacity(factor=4.0)):
        other = tuple(
            dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, dispatch=dispatch))
            if i in spec.moe_layers
            else layer
            for i, layer in enumerate(spec.layers)
        )
        same = with_parameters(dataclasses.replace(spec, layers=other), parameters(model))
        np.testing.assert_allclose(run(same, tokens_BxS).logits_BxSxV, logits, atol=2e-5)


def test_padding_changes_nothing(run, model, tokens_BxS):
    """Catches padding that is attended to, or that takes part in routing."""
    logits = run(model, tokens_BxS).logits_BxSxV
    padded = jnp.concatenate([tokens_BxS, jnp.full((2, 3), 7)], axis=1)
    mask = jnp.arange(12) < jnp.array([[9], [6]])
    masked = run(model, padded, mask)
    np.testing.assert_allclose(masked.logits_BxSxV[0, :9], logits[0], atol=2e-5)
    np.testing.assert_allclose(masked.logits_BxSxV[1, :6], logits[1, :6], atol=2e-5)
    assert float(masked.routings[1].counts_E().sum()) == 2 * (9 + 6)


def test_equal_layers_share_a_run_and_edits_split_it(run, model, tokens_BxS):
    """Catches a scan over layers that differ, and layers that lose their place."""
    assert [run.spec for run in model.runs] == [model.spec.layers[0], model.spec.layers[1]]
    blocks = layers(model)
    bank = blocks[2].moe.experts.gate
    bank.set_value(weights.SymmetricGrid(bits=8, group=32)(bank.get_value()))
    mixed = with_layers(model, blocks)
    assert len(mixed.runs) == 3
    assert isinstance(parameters(mixed)["layers.2.moe.experts.gate"], weights.Packed)
    before, after = (run(m, tokens_BxS).logits_BxSxV for m in (model, mixed))
    assert 0 < float(jnp.abs(before - after).max()) < 0.2


def test_taps_answer_what_was_asked(run, model, tokens_BxS):
    """Catches taps of the wrong layer, in the wrong order, or returned unasked."""
    out = forward(model, tokens_BxS, request=frozenset({taps.ROUTING, taps.EXPERT_INPUT}))
    assert [sorted(t.values) for t in out.taps] == [[], *[["expert_input", "routing"]] * 2]
    asked = run(model, tokens_BxS).taps
    for index in (1, 2):
        tapped, routing = asked[index], out.routings[index]
        np.testing.assert_array_equal(tapped["routing"].expert_A, routing.expert_A)
        plan = tapped["dispatch"]
        rows = tapped["ffn_input"][plan.token_R]
        np.testing.assert_allclose(tapped["expert_input"], rows, atol=1e-6)
        shared = layers(model)[index].moe.shared(tapped["ffn_input"])
        routed = plan.gather(tapped["expert_output"])
        np.testing.assert_allclose(tapped["ffn_output"], routed + shared, atol=1e-5)


def test_attention_mass_is_a_column_mean_over_later_tokens(run, model, tokens_BxS):
    """Catches a mean over keys: 1 per row whatever the attention (MC-MoE's released code)."""
    mass = run(model, tokens_BxS).taps[0]["attention_mass"]
    S = tokens_BxS.shape[1]
    paid = np.asarray(mass) * np.maximum(S - 1 - np.arange(S), 0)
    assert mass.shape == tokens_BxS.shape and float(mass[:, -1].max()) == 0.0
    # Later tokens pay S - 1 in all, less what each pays to itself.
    assert np.all(paid.sum(1) < S - 1) and np.all(np.asarray(mass)[:, :-1] > 0)
    assert np.std(np.asarray(mass)[0, :-1]) > 1e-3
