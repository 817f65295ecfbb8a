"""Splits of neurons: every one a partition into equal parts, clusters where there are any."""

import itertools

import numpy as np
import pytest

from moejax.core import SpecError
from moejax.upcycle import BalancedKMeans, Contiguous, RandomSplit

SPLITS = (Contiguous(), RandomSplit(), BalancedKMeans())


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: type(split).__name__)
@pytest.mark.parametrize("experts", [1, 3, 8, 24])
def test_every_neuron_is_dealt_once(split, experts):
    """Catches a neuron in two experts or in none, and a draw that the seed does not decide."""
    gate = np.random.default_rng(0).normal(size=(5, 24))
    orders = [split(gate, experts, np.random.default_rng(1)) for _ in range(2)]
    assert sorted(orders[0]) == list(range(24))
    np.testing.assert_array_equal(*orders)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: type(split).__name__)
def test_neurons_that_are_all_alike_are_dealt_too(split):
    """Catches a draw by distances that are all zero."""
    order = split(np.zeros((3, 8)), 4, np.random.default_rng(0))
    assert sorted(order) == list(range(8))


def test_random_split_moves_neurons():
    """Catches a random split that is the contiguous one."""
    order = RandomSplit()(np.zeros((2, 64)), 8, np.random.default_rng(0))
    assert (order != np.arange(64)).mean() > 0.9


def test_clusters_are_found_however_long_their_vectors():
    """Catches clustering of rows instead of columns, and distances that lengths dominate."""
    random = np.random.default_rng(0)
    centres = np.linalg.qr(random.normal(size=(16, 16)))[0][:4]
    member = random.permutation(np.repeat(np.arange(4), 6))
    vectors = (centres[member] + 0.05 * random.normal(size=(24, 16))) * random.uniform(
        0.1, 10, (24, 1)
    )
    order = BalancedKMeans(rounds=20)(vectors.T, 4, np.random.default_rng(3))
    assert all(len(set(part)) == 1 for part in member[order].reshape(4, 6))


def test_one_round_is_the_cheapest_balanced_assignment():
    """Catches a greedy assignment, which fills the nearest centre first."""
    vectors = np.random.default_rng(5).normal(size=(6, 2))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = BalancedKMeans(rounds=1)(vectors.T, 2, np.random.default_rng(2))
    random = np.random.default_rng(2)  # the first centres once more, from k-means++
    first = vectors[random.integers(6)]
    share = ((vectors - first) ** 2).sum(1)
    centres = np.stack([first, vectors[random.choice(6, p=share / share.sum())]])
    cost = ((vectors[:, None] - centres) ** 2).sum(2)

    def total(part):
        return sum(cost[i, 0 if i in part else 1] for i in range(6))

    best = min(itertools.combinations(range(6), 3), key=total)
    assert set(order[:3]) == set(best)


def test_no_rounds_are_refused():
    """Catches clusters that were never assigned."""
    with pytest.raises(SpecError, match="rounds = 0"):
        BalancedKMeans(rounds=0)
