"""Costs against their formulas, and what they say of experts without a token."""

import numpy as np
import pytest

from moejax import weights
from moejax.calibrate import ByGroup, CoActivation, ExpertCounts, LayerInputs, ProbabilityMass
from moejax.compress.block_weights import block_weights
from moejax.compress.costs import (
    Cost,
    FrequencyCost,
    MultiDomainCost,
    PMQCost,
    RoutedError,
    WeightError,
)
from moejax.compress.methods import FullPrecision
from moejax.compress.routed_error import routed_errors
from moejax.core import DataError, SpecError
from moejax.weights import AsymmetricGrid, SymmetricGrid
from tests.compress.tiny_moe import EXPERTS, make_block, make_inputs, preferring, statistics

GRIDS = (SymmetricGrid(bits=2, group=None), FullPrecision(), AsymmetricGrid(bits=3, group=16))
MATRICES = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")


@pytest.fixture(scope="module")
def block():
    return make_block()


@pytest.fixture(scope="module")
def stats(block):
    return statistics(block, make_inputs())


@pytest.fixture(scope="module")
def error_ExB(block):
    return routed_errors(block, make_inputs(), GRIDS)[0]


@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(1, 1.5, 2), (1, 1.5, 1), (0, 1, 0.5)])
def test_pmq_is_the_product_of_its_powers(block, stats, error_ExB, alpha, beta, gamma):
    """Catches exponents in each other's place, and factors that are not shares."""
    phi_E, w_E = (stats[name] / stats[name].sum() for name in ("expert_counts", "probability_mass"))
    cost = PMQCost(alpha=alpha, beta=beta, gamma=gamma)
    wanted = (phi_E**alpha * w_E**beta)[:, None] * error_ExB**gamma
    np.testing.assert_allclose(cost(0, block, stats, GRIDS), wanted, rtol=1e-6)
    assert (PMQCost().alpha, PMQCost().beta, PMQCost().gamma) == (1, 1.5, 2)


def test_the_errors_alone_are_squared(block, stats, error_ExB):
    """Catches a cost whose sums are no squared distance."""
    np.testing.assert_allclose(RoutedError()(0, block, stats, GRIDS), error_ExB**2, rtol=1e-6)


def test_an_expert_without_a_token_is_not_perfect():
    """Catches zero costs, which would give uncalibrated experts the fewest bits for certain."""
    x_TxD = make_inputs()
    x_TxD[:, 0] = 1
    block = preferring(make_block(), [2, 1, 1, 1, 1, -20.0])
    stats = statistics(block, x_TxD)
    assert stats["expert_counts"][5] == 0 < stats["expert_counts"][:5].min()
    for cost in (PMQCost(), RoutedError(), FrequencyCost()):
        found_ExB = cost(0, block, stats, (GRIDS[0], GRIDS[2]))
        assert (found_ExB[5] > 0).all()
        assert (found_ExB[5] <= found_ExB[:5].min(0)).all()
        assert found_ExB[5, 0] > found_ExB[5, 1]
    # An expert of the text that the cached inputs miss keeps its own share.
    stats["expert_counts"] = stats["expert_counts"] + np.array([0, 0, 0, 0, 0, 7])
    stats["probability_mass"] = stats["probability_mass"] + np.array([0, 0, 0, 0, 0, 2.0])
    error_ExB, tokens_E = routed_errors(block, x_TxD, GRIDS[:1])
    assert tokens_E[5] == 0
    phi, w = (stats[n][5] / stats[n].sum() for n in ("expert_counts", "probability_mass"))
    wanted = phi * w**1.5 * error_ExB[:5].min() ** 2
    assert PMQCost()(0, block, stats, GRIDS[:1])[5, 0] == pytest.approx(wanted, rel=1e-6)


def test_frequency_knows_counts_and_bits_alone(block, stats):
    """Catches a control that sees weights, and bits that do not lower it fourfold each."""
    phi_E = stats["expert_counts"] / stats["expert_counts"].sum()
    found_ExB = FrequencyCost()(0, block, {"expert_counts": stats["expert_counts"]}, GRIDS)
    np.testing.assert_allclose(found_ExB, phi_E[:, None] / [4**2, 4**16, 4**3])


