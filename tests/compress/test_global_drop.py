"""Experts dropped over all layers at once."""

import numpy as np
import pytest

from moejax.calibrate import SoftCounts, collect
from moejax.checkpoint import load_model, save_model
from moejax.compress import ExpertDrop, Frequency, GlobalExpertDrop, MeanProbability, check_recipe
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
