"""Errors of experts on grids against replacing them one at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.methods import FullPrecision
from moejax.compress.routed_error import routed_errors, stored_sums
from moejax.core import SpecError, compat
from moejax.moe import Capacity, Dense, SlotSpec
from moejax.weights import AsymmetricGrid, SymmetricGrid
from tests.compress.tiny_moe import (
    EXPERTS,
    experts_of,
    make_block,
    make_inputs,
    numpy_output,
    output,
    preferring,
    routing,
)
from tests.evaluate.conftest import dense, routed

GRIDS = (SymmetricGrid(bits=2, group=None), FullPrecision(), AsymmetricGrid(bits=3, group=16))


def test_errors_are_those_of_one_expert_replaced_at_a_time():
    """Catches gates not squared, rows of other experts, one error for the whole bank."""
    block, x_TxD = make_block(), make_inputs()
    x_TxD[:, 0] = 1
    block = preferring(block, [2, 1, 1, 1, 1, -20.0])  # no token reaches the last expert
    found_ExB, tokens_E = routed_errors(block, x_TxD, GRIDS)
    by, exact = routing(block, x_TxD), experts_of(block)
    y = numpy_output(x_TxD, by, *exact)
    names = expert_matrices(block)
    assert names == ("moe.experts.down", "moe.experts.gate", "moe.experts.up")
    down, gate, up = (block_weights(block)[name] for name in names)
    for b, grid in enumerate(GRIDS):
        near = [np.asarray(weights.materialize(grid(w)), np.float64) for w in (gate, up, down)]
        for e in range(EXPERTS):
            one = [w.copy() for w in exact]
            for w, n in zip(one, near, strict=True):
                w[e] = n[e]
            wanted = np.linalg.norm(y - numpy_output(x_TxD, by, *one))
            assert found_ExB[e, b] == pytest.approx(wanted, rel=1e-4)
            assert (wanted == 0) == (b == 1 or e == 5)
    np.testing.assert_array_equal(tokens_E, np.bincount(by[0].ravel(), minlength=EXPERTS))


@pytest.mark.parametrize("dispatch", [Dense(), Capacity(factor=6.0)])
def test_the_dispatch_does_not_matter(dispatch):
    """Catches empty rows that count, and experts of rows taken from a dropless order."""
    layer = routed(experts=EXPERTS)
    other = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, dispatch=dispatch))
    x_TxD, grids = make_inputs(), GRIDS[:1]
    wanted_ExB, wanted_E = routed_errors(make_block(), x_TxD, grids)
    found_ExB, found_E = routed_errors(make_block(layer=other), x_TxD, grids)
    np.testing.assert_allclose(found_ExB, wanted_ExB, rtol=1e-5)
    np.testing.assert_array_equal(found_E, wanted_E)


def test_router_experts_that_share_a_stored_one_err_together():
    """Catches errors of two assignments added as if they were independent."""
    layer = routed(experts=EXPERTS)
    slots = dataclasses.replace(layer.ffn, slots=SlotSpec(stored=3))
    block, x_TxD = make_block(layer=dataclasses.replace(layer, ffn=slots)), make_inputs()
    found_ExB, tokens_E = routed_errors(block, x_TxD, GRIDS[:1])
    assert found_ExB.shape == (3, 1)
    expert_TxK = routing(block, x_TxD)[0] % 3  # dealt over the stored ones in turn
    assert (expert_TxK[:, 0] == expert_TxK[:, 1]).any()
    for e in range(3):
        changed = {}
        for name in expert_matrices(block):
            w = block_weights(block)[name]
            changed[name] = w.at[e].set(weights.materialize(GRIDS[0](w))[e])
        y_TxD = output(with_block_weights(block, changed), x_TxD)
        wanted = np.linalg.norm(output(block, x_TxD) - y_TxD)
        assert found_ExB[e, 0] == pytest.approx(wanted, rel=1e-4)
        assert tokens_E[e] == (expert_TxK == e).any(1).sum()


def test_sums_of_router_experts_go_to_their_stored_ones():
    """Catches copies that each get the whole, and slots beyond the copies."""
    layer = routed(experts=3)
    slots = dataclasses.replace(layer.ffn, slots=SlotSpec(stored=4, copies=2))
    block = compat.copied(make_block(layer=dataclasses.replace(layer, ffn=slots)))
    assert block.moe is not None
    compat.write(block.moe.slots["slot"], jnp.asarray([[0, 3], [1, 0], [1, 2]]))
    compat.write(block.moe.slots["copies"], jnp.asarray([2, 1, 1]))
    np.testing.assert_array_equal(stored_sums(block, np.array([4, 5, 6])), [2, 11, 0, 2])
    np.testing.assert_array_equal(stored_sums(make_block(), np.arange(6)), np.arange(6))


def test_what_has_no_answer_is_refused():
    """Catches a group that does not fit without the name of its matrix, and dense layers."""
    with pytest.raises(SpecError, match=r"layers\.3\.moe\.experts\.\w+"):
        routed_errors(make_block(), make_inputs(), (SymmetricGrid(bits=2, group=24),), layer=3)
    with pytest.raises(SpecError, match="no experts"):
        routed_errors(make_block(layer=dense()), make_inputs(), GRIDS)
