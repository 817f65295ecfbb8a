"""Routing rules inside a model: where attention comes from, scans, gradients, generation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax.core import SpecError, taps
from moejax.models import (
    abstract_model,
    combine,
    forward,
    generate,
    init_state,
    layers,
    parameters,
    partition,
    select_experts,
    with_layers,
    with_parameters,
    with_rule,
)
from moejax.moe import AttentionImportance, Protection, RandomImportance, SkipSmallGates
from tests.models.test_generate import repeated

RATIO = SkipSmallGates()
ODP = SkipSmallGates(protect=Protection(share=0.2))
REQUEST = frozenset({taps.FFN_INPUT, taps.ATTENTION_MASS})
_traced = []  # grows by one for each program that is compiled


@functools.partial(jax.jit, static_argnums=0)
def _pass(graphdef, state, tokens_BxS, mask_BxS):
    _traced.append(graphdef)
    model = nnx.merge(graphdef, state)
    return forward(model, tokens_BxS, mask_BxS=mask_BxS, request=REQUEST)


def passed(model, tokens_BxS, mask_BxS=None):
    mask_BxS = jnp.ones(tokens_BxS.shape, bool) if mask_BxS is None else mask_BxS
    return _pass(*nnx.split(model), tokens_BxS, mask_BxS)


def ruled(model, rule, betas):
    """The model with a rule on each MoE layer."""
    blocks = layers(model)
    for index, beta in zip(model.spec.moe_layers, betas, strict=True):
        blocks[index] = with_rule(blocks[index], rule, {"beta": jnp.float32(beta)})
    return with_layers(model, blocks)


def kept(out, layer):
    """How many experts each token has: [B, S]."""
    B, S, _ = out.logits_BxSxV.shape
    return np.asarray(out.routings[layer].valid_A).reshape(B, S, -1).sum(-1)


def test_beta_zero_is_the_model_and_beta_above_one_its_top_one(model, tokens_BxS):
    """Catches rules that touch a routing for nothing, and dispatch of what was taken back."""
    plain = passed(model, tokens_BxS).logits_BxSxV
    same = passed(ruled(model, RATIO, (0, 0)), tokens_BxS)
    np.testing.assert_array_equal(same.logits_BxSxV, plain)
    above = passed(ruled(model, RATIO, (1.5, 1.5)), tokens_BxS)
    one = [_with_k(layer, 1) for layer in model.spec.layers]
    top = with_parameters(dataclasses.replace(model.spec, layers=tuple(one)), parameters(model))
    np.testing.assert_allclose(above.logits_BxSxV, passed(top, tokens_BxS).logits_BxSxV, atol=2e-5)
    assert float(above.routings[1].counts_E().sum()) == tokens_BxS.size


def _with_k(layer, k):
    if not hasattr(layer.ffn, "router"):
        return layer
    router = dataclasses.replace(
        layer.ffn.router, selector=dataclasses.replace(layer.ffn.router.selector, k=k)
    )
    return dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, router=router))


def protected_by_hand(out, layer, lengths, share):
    """The top share by ||t||_1 times the attention later tokens pay, from the taps: [B, S]."""
    mass_BxS = np.asarray(out.taps[layer]["attention_mass"], np.float64)
    norm_BxS = np.abs(np.asarray(out.taps[layer]["ffn_input"], np.float64)).sum(-1)
    score_BxS = norm_BxS.reshape(mass_BxS.shape) * mass_BxS
    safe = np.zeros(mass_BxS.shape, bool)
    for b, length in enumerate(lengths):
        best = np.argsort(-score_BxS[b, :length])
        safe[b, best[: math.ceil(round(share * length, 9))]] = True
    return safe, score_BxS


@pytest.fixture(scope="module")
def odp(model):
    return ruled(model, ODP, (1.5, 1.5))


def test_the_most_important_tokens_keep_their_experts(odp, tokens_BxS):
    """Catches another layer's attention, importance of the residual stream, or none at all."""
    out = passed(odp, tokens_BxS)
    for layer in odp.spec.moe_layers:
        safe, _ = protected_by_hand(out, layer, (9, 9), 0.2)
        np.testing.assert_array_equal(kept(out, layer), np.where(safe, 2, 1))


def test_uniform_attention_changes_the_importance(model, odp, tokens_BxS):
    """Catches attention that does not enter the score (MC-MoE's released code)."""
    named = parameters(odp)
    flat = {n: jnp.zeros_like(w) for n, w in named.items() if n.endswith("attention.q")}
    uniform = passed(with_parameters(odp.spec, named | flat), tokens_BxS)
    S = tokens_BxS.shape[1]
    j = np.arange(S - 1)
    # Query i pays 1 / (i + 1) to each of its i + 1 tokens.
    expected = [np.mean([1 / (i + 1) for i in range(at + 1, S)]) for at in j]
    mass = np.asarray(uniform.taps[1]["attention_mass"])
    np.testing.assert_allclose(mass[:, :-1], np.tile(expected, (2, 1)), atol=1e-6)
    _, before = protected_by_hand(passed(odp, tokens_BxS), 1, (9, 9), 0.2)
    safe, after = protected_by_hand(uniform, 1, (9, 9), 0.2)
    assert np.abs(before - after).max() > 0.05 * before.max()
    np.testing.assert_array_equal(kept(uniform, 1), np.where(safe, 2, 1))


