"""Taps against the formulas in float64 NumPy, and what they cost when nobody asks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import weights
from moejax.core import taps
from moejax.models import forward, parameters, with_parameters
from moejax.moe import MoELayer, MoESpec, RouterContext, RouterSpec, SlotSpec, SoftmaxGates, TopK
from tests.models.test_decoder import rms, rope, silu


@pytest.fixture(scope="module")
def out(run, model, tokens_BxS):
    return run(model, tokens_BxS)


@pytest.fixture(scope="module")
def named(model):
    return {name: np.asarray(value, np.float64) for name, value in parameters(model).items()}


def hidden(x, gate, up):
    return silu(x @ gate) * (x @ up)


def wide(value):
    return np.asarray(value, np.float64)


def shares(p, layer, x_BxSxD, spec):
    """Attention shares [B, H, S, S] and values [B, S, KV, W] of a layer, head by head."""
    (B, S, _), a, n = x_BxSxD.shape, spec.layers[layer].mixer, f"layers.{layer}.attention."
    q = rms(x_BxSxD @ p[n + "q"], p[n + "q_norm.scale"]).reshape(B, S, a.heads, -1)
    k = rms(x_BxSxD @ p[n + "k"], p[n + "k_norm.scale"]).reshape(B, S, a.kv_heads, -1)
    v = (x_BxSxD @ p[n + "v"]).reshape(B, S, a.kv_heads, -1)
    found = np.zeros((B, a.heads, S, S))
    for b in range(B):
        q_b, k_b = rope(q[b], a.rope.base), rope(k[b], a.rope.base)
        for h in range(a.heads):
            for s in range(S):
                e = np.exp(
                    k_b[: s + 1, h // (a.heads // a.kv_heads)] @ q_b[s, h] * a.head_width**-0.5
                )
                found[b, h, s, : s + 1] = e / e.sum()
    return found, v


def test_attention_context_is_what_the_output_projection_sees(out, spec, named):
    """Catches heads in another order, and the tap taken after the projection."""
    for layer in (0, 2):
        tapped = out.taps[layer]
        share, v = shares(named, layer, wide(tapped["attention_input"]), spec)
        per_group = share.shape[1] // v.shape[2]
        heads = [
            np.einsum("bst,btw->bsw", share[:, h], v[:, :, h // per_group])
            for h in range(share.shape[1])
        ]
        np.testing.assert_allclose(
            tapped["attention_context"], np.concatenate(heads, -1), atol=1e-5
        )
        mixed = (
            wide(tapped["block_input"])
            + wide(tapped["attention_context"]) @ (named[f"layers.{layer}.attention.o"])
        )
        normed = rms(mixed, named[f"layers.{layer}.ffn_norm.scale"]).reshape(-1, spec.width)
        np.testing.assert_allclose(tapped["ffn_input"], normed, atol=1e-5)


def test_attention_mass_is_the_mean_over_heads_and_later_tokens(out, spec, named):
    """Catches a token that pays itself, a mean over keys, and a sum instead of a mean."""
    tapped = out.taps[1]
    share, _ = shares(named, 1, wide(tapped["attention_input"]), spec)
    mean = share.mean(1)
    B, S = mean.shape[:2]
    expected = np.zeros((B, S))
    for j in range(S - 1):
        expected[:, j] = mean[:, j + 1 :, j].mean(1)
    np.testing.assert_allclose(tapped["attention_mass"], expected, atol=1e-5)


def test_hidden_of_dense_and_shared_feed_forwards(out, named):
    """Catches the hidden before the activation or the product, and shared taken for routed."""
    first, second = out.taps[0], out.taps[1]
    x = wide(first["ffn_input"])
    h = hidden(x, named["layers.0.ffn.gate"], named["layers.0.ffn.up"])
    np.testing.assert_allclose(first["ffn_hidden"], h, atol=1e-5)
    np.testing.assert_allclose(first["ffn_output"], h @ named["layers.0.ffn.down"], atol=1e-5)
    x, shared = wide(second["ffn_input"]), "layers.1.moe.shared."
    h = hidden(x, named[shared + "gate"], named[shared + "up"])
    np.testing.assert_allclose(second["shared_hidden"], h, atol=1e-5)


def test_block_input_and_output_are_the_residual_stream(out, named, tokens_BxS):
    """Catches the stream after a norm, or before the feed-forward was added."""
    np.testing.assert_array_equal(out.taps[0]["block_input"], named["embed"][tokens_BxS])
    for before, after in zip(out.taps, out.taps[1:], strict=False):
        np.testing.assert_array_equal(before["block_output"], after["block_input"])
    last = rms(wide(out.taps[-1]["block_output"]), named["final_norm.scale"])
    np.testing.assert_allclose(out.hidden_BxSxD, last, atol=1e-5)


def test_all_experts_on_every_token(out, named):
    """Catches gates in the output, tokens of one expert only, and experts in another order."""
    for layer in (1, 2):
        tapped, bank = out.taps[layer], f"layers.{layer}.moe.experts."
        x = wide(tapped["ffn_input"])
        assert tapped["all_hidden"].shape == (4, len(x), 32)
        for e in range(4):
            h = hidden(x, named[bank + "gate"][e], named[bank + "up"][e])
            np.testing.assert_allclose(tapped["all_hidden"][e], h, atol=1e-5)
            np.testing.assert_allclose(
                tapped["all_output"][e], h @ named[bank + "down"][e], atol=1e-5
            )
        plan, rows = tapped["dispatch"], tapped["expert_output"]
        expert_R = np.repeat(np.arange(4), plan.group_sizes_E)
        mine = tapped["all_output"][expert_R, plan.token_R]
        np.testing.assert_allclose(rows, mine, atol=1e-5)


def test_all_experts_are_the_stored_ones():
    """Catches router experts instead of stored ones, where a slot map lies between them."""
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates())
    spec = MoESpec(experts=6, width=8, router=router, slots=SlotSpec(stored=3))
    layer = MoELayer(spec, 4, 0.5, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x_TxD = jax.random.normal(jax.random.key(0), (5, 4))
    request = frozenset({taps.ALL_OUTPUT, taps.ALL_HIDDEN})
    call = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x, RouterContext(), request))
    y_TxD, routing, found = call(state, x_TxD)
    assert found["all_output"].shape == (3, 5, 4) and found["all_hidden"].shape == (3, 5, 8)
    expected = np.zeros((5, 4))
    for t, e, g in zip(routing.token_A, routing.expert_A, routing.gate_A, strict=True):
        expected[t] += float(g) * np.asarray(found["all_output"][int(e) % 3, int(t)])
    np.testing.assert_allclose(y_TxD, expected, atol=1e-5)


def test_all_experts_of_a_compressed_bank(run, out, spec, model, tokens_BxS):
    """Catches a tap that reads weights as plain arrays."""
    grid = weights.SymmetricGrid(bits=8, group=32)
    banks = {n: grid(w) for n, w in parameters(model).items() if ".moe.experts." in n}
    packed = run(with_parameters(spec, parameters(model) | banks), tokens_BxS)
    found, plain = packed.taps[1]["all_output"], out.taps[1]["all_output"]
    assert 0 < float(jnp.abs(found - plain).max()) < 0.1


@functools.cache
def program(graphdef, request):
    tokens_BxS = jnp.zeros((2, 9), jnp.int32)
    trace = lambda state: forward(nnx.merge(graphdef, state), tokens_BxS, request=request)
    return lambda state: str(jax.make_jaxpr(trace)(state))


def test_what_nobody_asks_for_is_not_computed(model):
    """Catches all experts on all tokens, or the attention mass, in every forward pass."""
    graphdef, state = nnx.split(model)
    every_row = f"f32[{4 * 18},32]"  # neither the A = 36 routed rows nor the T = 18 tokens
    others = taps.NAMES - {taps.ALL_HIDDEN, taps.ALL_OUTPUT}
    assert every_row not in program(graphdef, others)(state)
    assert every_row in program(graphdef, frozenset({taps.ALL_OUTPUT}))(state)
    nothing = len(program(graphdef, taps.NOTHING)(state))
    assert len(program(graphdef, frozenset({taps.ATTENTION_MASS}))(state)) > nothing + 200
    asked = frozenset({taps.ALL_OUTPUT})
    tokens_BxS = jnp.zeros((1, 2), jnp.int32)
    ask = lambda s: forward(nnx.merge(graphdef, s), tokens_BxS, request=asked)
    out = jax.eval_shape(ask, state)
    assert [sorted(t.values) for t in out.taps] == [[], ["all_output"], ["all_output"]]


def test_a_model_without_taps_is_the_same_model(run, model, tokens_BxS):
    """Catches a tap that changes what it looks at."""
    graphdef, state = nnx.split(model)
    plain = jax.jit(lambda s: forward(nnx.merge(graphdef, s), tokens_BxS).logits_BxSxV)(state)
    np.testing.assert_allclose(run(model, tokens_BxS).logits_BxSxV, plain, atol=1e-5)
