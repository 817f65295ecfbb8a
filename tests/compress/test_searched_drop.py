"""MoE-I2's search for the experts to drop, against brute force."""

import itertools

import numpy as np
import pytest

from moejax.calibrate import LayerInputs
from moejax.compress import Frequency, GeneticSearch, SearchedDrop, check_recipe
from moejax.compress.searched_drop import shared_out, stream_errors
from moejax.compress.subset_error import subset_errors
from moejax.compress.text_windows import spread
from moejax.core import MoejaxError, SpecError
from moejax.models import layers, select_experts
from tests.compress.conftest import EXPERTS, LAYERS, apply
from tests.compress.tiny_moe import make_block, make_inputs, output

HALF = SearchedDrop(fraction=0.5, score=Frequency(), tokens=40, candidates=3, span=2, windows=2)


def test_the_search_finds_the_optimum():
    """Catches a search that loses its best, breeds outside the parents or never mutates: quadratic
    losses with traps, all 252 subsets by brute force, in at least 95 % of the seeds."""
    every = np.array(list(itertools.combinations(range(10), 5)))
    found, seeds = 0, 40
    for seed in range(seeds):
        draws = np.random.default_rng(seed)
        pairs = draws.normal(size=(10, 10))

        def losses(subsets, pairs=pairs):
            chosen = (subsets[:, :, None] == np.arange(10)).any(1).astype(float)
            return np.einsum("ni,ij,nj->n", chosen, pairs, chosen)

        search = GeneticSearch(population=40, generations=25, seed=seed)
        best = search(losses, 10, 5, 3)
        assert len(set(best)) == 3 and all(len(set(subset)) == 5 for subset in best)
        values = losses(np.array(best))
        assert (np.diff(values) >= 0).all()
        found += values[0] <= losses(every).min() + 1e-12
    assert found >= 0.95 * seeds


def test_few_subsets_are_all_tried():
    """Catches a random search where all can be looked at, and subsets measured twice."""
    asked = []

    def losses(subsets):
        asked.extend(map(tuple, subsets.tolist()))
        return np.abs(subsets - np.array([2, 5])).sum(1).astype(float)

    assert GeneticSearch()(losses, 8, 2, 2)[0] == (2, 5)
    assert len(asked) == len(set(asked)) == 28
    assert GeneticSearch()(lambda s: np.zeros(len(s)), 3, 3, 5) == [(0, 1, 2)]
    with pytest.raises(MoejaxError, match="NaN"):
        GeneticSearch()(lambda s: np.full(len(s), np.nan), 4, 2)


def test_the_same_seed_finds_the_same():
    """Catches streams shared by all layers, and a search that depends on hashes."""

    def losses(subsets):
        return np.cos(subsets @ np.arange(1, 7) ** 2)

    search = GeneticSearch(population=6, generations=1)
    runs = [search(losses, 20, 6, 3, stream) for stream in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_errors_of_subsets_are_those_of_the_layer_without_the_others():
    """Catches gates that are not renormalised among those left, and experts of other indices."""
    block, x = make_block(), make_inputs()
    kept = np.array([[0, 1, 2], [1, 3, 5], [2, 3, 4]])
    found = subset_errors(block, x, kept, layer=0)
    whole = output(block, x)
    for subset, error in zip(kept, found, strict=True):
        less = output(select_experts(block, subset.tolist()), x)
        assert error == pytest.approx(np.linalg.norm(whole - less), rel=1e-4)


def test_counts_follow_importance():
    """Catches more dropped where layers matter more, and counts that miss the budget or k."""
    least, most = {0: 2, 1: 2, 3: 2}, {0: 8, 1: 8, 3: 8}
    assert shared_out(12, {0: 1.0, 1: 1.0, 3: 1.0}, least, most) == {0: 4, 1: 4, 3: 4}
    found = shared_out(12, {0: 4.0, 1: 1.0, 3: 1.0}, least, most)
    assert found[0] > found[1] == found[3] and sum(found.values()) == 12
    assert shared_out(20, {0: 9.0, 1: 0.0, 3: 0.0}, least, most) == {0: 8, 1: 6, 3: 6}
    assert shared_out(6, {0: 9.0, 1: 0.0, 3: 0.0}, least, most) == least


def test_layers_are_chosen_together(model, source):
    """Catches candidates that are combined layer by layer: the combination taken is the best of
    nine, and so no worse than the best of each layer."""
    after, ledger = apply(model, [HALF], source)
    stats = source(model, (LayerInputs(tokens=40), *Frequency().needs()))
    plan = HALF.decide(stats, model)
    assert sum(map(len, plan.values())) == LAYERS * EXPERTS // 2
    candidates = {}
    for layer, kept in plan.items():
        inputs = stats.of(layer, LayerInputs(tokens=40))

        def losses(subsets, layer=layer, inputs=inputs):
            return subset_errors(layers(model)[layer], inputs, subsets, layer=layer)

        every = np.array(list(itertools.combinations(range(EXPERTS), len(kept))))
        order = np.argsort(losses(every), kind="stable")[:3]
        candidates[layer] = [tuple(every[i].tolist()) for i in order]
        assert kept in candidates[layer]
    text = spread(stats.text, 2, "test")
    joint = [
        dict(zip(plan, subsets, strict=True)) for subsets in itertools.product(*candidates.values())
    ]
    errors = stream_errors(model, joint, text, max(plan))
    assert joint[int(np.argmin(errors))] == plan
    dropped = {(r.layer, r.expert) for r in ledger if r.lineage}
    assert {(i, e) for i, kept in plan.items() for e in range(EXPERTS) if e not in kept} == dropped
    assert [b.spec.ffn.experts for b in layers(after)] == [len(kept) for kept in plan.values()]


def test_too_few_experts_are_refused_before_any_work(model):
    """Catches a router that chooses two of one."""
    with pytest.raises(SpecError, match=r"SearchedDrop.*layers \[0, 1\]"):
        check_recipe([SearchedDrop(fraction=0.9, score=Frequency())], model)
