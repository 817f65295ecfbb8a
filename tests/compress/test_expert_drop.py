"""Dropped experts: which, what is left of the model, and what the ledger says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import ExpertCounts, GateMass, SoftCounts, collect
from moejax.compress import (
    ExpertDrop,
    Frequency,
    GateMassScore,
    MeanProbability,
    Rarity,
    check_recipe,
)
from moejax.core import SpecError, spec
from moejax.evaluate import evaluate
from moejax.models import abstract_model, parameters, with_parameters
from moejax.moe import LinearScores
from tests.compress.conftest import (
    EXPERTS,
    HALF,
    LAYERS,
    MATRICES,
    apply,
    assert_same_weights,
    logits,
)
from tests.evaluate.conftest import dense, make_model, make_spec, routed


def _kept(before, after, layer):
    """The experts of a layer that are still there, in their order, found by their weights."""
    name = f"layers.{layer}.moe.experts.up"
    old, new = np.asarray(parameters(before)[name]), np.asarray(parameters(after)[name])
    return [next(e for e, w in enumerate(old) if np.array_equal(w, row)) for row in new]


@pytest.mark.parametrize(
    ("score", "accumulator"),
    [
        (Frequency(), ExpertCounts()),
        (GateMassScore(), GateMass()),
        (MeanProbability(), SoftCounts()),
    ],
)
def test_the_best_experts_of_every_layer_stay(model, applied, text, score, accumulator):
    """Catches the worst kept, one order for all layers, a score that reads another statistic."""
    after, _ = applied(ExpertDrop(fraction=0.5, score=score))
    stats = collect(model, text, (ExpertCounts(), GateMass(), SoftCounts()))
    for layer in range(LAYERS):
        values = stats.of(layer, accumulator)
        wanted = sorted(sorted(range(EXPERTS), key=lambda e: (-values[e], e))[:3])
        assert _kept(model, after, layer) == wanted
        assert after.spec.layers[layer].ffn.experts == 3
    assert _kept(model, after, 0) != _kept(model, after, 1)


@spec
class Masked:
    """Linear scores with some experts' logits at minus infinity: the oracle of a drop."""

    gone: tuple[int, ...]

    def init(self, width, experts, scale, key):
        return LinearScores().init(width, experts, scale, key)

    def axes(self):
        return LinearScores().axes()

    def __call__(self, parameters, x_TxD, context):
        logits = LinearScores()(parameters, x_TxD, context)
        return logits.at[:, jnp.asarray(self.gone)].set(-jnp.inf)


def test_the_rest_acts_as_if_the_dropped_could_not_be_chosen(source, text):
    """Catches router columns that lose their experts, and probabilities over all the experts."""
    layer = routed(renormalise=False)
    model = make_model(3, make_spec(layer, layer))
    after, _ = apply(model, [HALF], source)
    masked = []
    for index, old in enumerate(model.spec.layers):
        gone = tuple(sorted(set(range(EXPERTS)) - set(_kept(model, after, index))))
        router = dataclasses.replace(old.ffn.router, scores=Masked(gone=gone))
        masked.append(dataclasses.replace(old, ffn=dataclasses.replace(old.ffn, router=router)))
        assert len(gone) == 3
    oracle_spec = dataclasses.replace(model.spec, layers=tuple(masked))
    wanted = logits(with_parameters(oracle_spec, parameters(model)), text)
    np.testing.assert_allclose(logits(after, text), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - logits(model, text)).max() > 0.1


def test_keeping_all_changes_nothing(model, applied, text):
    """Catches a pass that reorders experts or rounds its fraction up."""
    after, ledger = applied(ExpertDrop(fraction=0.05, score=Frequency()))
    np.testing.assert_array_equal(logits(after, text), logits(model, text))
    assert_same_weights(after, model)
    assert not any(row.dropped for row in ledger)


