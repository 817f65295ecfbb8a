"""Rules on a routing against NumPy, token by token, written from the papers' formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError, from_json, to_json
from moejax.moe import Protection, RandomImportance, RouterContext, Routing, SkipSmallGates

D, E = 6, 5
apply = jax.jit(lambda rule, *given: rule(*given), static_argnums=0)
protected = jax.jit(lambda protect, *given: protect(*given), static_argnums=0)


def routing_of(gate_TxK, valid_T=None):
    """A routing with these gates in any order, to arbitrary distinct experts."""
    T, K = gate_TxK.shape
    valid_T = np.ones(T, bool) if valid_T is None else valid_T
    return Routing(
        token_A=jnp.repeat(jnp.arange(T), K),
        expert_A=jnp.tile(jnp.arange(K), T),
        gate_A=jnp.asarray(gate_TxK, jnp.float32).reshape(-1),
        valid_A=jnp.repeat(jnp.asarray(valid_T), K),
        logits_TxE=jnp.zeros((T, E)),
        probabilities_TxE=jnp.zeros((T, E)),
        per_token=K,
    )


def draw(seed, T=24, K=3):
    random = np.random.default_rng(seed)
    return random.uniform(0.05, 1, (T, K)).astype(np.float32), random.normal(size=(T, D))


def skip(rule, beta, gate_TxK, x_TxD, context=RouterContext(), valid_T=None):
    """Which are kept, and the gates, [T, K]."""
    tables = {"beta": jnp.float32(beta)}
    found = apply(rule, tables, routing_of(gate_TxK, valid_T), jnp.asarray(x_TxD), context)
    return tuple(np.asarray(a).reshape(gate_TxK.shape) for a in (found.valid_A, found.gate_A))


def by_hand(beta, gate_TxK, renormalise, safe_T):
    """Token by token: experts in order of their gates, the first always stays."""
    kept, gates = np.ones(gate_TxK.shape, bool), np.array(gate_TxK)
    for t, gate_K in enumerate(gate_TxK):
        order = np.argsort(-gate_K, kind="stable")
        if not safe_T[t]:
            for rank in order[1:]:
                kept[t, rank] = gate_K[rank] >= np.float32(beta) * gate_K[order[0]]
        if renormalise:
            gates[t] = gate_K * (gate_K.sum() / gate_K[kept[t]].sum())
    return kept, gates


@pytest.mark.parametrize("renormalise", [True, False])
def test_ranks_below_the_first_are_skipped_by_their_ratio(renormalise):
    """Catches a rule for the second rank only, one that trusts the order, or other gates."""
    gate_TxK, x_TxD = draw(0)
    rule = SkipSmallGates(renormalise=renormalise)
    kept, gates = skip(rule, 0.6, gate_TxK, x_TxD)
    expected, weights = by_hand(0.6, gate_TxK, renormalise, np.zeros(24, bool))
    assert {1, 2, 3} == set(expected.sum(1))
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_allclose(gates[kept], weights[kept], rtol=1e-6)
    if renormalise:
        total = np.where(kept, gates, 0).sum(1)
        np.testing.assert_allclose(total, gate_TxK.sum(1), rtol=1e-6)


def test_zero_changes_no_bit_and_above_one_leaves_the_first():
    """Catches gates that renormalisation touches for nothing, and ties that lose all experts."""
    gate_TxK, x_TxD = draw(1)
    gate_TxK[3] = 0.5
    kept, gates = skip(SkipSmallGates(), 0.0, gate_TxK, x_TxD)
    assert kept.all() and gates.tobytes() == gate_TxK.tobytes()
    kept, _ = skip(SkipSmallGates(), 1.01, gate_TxK, x_TxD)
    assert (kept.sum(1) == 1).all()
    np.testing.assert_array_equal(kept.argmax(1), gate_TxK.argmax(1))


def test_what_an_earlier_rule_took_back_stays_taken_back():
    """Catches a token that loses its last expert because its largest gate no longer counts."""
    gate_TxK = np.array([[0.6, 0.3, 0.1]], np.float32)
    routing = dataclasses.replace(routing_of(gate_TxK), valid_A=jnp.array([False, True, True]))
    tables = {"beta": jnp.float32(0.9)}
    found = apply(SkipSmallGates(), tables, routing, jnp.zeros((1, D)), RouterContext())
    assert found.valid_A.tolist() == [False, True, False]
    np.testing.assert_allclose(found.gate_A[1], 0.4, rtol=1e-6)


def top_share(score_BxS, valid_BxS, share):
    """The tokens of the top share of each sequence, rounded up: bool [B, S]."""
    safe = np.zeros(valid_BxS.shape, bool)
    for b, valid_S in enumerate(valid_BxS):
        places = np.flatnonzero(valid_S)
        best = places[np.argsort(-score_BxS[b, places], kind="stable")]
        safe[b, best[: math.ceil(round(share * len(places), 9))]] = True
    return safe


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 9),
    share=st.sampled_from([0.02, 0.07, 0.25, 1.0]),
    lengths=st.tuples(*[st.integers(0, 12)] * 3),
)
def test_protected_are_the_top_share_of_each_sequence(seed, share, lengths):
    """Catches a share of the batch, padding that counts, and a count that is off by one."""
    random = np.random.default_rng(seed)
    x_BxSxD, attention_BxS = random.normal(size=(3, 12, D)), random.uniform(size=(3, 12))
    valid_BxS = np.arange(12) < np.array(lengths)[:, None]
    context = RouterContext(
        mask_T=jnp.asarray(valid_BxS.reshape(-1)),
        attention_T=jnp.asarray(attention_BxS.reshape(-1)),
        sequences=3,
    )
    found = protected(Protection(share=share), jnp.asarray(x_BxSxD.reshape(-1, D)), context)
    expected = top_share(np.abs(x_BxSxD).sum(-1) * attention_BxS, valid_BxS, share)
    np.testing.assert_array_equal(np.asarray(found).reshape(3, 12), expected)


def test_seven_percent_of_a_hundred_are_seven():
    """Catches 0.07 * 100 = 7.000000000000001 rounded up to 8."""
    context = RouterContext(attention_T=jnp.arange(100.0), sequences=1)
    found = protected(Protection(share=0.07), jnp.ones((100, D)), context)
    assert np.flatnonzero(found).tolist() == list(range(93, 100))


def test_protected_tokens_keep_all_their_experts():
    """Catches protection that is computed and not used, or that spares other tokens too."""
    gate_TxK, x_TxD = draw(2)
    attention_T = np.random.default_rng(3).uniform(size=24).astype(np.float32)
    context = RouterContext(attention_T=jnp.asarray(attention_T), sequences=2)
    rule = SkipSmallGates(protect=Protection(share=0.25))
    assert rule.uses_attention and not SkipSmallGates().uses_attention
    score_BxS = (np.abs(x_TxD).sum(-1) * attention_T).reshape(2, 12)
    safe_T = top_share(score_BxS, np.ones((2, 12), bool), 0.25).reshape(-1)
    kept, gates = skip(rule, 1.5, gate_TxK, x_TxD, context)
    assert safe_T.sum() == 6
    np.testing.assert_array_equal(kept.sum(1), np.where(safe_T, 3, 1))
    np.testing.assert_array_equal(gates[safe_T], gate_TxK[safe_T])


def test_the_ratio_rule_alone_decodes():
    """Catches one token at a time, which would be its sequence's most important."""
    gate_TxK, x_TxD = draw(4, T=3)
    for importance in (Protection().importance, RandomImportance()):
        rule = SkipSmallGates(protect=Protection(importance=importance))
        kept, _ = skip(rule, 1.5, gate_TxK, x_TxD, RouterContext(sequences=3))
        assert (kept.sum(1) == 1).all()
    rule = SkipSmallGates(protect=Protection())
    kept, _ = skip(rule, 1.5, gate_TxK, x_TxD, RouterContext(sequences=1))
    assert (kept.sum(1) == 1).all(), "no attention is known"


