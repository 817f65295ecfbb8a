"""STUN's clusters of experts: which unite, which of them stays."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import ClusterDrop, check_recipe
from moejax.compress.cluster_drop import clusters, clusters_of_all
from moejax.core import SpecError
from moejax.models import parameters, with_parameters
from tests.compress.conftest import LAYERS, apply


def distances(seed, experts=9):
    place = np.random.default_rng(seed).normal(size=(experts, 2))
    return np.linalg.norm(place[:, None] - place[None], axis=-1)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.6, 9.0])
def test_all_distances_within_a_cluster_are_below_the_threshold(threshold):
    """Catches single linkage, and a cluster checked at the ends of one pair only."""
    for seed in range(10):
        d = distances(seed)
        found = clusters(d, threshold)
        assert sorted(e for group in found for e in group) == list(range(len(d)))
        assert all(d[np.ix_(group, group)].max() < threshold for group in found)
        # Complete: two clusters that could unite have united.
        for a in found:
            for b in found:
                assert a == b or d[np.ix_(a, b)].max() >= threshold


def test_one_threshold_leaves_the_number_wanted():
    """Catches a threshold per layer, and a search that stops a step too early."""
    layers = {0: distances(1), 1: distances(2) * 3}
    floors = {0: 2, 1: 2}
    for wanted in range(18, 3, -1):
        found = clusters_of_all(layers, floors, wanted)
        assert wanted <= sum(map(len, found.values())) <= wanted + 1
    assert len(found[0]) == 2
    ten = clusters_of_all(layers, floors, 10)
    assert len(ten[1]) > len(ten[0])  # its experts lie three times as far apart


def test_of_duplicates_one_stays(model, source):
    """Catches clusters by weights instead of by routing, and a centroid that is nobody."""
    named = dict(parameters(model))
    for layer in range(LAYERS):
        router = f"layers.{layer}.moe.router.scores.kernel"
        named[router] = named[router].at[:, 4].set(named[router][:, 1] + 1e-4)
        up = f"layers.{layer}.moe.experts.up"
        named[up] = named[up].at[4].set(named[up][1])
    planted = with_parameters(model.spec, named)
    step = ClusterDrop(fraction=1 / 6, coactivation=0.0)
    after, ledger = apply(planted, [step], source)
    gone = {(row.layer, row.expert) for row in ledger if row.dropped}
    assert len(gone) == LAYERS and all(expert in (1, 4) for _, expert in gone)
    assert [layer.ffn.experts for layer in after.spec.layers] == [5, 5]


def test_experts_chosen_together_unite(model, source, text):
    """Catches co-activation with the wrong sign: those that share tokens are alike."""
    step = ClusterDrop(fraction=0.25, coactivation=1000.0)
    after, ledger = apply(model, [step], source)
    assert sum(layer.ffn.experts for layer in after.spec.layers) in (9, 10)
    assert any(row.dropped for row in ledger)


def test_the_representative_is_nearest_to_the_centroid(model, source):
    """Catches the first of a cluster kept: experts 0, 1 and 2 are alike, 1 lies between them."""
    named = dict(parameters(model))
    for layer in range(LAYERS):
        router = f"layers.{layer}.moe.router.scores.kernel"
        kernel = jnp.zeros_like(named[router])
        named[router] = kernel.at[0].set(jnp.asarray([0.0, 0.01, 0.02, 5.0, 10.0, 15.0]))
        for matrix in ("gate", "up", "down"):
            name = f"layers.{layer}.moe.experts.{matrix}"
            w = named[name]
            named[name] = w.at[0].set(w[1] * 0.5).at[2].set(w[1] * 1.5)
    planted = with_parameters(model.spec, named)
    _, ledger = apply(planted, [ClusterDrop(fraction=1 / 3, coactivation=0.0)], source)
    gone = {(row.layer, row.expert) for row in ledger if row.dropped}
    assert gone == {(layer, expert) for layer in range(LAYERS) for expert in (0, 2)}


def test_floors_above_the_budget_are_refused(model):
    """Catches a cluster count below what the router chooses."""
    with pytest.raises(SpecError, match="ClusterDrop.fraction = 0.9"):
        check_recipe([ClusterDrop(fraction=0.9)], model)
