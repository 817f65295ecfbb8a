"""Searches for subsets against brute force on losses that are known."""

import itertools

import numpy as np
import pytest

from moejax.compress import ExhaustiveSubsets, GeneticSubsets, GreedySubsets
from moejax.core import SpecError

EXPERTS = 8


def rough(seed):
    """Losses that no expert's own share explains; counts how often it is asked."""
    table = {}

    def loss(subsets):
        asked.extend(map(tuple, subsets.tolist()))
        return np.asarray([_value(seed, tuple(s)) for s in subsets.tolist()])

    asked = []
    loss.asked, loss.table = asked, table
    return loss


def _value(seed, subset):
    draws = np.random.default_rng(seed)
    pair = np.triu(draws.normal(size=(EXPERTS, EXPERTS)))
    return float(pair[np.ix_(subset, subset)].sum())


def additive(share):
    return lambda subsets: np.asarray([np.sum(share) - np.sum(share[s]) for s in subsets])


def best_of(seed, kept):
    return min(itertools.combinations(range(EXPERTS), kept), key=lambda s: _value(seed, s))


@pytest.mark.parametrize("kept", [1, 3, 6, 8])
def test_exhaustive_is_brute_force(kept):
    """Catches subsets left out, and an argmin of the last chunk alone."""
    assert ExhaustiveSubsets()(rough(kept), EXPERTS, kept, 0) == best_of(kept, kept)


def test_greedy_drops_the_least_first():
    """Catches an order upside down: where losses add up, greedy is optimal."""
    share = np.asarray([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0])
    assert GreedySubsets()(additive(share), EXPERTS, 4, 0) == (2, 4, 6, 7)


def test_genetic_finds_the_optimum():
    """Catches a search that loses its best, or breeds subsets of another size."""
    search = GeneticSubsets(population=12, generations=12)
    hits = 0
    for seed in range(20):
        loss = rough(seed)
        found = search(loss, EXPERTS, 6, seed)
        assert len(set(found)) == 6 and found == tuple(sorted(found))
        assert len(loss.asked) == len(set(loss.asked)) <= 28  # none weighed twice
        hits += found == best_of(seed, 6)
    assert hits >= 19  # 95 % of seeds


def test_genetic_never_loses_the_best():
    """Catches generations that replace their parents."""
    worse = []
    for generations in (0, 2, 6):
        search = GeneticSubsets(population=4, generations=generations, seed=3)
        worse.append(_value(7, search(rough(7), EXPERTS, 4, 0)))
    assert worse == sorted(worse, reverse=True)


def test_what_cannot_be_searched_is_refused():
    """Catches a search that would take years, and a population that cannot breed."""
    with pytest.raises(SpecError, match="subsets of 32 of 64 experts in layer 3"):
        ExhaustiveSubsets().check_size(64, 32, 3)
    with pytest.raises(SpecError, match="two parents"):
        GeneticSubsets(population=1)
