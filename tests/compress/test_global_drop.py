"""Experts dropped over all layers at once."""

import numpy as np
import pytest

from moejax.calibrate import SoftCounts, collect
from moejax.checkpoint import load_model, save_model
from moejax.compress import (
    BelowMeanDrop,
    ExpertDrop,
    Frequency,
    GlobalExpertDrop,
    MeanProbability,
    check_recipe,
)
from moejax.core import SpecError, spec
from moejax.models import generate
from tests.compress.conftest import EXPERTS, LAYERS, Source, apply, logits


@spec
class PlantedByLayer:
    """Scores by layer: all experts of layer 1 above those of layer 0."""

    def needs(self):
        return ()

    def __call__(self, layer, block, stats):
        return 10.0 * layer + np.asarray([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])


class Nothing:
    layers = ({}, {})


def plan(model, **changes):
    return GlobalExpertDrop(score=PlantedByLayer(), **changes).decide(Nothing(), model)


def test_layers_of_low_scores_lose_more(model):
    """Catches a share per layer under the global name, and ties that take the higher index."""
    assert plan(model, fraction=0.25) == {0: (2, 4, 5), 1: (0, 1, 2, 3, 4, 5)}
    assert plan(model, fraction=1 / 12)[0] == (0, 1, 2, 4, 5)


def test_a_floor_holds(model):
    """Catches a layer left with fewer experts than its router chooses, or than its floor."""
    assert plan(model, fraction=0.5) == {0: (4, 5), 1: (0, 2, 4, 5)}
    assert plan(model, fraction=0.5, floor=3) == {0: (2, 4, 5), 1: (2, 4, 5)}


def test_it_keeps_the_most_probable_of_all(model, text, tmp_path):
    """Catches scores of one layer compared with means of another; the model must run."""
    step = GlobalExpertDrop(fraction=0.25, score=MeanProbability())
    after, ledger = apply(model, [step], Source(text))
    stats = collect(model, text, (SoftCounts(),))
    scores = np.concatenate([stats.of(i, SoftCounts()) for i in range(LAYERS)])
    kept = sorted(np.argsort(-scores)[:9].tolist())
    left = [row for row in ledger if row.matrix == "moe.experts.up" and not row.dropped]
    assert sorted(row.layer * EXPERTS + row.expert for row in left) == kept
    save_model(tmp_path / "model", after)
    again = load_model(tmp_path / "model")
    np.testing.assert_array_equal(logits(again, text), logits(after, text))
    assert generate(again, text[0].tokens_BxS[:1, :4], 2).shape == (1, 2)


def test_a_plan_drops_as_many(model):
    """Catches an outline of another size than what is made."""
    step = GlobalExpertDrop(fraction=0.25, score=Frequency())
    outlined, names = step.outline(model)
    assert sum(layer.ffn.experts for layer in outlined.spec.layers) == 9
    assert len(names) == 3 * LAYERS


def test_floors_above_the_budget_are_refused(model):
    """Catches a budget that is exceeded in silence."""
    for changes in ({"fraction": 0.75}, {"fraction": 0.25, "floor": 5}):
        with pytest.raises(SpecError, match="GlobalExpertDrop.fraction"):
            check_recipe([GlobalExpertDrop(score=Frequency(), **changes)], model)
    check_recipe([ExpertDrop(fraction=0.5, score=Frequency())], model)


def test_experts_below_a_share_of_the_mean_go(model):
    """Catches a share of the sum or the maximum, and a mean over all layers: the scores of layer 0
    are 3 1 4 1 5 9, mean 23 / 6, those of layer 1 ten more."""
    found = BelowMeanDrop(share=0.8, score=PlantedByLayer()).decide(Nothing(), model)
    assert found == {0: (2, 4, 5), 1: (0, 2, 4, 5)}
    few = BelowMeanDrop(share=3.0, score=PlantedByLayer()).decide(Nothing(), model)
    assert few == {0: (4, 5), 1: (4, 5)}  # as many as the router chooses


def test_a_rising_share_drops_in_turn(model, text):
    """Catches a second drop that scores the experts of the model before the first."""
    recipe = [BelowMeanDrop(share=share, score=Frequency()) for share in (0.6, 1.2)]
    check_recipe(recipe, model)
    after, ledger = apply(model, recipe, Source(text))
    ups = [r for r in ledger if r.matrix == "moe.experts.up"]
    for index in range(LAYERS):
        gone = [row.tokens for row in ups[: 2 * EXPERTS] if row.layer == index and row.dropped]
        stay = [row.tokens for row in ups[: 2 * EXPERTS] if row.layer == index and not row.dropped]
        mean = np.mean(gone + stay)
        assert max(gone, default=0) < 0.6 * mean <= min(stay)
        again = [row.tokens for row in ups[2 * EXPERTS :] if row.layer == index]
        assert len(again) == len(stay) >= after.spec.layers[index].ffn.experts
    with pytest.raises(SpecError, match="share"):
        BelowMeanDrop(share=0.0, score=Frequency())
