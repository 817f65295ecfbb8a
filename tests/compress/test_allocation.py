"""Allocations: budgets kept, and bits given where they are needed."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from moejax.calibrate import ExpertCounts
from moejax.compress.allocation import Allocation, BitBudget, RankedExperts
from moejax.compress.allocation_damage import DamageBudget
from moejax.compress.block_weights import block_weights, with_block_weights
from moejax.compress.costs import FrequencyCost, PMQCost, RoutedError
from moejax.compress.expert_scores import Frequency, OutlierScore
from moejax.compress.solvers import Exhaustive, IntegerProgram, Problem, RandomAllocation
from moejax.core import SpecError, spec
from moejax.models import with_layers
from moejax.weights import AsymmetricGrid
from tests.compress.tiny_moe import (
    make_block,
    make_inputs,
    mixed,
    output,
    preferring,
    scaled,
    statistics,
)
from tests.evaluate.conftest import dense, make_model, make_spec, routed

GRIDS = tuple(AsymmetricGrid(bits=bits, group=None) for bits in (1, 2, 3))
SPEC = make_spec(routed(), dense(), routed(experts=4))


@spec
class Planted:
    """Costs that make the experts of layer 2 worth ten times those of layer 0."""

    def needs(self, grids):
        return (ExpertCounts(),)

    def __call__(self, layer, block, stats, grids):
        worth_E = (1 + 9 * (layer == 2)) * np.arange(1, block.spec.ffn.stored + 1)
        return worth_E[:, None] * 4.0 ** -np.array([grid.bits for grid in grids])


def decide(allocation, model, grids=GRIDS):
    stats = SimpleNamespace(layers=({},) * len(model.spec.layers))
    return allocation.decide(stats, model, grids)


def bits_of(plan, grids=GRIDS):
    return {layer: [grids[i].bits for i in choice] for layer, choice in plan.items()}


@pytest.fixture(scope="module")
def model():
    return make_model(0, SPEC)


def test_each_layer_keeps_the_budget(model):
    """Catches a budget of the first layer for all, dense layers, and the least counts ignored."""
    pmq = BitBudget(mean_bits=2.0, cost=Planted(), at_least=((3, 1), (2, 1)))
    plan = bits_of(decide(pmq, model))
    assert {layer: len(bits) for layer, bits in plan.items()} == {0: 6, 2: 4}
    for bits in plan.values():
        assert sum(bits) == 2 * len(bits) and {2, 3} <= set(bits)
        assert bits == sorted(bits)  # later experts are worth more
    exact = BitBudget(mean_bits=2.0, cost=Planted(), solver=Exhaustive(), at_least=pmq.at_least)
    assert plan == bits_of(decide(exact, model))


def test_one_budget_for_all_layers_moves_bits(model):
    """Catches per_layer ignored, and layers that get each other's choices."""
    whole = bits_of(decide(BitBudget(mean_bits=2.0, cost=Planted(), per_layer=False), model))
    assert {layer: len(bits) for layer, bits in whole.items()} == {0: 6, 2: 4}
    assert sum(whole[0]) + sum(whole[2]) == 20
    assert np.mean(whole[2]) > 2.5 > 2 > np.mean(whole[0])


def test_shards_get_equal_buckets(model):
    """Catches shards that do not reach the solver."""
    plan = decide(BitBudget(mean_bits=2.4, cost=Planted(), shards=2), model)
    for choice in plan.values():
        assert (np.bincount(choice, minlength=3) % 2 == 0).all()


