"""NAEE's pruning against brute force, and its progressive form."""

import itertools

import numpy as np
import pytest

from moejax.calibrate import LayerInputs, collect
from moejax.compress import (
    ExhaustiveSubsets,
    GreedySubsets,
    LeaveOneOut,
    Sequential,
    SubsetDrop,
    check_recipe,
)
from moejax.compress.block_weights import block_weights, with_block_weights
from moejax.compress.subset_drop import SubsetLoss
from moejax.core import SpecError
from moejax.models import layers, parameters, with_parameters
from tests.compress.conftest import EXPERTS, LAYERS, apply, logits
from tests.compress.tiny_moe import (
    experts_of,
    make_block,
    make_inputs,
    numpy_output,
    routing,
    statistics,
)
from tests.evaluate.conftest import make_model, make_spec, routed

TOKENS = 64
THIRD = SubsetDrop(fraction=1 / 3, tokens=TOKENS)


def of_subset(block, x, subset):
    """Y of the experts of a subset alone, from the formula."""
    index = list(subset)
    kernel = block_weights(block)["moe.router.scores.kernel"][:, np.asarray(index)]
    some = with_block_weights(block, {"moe.router.scores.kernel": kernel})
    return numpy_output(x, routing(some, x), *(w[index] for w in experts_of(block)))


@pytest.mark.parametrize("kept", [2, 4, 5])
def test_losses_are_those_of_the_formula(kept):
    """Catches gates that are not renormalised, experts taken at the place in the subset."""
    block, x = make_block(), make_inputs()
    subsets = list(itertools.combinations(range(EXPERTS), kept))
    whole = of_subset(block, x, range(EXPERTS))
    found = SubsetLoss(block, x, whole.astype(np.float32), 0)(np.asarray(subsets))
    wanted = [np.linalg.norm(whole - of_subset(block, x, subset)) for subset in subsets]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_one_less_is_leave_one_out():
    """Catches two notions of what an expert's absence costs."""
    block, x = make_block(), make_inputs()
    subsets = [[e for e in range(EXPERTS) if e != gone] for gone in range(EXPERTS)]
    whole = of_subset(block, x, range(EXPERTS)).astype(np.float32)
    found = SubsetLoss(block, x, whole, 0)(np.asarray(subsets))
    np.testing.assert_allclose(found, LeaveOneOut()(0, block, statistics(block, x)), rtol=1e-3)


def kept_of(before, after, layer):
    name = f"layers.{layer}.moe.experts.up"
    old, new = (np.asarray(parameters(m)[name]) for m in (before, after))
    return tuple(next(e for e, w in enumerate(old) if np.array_equal(w, row)) for row in new)


def test_every_layer_keeps_its_best_subset(model, applied, text):
    """Catches targets of another layer, and inputs of another text."""
    after, ledger = applied(THIRD)
    inputs = LayerInputs(tokens=TOKENS)
    stats = collect(model, text, (inputs,))
    for layer, block in enumerate(layers(model)):
        x = stats.of(layer, inputs)
        whole = of_subset(block, x, range(EXPERTS))
        subsets = list(itertools.combinations(range(EXPERTS), 4))
        loss = [np.linalg.norm(whole - of_subset(block, x, subset)) for subset in subsets]
        assert kept_of(model, after, layer) == subsets[int(np.argmin(loss))]
    assert sum(row.dropped for row in ledger) == 2 * 3 * LAYERS


def test_a_dead_expert_goes_first_and_costs_nothing(model, source, text):
    """Catches a loss over all experts whether chosen or not."""
    named = dict(parameters(model))
    named["embed"] = named["embed"].at[:, 0].set(3.0)  # a direction that every token has
    for layer in range(LAYERS):
        name = f"layers.{layer}.moe.router.scores.kernel"
        named[name] = named[name].at[0, 4].set(-20.0)
    planted = with_parameters(model.spec, named)
    after, _ = apply(planted, [SubsetDrop(fraction=1 / 6, tokens=TOKENS)], source)
    for layer in range(LAYERS):
        assert kept_of(planted, after, layer) == (0, 1, 2, 3, 5)
    np.testing.assert_allclose(logits(after, text), logits(planted, text), atol=1e-4)


def test_progressive_pruning_sees_inputs_of_the_pruned_model(model, source, text):
    """Catches targets that move with the inputs, and inputs of the whole model."""
    after, _ = apply(model, [Sequential(step=THIRD)], source)
    inputs = LayerInputs(tokens=TOKENS)
    whole = collect(model, text, (inputs,))
    pruned = collect(after, text, (inputs,))
    block = layers(model)[1]
    target = of_subset(block, whole.of(1, inputs), range(EXPERTS))
    x = pruned.of(1, inputs)
    assert not np.allclose(x, whole.of(1, inputs), atol=1e-2)
    subsets = list(itertools.combinations(range(EXPERTS), 4))
    loss = [np.linalg.norm(target - of_subset(block, x, subset)) for subset in subsets]
    assert kept_of(model, after, 1) == subsets[int(np.argmin(loss))]


def test_what_cannot_be_searched_is_refused(model):
    """Catches a router that chooses k of fewer, and searches that would never end."""
    for step, wanted in (
        (SubsetDrop(fraction=0.9), "SubsetDrop.fraction = 0.9 leaves 1 of 6 experts in layer 0"),
        (SubsetDrop(fraction=0.5, search=ExhaustiveSubsets(most=19)), "20 subsets of 3 of 6"),
    ):
        with pytest.raises(SpecError, match=wanted):
            check_recipe([step], model)
    check_recipe([SubsetDrop(fraction=0.5, search=GreedySubsets())], model)
    large = make_model(0, make_spec(routed(experts=24)))
    with pytest.raises(SpecError, match="above ExhaustiveSubsets.most"):
        check_recipe([SubsetDrop(fraction=0.5)], large)