@pytest.mark.parametrize("importance", [AttentionImportance(), RandomImportance()])
def test_padding_changes_nothing(model, tokens_BxS, importance):
    """Catches shares of padded lengths, and padding that is protected or that pays attention."""
    rule = SkipSmallGates(protect=Protection(share=0.2, importance=importance))
    protecting = ruled(model, rule, (1.5, 1.5))
    padded = jnp.concatenate([tokens_BxS, jnp.full((2, 3), 7)], axis=1)
    lengths = np.array([9, 6])
    both = passed(protecting, padded, jnp.arange(12) < lengths[:, None])
    for row, length in enumerate(lengths):
        alone = passed(protecting, tokens_BxS[row : row + 1, :length])
        np.testing.assert_allclose(
            both.logits_BxSxV[row, :length], alone.logits_BxSxV[0], atol=2e-5
        )
        np.testing.assert_array_equal(kept(both, 2)[row, :length], kept(alone, 2)[0])
        assert kept(both, 2)[row, length:].sum() == 0


def test_layers_of_other_thresholds_are_one_run(odp, model, tokens_BxS):
    """Catches thresholds in the spec or the graph, which would compile every layer anew."""
    other = ruled(model, ODP, (0.3, 0.8))
    assert [nnx.split(run)[0] for run in other.runs] == [nnx.split(run)[0] for run in odp.runs]
    assert len(other.runs) == 2
    passed(odp, tokens_BxS)
    traced = len(_traced)
    out = passed(other, tokens_BxS)
    assert len(_traced) == traced
    assert kept(out, 1).sum() > kept(out, 2).sum() >= tokens_BxS.size


def test_rules_have_names_shapes_and_a_place_in_pruned_models(odp):
    """Catches tables that are unnamed, lost by edits, or missing from abstract models."""
    named = parameters(odp)
    assert float(named["layers.1.moe.rules.0.beta"]) == 1.5
    assert parameters(abstract_model(odp.spec)).keys() == named.keys()
    block = select_experts(layers(odp)[2], [2, 0, 1])
    assert block.moe is not None
    assert block.moe.spec.rules == (ODP,) and float(block.moe.rules[0]["beta"][...]) == 1.5
    with pytest.raises(SpecError, match="no routing"):
        with_rule(layers(odp)[0], RATIO, RATIO.init())


def test_training_moves_weights_and_no_threshold(odp, tokens_BxS):
    """Catches a gradient through the threshold, and NaN where an expert is skipped."""
    structure, trainable, frozen = partition(ruled(odp, RATIO, (0.5, 0.5)))
    tables = [name for name in frozen if ".rules." in name]
    assert len(tables) == 2 and not any(".rules." in name for name in trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            out = forward(combine(structure, trainable, frozen), tokens_BxS, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(
                out.logits_BxSxV[:, :-1], tokens_BxS[:, 1:]
            ).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trainable, updates), state, value, gradient

    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(trainable), []
    for _ in range(5):
        trainable, state, value, gradient = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    for name, leaf in gradient.items():
        assert np.isfinite(leaf).all(), name
    router = next(name for name in gradient if "router.scores.kernel" in name)
    assert np.abs(gradient[router]).max() > 0


def test_generation_follows_the_ratio_rule(run, model, tokens_BxS):
    """Catches a decoding step that runs experts which a full pass would skip."""
    skipping = ruled(model, RATIO, (0.9, 0.9))
    got = generate(skipping, tokens_BxS, 3)
    np.testing.assert_array_equal(got, repeated(run, skipping, tokens_BxS, 3))


def test_prompts_are_protected_and_padding_changes_nothing(model, odp, tokens_BxS):
    """Catches attention of empty cache slots, and importance read at the wrong place of a cache."""
    padded = jnp.concatenate([jnp.full((2, 3), 11), tokens_BxS], axis=1)
    mask = jnp.broadcast_to(jnp.arange(12) >= 3, padded.shape)
    got = generate(odp, tokens_BxS, 3)
    np.testing.assert_array_equal(generate(odp, padded, 3, mask_BxS=mask), got)


def test_a_chunk_of_a_prompt_reads_its_own_attention(odp, tokens_BxS):
    """Catches importance read at the wrong place of a cache: that of the chunk before."""
    whole = passed(odp, tokens_BxS)
    state = init_state(odp, 2, 12)
    state = _chunk(odp, tokens_BxS[:, :4], 0, state).state
    out = _chunk(odp, tokens_BxS[:, 4:], 4, state)
    _, score_BxS = protected_by_hand(whole, 1, (9, 9), 0.2)
    safe = np.arange(5) == score_BxS[:, 4:].argmax(1)[:, None]  # one of five is a fifth
    np.testing.assert_array_equal(kept(out, 1), np.where(safe, 2, 1))


def _chunk(model, tokens_BxS, first, state):
    positions = jnp.broadcast_to(first + jnp.arange(tokens_BxS.shape[1]), tokens_BxS.shape)
    graphdef, values = nnx.split(model)
    how = {"positions_BxS": positions}
    run = jax.jit(lambda v, s: forward(nnx.merge(graphdef, v), tokens_BxS, state=s, **how))
    return run(values, state)
