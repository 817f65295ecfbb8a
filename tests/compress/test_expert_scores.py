"""Scores of experts against their formulas."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from moejax.calibrate import LayerInputs
from moejax.compress.block_weights import block_weights, with_block_weights
from moejax.compress.expert_scores import (
    KurtosisScore,
    LeaveOneOut,
    OutlierScore,
    RandomScore,
    RoutedErrorScore,
)
from moejax.compress.routed_error import routed_errors
from moejax.core import SpecError
from moejax.models import select_experts
from moejax.moe import BiasedTopK, SlotSpec
from moejax.weights import SymmetricGrid
from tests.compress.tiny_moe import (
    EXPERTS,
    experts_of,
    make_block,
    make_inputs,
    numpy_output,
    output,
    routing,
)
from tests.evaluate.conftest import routed


def with_outlier(block, expert, matrix="moe.experts.up"):
    """One weight of one expert far from the rest."""
    w = block_weights(block)[matrix]
    return with_block_weights(block, {matrix: w.at[expert, 3, 5].set(20 * jnp.abs(w).max())})


def test_outliers_are_ratios_along_the_outputs_of_an_input():
    """Catches ratios along the inputs, over the whole matrix, and a mean over inputs."""
    found_E = OutlierScore()(0, make_block(), {})
    for e in range(EXPERTS):
        ratios = [np.abs(w[e]).max(1) / np.abs(w[e]).mean(1) for w in experts_of(make_block())]
        assert found_E[e] == pytest.approx(max(r.max() for r in ratios), rel=1e-5)
    assert OutlierScore()(0, with_outlier(make_block(), 4), {}).argmax() == 4


def test_kurtosis_is_that_of_each_matrix():
    """Catches excess kurtosis, second moments, and one matrix alone."""
    found_E = KurtosisScore()(0, make_block(), {})
    for e in range(EXPERTS):
        each = [
            scipy_stats.kurtosis(w[e], axis=None, fisher=False) for w in experts_of(make_block())
        ]
        assert found_E[e] == pytest.approx(np.mean(each), rel=1e-4)
    for matrix in ("moe.experts.gate", "moe.experts.down"):
        assert KurtosisScore()(0, with_outlier(make_block(), 2, matrix), {}).argmax() == 2


def test_matrices_of_zeros_have_scores():
    """Catches 0 / 0."""
    w = block_weights(make_block())["moe.experts.up"]
    block = with_block_weights(make_block(), {"moe.experts.up": w.at[1].set(0)})
    for score in (OutlierScore(), KurtosisScore()):
        assert np.isfinite(score(0, block, {})).all()


def test_leaving_one_out_is_dropping_it():
    """Catches gates that are not weighed anew, tokens that lose an expert, a column too many."""
    block, x_TxD = make_block(), make_inputs()
    found_E = LeaveOneOut()(0, block, {LayerInputs(tokens=2048).name: x_TxD})
    gate, up, down = experts_of(block)
    y_TxD = numpy_output(x_TxD, routing(block, x_TxD), gate, up, down)
    logits_TxE = x_TxD.astype(np.float64) @ np.asarray(
        block_weights(block)["moe.router.scores.kernel"], np.float64
    )
    for e in range(EXPERTS):
        others = logits_TxE.copy()
        others[:, e] = -np.inf
        expert_TxK = np.argsort(-others, axis=1, kind="stable")[:, :2]
        p_TxK = np.exp(np.take_along_axis(others, expert_TxK, 1))
        by = expert_TxK, p_TxK / p_TxK.sum(1, keepdims=True), None
        wanted = np.linalg.norm(y_TxD - numpy_output(x_TxD, by, gate, up, down))
        assert found_E[e] == pytest.approx(wanted, rel=1e-4)


def test_leaving_one_out_keeps_the_bias_of_the_others():
    """Catches a selector's state in the old order, and a bias that chooses who is gone."""
    layer = routed(experts=EXPERTS)
    router = dataclasses.replace(layer.ffn.router, selector=BiasedTopK(k=2))
    ffn = dataclasses.replace(layer.ffn, router=router, shared_width=8)
    block, x_TxD = make_block(layer=dataclasses.replace(layer, ffn=ffn)), make_inputs()
    bias = {"moe.router.selector.bias": jnp.asarray([0.9, 0.0, 0.5, 0.0, 0.1, 0.3])}
    block = with_block_weights(block, bias)
    found_E = LeaveOneOut()(0, block, {LayerInputs(tokens=2048).name: x_TxD})
    y_TxD = output(block, x_TxD)
    for e in (0, 3):
        rest = select_experts(block, [i for i in range(EXPERTS) if i != e])
        assert found_E[e] == pytest.approx(np.linalg.norm(y_TxD - output(rest, x_TxD)), rel=1e-4)


def test_none_can_be_left_out_where_all_are_chosen():
    """Catches a top-k of more than there are, and statistics of other experts than the router's."""
    slots = dataclasses.replace(routed(experts=4).ffn, slots=SlotSpec(stored=2))
    for layer, wanted in (
        (routed(experts=2), "one of 2 experts in layer 7"),
        (dataclasses.replace(routed(experts=4), ffn=slots), "behind a slot map"),
    ):
        with pytest.raises(SpecError, match=wanted):
            LeaveOneOut()(7, make_block(layer=layer), {})


def test_routed_errors_are_scores():
    """Catches a score of another grid, or of another sample."""
    grid, x_TxD = SymmetricGrid(bits=2, group=None), make_inputs()
    score = RoutedErrorScore(grid=grid, tokens=9)
    found_E = score(0, make_block(), {LayerInputs(tokens=9).name: x_TxD})
    np.testing.assert_array_equal(found_E, routed_errors(make_block(), x_TxD, (grid,))[0][:, 0])
    assert score.needs() == (LayerInputs(tokens=9),)


def test_random_scores_are_a_seed_and_a_layer():
    """Catches a control that changes from run to run, or drops the same experts everywhere."""

    def order(seed, layer):
        return tuple(RandomScore(seed=seed)(layer, make_block(), {}))

    assert order(0, 0) == order(0, 0) and len(order(0, 0)) == EXPERTS
    assert len({order(seed, layer) for seed in (0, 1) for layer in (0, 1)}) == 4
