"""SMILE's two routers against NumPy in float64, written from the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError
from moejax.moe import (
    BiLevelLoadBalance,
    BiLevelScores,
    Router,
    RouterContext,
    RouterSpec,
    SoftmaxGates,
    TopK,
)

T, D, NODES, DEVICES = 30, 6, 3, 4


@pytest.fixture(scope="module")
def routed():
    """The routing, and p_TxI, q_TxJ."""
    spec = RouterSpec(selector=TopK(k=1), gates=SoftmaxGates(), scores=BiLevelScores(nodes=NODES))
    router = Router(spec, D, NODES * DEVICES, 0.8, rngs=nnx.Rngs(0))
    x_TxD = jax.random.normal(jax.random.key(1), (T, D))
    routing = router(x_TxD, RouterContext())

    def softmax(name):
        z = np.float64(x_TxD) @ np.float64(router.scores[name].get_value())
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    return routing, softmax("node"), softmax("device"), router


def test_a_token_goes_to_its_best_device_on_its_best_node(routed):
    """Catches a sum of both probabilities, and the device chosen among all nodes' devices."""
    routing, p_TxI, q_TxJ, _ = routed
    expected = p_TxI.argmax(1) * DEVICES + q_TxJ.argmax(1)
    np.testing.assert_array_equal(routing.expert_A, expected)
    np.testing.assert_allclose(routing.gate_A, p_TxI.max(1) * q_TxJ.max(1), rtol=1e-5)


def test_both_levels_are_balanced(routed):
    """Catches a loss over experts, and the two weights or sizes swapped."""
    routing, p_TxI, q_TxJ, _ = routed
    mask_T = np.arange(T) % 5 > 0

    def balance(p):
        share = np.eye(p.shape[1])[p[mask_T].argmax(1)].mean(0)
        return p.shape[1] * (share * p[mask_T].mean(0)).sum()

    loss = BiLevelLoadBalance(nodes=NODES, weight=0.3, device_weight=0.7)
    expected = 0.3 * balance(p_TxI) + 0.7 * balance(q_TxJ)
    np.testing.assert_allclose(loss([routing], jnp.asarray(mask_T)), expected, rtol=1e-5)


def test_experts_without_scores_of_their_own_cannot_be_selected(routed):
    """Catches places within a node dropped in the name of experts."""
    *_, router = routed
    with pytest.raises(SpecError, match="BiLevelScores"):
        router.take(jnp.arange(4))
    with pytest.raises(SpecError, match="does not divide the 10"):
        BiLevelScores(nodes=NODES).init(D, 10, 0.1, jax.random.key(0))