def test_random_importance_is_a_control():
    """Catches a control that is constant, of another share, or moved by padding and batching."""
    ids_BxS = np.random.default_rng(0).integers(0, 9, (2, 40))

    def chosen(ids_BxS, valid_BxS, seed=0):
        context = RouterContext(
            mask_T=jnp.asarray(valid_BxS.reshape(-1)),
            token_ids_T=jnp.asarray(ids_BxS.reshape(-1)),
            sequences=len(ids_BxS),
        )
        protect = Protection(share=0.1, importance=RandomImportance(seed=seed))
        found = protected(protect, jnp.zeros((ids_BxS.size, D)), context)
        return np.asarray(found).reshape(ids_BxS.shape)

    whole = chosen(ids_BxS, np.ones((2, 40), bool))
    assert whole.sum(1).tolist() == [4, 4]
    assert (whole != chosen(ids_BxS, np.ones((2, 40), bool), seed=1)).any()
    assert (whole[0] != whole[1]).any()
    np.testing.assert_array_equal(chosen(ids_BxS[1:], np.ones((1, 40), bool)), whole[1:])
    for before, after in ((3, 0), (0, 3)):
        room = ((0, 0), (before, after))
        found = chosen(np.pad(ids_BxS, room), np.pad(np.ones((2, 40), bool), room))
        np.testing.assert_array_equal(found, np.pad(whole, room))


def test_impossible_rules_are_refused_and_others_travel():
    """Catches a share above all tokens, lists without K per token, and fields lost in JSON."""
    for build in (lambda: Protection(share=1.5), lambda: RandomImportance(seed=-1)):
        with pytest.raises(SpecError):
            build()
    ragged = dataclasses.replace(routing_of(draw(0)[0]), per_token=None)
    with pytest.raises(SpecError, match="same number"):
        SkipSmallGates()({"beta": jnp.zeros(())}, ragged, jnp.zeros((24, D)), RouterContext())
    rule = SkipSmallGates(protect=Protection(importance=RandomImportance(seed=3)))
    assert from_json(to_json(rule)) == rule
