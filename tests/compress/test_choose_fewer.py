"""Fewer experts per token: the model is the one that was made so."""

import dataclasses

import numpy as np
import pytest

from moejax.compress import ChooseFewer, ExpertDrop, Frequency, check_recipe
from moejax.core import SpecError
from moejax.models import parameters, with_parameters
from moejax.moe import BiasedTopK, GroupLimited, TopK
from tests.compress.conftest import apply, assert_same_weights, logits
from tests.evaluate.conftest import dense, make_model, make_spec, routed


def test_only_k_changes(model, text, source):
    """Catches a mask over the second choice whose gate stays, and changed weights."""
    after, ledger = apply(model, [ChooseFewer(k=1)], source)
    built = with_parameters(make_spec(routed(k=1), routed(k=1)), parameters(model))
    assert after.spec == built.spec and len(ledger) == 0
    assert_same_weights(after, model)
    np.testing.assert_array_equal(logits(after, text), logits(built, text))


def test_experts_may_go_then_that_the_router_needed(model):
    """Catches a pass whose outline keeps the old k: one of six experts is enough now."""
    drop = ExpertDrop(fraction=5 / 6, score=Frequency())
    with pytest.raises(SpecError, match="k = 2"):
        check_recipe([drop], model)
    check_recipe([ChooseFewer(k=1), drop], model)


def test_every_ranked_selector_can_choose_fewer():
    """Catches a limit to groups, or a bias, that is lost with k."""
    biased = BiasedTopK(k=4, rate=0.5)
    assert biased.choosing(2) == BiasedTopK(k=2, rate=0.5)
    limited = GroupLimited(selector=biased, groups=4, kept=2, best=2)
    assert limited.choosing(3) == dataclasses.replace(limited, selector=biased.choosing(3))
    assert TopK(k=2).choosing(1) == TopK(k=1)


@pytest.mark.parametrize(
    ("layer", "k", "wrong"),
    [
        (routed(), 3, r"ChooseFewer.k = 3, but the router of layer 0 chooses 2"),
        (dense(), 1, "no experts"),
    ],
)
def test_what_cannot_choose_fewer_is_refused(layer, k, wrong):
    """Catches more experts under the name of fewer."""
    with pytest.raises(SpecError, match=wrong):
        check_recipe([ChooseFewer(k=k)], make_model(0, make_spec(layer)))
    with pytest.raises(SpecError, match="at least one expert"):
        ChooseFewer(k=0)