def test_the_ledger_keeps_what_was_dropped(model, applied, text):
    """Catches rows of survivors alone, and experts renumbered by an earlier pass."""
    stats = collect(model, text, (ExpertCounts(),))
    once, _ = applied(HALF)
    twice, ledger = applied(HALF, ExpertDrop(fraction=1 / 3, score=Frequency()))
    assert len(ledger) == LAYERS * MATRICES * (EXPERTS + 3)
    for layer in range(LAYERS):
        first, last = _kept(model, once, layer), _kept(model, twice, layer)
        assert set(last) < set(first)
        final = {e: row for (i, e, _), row in ledger.last("arm").items() if i == layer}
        assert sorted(final) == list(range(EXPERTS))
        assert sorted(e for e in final if not final[e].dropped) == last
        for e, row in final.items():
            assert (row.stored_bytes == 0) == (e not in last) == (row.code_bits is None)
            assert row.lineage == (() if e in last else ("dropped",))
            assert row.relative_error == (0 if e in last else None)
            if e not in first:
                assert row.tokens == stats.of(layer, ExpertCounts())[e]


def test_layers_may_lose_different_shares(applied):
    """Catches one share for all layers, and shares of layers in another order."""
    after, ledger = applied(ExpertDrop(fraction=(0.0, 0.5), score=Frequency()))
    assert [layer.ffn.experts for layer in after.spec.layers] == [6, 3]
    assert {row.layer for row in ledger if row.dropped} == {1}


def test_equal_scores_keep_the_lower_index(model):
    """Catches an order of equals left to a sort that is not stable."""

    @spec
    class Equal:
        def needs(self):
            return ()

        def __call__(self, layer, block, stats):
            return np.zeros(EXPERTS)

    class Nothing:
        layers = ({}, {})

    plan = ExpertDrop(fraction=0.5, score=Equal()).decide(Nothing(), model)
    assert plan == {0: (0, 1, 2), 1: (0, 1, 2)}


def test_frequent_experts_matter_more(source, text):
    """Catches a score used upside down: two experts that take most tokens are planted."""
    model = make_model(1)
    named = dict(parameters(model))
    named["embed"] = named["embed"].at[:, 0].set(2.0)  # a direction that every token has
    for layer in range(LAYERS):
        name = f"layers.{layer}.moe.router.scores.kernel"
        preference = jnp.asarray([0.0, 1.5, 0.0, 0.0, 1.5, 0.0])
        named[name] = named[name].at[0].set(preference)
    planted = with_parameters(model.spec, named)
    frequent, _ = apply(planted, [HALF], source)
    rare, _ = apply(planted, [ExpertDrop(fraction=0.5, score=Rarity())], source)
    assert {1, 4} <= set(_kept(planted, frequent, 0))
    assert not {1, 4} & set(_kept(planted, rare, 0))
    scores = evaluate(
        {"base": planted, "frequent": frequent, "rare": rare},
        text,
        base={"frequent": "base", "rare": "base"},
        group_bytes={"docs": 1},
    )
    assert scores["frequent"].average.kl < 0.5 * scores["rare"].average.kl


@pytest.mark.parametrize(
    ("fraction", "wanted"),
    [
        (5 / 6, "layer 0, but its router chooses k = 2"),
        ((0.0, 0.8), "layer 1, but its router chooses k = 2"),
        ((0.5,), "one for each of the 2 layers"),
    ],
)
def test_a_fraction_that_leaves_too_few_is_refused(model, fraction, wanted):
    """Catches a router that chooses k of fewer than k."""
    with pytest.raises(SpecError) as caught:
        check_recipe([ExpertDrop(fraction=fraction, score=Frequency())], model)
    assert wanted in str(caught.value)
    assert "ExpertDrop.fraction" in str(caught.value)


def test_what_cannot_be_dropped_is_refused(applied):
    """Catches a fraction of one, a dense model, and scores that are no numbers."""
    with pytest.raises(SpecError, match="below 1"):
        ExpertDrop(fraction=1.0, score=Frequency())
    with pytest.raises(SpecError, match="0 layers with experts"):
        check_recipe([HALF], abstract_model(make_spec(dense())))

    @spec
    class Broken:
        def needs(self):
            return ()

        def __call__(self, layer, block, stats):
            return np.full(EXPERTS, np.nan)

    with pytest.raises(SpecError, match="Broken"):
        applied(ExpertDrop(fraction=0.5, score=Broken()))


def test_the_model_given_is_not_changed(model, applied):
    """Catches an edit in place of the model that all later ones are compared with."""
    applied(HALF)
    assert_same_weights(model, make_model(0))