@pytest.mark.parametrize(
    "allocation",
    [
        BitBudget(mean_bits=2.4, cost=Planted(), at_least=((3, 2),), shards=2),
        BitBudget(mean_bits=2.4, cost=Planted(), per_layer=False),
        RankedExperts(score=OutlierScore(), top=1),
        DamageBudget(tolerance=0.1),
    ],
)
def test_an_outline_has_the_shape_of_a_plan(model, allocation):
    """Catches a plan before load whose buckets do not exist, or that breaks the budget."""
    grids = GRIDS[:2] if isinstance(allocation, RankedExperts) else GRIDS
    assert isinstance(allocation, Allocation)
    outlined = allocation.outline(SPEC, grids)
    assert {layer: len(choice) for layer, choice in outlined.items()} == {0: 6, 2: 4}
    if isinstance(allocation, BitBudget):
        decided = decide(allocation, model)
        for plan in (outlined, decided):
            bits = [bits for each in bits_of(plan).values() for bits in each]
            assert 2.0 <= np.mean(bits) <= 2.4
        layer_bits = [np.mean(b) for b in bits_of(outlined).values()]
        assert not allocation.per_layer or max(layer_bits) <= 2.4
    if isinstance(allocation, RankedExperts):
        decided = decide(allocation, model, grids)
        assert {k: sorted(v) for k, v in decided.items()} == {
            k: sorted(v) for k, v in outlined.items()
        }


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"mean_bits": 0.5}, "0.5 mean bits are not enough for layer 0.* least is 1"),
        ({"at_least": ((4, 1),)}, "names 4 bits, which 0 of the grids have"),
        ({"mean_bits": 3.0, "at_least": ((3, 5),)}, "at_least = .* is impossible with 4 experts"),
        ({"shards": 4}, "shards = 4 does not divide 6 experts of layer 0"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_from_shapes(fields, wanted):
    """Catches an error that comes only after calibration."""
    allocation = BitBudget(**({"mean_bits": 2.5, "cost": Planted()} | fields))
    with pytest.raises(SpecError, match=wanted):
        allocation.outline(SPEC, GRIDS)


def test_impossible_specs_are_refused():
    """Catches widths named twice, sharded buckets of a model, experts of several sizes as one."""
    for fields in (
        {"mean_bits": 0.0},
        {"mean_bits": 2.0, "at_least": ((3, 1), (3, 2))},
        {"mean_bits": 2.0, "shards": 2, "per_layer": False},
    ):
        with pytest.raises(SpecError):
            BitBudget(cost=Planted(), **fields)
    small = dataclasses.replace(routed(), ffn=dataclasses.replace(routed().ffn, width=16))
    whole = BitBudget(mean_bits=2.0, cost=Planted(), per_layer=False)
    with pytest.raises(SpecError, match=r"hidden widths are \[16, 32\]"):
        whole.outline(make_spec(routed(), small), GRIDS)
    with pytest.raises(SpecError, match="no layer of the model has experts"):
        whole.outline(make_spec(dense()), GRIDS)


def test_ranked_experts_keep_the_best(model):
    """Catches the lowest scores on the first grid, and equals in no order."""
    counts = {"expert_counts": np.array([3, 9, 1, 9, 9, 0])}, {}, {"expert_counts": np.arange(4)}
    ranked, stats = RankedExperts(score=Frequency(), top=2), SimpleNamespace(layers=counts)
    plan = ranked.decide(stats, model, GRIDS[:2])
    assert plan == {0: (1, 0, 1, 0, 1, 1), 2: (1, 1, 0, 0)}
    with pytest.raises(SpecError, match="between 2 grids, but there are 3"):
        ranked.outline(SPEC, GRIDS)
    with pytest.raises(SpecError, match="top = 5, but layer 2 has 4"):
        RankedExperts(score=Frequency(), top=5).outline(SPEC, GRIDS[:2])
    with pytest.raises(SpecError, match="Frequency"):
        ranked.decide(
            SimpleNamespace(layers=({"expert_counts": np.ones(5)},) * 3), model, GRIDS[:2]
        )


def planted_block(seed, agree):
    """Three of 8 experts are frequent, three say four times more, one has heavy tails.

    agree: whether the loud ones are the frequent ones, as PMQ's product supposes.
    """
    draws = np.random.default_rng(seed)
    frequent_E = draws.permutation(8) < 3
    loud_E = frequent_E if agree else draws.permutation(8) < 3
    block = preferring(make_block(0, routed(experts=8)), 1.5 * frequent_E)
    block = scaled(block, 1.0 + 3 * loud_E)
    up = block_weights(block)["moe.experts.up"]
    heavy = int(np.flatnonzero(loud_E)[0])
    return with_block_weights(block, {"moe.experts.up": up.at[heavy].set(8 * up[heavy] ** 3)})


@pytest.mark.parametrize(
    ("cost", "agree", "seed"),
    [
        (PMQCost(), True, 0),
        pytest.param(PMQCost(), True, 1, marks=pytest.mark.slow),
        pytest.param(PMQCost(), True, 2, marks=pytest.mark.slow),
        (RoutedError(), False, 0),
        pytest.param(RoutedError(), False, 1, marks=pytest.mark.slow),
        pytest.param(RoutedError(), False, 2, marks=pytest.mark.slow),
    ],
)
def test_bits_go_where_they_are_needed(cost, agree, seed):
    """Catches costs upside down, and a program that does no better than chance at equal bits."""
    block, x_TxD = planted_block(seed, agree), make_inputs(seed, 200)
    x_TxD[:, 0] = 1
    stats = statistics(block, x_TxD)
    y_TxD = output(block, x_TxD)
    bits_B = np.array([grid.bits for grid in GRIDS])

    def lost(choice_E):
        assert bits_B[choice_E].sum() == 16
        return np.linalg.norm(y_TxD - output(mixed(block, GRIDS, choice_E), x_TxD))

    problem = Problem(cost(0, block, stats, GRIDS), bits_B, 16, {2: 1, 1: 1})
    found = lost(IntegerProgram()(problem))
    random = np.array([lost(RandomAllocation(seed=s)(problem)) for s in range(10)])
    assert found < random.min()
    assert found < random.mean() - random.std()
    frequency = Problem(FrequencyCost()(0, block, stats, GRIDS), bits_B, 16, {2: 1, 1: 1})
    if not agree:
        assert found < lost(IntegerProgram()(frequency))
    model = with_layers(make_model(0, make_spec(routed(experts=8))), [block])
    budget = BitBudget(mean_bits=2.0, cost=cost, at_least=((3, 1), (2, 1)))
    choice_E = budget.decide(SimpleNamespace(layers=(stats,)), model, GRIDS)[0]
    np.testing.assert_array_equal(choice_E, IntegerProgram()(problem))
