"""Group-limited selection against a loop over tokens, and what selectors make of fewer experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError, from_json, to_json
from moejax.moe import BiasedTopK, GroupLimited, MoESpec, RouterSpec, SoftmaxGates, TopK

T, E, G = 40, 12, 4
EACH = E // G
BIAS = np.array([0, -3, 2, 0, 0.4, 0, -2, 1, 0, 0, 0.3, -1])


def choices(selector, probabilities_TxE, state):
    return np.asarray(selector.choose(jnp.asarray(probabilities_TxE, jnp.float32), state))


def by_hand(rank_TxE, kept, best, k):
    """The choices, token by token, highest first."""
    chosen = []
    for rank in rank_TxE:
        score = [np.sort(rank[g * EACH : (g + 1) * EACH])[::-1][:best].sum() for g in range(G)]
        groups = np.argsort(-np.array(score), kind="stable")[:kept]
        allowed = [e for e in range(E) if e // EACH in groups]
        chosen.append(sorted(allowed, key=lambda e: -rank[e])[:k])
    return np.array(chosen)


@pytest.mark.parametrize(("kept", "best", "k"), [(1, 1, 3), (2, 1, 4), (2, 2, 3), (3, 3, 6)])
@pytest.mark.parametrize("biased", [False, True])
def test_groups_limit_the_choice(kept, best, k, biased):
    """Catches groups that score by mean, by ranks without the bias, or that are dealt in turn."""
    probabilities = np.random.default_rng(kept + k).uniform(size=(T, E))
    inner = BiasedTopK(k=k) if biased else TopK(k=k)
    selector = GroupLimited(selector=inner, groups=G, kept=kept, best=best)
    state = {"bias": jnp.asarray(BIAS, jnp.float32)} if biased else {}
    rank = np.float32(probabilities) + (np.float32(BIAS) if biased else 0)
    got = choices(selector, probabilities, state)
    np.testing.assert_array_equal(got, by_hand(rank, kept, best, k))
    assert max(len(set(row // EACH)) for row in got) <= kept


def test_other_groups_are_never_chosen_whatever_the_bias():
    """Catches masking with 0 (older transformers), which beats ranks that a bias made negative."""
    selector = GroupLimited(selector=BiasedTopK(k=3), groups=G, kept=1, best=2)
    state = {"bias": jnp.full(E, -5.0)}
    probabilities = np.random.default_rng(0).uniform(size=(T, E))
    got = choices(selector, probabilities, state)
    assert all(len(set(row // EACH)) == 1 for row in got)
    np.testing.assert_array_equal(got, by_hand(np.float32(probabilities) - 5, 1, 2, 3))


def test_all_groups_kept_is_the_selector_itself():
    """Catches a combinator that changes order or state."""
    inner = BiasedTopK(k=4, rate=0.5)
    selector = GroupLimited(selector=inner, groups=G, kept=G, best=2)
    state = {"bias": jnp.asarray(BIAS, jnp.float32)}
    probabilities = np.random.default_rng(1).uniform(size=(T, E))
    np.testing.assert_array_equal(
        choices(selector, probabilities, state), choices(inner, probabilities, state)
    )
    counts_E = jnp.arange(E, dtype=jnp.float32)
    np.testing.assert_array_equal(
        selector.next_state(counts_E, state)["bias"], inner.next_state(counts_E, state)["bias"]
    )
    assert selector.k == 4 and selector.init(E).keys() == {"bias"}
    assert from_json(to_json(selector)) == selector


@pytest.mark.parametrize(
    ("selector", "problem"),
    [
        (GroupLimited(selector=TopK(k=2), groups=5, kept=2), "groups = 5 must divide"),
        (GroupLimited(selector=TopK(k=2), groups=6, kept=2, best=3), "lower GroupLimited.best"),
        (GroupLimited(selector=TopK(k=7), groups=4, kept=2), "fewer than the 7 chosen"),
        (GroupLimited(selector=TopK(k=1), groups=2, kept=1, members=(0, 1)), "the groups of 2"),
        (
            GroupLimited(selector=TopK(k=3), groups=2, kept=1, members=(0,) * 10 + (1,) * 2),
            "fewer than the 3 chosen",
        ),
        (TopK(k=13), "chooses 13 experts"),
    ],
)
def test_a_selector_that_does_not_fit_is_refused(selector, problem):
    """Catches groups that overlap, and choices among experts at minus infinity."""
    with pytest.raises(SpecError, match=f"MoESpec.experts = 12 .*\n.*{problem}"):
        MoESpec(experts=E, width=4, router=RouterSpec(selector=selector, gates=SoftmaxGates()))


KEEPS = {
    "all, shuffled": [7, 0, 11, 5, 3, 9, 1, 10, 2, 8, 4, 6],
    "uneven groups": [0, 1, 2, 4, 6, 7, 8, 11, 10],
    "a group gone": [9, 11, 10, 1, 0, 2, 4, 5],
    "one each": [1, 3, 8, 11],
}


@pytest.mark.parametrize(
    ("name", "best"),
    [(name, best) for name in KEEPS for best in (1, 2) if (name, best) != ("one each", 2)],
)
def test_kept_experts_stay_in_their_groups(name, best):
    """Catches experts that change their group when others are moved or dropped: what is left must
    choose as if the others could not be chosen."""
    keep = KEEPS[name]
    before = GroupLimited(selector=BiasedTopK(k=2), groups=G, kept=2, best=best)
    after = before.keeping(keep, E)
    assert after.objection(len(keep)) is None and after.k == 2
    probabilities = np.random.default_rng(2).uniform(0.1, 1, size=(T, E))
    gone = np.setdiff1d(np.arange(E), keep)
    bias = np.float32(0.2 * BIAS)
    without = bias.copy()
    without[gone] = -np.inf
    wanted = choices(before, probabilities, {"bias": jnp.asarray(without)})
    got = choices(after, probabilities[:, keep], {"bias": jnp.asarray(bias[keep])})
    np.testing.assert_array_equal(np.array(keep)[got], wanted)


def test_groups_of_neighbours_stay_what_they_were():
    """Catches layers of one model that compile apart because equal rules are not equal."""
    selector = GroupLimited(selector=TopK(k=2), groups=G, kept=2)
    assert selector.keeping([0, 2, 3, 4, 7, 8, 10, 11], E) == selector
    shuffled = selector.keeping(KEEPS["all, shuffled"], E)
    assert shuffled.members and shuffled.keeping(np.argsort(KEEPS["all, shuffled"]), E) == selector
    one = selector.keeping([4, 3], E)
    assert one == GroupLimited(selector=TopK(k=2), groups=1, kept=1)
    assert from_json(to_json(shuffled)) == shuffled


@pytest.mark.parametrize(
    "wrong", [{"groups": 0, "kept": 0}, {"kept": 5}, {"best": 0}, {"members": (4,)}]
)
def test_impossible_groups_are_refused(wrong):
    """Catches a limit that keeps no group, or more than there are."""
    with pytest.raises(SpecError, match="GroupLimited"):
        GroupLimited(**{"selector": TopK(k=2), "groups": G, "kept": 2} | wrong)


def test_choices_have_no_gradient_of_their_own():
    """Catches a selection inside a gradient that is not finite where groups are masked."""
    selector = GroupLimited(selector=TopK(k=2), groups=G, kept=1)
    p_TxE = jax.random.uniform(jax.random.key(0), (T, E))
    gradient = jax.grad(
        lambda p: jnp.take_along_axis(p, selector.choose(jax.lax.stop_gradient(p), {}), 1).sum()
    )(p_TxE)
    assert gradient.sum() == 2 * T