def test_weight_errors_need_no_data(block):
    """Catches norms of the whole bank, and errors that are not relative."""
    wanted = np.zeros((EXPERTS, 3))
    for b, grid in enumerate(GRIDS):
        for name in MATRICES:
            w = np.asarray(block_weights(block)[name], np.float64)
            near = np.asarray(weights.materialize(grid(block_weights(block)[name])), np.float64)
            for e in range(EXPERTS):
                wanted[e, b] += ((w[e] - near[e]) ** 2).sum() / (w[e] ** 2).sum() / 3
    assert WeightError().needs(GRIDS) == ()
    np.testing.assert_allclose(WeightError()(0, block, {}, GRIDS), wanted, rtol=1e-4)


def of_domains(block, cost, *texts):
    """Statistics with each domain apart."""
    parts, x_TxD = [statistics(block, x) for x in texts], np.concatenate(texts)
    found = statistics(block, x_TxD, cost.tokens)
    for a in (ExpertCounts(), ProbabilityMass()):
        found[ByGroup(of=a, groups=cost.groups).name] = np.stack([p[a.name] for p in parts])
    return found


@pytest.mark.parametrize(("spread", "coactivation"), [(0.0, 0.0), (2.0, 0.0), (1.0, 0.5)])
def test_significance_over_domains(block, spread, coactivation):
    """Catches domains pooled by size, a spread left out, and an expert that is its own partner."""
    cost = MultiDomainCost(groups=("a", "b"), spread=spread, coactivation=coactivation)
    texts = make_inputs(1, 10) + 1, make_inputs(2, 40) - 1
    stats = of_domains(block, cost, *texts)
    s_DxE = []
    for x in texts:
        one = statistics(block, x)
        counts_E, mass_E = one["expert_counts"], one["probability_mass"]
        s_DxE.append(counts_E / counts_E.sum() * mass_E / mass_E.sum())
    base_E = np.mean(s_DxE, axis=0) + spread * np.std(s_DxE, axis=0)
    together = stats["co_activation"]
    wanted_E = base_E.copy()
    for e in range(EXPERTS):
        others = [f for f in range(EXPERTS) if f != e]
        total = sum(together[e, f] for f in others)
        if total:
            wanted_E[e] += coactivation * sum(together[e, f] * base_E[f] for f in others) / total
    positive = wanted_E[wanted_E > 0]
    wanted_E = np.where(wanted_E > 0, wanted_E, positive.min())
    error_ExB, tokens_E = routed_errors(block, np.concatenate(texts), GRIDS)
    reached = tokens_E > 0
    wanted_ExB = wanted_E[:, None] * error_ExB
    found_ExB = cost(0, block, stats, GRIDS)
    np.testing.assert_allclose(found_ExB[reached], wanted_ExB[reached], rtol=1e-6)


def test_a_domain_without_text_is_refused(block):
    """Catches a misspelt group that counts as a domain where no expert matters."""
    cost = MultiDomainCost(groups=("a", "b"))
    stats = of_domains(block, cost, make_inputs(1), make_inputs(2))
    stats[ByGroup(of=ExpertCounts(), groups=("a", "b")).name][1] = 0
    with pytest.raises(DataError, match="'b', of which no text"):
        cost(0, block, stats, GRIDS)
    with pytest.raises(SpecError, match="groups"):
        MultiDomainCost(groups=("a", "a"))


def test_costs_ask_for_what_they_read(block, stats):
    """Catches a cost that would fail only after calibration."""
    costs = (PMQCost(tokens=5), RoutedError(), FrequencyCost(), WeightError())
    for cost in (*costs, MultiDomainCost(groups=("a",), coactivation=1.0)):
        assert isinstance(cost, Cost)
        asked = {a.name for a in cost.needs(GRIDS)}
        several = isinstance(cost, MultiDomainCost)
        everything = of_domains(block, cost, make_inputs()) if several else stats
        everything = {**everything, LayerInputs(tokens=5).name: make_inputs()}
        found = cost(0, block, {n: v for n, v in everything.items() if n in asked}, GRIDS)
        assert found.shape == (EXPERTS, 3) and found.dtype == np.float64
        assert np.isfinite(found).all() and (found >= 0).all()
    assert CoActivation() not in MultiDomainCost(groups=("a",)).needs(GRIDS)
